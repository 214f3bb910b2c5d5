"""How long a final fit lasts, on training and validation examples together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gr4ad_jax.machine import distributed
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.config import TrainConfig


def refit_config(
  config: TrainConfig, *, tuned: Place, step: int, counts: Mapping[str, Mapping[str, int]]
) -> TrainConfig:
  """The settings of a tuned run, for as many passes through the examples as were best there.

  Args:
    config: of the tuned run.
    tuned: its folder, for the message.
    step: where it was best.
    counts: split -> "examples" -> how many.
  """
  learned, added = (counts[split]["examples"] for split in ("train", "validation"))
  num_steps = max(1, round(step * (learned + added) / learned))
  if distributed.is_first():
    console.print(
      f"{tuned}: step {step:,} is its best; {num_steps:,} steps with {added:,} examples of "
      f"validation beside {learned:,} of training"
    )
  return dataclasses.replace(config, num_steps=num_steps, best_by="loss", patience=0)
