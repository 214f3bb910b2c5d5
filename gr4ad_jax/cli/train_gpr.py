"""`gr4ad train --system gpr|hstu|onerec`: GPR, and the baselines that are made of its parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import tyro

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError
from gr4ad_jax.gpr.config import PRESETS, Config, presets_of
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place

if TYPE_CHECKING:
  from gr4ad_jax.gpr.run import RunFile


@dataclasses.dataclass(frozen=True)
class _Train:
  """What to train on, where, and how."""

  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  data: Place | None = None
  """Folder that `prepare` wrote; to be named, but with --start, whose data are the default."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids, or with --start those of that run."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  start: Place | None = None
  """Folder of a trained run to begin with, of the same model and data; stages after the first need
  one."""
  reward: Place | None = None
  """Folder of a reward model (`gr4ad reward`), which prices the candidates of stage 3."""
  market: Place | None = None
  """Folder with the market.json of the market that the data are a log of; its truth prices the
  candidates instead."""
  thoughts: Place | None = None
  """Parquet file of what a language model, for example, thinks of users: user_id, timestamp, and
  text or embedding. A request sees those that are older than it. With --start a run has those of
  that run."""


@dataclasses.dataclass(frozen=True)
class TrainGpr(_Train):
  """What to train on, where, and how."""

  system: Literal["gpr"] = "gpr"
  """What is trained: Tencent's one-model recommender."""
  preset: Literal[presets_of("gpr")] = "gpr-small"  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  config: Flat[Config] = PRESETS["gpr-small"]


@dataclasses.dataclass(frozen=True)
class TrainHstu(_Train):
  """What to train on, where, and how."""

  system: Literal["hstu"] = "hstu"
  """What is trained: GPR's base without GPR's parts, a baseline."""
  preset: Literal[presets_of("hstu")] = "hstu-small"  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  config: Flat[Config] = PRESETS["hstu-small"]


@dataclasses.dataclass(frozen=True)
class TrainOnerec(_Train):
  """What to train on, where, and how."""

  system: Literal["onerec"] = "onerec"
  """What is trained: an encoder and a decoder as OneRec's, a baseline."""
  preset: Literal[presets_of("onerec")] = "onerec-small"  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  config: Flat[Config] = PRESETS["onerec-small"]


Train = TrainGpr | TrainHstu | TrainOnerec
OF_SYSTEM: dict[str, type[Train]] = {"gpr": TrainGpr, "hstu": TrainHstu, "onerec": TrainOnerec}


def defaults(system: str, preset: str | None) -> Train:
  """Options where the system and the preset alone are named."""
  named = preset_of(system, preset)
  return OF_SYSTEM[system](tyro.MISSING, preset=named, config=PRESETS[named])


def preset_of(system: str, preset: str | None) -> str:
  """The preset where it is one of the system's, else its "small" one."""
  return preset if preset in presets_of(system) else f"{system}-small"


def train(options: Train) -> None:
  """Semantic IDs and examples -> a trained GPR, or its base, in WORKDIR."""
  from gr4ad_jax.gpr.run import train_run
  from gr4ad_jax.machine import distributed
  from gr4ad_jax.machine.memory import keep_freed_memory

  run = _run_of(options)
  keep_freed_memory()
  distributed.join()
  state = train_run(run, options.workdir, resume=options.resume)
  if distributed.is_first():
    tables.console.print(f"trained {int(state.step):,} steps in {options.workdir}")
    tables.print_next("evaluate", "--workdir", options.workdir)


def _run_of(options: Train) -> RunFile:
  """What the options ask for; raises ConfigError without data."""
  from gr4ad_jax.gpr.run import RunFile, read_run
  from gr4ad_jax.training.run_folder import require_system

  data, sids, start, reward, market, thoughts = (
    storage.absolute(place) if place else "" for place in (
      options.data, options.sids, options.start, options.reward, options.market, options.thoughts,
    )
  )
  if not data and options.start is None:
    raise ConfigError("--data is missing: the folder that `gr4ad prepare` wrote")
  if not data:
    require_system(options.start, options.system)
    before = read_run(options.start)
    data, sids = before.data, sids or before.sids
  sids = sids or storage.absolute(storage.place(data) / "sids")
  return RunFile(data, sids, options.config, options.system, start, reward, market, thoughts)
