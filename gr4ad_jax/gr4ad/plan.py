"""What a GR4AD run will need, before anything is started: `gr4ad plan`."""

from __future__ import annotations

import numpy as np

from gr4ad_jax.gr4ad.batch import Batch, Vocabulary, random_context, random_vocabulary
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import Config, DataShape
from gr4ad_jax.gr4ad.cost import train_flops
from gr4ad_jax.gr4ad.run import RunFile, context_tokens, open_inputs
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.peaks import Device
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training import plan
from gr4ad_jax.training.plan import Plan


def plan_run(
  config: Config,
  shape: DataShape,
  device: Device,
  num_devices: int,
  *,
  mfu: float = 0.4,
  vocabulary: Vocabulary | None = None,
) -> Plan:
  """Plans a run with these settings on data of this shape; see `training.plan.plan_run`.

  `vocabulary` is that of data which are there; None = as a small run has it.
  """
  if vocabulary is None:
    num_ads = config.model.item_scorer * shape.num_ads
    vocabulary = random_vocabulary(shape.codebook_sizes, num_ads=num_ads)
  context = random_context(
    vocabulary, 1, shape.context_tokens,
    shortlist=(config.model.copied_ads, config.model.copied_numbers),
  )
  if config.model.id_rows:
    context = context._replace(user_id_B=np.zeros(1, np.int32), ad_id_BT=context.ad_count_BT)
  example = Batch(
    context, np.zeros((1, shape.max_targets, vocabulary.num_levels), np.int32),
    np.zeros((1, shape.max_targets), np.int32), np.ones((1, shape.max_targets), np.float32),
  )
  return plan.plan_run(
    vsl_task(build_decoder(config.model, vocabulary), config.loss), config.train, example,
    example_flops=train_flops(
      config.model, vocabulary, context_tokens=shape.context_tokens, targets=shape.max_targets
    ),
    device=device, num_devices=num_devices, mfu=mfu,
  )


def plan_run_on(
  data: Place, sids: Place, config: Config, device: Device, num_devices: int, *, mfu: float = 0.4
) -> Plan:
  """Plans a run on prepared data; errors as `open_inputs`, too."""
  inputs = open_inputs(RunFile(storage.absolute(data), storage.absolute(sids), config))
  shape = DataShape(
    inputs.vocabulary.codebook_sizes, context_tokens(inputs),
    inputs.make_batch.sequence.max_targets,
  )
  return plan_run(config, shape, device, num_devices, mfu=mfu, vocabulary=inputs.vocabulary)
