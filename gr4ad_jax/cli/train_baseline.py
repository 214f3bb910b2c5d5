"""`gr4ad train --system sasrec|two_tower`: trained baselines."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.sequential.config import SasrecConfig, TwoTowerConfig


@dataclasses.dataclass(frozen=True)
class TrainSasrec:
  """What to train on, where, and how."""

  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  data: Place
  """Folder that `prepare` wrote; semantic IDs are not asked for."""
  system: Literal["sasrec"] = "sasrec"
  """Self-attention over the history, a softmax over all ads."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  config: Flat[SasrecConfig] = SasrecConfig()


@dataclasses.dataclass(frozen=True)
class TrainTwoTower:
  """What to train on, where, and how."""

  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  data: Place
  """Folder that `prepare` wrote; semantic IDs are not asked for."""
  system: Literal["two_tower"] = "two_tower"
  """A vector of the request, a vector of the ad."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  config: Flat[TwoTowerConfig] = TwoTowerConfig()


TrainBaseline = TrainSasrec | TrainTwoTower
OF_SYSTEM: dict[str, type[TrainBaseline]] = {"sasrec": TrainSasrec, "two_tower": TrainTwoTower}


def train(options: TrainBaseline) -> None:
  """Examples -> a trained baseline in WORKDIR."""
  from gr4ad_jax.machine import distributed
  from gr4ad_jax.sequential.run import SasrecRun, TwoTowerRun, train_baseline

  distributed.join()
  data = storage.absolute(options.data)
  match options:
    case TrainSasrec():
      run = SasrecRun(data, options.config)
    case TrainTwoTower():
      run = TwoTowerRun(data, options.config)
  state = train_baseline(run, options.workdir, resume=options.resume)
  if distributed.is_first():
    tables.console.print(f"trained {int(state.step):,} steps in {options.workdir}")
    tables.print_next("evaluate", "--workdir", options.workdir)
