"""The table of ids: row-wise Adagrad by hand, its layout, and a run from logs to evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gr4ad_jax.data.pipeline import hash_ids
from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import Config, DataShape, LossConfig, ModelConfig
from gr4ad_jax.gr4ad.cost import num_params, num_table_params
from gr4ad_jax.gr4ad.layouts import SPARSE_TABLES
from gr4ad_jax.gr4ad.plan import plan_run
from gr4ad_jax.gr4ad.run import RunFile, open_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.machine import sharding
from gr4ad_jax.machine.peaks import DEVICES
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.optimizer import build_optimizer, scale_by_row_adagrad
from gr4ad_jax.training.task import count_params
from gr4ad_jax.training.train_step import compile_programs
from tests.support import VOCABULARY, moved, random_codes, random_context

ROWS = 8 * 1024
MODEL = ModelConfig(
  width=32, num_heads=2, num_layers=1, num_lazy_layers=0, id_rows=ROWS, id_width=16
)
TRAIN = TrainConfig(num_steps=3, batch_size=8, table_learning_rate=0.1, warmup_share=0.0)


def test_row_adagrad_by_hand():
  """Row 0 gets mean squares 12.5 and then 0.5 more; row 1 is never touched."""
  optimizer = scale_by_row_adagrad(eps=0.0)
  table = {"t": jnp.zeros((2, 2))}
  state = optimizer.init(table)
  first, state = optimizer.update({"t": jnp.array([[3.0, 4.0], [0.0, 0.0]])}, state)
  np.testing.assert_allclose(first["t"][0], [3 / 12.5**0.5, 4 / 12.5**0.5], rtol=1e-6)
  second, state = optimizer.update({"t": jnp.array([[1.0, 0.0], [0.0, 0.0]])}, state)
  np.testing.assert_allclose(second["t"][0], [1 / 13**0.5, 0], rtol=1e-6)
  np.testing.assert_allclose(state.sum_of_squares["t"], [[13.0], [0.0]])


def batch() -> Batch:
  rng = np.random.default_rng(0)
  context = random_context(rng, 8)._replace(
    user_id_B=rng.integers(0, 2**31 - 1, 8).astype(np.int32),
    ad_id_BT=rng.integers(-1, 2**31 - 1, (8, 5)).astype(np.int32),
  )
  return Batch(
    context, random_codes(rng, 8, 2).astype(np.int32), np.zeros((8, 2), np.int32),
    np.ones((8, 2), np.float32),
  )


def stepped(shape):
  """Losses of two steps, the first and last table, the state, and the program."""
  mesh = sharding.build_mesh(data_parallel=shape[0], fsdp=shape[1], tensor=shape[2])
  task = vsl_task(build_decoder(MODEL, VOCABULARY), LossConfig())
  programs = compile_programs(task, TRAIN, mesh)
  state = programs.init(jax.random.key(0))
  first = np.asarray(state.params["context_processor"]["ids"]["table"])
  on_device = programs.to_devices(batch())
  program = programs.step.lower(state, on_device).compile()
  losses = []
  for _ in range(2):
    state, metrics = program(state, on_device, *programs.step.last)
    losses.append(float(metrics["loss"][0]))
  return losses, first, state, program.as_text()


@pytest.fixture(scope="module")
def single():
  return stepped((1, 1, 1))


def test_only_rows_of_the_batch_change(single):
  losses, first, state, _ = single
  last = np.asarray(state.params["context_processor"]["ids"]["table"])
  hashes = np.concatenate([batch().context.user_id_B, batch().context.ad_id_BT.ravel()])
  touched = np.unique(hashes[hashes >= 0] % ROWS)
  np.testing.assert_array_equal(np.flatnonzero((last != first).any(axis=1)), touched)
  assert losses[1] < losses[0]


def test_the_table_is_split_over_all_devices_and_never_gathered(single):
  losses, _, state, program = stepped((2, 2, 2))
  np.testing.assert_allclose(losses, single[0], rtol=2e-5)
  table = state.params["context_processor"]["ids"]["table"]
  assert table.sharding.shard_shape(table.shape) == (ROWS // 4, 16)
  held = [
    leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
    if "ids" in str(path) and leaf.ndim == 2 and leaf.shape[0] == ROWS
  ]
  assert [leaf.shape for leaf in held] == [(ROWS, 1)]  # one number a row, no moments
  assert held[0].sharding.shard_shape((ROWS, 1)) == (ROWS // 4, 1)
  found = moved(program)
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    for shape in found.get(kind, []):
      assert shape[:1] not in ((ROWS,), (ROWS // 2,)), (kind, shape)


def test_parameters_are_counted():
  params = jax.eval_shape(vsl_task(build_decoder(MODEL, VOCABULARY), LossConfig()).init,
                          jax.random.key(0))
  assert num_params(MODEL, VOCABULARY) == count_params(params)
  without = dataclasses.replace(MODEL, id_rows=0)
  assert num_table_params(MODEL, VOCABULARY) - num_table_params(without, VOCABULARY) == ROWS * 16


def test_a_hundred_million_rows_are_planned():
  """100M x 16 float32 and a number a row: 6.8 GB, split over 16 chips, with AdamW 19.2 GB."""
  model = dataclasses.replace(MODEL, id_rows=100_000_000)
  bytes_of = {}
  for rate in (0.0, 0.05):
    train = dataclasses.replace(TRAIN, table_learning_rate=rate, fsdp=16, batch_size=16)
    planned = plan_run(Config(model=model, train=train), DataShape(), DEVICES["v5e"], 16)
    bytes_of[rate] = planned.params_bytes + planned.optimizer_bytes
  assert bytes_of[0.05] == pytest.approx(6.8e9 / 16, rel=0.02)
  assert bytes_of[0.0] == pytest.approx(19.2e9 / 16, rel=0.02)


def test_without_a_rate_of_its_own_everything_is_adamw():
  params = {"ids": {"table": jnp.ones((4, 2))}, "w": jnp.ones((2, 2))}
  grads = jax.tree.map(lambda p: 0.1 * p, params)
  config = dataclasses.replace(TRAIN, table_learning_rate=0.0)
  optimizer = build_optimizer(config, SPARSE_TABLES)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates["ids"]["table"][0], updates["w"][0])
  own = build_optimizer(TRAIN, SPARSE_TABLES)
  updates, _ = own.update(grads, own.init(params), params)
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new["ids"]["table"], 0.9, rtol=1e-5)  # rate 0.1, no decay


def test_hashes_depend_on_the_id_alone():
  assert hash_ids(np.array(["a", "b"], object)).tolist() == hash_ids(
    np.array(["x", "a", "b"], object)).tolist()[1:]
  assert hash_ids(np.array(["a", "b"], object)).min() >= 0


def test_a_run_with_ids_from_logs_to_recommendations(tiny_data, tmp_path):
  config = Config(
    model=MODEL, search=SearchConfig(widths=(8, 16, 32)),
    train=dataclasses.replace(
      TRAIN, batch_size=16, data_parallel=1, eval_batches=1, log_every=1, checkpoint_every=2
    ),
  )
  run_file = RunFile(str(tiny_data), str(tiny_data / "sids"), config)
  train_run(run_file, tmp_path / "run")
  state = train_run(run_file, tmp_path / "run", resume=True)
  opened = open_run(tmp_path / "run")
  assert (opened.step, opened.num_params) == (3, count_params(state.params))
  context = opened.contexts.context([first_test_example(opened)])
  assert context.ad_id_BT.shape == context.ad_count_BT.shape
  assert opened.recommender()(context, 5).ad_RK.shape == (1, 5)


def first_test_example(opened):
  from gr4ad_jax.data.example_records import to_example

  return to_example(opened.examples.sources["test"][0], 2)
