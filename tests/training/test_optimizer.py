"""The optimizer and the step by hand, and which checkpoint is the best one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import sharding
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.metric_log import MeanMetrics
from gr4ad_jax.training.optimizer import build_optimizer, learning_rate
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params
from gr4ad_jax.training.train_step import begin_with, compile_programs, init_state

CONFIG = TrainConfig(
  num_steps=10, batch_size=4, learning_rate=0.5, warmup_share=0.1, weight_decay=0.1, clip_norm=1.0,
  data_parallel=1,
)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
  rate = learning_rate(dataclasses.replace(CONFIG, num_steps=100, learning_rate=2.0))
  np.testing.assert_allclose(
    [rate(step) for step in (0, 5, 10, 55, 100)], [0, 1, 2, (2 + 0.2) / 2, 0.2], rtol=1e-5
  )


def test_the_rate_can_stay_at_its_peak_until_it_falls_in_a_line():
  config = dataclasses.replace(CONFIG, schedule="wsd", learning_rate=2.0, decay_share=0.2)
  rate = learning_rate(dataclasses.replace(config, num_steps=100))
  np.testing.assert_allclose(
    [rate(step) for step in (0, 5, 10, 55, 80, 90, 100)], [0, 1, 2, 2, 2, (2 + 0.2) / 2, 0.2],
    rtol=1e-5,
  )
  longer = learning_rate(dataclasses.replace(config, num_steps=200, warmup_share=0.05))
  assert [rate(step) for step in range(81)] == [longer(step) for step in range(81)]
  with pytest.raises(ConfigError, match="train.decay_share=0.95: needs"):
    dataclasses.replace(config, decay_share=0.95)


def test_three_steps_of_adamw_by_hand():
  """Clipped to norm 1 before the moments; the decay moves matrices, and vectors never."""
  params = {"w": np.array([[1.0, 2], [3, 4]]), "b": np.array([1.0, -1])}
  grads = [
    {"w": np.full((2, 2), 3.0), "b": np.full(2, 4.0)},  # norm (4 * 9 + 2 * 16) ** .5
    {"w": np.array([[0.1, 0], [0, 0.2]]), "b": np.zeros(2)},
    {"w": np.zeros((2, 2)), "b": np.array([0.3, -0.1])},
  ]
  rates = [0, 0.5, 0.05 + 0.45 * (1 + np.cos(np.pi / 9)) / 2]  # a step of warm-up, nine of cosine
  expected = {name: x.copy() for name, x in params.items()}
  first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
  optimizer = build_optimizer(CONFIG)
  got = jax.tree.map(jnp.float32, params)
  state = optimizer.init(got)
  for step, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
    updates, state = optimizer.update(jax.tree.map(jnp.float32, grad), state, got)
    got = optax.apply_updates(got, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
    for name, x in expected.items():
      g = grad[name] / max(norm, 1)
      first[name] = 0.9 * first[name] + 0.1 * g
      second[name] = 0.95 * second[name] + 0.05 * g**2
      mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
      decay = 0.1 * x if name == "w" else 0
      expected[name] = x - rate * (mean / (np.sqrt(square) + 1e-8) + decay)
    for name in expected:
      np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=f"{name}, {step}")


def drawing_task() -> Task:
  """Loss w x, summed over rows; the metrics tell of the step's dropout key."""

  def loss(params, batch, key):
    drawn = 0.5 if key is None else jax.random.uniform(key)
    one = jnp.ones(())
    return {
      "loss": (jnp.sum(batch @ params["w"]), jnp.float32(len(batch))),
      "drawn": (drawn, one), "drawn_squared": (drawn**2, one),
    }

  return Task(lambda key: {"w": jnp.zeros(2)}, loss)


def steps(config: TrainConfig, count: int) -> list[dict[str, float]]:
  """Sums of the metrics of so many steps on the same batch."""
  programs = compile_programs(
    drawing_task(), config, sharding.build_mesh(data_parallel=1)
  )
  state = programs.init(jax.random.key(0))
  batch = programs.to_devices(np.float32([[1, 0], [3, 0], [0, 4], [0, 8]]))
  found = []
  for _ in range(count):
    state, metrics = programs.step(state, batch)
    found.append({name: float(total) for name, (total, _) in metrics.items()})
  return found


def test_a_step_follows_the_mean_over_the_batch_and_draws_anew():
  first, second = steps(CONFIG, 2)
  assert first["grad_norm"] == pytest.approx(np.hypot(4 / 4, 12 / 4))
  assert (first["learning_rate"], second["learning_rate"]) == (0, 0.5)
  assert first["drawn"] != second["drawn"]
  assert steps(CONFIG, 1)[0]["drawn"] == first["drawn"]
  assert steps(dataclasses.replace(CONFIG, seed=1), 1)[0]["drawn"] != first["drawn"]


def test_an_average_of_the_parameters_is_kept_and_given(tmp_path):
  """Against a loop; the second half is of a run that was stopped and goes on."""
  config, mesh = dataclasses.replace(CONFIG, ema=0.5), sharding.build_mesh(data_parallel=1)
  programs = compile_programs(drawing_task(), config, mesh)
  state = begin_with(programs.init(jax.random.key(0)), {"w": np.array([8.0, -8])})
  batch = programs.to_devices(np.float32([[1, 0], [3, 0], [0, 4], [0, 8]]))
  average = np.array([8.0, -8])
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    for step in range(12):
      state, _ = programs.step(state, batch)
      decay = min(0.5, (1 + step) / (10 + step))
      average = decay * average + (1 - decay) * np.asarray(state.params["w"])
      np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
      if step == 5:
        checkpoints.save(state, data_iterator={}, validation=None)
        checkpoints.wait()
        state, _ = checkpoints.restore_newest(programs.abstract)
  given, _ = read_params(drawing_task(), config, tmp_path)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    kept, _ = checkpoints.restore_newest(programs.abstract)
  np.testing.assert_array_equal(given["w"], kept.ema["w"])
  assert abs(given["w"] - kept.params["w"]).max() > 1e-3
  # Without an average a checkpoint is what earlier versions wrote.
  plain = init_state(drawing_task(), CONFIG, jax.random.key(0))
  with Checkpoints(tmp_path / "plain") as checkpoints:
    checkpoints.save(plain, data_iterator={}, validation=None)
  parts = {"step": plain.step, "params": plain.params, "optimizer": plain.optimizer}
  with ocp.training.Checkpointer(tmp_path / "plain") as plainly:
    assert plainly.load(0, parts)["params"]["w"].tolist() == [0, 0]
    with pytest.raises(Exception, match="ema"):  # a part more or less is noticed
      plainly.load(0, parts | {"ema": plain.params})


def test_parts_of_a_batch_draw_for_themselves():
  (found,) = steps(dataclasses.replace(CONFIG, accumulate=2), 1)
  assert found["grad_norm"] == pytest.approx(np.hypot(4 / 4, 12 / 4))
  # Two equal numbers have the smallest squares of all that sum to the same.
  assert found["drawn_squared"] > found["drawn"] ** 2 / 2 + 1e-4


def test_means_are_of_all_that_was_counted_and_begin_anew():
  means = MeanMetrics()
  for total, count in ((6.0, 2.0), (1.0, 1.0), (0.0, 0.0)):
    means.add({"x": (total, count), "none": (0.0, 0.0)})
  found = means.means()
  assert found["x"] == pytest.approx(7 / 3) and np.isnan(found["none"])
  means.add({"x": (5.0, 1.0)})
  assert means.means() == {"x": 5}


def test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_kept(tmp_path):
  """The latest of equal ones."""
  task = drawing_task()
  state = init_state(task, CONFIG, jax.random.key(0))
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    for step, loss in enumerate((1.0, 1.0, 2.0, 4.0, None), 1):
      now = state._replace(step=jnp.int32(step), params={"w": jnp.full(2, float(step))})
      checkpoints.save(now, data_iterator={"at": step}, validation=loss and {"loss": loss})
    checkpoints.wait()
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 5)
  best, step = read_params(task, CONFIG, tmp_path)
  assert step == 2 and best["w"].tolist() == [2, 2]
  newest, step = read_params(task, CONFIG, tmp_path, newest=True)
  assert step == 5 and newest["w"].tolist() == [5, 5]
