"""Runs of the trained baselines: their folders, their training, opened again.

    WORKDIR/run.json      the system, where the data are, and every setting
    WORKDIR/checkpoints/, train_log.jsonl, tb/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.prepared import PreparedLogs, open_logs
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.pipeline import train_batches, validation_batches
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.machine import distributed, lock, sharding, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.baseline import Baseline
from gr4ad_jax.search.held_out import eval_requests, sample_requests
from gr4ad_jax.search.judge import DEPTH
from gr4ad_jax.search.ranking import mean_metrics, only_new
from gr4ad_jax.sequential.config import SasrecConfig, TwoTowerConfig
from gr4ad_jax.sequential.ranker import Ranker
from gr4ad_jax.sequential.system import System, sasrec, two_tower
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.refit import refit_config
from gr4ad_jax.training.run_folder import going_on, is_taken, require_system
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.train_loop import kept_step, read_params, train
from gr4ad_jax.training.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class _Run:
  """What run.json holds of a run, beside its system and settings."""

  data: str
  """Folder that `gr4ad prepare` wrote."""
  refit: str = dataclasses.field(default="", kw_only=True)
  """Folder of the tuned run that this one fits anew, with the validation requests; "" = none."""
  fingerprint: str = dataclasses.field(default="", kw_only=True)
  """Hashes of logs and examples; a run only ever ranks for those it was trained on."""


@dataclasses.dataclass(frozen=True)
class SasrecRun(_Run):
  """A run of SASRec."""

  config: SasrecConfig = SasrecConfig()
  system: Literal["sasrec"] = "sasrec"


@dataclasses.dataclass(frozen=True)
class TwoTowerRun(_Run):
  """A run of the two towers."""

  config: TwoTowerConfig = TwoTowerConfig()
  system: Literal["two_tower"] = "two_tower"


Run = SasrecRun | TwoTowerRun
WITHOUT_SIDS = ("sasrec", "two_tower")
"""The systems of these runs."""


def read_run(workdir: Place) -> Run:
  """The settings of a run in a folder that holds one of these systems."""
  values = config_lib.read_values(storage.fetch(workdir / "run.json"))
  kind = TwoTowerRun if values.get("system") == "two_tower" else SasrecRun
  return config_lib.from_dict(kind, values)


def refit_of(tuned: Place, *, data: Place | None = None) -> Run:
  """The run that fits a tuned one anew, on training and validation requests together.

  Args:
    tuned: folder of a trained run of one of these systems.
    data: where its data lie now; None = where they lay.

  Raises:
    ConfigError: no trained run, or one that is a refit itself.
  """
  run = read_run(tuned)
  if run.refit:
    raise ConfigError(f"{tuned}: has learned from the validation requests; fit the tuned run")
  run = dataclasses.replace(run, data=run.data if data is None else storage.absolute(data))
  about = storage.fetch(storage.place(run.data) / "examples" / "examples.json")
  train = refit_config(
    run.config.train, tuned=tuned, step=kept_step(tuned),
    counts=config_lib.read_values(about)["counts"],
  )
  config = dataclasses.replace(run.config, train=train)
  return dataclasses.replace(run, config=config, refit=storage.absolute(tuned))


def system_of(run: Run, data: PreparedLogs) -> System:
  """The model that a run trains."""
  match run:
    case SasrecRun():
      return sasrec(run.config, data)
    case TwoTowerRun():
      return two_tower(run.config, data)


def train_baseline(run: Run, workdir: Place, *, resume: bool = False) -> TrainState:
  """Trains in `workdir`.

  Args:
    run: data and settings.
    workdir: a new folder, or with `resume` that of an earlier run with the same settings.
    resume: continue an earlier run, to the same bits (a new run where there is none).

  Raises:
    ConfigError: the folder is taken, its settings or data differ, or another process works in it.
    DivergedError: see `train_loop.train`.
  """
  with lock.held(workdir, "a training"):
    return _train(run, workdir, resume)


def _train(run: Run, workdir: Place, resume: bool) -> TrainState:
  if is_taken(workdir, resume=resume):
    require_system(workdir, run.system)
    run = going_on(run, read_run(workdir), workdir)
  data = open_logs(storage.place(run.data), fingerprint=run.fingerprint)
  run = dataclasses.replace(run, fingerprint=data.fingerprint)
  system, config = system_of(run, data), run.config.train
  judge = _judge(run, data, system) if config.best_by != "loss" else None
  hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
  source, held_out = data.examples.sources["train"], data.examples.sources["validation"]
  if run.refit:
    parts = [grain.MapDataset.source(records) for records in (source, held_out)]
    source = grain.MapDataset.concatenate(parts)
  if distributed.is_first():
    storage.write_text(workdir / "run.json", config_lib.to_json(run))
    console.print(
      f"{workdir}: {config.num_steps:,} steps of {config.batch_size:,} examples at the most, "
      f"{config.num_steps * config.batch_size / len(source):,.1f} times through the "
      f"{len(source):,} of training" + (" and validation" if run.refit else "")
    )
  validation = [] if run.refit else validation_batches(
    held_out, system.make_batch, batch_size=config.batch_size, most=config.eval_batches,
    parts=sharding.row_parts(training_mesh(config)), **hosts,
  )
  state = train(
    system.task, config, folder=workdir, judge=judge, pace=Pace(), validation=validation,
    batches=train_batches(
      source, system.make_batch, batch_size=config.batch_size, seed=config.seed, **hosts
    ),
  )
  if distributed.is_first() and not run.refit:
    console.print(f"{workdir}: {Selection(config, read_log(workdir))}")
  return state


def _judge(
  run: Run, data: PreparedLogs, system: System
) -> Callable[[Any], dict[str, float]]:
  """Parameters -> recall@50, ndcg@50 and value_recall@50 on a sample of validation requests.

  Raises:
    ConfigError: value decides, and no validation request has any; or new targets do, and none is.
  """
  by = run.config.train.best_by
  groups = sample_requests(data.examples, "validation", most=run.config.train.rank_requests)
  requests, seen = eval_requests(groups), None
  if by == "value_recall@50" and not requests.value_RC.any():
    raise ConfigError(f"train.best_by={by!r}: nothing in the validation requests has a value")
  if run.config.exclude_seen:
    if not requests.new_RC.any():
      raise ConfigError("exclude_seen: no target of the validation requests is new to them")
    groups = [group for group in groups if any(e.new_C.any() for e in group)]
    requests, seen = only_new(requests), SeenAds(data.logs)
  examples, ranker = [group[0] for group in groups], Ranker(system)

  def judge(params: Any) -> dict[str, float]:
    ranked_RK = ranker(distributed.whole(params), examples, DEPTH, seen=seen)
    return mean_metrics(ranked_RK, requests, k=DEPTH)

  return judge


def open_baseline(workdir: Place, data: PreparedLogs) -> Baseline:
  """A trained run, with the parameters of its best validation; a refit gives its last ones.

  Args:
    workdir: folder of the run.
    data: that it was trained on.

  Raises:
    ConfigError: no checkpoint.
  """
  run = read_run(workdir)
  system = system_of(run, data)
  params, _ = read_params(system.task, run.config.train, workdir, newest=bool(run.refit))
  ranker = Ranker(system)

  def rank(examples: Sequence[Example], k: int, seen: SeenAds | None) -> np.ndarray:
    return ranker(params, examples, k, seen=seen)

  return Baseline(run.system, rank, ("test",) if run.refit else ("validation", "test"))
