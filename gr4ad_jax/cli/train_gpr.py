"""`gr4ad train --system gpr`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError
from gr4ad_jax.gpr.config import PRESETS, Config
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place

DEFAULT_PRESET = "gpr-small"


@dataclasses.dataclass(frozen=True)
class TrainGpr:
  """What to train on, where, and how."""

  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  data: Place | None = None
  """Folder that `prepare` wrote; to be named."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  system: Literal["gpr"] = "gpr"
  """What is trained: Tencent's one-model recommender, after stage 1."""
  preset: Literal[tuple(PRESETS)] = DEFAULT_PRESET  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  config: Flat[Config] = Config()


def defaults(preset: str) -> TrainGpr:
  """Options where nothing but the preset is named."""
  return TrainGpr(tyro.MISSING, preset=preset, config=PRESETS[preset])


def train(options: TrainGpr) -> None:
  """Semantic IDs and examples -> a trained GPR in WORKDIR."""
  from gr4ad_jax.gpr.run import RunFile, train_run
  from gr4ad_jax.machine import distributed
  from gr4ad_jax.machine.memory import keep_freed_memory

  if options.data is None:
    raise ConfigError("--data is missing: the folder that `gr4ad prepare` wrote")
  keep_freed_memory()
  distributed.join()
  data, sids = (
    storage.absolute(place) for place in (options.data, options.sids or options.data / "sids")
  )
  run = RunFile(data, sids, options.config)
  state = train_run(run, options.workdir, resume=options.resume)
  if distributed.is_first():
    tables.console.print(f"trained {int(state.step):,} steps in {options.workdir}")
    tables.print_next("evaluate", "--workdir", options.workdir)
