"""`gr4ad train`, `gr4ad sweep` and `gr4ad plan`."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

import tyro

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat, Preset
from gr4ad_jax.cli.sweep_config import Sweep
from gr4ad_jax.config import ConfigError
from gr4ad_jax.gr4ad.config import PRESETS, Config, DataShape, ModelConfig
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.config import TrainConfig

if TYPE_CHECKING:
  from gr4ad_jax.gr4ad.run import RunFile


@dataclasses.dataclass(frozen=True)
class Train:
  """What to train on, where, and how."""

  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  data: Place | None = None
  """Folder that `prepare` wrote; to be named, but with --refit that of the tuned run."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  system: Literal["gr4ad", "gpr", "hstu", "onerec", "sasrec", "two_tower"] = "gr4ad"
  """What is trained; the others (the last four are baselines) have options of their own: --system
  NAME --help."""
  preset: Preset = "small"
  """Named settings; the options below change single ones."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  start: Place | None = None
  """Folder of a trained run to begin with, of the same model and data."""
  lists: Place | None = None
  """Folder that `candidates` wrote: learn from these lists, too, as --preference.method says."""
  refit: Place | None = None
  """Folder of a tuned run: the same settings, on training and validation requests together, for as
  many passes as were best there. Nothing is validated; only the test split judges such a run."""
  profile: str | None = None
  """Steps to trace, as 10:20, into WORKDIR/profile; `xprof WORKDIR/profile` shows them."""
  config: Flat[Config] = Config()


def train_defaults(preset: str) -> Train:
  """Options of `train` where nothing but the preset is named."""
  return Train(tyro.MISSING, preset=preset, config=PRESETS[preset])


def train(options: Flat[Train]) -> None:
  """Semantic IDs and examples -> a trained decoder in WORKDIR."""
  from gr4ad_jax.gr4ad.train_run import train_run
  from gr4ad_jax.machine import distributed
  from gr4ad_jax.training.profiling import parse_steps

  keep_freed_memory()
  distributed.join()
  state = train_run(
    _run_of(options), options.workdir, resume=options.resume,
    profile=parse_steps(options.profile) if options.profile else None,
  )
  if distributed.is_first():
    tables.console.print(f"trained {int(state.step):,} steps in {options.workdir}")
    tables.print_next("evaluate", "--workdir", options.workdir)


def _run_of(options: Train) -> RunFile:
  """What the options ask for.

  Raises:
    ConfigError: no data, or --refit beside what it takes from the tuned run.
  """
  from gr4ad_jax.gr4ad.refit import refit_of
  from gr4ad_jax.gr4ad.run import RunFile

  if options.refit is not None:
    if options != dataclasses.replace(
      train_defaults(options.preset), workdir=options.workdir, data=options.data,
      resume=options.resume, refit=options.refit, profile=options.profile,
    ):
      raise ConfigError("--refit: settings, --sids, --start and --lists are those of the tuned run")
    return refit_of(options.refit, data=options.data)
  if options.data is None:
    raise ConfigError("--data is missing: the folder that `gr4ad prepare` wrote")
  sids = options.sids or options.data / "sids"
  data, sids, start, lists = (
    storage.absolute(place) if place else ""
    for place in (options.data, sids, options.start, options.lists)
  )
  return RunFile(data, sids, options.config, start, lists)


def sweep(options: Flat[Sweep]) -> None:
  """Many training runs: every combination of a grid, or a search; finished ones are kept."""
  from gr4ad_jax.cli.sweep import run_sweep

  results = run_sweep(options)
  by = options.config_of({}).train.best_by
  tables.print_sweep(results, title=f"{options.workdir}/results.json", best_by=by)
  if any(result.status != "finished" for result in results):
    sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to plan for."""

  devices: str
  """KIND-NUMBER: a TPU slice (v4, v5e, v5p, v6e) as Google names it, GPUs (a100, h100, h200, l4,
  l20), or cpu; for example v5e-16, h100-8."""
  system: Literal["gr4ad", "gpr", "hstu", "onerec"] = "gr4ad"
  """What is to be trained; the others have options of their own: --system gpr --help."""
  preset: Preset = "small"
  """Named settings; the options below change single ones."""
  mfu: float = 0.4
  """Share of the peak that the run is assumed to reach."""
  data: Place | None = None
  """Folder that `prepare` and `tokenize` wrote, whose sizes count; default: the sizes below."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  shape: Flat[DataShape] = DataShape()
  model: ModelConfig = ModelConfig()
  train: TrainConfig = TrainConfig()


def plan_defaults(preset: str) -> Plan:
  """Options of `plan` where nothing but the preset is named."""
  config = PRESETS[preset]
  return Plan(tyro.MISSING, preset=preset, model=config.model, train=config.train)


def plan(options: Flat[Plan]) -> None:
  """Parameters, FLOPs, memory per device and time of a training run, before it costs anything."""
  from gr4ad_jax.gr4ad.plan import plan_run, plan_run_on
  from gr4ad_jax.machine.peaks import parse_devices

  device, count = parse_devices(options.devices)
  config = Config(model=options.model, train=options.train)
  if options.data is None:
    planned = plan_run(config, options.shape, device, count, mfu=options.mfu)
  elif options.shape != DataShape():
    raise ConfigError("plan: --data has sizes of its own; leave out those on the command line")
  else:
    sids = options.sids or options.data / "sids"
    planned = plan_run_on(options.data, sids, config, device, count, mfu=options.mfu)
  tables.print_plan(planned, title=f"{options.preset} on {options.devices}")
