"""`gr4ad plan --system gpr|hstu|onerec`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.cli.train_gpr import preset_of
from gr4ad_jax.config import ConfigError, nearest
from gr4ad_jax.gpr.config import PRESETS, Config, System, presets_of
from gr4ad_jax.machine.storage import Place

CODEBOOK_SIZES = (4096, 1024, 256)  # of data that are not there yet


@dataclasses.dataclass(frozen=True)
class PlanGpr:
  """What to plan for."""

  devices: str
  """KIND-NUMBER: a TPU slice (v4, v5e, v5p, v6e) as Google names it, GPUs (a100, h100, h200, l4,
  l20), or cpu; for example v5e-16, h100-8."""
  system: System = "gpr"
  """What is to be trained: Tencent's one-model recommender, stage 1, or a baseline of its parts. An
  example is a row of a user's requests."""
  preset: Literal[tuple(PRESETS)] = "gpr-small"  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  mfu: float = 0.4
  """Share of the peak that the run is assumed to reach."""
  data: Place | None = None
  """Folder that `prepare` and `tokenize` wrote, whose sizes count."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  codebook_sizes: tuple[int, ...] = CODEBOOK_SIZES
  """Codes of each SID level, without --data."""
  config: Flat[Config] = Config()


def defaults(system: System, preset: str | None) -> PlanGpr:
  """Options where the system and the preset alone are named, as `train_gpr.defaults`."""
  named = preset_of(system, preset)
  return PlanGpr(tyro.MISSING, system, named, config=PRESETS[named])


def plan(options: PlanGpr) -> None:
  """Parameters, FLOPs, memory per device and time of a training run, before it costs anything."""
  from gr4ad_jax.gpr.plan import plan_run, plan_run_on, usual_vocabulary
  from gr4ad_jax.machine.peaks import parse_devices

  presets = presets_of(options.system)
  if options.preset not in presets:
    raise ConfigError(f"preset={options.preset!r}: {nearest(options.preset, presets)}")
  device, count = parse_devices(options.devices)
  if options.data is None:
    vocabulary = usual_vocabulary(options.codebook_sizes)
    planned = plan_run(options.config, vocabulary, device, count, mfu=options.mfu)
  elif options.codebook_sizes != CODEBOOK_SIZES:
    raise ConfigError("plan: --data has codebooks of its own; leave out --codebook-sizes")
  else:
    sids = options.sids or options.data / "sids"
    planned = plan_run_on(
      options.data, sids, options.config, device, count, mfu=options.mfu
    )
  tables.print_plan(planned, title=f"{options.preset} on {options.devices}")
