"""What a run of GPR will need, before anything is started: `gr4ad plan --system gpr`."""

from __future__ import annotations

import numpy as np

from gr4ad_jax.gpr.batch import NUM_HOURS, NUM_WEEKDAYS, Batch, Context, Vocabulary
from gr4ad_jax.gpr.config import Config
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.mtp import mtp_task
from gr4ad_jax.gpr.run import RunFile, open_inputs
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.peaks import Device
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training import plan
from gr4ad_jax.training.flops import example_flops
from gr4ad_jax.training.plan import Plan


def usual_vocabulary(codebook_sizes: tuple[int, ...]) -> Vocabulary:
  """Sizes of data that are not there yet: two features of users, one of requests."""
  return Vocabulary(codebook_sizes, (8, 8), (8, NUM_HOURS, NUM_WEEKDAYS))


def full_row(config: Config, vocabulary: Vocabulary) -> Batch:
  """A batch of one row without padding: zeros of its shapes."""
  stream, levels, heads = config.stream, vocabulary.num_levels, config.model.predictions
  groups, labels, bundled = stream.groups, stream.labels, stream.groups * stream.bundle
  words = -(-max(vocabulary.codebook_sizes) // 32)

  def zeros(*shape: int) -> np.ndarray:
    return np.zeros((1, *shape), np.int32)

  return Batch(
    Context(
      zeros(len(vocabulary.user_sizes)), zeros(groups, len(vocabulary.request_sizes)),
      zeros(groups), zeros(groups), zeros(groups), zeros(groups), zeros(bundled, levels),
      zeros(bundled), zeros(bundled, levels),
    ),
    zeros(labels), zeros(labels, heads, levels),
    np.zeros((1, labels, heads, levels, words), np.uint32), np.zeros((1, labels), np.float32),
  )


def plan_run(
  config: Config, vocabulary: Vocabulary, device: Device, num_devices: int, *, mfu: float = 0.4
) -> Plan:
  """Plans stage 1 with these settings; see `training.plan.plan_run`. An example is a row."""
  task, row = mtp_task(Gpr(config.model, vocabulary), config.loss), full_row(config, vocabulary)
  return plan.plan_run(
    task, config.train, row, example_flops=example_flops(task, row), device=device,
    num_devices=num_devices, mfu=mfu,
  )


def plan_run_on(
  data: Place, sids: Place, config: Config, device: Device, num_devices: int, *, mfu: float = 0.4
) -> Plan:
  """Plans a run on prepared data; errors as `open_inputs`, too."""
  inputs = open_inputs(RunFile(storage.absolute(data), storage.absolute(sids), config))
  return plan_run(config, inputs.make_batch.vocabulary, device, num_devices, mfu=mfu)
