"""Training: meshes agree, a killed run resumes to the same bits, divergence stops with advice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gr4ad_jax import sharding
from gr4ad_jax.config import Config, ConfigError, ModelConfig, SearchConfig, TrainConfig
from gr4ad_jax.data.pipeline import train_batches
from gr4ad_jax.learning.vsl_task import vsl_task
from gr4ad_jax.model.build import build_decoder
from gr4ad_jax.run import RunFile, load_params, open_inputs, train_run
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.train_loop import DivergedError
from gr4ad_jax.training.train_step import abstract_state, compile_init, compile_train_step

CONFIG = Config(
  model=ModelConfig(
    width=32, num_heads=2, num_layers=2, num_lazy_layers=1, copy_path=True, dropout=0.1
  ),
  train=TrainConfig(
    num_steps=14, batch_size=16, learning_rate=3e-3, log_every=1, eval_every=7, eval_batches=2,
    checkpoint_every=4, data_parallel=1,
  ),
  search=SearchConfig(widths=(8, 16, 32)),
)


def run_of(tiny_data: Path, **train) -> RunFile:
  config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train))
  return RunFile(str(tiny_data), str(tiny_data / "sids"), config)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return train_run(run_of(tiny_data), workdir), workdir


def assert_same_bits(a, b) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("at_step", [5, 9])
def test_killed_run_resumes_to_the_same_bits(finished, tiny_data, tmp_path, at_step):
  """SIGKILL lands wherever it lands after `at_step`: between steps, or inside a checkpoint."""
  workdir = tmp_path / "run"
  run = run_of(tiny_data)
  script = (
    "from pathlib import Path\n"
    "from gr4ad_jax.config import from_dict\n"
    "from gr4ad_jax.run import RunFile, train_run\n"
    "import json, sys\n"
    "train_run(from_dict(RunFile, json.loads(sys.argv[1])), Path(sys.argv[2]))\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", script, json.dumps(dataclasses.asdict(run)), str(workdir)],
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    cwd=Path(__file__).resolve().parents[2], env=os.environ,
  )
  deadline = time.monotonic() + 240
  while not any(row["step"] >= at_step for row in read_log(workdir)):
    assert time.monotonic() < deadline, "the run is too slow to be killed"
    if process.poll() is not None:
      pytest.fail(f"the run ended by itself: {process.stderr.read()[-2000:]}")
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.latest_step is None or checkpoints.latest_step < 14
  state = train_run(run, workdir, resume=True)
  assert_same_bits(state, finished[0])
  # The log reads as if nothing had happened: the same steps, each once, with the same losses.
  rows, expected = read_log(workdir), read_log(finished[1])
  assert [(r["step"], r["kind"], r["loss"]) for r in rows] == [
    (r["step"], r["kind"], r["loss"]) for r in expected
  ]


def test_finished_run_is_kept_and_best_checkpoint_is_readable(finished, tiny_data):
  state, workdir = finished
  assert_same_bits(train_run(run_of(tiny_data), workdir, resume=True), state)
  steps = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
  losses = {r["step"]: r["loss"] for r in read_log(workdir) if r["kind"] == "validation"}
  best = min(losses, key=losses.get)
  assert 14 in steps and best in steps and len(steps) <= 3
  run = run_of(tiny_data)
  _, params, step = load_params(run, workdir, open_inputs(run).vocabulary)
  assert step == best
  if best == 14:
    assert_same_bits(params, state.params)
  assert list((workdir / "tb").glob("events*"))


def test_validation_loss_falls(finished):
  losses = [r["loss"] for r in read_log(finished[1]) if r["kind"] == "train"]
  assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])


def test_a_taken_folder_or_other_settings_are_refused(finished, tiny_data):
  with pytest.raises(ConfigError, match="--resume"):
    train_run(run_of(tiny_data), finished[1])
  with pytest.raises(ConfigError, match="learning_rate: 0.003 -> 0.1"):
    train_run(run_of(tiny_data, learning_rate=0.1), finished[1], resume=True)
  with pytest.raises(ConfigError, match="devices"):
    train_run(run_of(tiny_data, batch_size=15, data_parallel=2), finished[1].parent / "new")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny_data, tmp_path):
  run = run_of(tiny_data, learning_rate=1e4, clip_norm=1e9, warmup_share=0.9, checkpoint_every=1)
  with pytest.raises(DivergedError, match="learning_rate"):
    train_run(run, tmp_path / "run")
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    latest = checkpoints.latest_step
  if latest is not None:
    assert all(
      np.isfinite(r["loss"]) for r in read_log(tmp_path / "run") if r["step"] <= latest
    )


def test_every_mesh_gives_the_same_losses(tiny_data):
  run = run_of(tiny_data)
  inputs = open_inputs(run)
  model = dataclasses.replace(CONFIG.model, dropout=0.0)
  task = vsl_task(build_decoder(model, inputs.vocabulary), run.config.loss)
  losses = {}
  for shape in ((1, 1), (8, 1), (4, 2)):
    mesh = sharding.build_mesh(data_parallel=shape[0], fsdp=shape[1])
    abstract = abstract_state(task, CONFIG.train, mesh)
    state = compile_init(task, CONFIG.train, abstract)(jax.random.key(0))
    step = compile_train_step(task, CONFIG.train, mesh, abstract)
    batches = train_batches(
      inputs.examples.sources["train"], inputs.make_batch, batch_size=16, seed=0
    )
    losses[shape] = []
    for _ in range(2):
      state, metrics = step(state, sharding.global_batch(mesh)(next(batches)))
      losses[shape].append(float(metrics["loss"][0] / metrics["loss"][1]))
    if shape == (4, 2):  # parameters and optimizer state really are split
      kernel = state.params["layers_0"]["feed_forward"]["in"]["kernel"]
      assert kernel.addressable_shards[0].data.size * 2 == kernel.size
  np.testing.assert_allclose(losses[8, 1], losses[1, 1], rtol=2e-5)
  np.testing.assert_allclose(losses[4, 2], losses[1, 1], rtol=2e-5)


def test_more_devices_than_there_are():
  with pytest.raises(ValueError, match="devices"):
    sharding.build_mesh(data_parallel=5, fsdp=2)
