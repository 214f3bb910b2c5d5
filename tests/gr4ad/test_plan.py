"""Planned sizes against those of the compiled program on simulated devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.gr4ad.batch import Batch, random_context, random_vocabulary
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import DataShape, preset
from gr4ad_jax.gr4ad.plan import plan_run
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.machine.peaks import DEVICES, Device, measured_rate, parse_devices, peak_flops
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.train_step import compile_programs

SHAPE = DataShape(codebook_sizes=(256, 64, 64), context_tokens=40, max_targets=2)
ONE = Device(1e12, 1e9, float("inf"))
ON_MESH = override_all(
  preset("tiny"),
  {"train.fsdp": 2, "train.tensor": 2, "train.batch_size": 64, "train.ema": 0.9},
)


def test_memory_is_that_of_the_compiled_step():
  planned = plan_run(ON_MESH, SHAPE, ONE, 8)
  mesh = training_mesh(ON_MESH.train)
  vocabulary = random_vocabulary(SHAPE.codebook_sizes)
  task = vsl_task(build_decoder(ON_MESH.model, vocabulary), ON_MESH.loss)
  batch = Batch(
    random_context(vocabulary, 64, SHAPE.context_tokens), np.zeros((64, 2, 3), np.int32),
    np.zeros((64, 2), np.int32), np.ones((64, 2), np.float32),
  )
  programs = compile_programs(task, ON_MESH.train, mesh)
  memory = programs.step.lower(programs.abstract, batch).compile().memory_analysis()
  of_batch = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) / 4  # data x fsdp
  seed_and_step = 8
  held = planned.params_bytes + planned.optimizer_bytes + of_batch + seed_and_step
  assert memory.argument_size_in_bytes == pytest.approx(held, rel=0.01)
  # At most what is planned; XLA on CPU keeps more copies of gradients than of activations.
  assert memory.temp_size_in_bytes < planned.activations_bytes + 4 * planned.gradients_bytes
  assert planned.mesh == (2, 2, 2)


def test_fsdp_splits_what_layers_keep():
  whole, split = (
    plan_run(override_all(preset("0.16b"), {"train.fsdp": fsdp}), DataShape(), ONE, 16)
    for fsdp in (1, 16)
  )
  # All but the rows of tables.
  tables = 4 * 1024 * (4096 + 1024 + 256 + 8192)
  assert split.params_bytes == pytest.approx((whole.params_bytes - tables) / 16 + tables, rel=0.01)
  assert split.activations_bytes == whole.activations_bytes  # rows are split over both axes
  assert whole.num_params == split.num_params == whole.params_bytes / 4


@pytest.mark.parametrize("changes", [{"model.remat": "all"}, {"train.accumulate": 4}], ids=str)
def test_activations_can_be_traded_for_time(changes):
  before = plan_run(preset("tiny"), SHAPE, ONE, 8)
  after = plan_run(override_all(preset("tiny"), changes), SHAPE, ONE, 8)
  assert after.activations_bytes < 0.6 * before.activations_bytes
  assert after.flops_per_step == before.flops_per_step


def test_time_follows_from_the_peak():
  planned = plan_run(preset("tiny"), SHAPE, ONE, 4, mfu=0.25)
  assert planned.step_s == pytest.approx(planned.flops_per_example * 32 / 1e12)
  assert planned.run_s == pytest.approx(200 * planned.step_s)
  assert planned.examples_per_s == pytest.approx(32 / planned.step_s)
  slow = dataclasses.replace(ONE, bytes_per_s=1e6)
  assert plan_run(preset("tiny"), SHAPE, slow, 4).step_s > planned.needed_bytes / 1e6
  small = dataclasses.replace(ONE, memory_bytes=1e6)
  assert planned.fits and not plan_run(preset("tiny"), SHAPE, small, 4).fits


@pytest.mark.parametrize("text, kind, count", [
  ("v5e-16", "v5e", 16), ("v5litepod-4", "v5e", 4), ("v5p-8", "v5p", 4), ("H100-8", "h100", 8),
])  # fmt: skip
def test_slices_are_read_by_their_names(text, kind, count):
  assert parse_devices(text) == (DEVICES[kind], count)


@pytest.mark.parametrize("text", ["v5e", "v9-8", "h100-0", "v4-3", ""])
def test_unknown_devices_are_refused(text):
  with pytest.raises(ConfigError, match="v5e-16 or h100-8"):
    parse_devices(text)


@pytest.mark.parametrize("changes, devices, words", [
  ({"train.fsdp": 3}, 8, "do not fill 8 devices"), ({"train.batch_size": 12}, 8, "multiple of 8"),
])  # fmt: skip
def test_meshes_that_do_not_fit_are_refused(changes, devices, words):
  with pytest.raises(ConfigError, match=words):
    plan_run(override_all(preset("tiny"), changes), SHAPE, ONE, devices)


def test_peaks_of_accelerators_are_known_and_of_cpus_measured():
  @dataclasses.dataclass
  class Fake:
    device_kind: str
    platform: str = "gpu"

  assert peak_flops([Fake("NVIDIA H100 80GB HBM3")] * 2, "bfloat16") == 2 * 989e12
  assert peak_flops([Fake("TPU v5 lite", "tpu")] * 4, "bfloat16") == 4 * 197e12
  assert peak_flops([Fake("NVIDIA L4")], "bfloat16") == 121e12
  for unknown in ("NVIDIA L40S", "something new"):
    assert math.isnan(peak_flops([Fake(unknown)], "bfloat16"))
  # Simulated devices share one host.
  assert peak_flops(jax.devices(), "float32") == pytest.approx(measured_rate("float32"), rel=2)
