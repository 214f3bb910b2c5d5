"""`gr4ad train --system sasrec|two_tower`: trained baselines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.sequential.config import SasrecConfig, TwoTowerConfig

if TYPE_CHECKING:
  from gr4ad_jax.sequential.run import Run


@dataclasses.dataclass(frozen=True)
class _Train:
  """What to train on, where, and how."""

  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  data: Place | None = None
  """Folder that `prepare` wrote; to be named, but with --refit. Semantic IDs are not asked for."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  refit: Place | None = None
  """Folder of a tuned run of this system: the same settings, on training and validation requests
  together, for as many passes as were best there."""


@dataclasses.dataclass(frozen=True)
class TrainSasrec(_Train):
  """What to train on, where, and how."""

  system: Literal["sasrec"] = "sasrec"
  """Self-attention over the history, a softmax over all ads."""
  config: Flat[SasrecConfig] = SasrecConfig()


@dataclasses.dataclass(frozen=True)
class TrainTwoTower(_Train):
  """What to train on, where, and how."""

  system: Literal["two_tower"] = "two_tower"
  """A vector of the request, a vector of the ad."""
  config: Flat[TwoTowerConfig] = TwoTowerConfig()


TrainBaseline = TrainSasrec | TrainTwoTower
OF_SYSTEM: dict[str, type[TrainBaseline]] = {"sasrec": TrainSasrec, "two_tower": TrainTwoTower}


def train(options: TrainBaseline) -> None:
  """Examples -> a trained baseline in WORKDIR."""
  from gr4ad_jax.machine import distributed
  from gr4ad_jax.sequential.run import train_baseline

  distributed.join()
  state = train_baseline(_run_of(options), options.workdir, resume=options.resume)
  if distributed.is_first():
    tables.console.print(f"trained {int(state.step):,} steps in {options.workdir}")
    tables.print_next("evaluate", "--workdir", options.workdir)


def _run_of(options: TrainBaseline) -> Run:
  """What the options ask for.

  Raises:
    ConfigError: no data, settings beside --refit, or a tuned run of another system.
  """
  from gr4ad_jax.sequential.run import SasrecRun, TwoTowerRun, refit_of
  from gr4ad_jax.training.run_folder import require_system

  if options.refit is not None:
    if options.config != type(options.config)():
      raise ConfigError("--refit: settings are those of the tuned run")
    require_system(options.refit, options.system)
    return refit_of(options.refit, data=options.data)
  if options.data is None:
    raise ConfigError("--data is missing: the folder that `gr4ad prepare` wrote")
  data = storage.absolute(options.data)
  match options:
    case TrainSasrec():
      return SasrecRun(data, options.config)
    case TrainTwoTower():
      return TwoTowerRun(data, options.config)
