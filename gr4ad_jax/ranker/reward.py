"""Trains the reward model on prepared data, calibrates and judges it, and scores ads with it.

    WORKDIR/reward.json      where the data is, and every setting
    WORKDIR/checkpoints/, train_log.jsonl, tb/
    WORKDIR/metrics.json     calibration fitted on validation, metrics on test
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import training_events
from gr4ad_jax.data.impressions import Impressions, read_impressions
from gr4ad_jax.data.pipeline import repeat_last, train_batches
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.machine import lock, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.ranker.calibration import Platt, fit_platt, probability_metrics
from gr4ad_jax.ranker.config import REWARD_TRAINING, RewardConfig
from gr4ad_jax.ranker.data import (
  RewardBatchMaker,
  bids_of,
  full_batches,
  of_rows,
  reward_batch_maker,
)
from gr4ad_jax.ranker.reward_model import RewardModel, reward_task
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params, train


@dataclasses.dataclass(frozen=True)
class RewardRun:
  """What reward.json holds."""

  data: str
  """Folder that `gr4ad prepare` wrote."""
  model: RewardConfig = RewardConfig()
  train: TrainConfig = REWARD_TRAINING
  fingerprint: str = ""
  """Hashes of logs and examples; a model is only ever opened with those it was trained on."""


class Scores(NamedTuple):
  """Rates and values for R requests of C ads each; 0 where there is no ad."""

  click_RC: np.ndarray  # float32, calibrated pCTR
  conversion_RC: np.ndarray  # float32, calibrated pCVR given a click
  ecpm_RC: np.ndarray  # float32, 1000 * bid * pCTR * pCVR


@dataclasses.dataclass(frozen=True)
class RewardScorer:
  """A trained reward model.

  Attributes:
    make_batch: contexts and ads -> what the model reads.
    bid_A: float32, currency per conversion.
    click, conversion: calibrations.
    logits: compiled (params, batch) -> RewardLogits.
    params: parameters.
    fingerprint: of the data that it was trained on.
  """

  make_batch: RewardBatchMaker
  bid_A: np.ndarray
  click: Platt
  conversion: Platt
  logits: Any
  params: Any
  fingerprint: str

  def raw(self, contexts: Sequence[Example], ad_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, C] logits of click and conversion before calibration."""
    click, conversion = [], []
    for part, rows in full_batches(contexts):
      ads, size = repeat_last(ad_RC[part], len(rows)), part.stop - part.start
      logits = self.logits(self.params, self.make_batch(rows, ads))
      click.append(np.asarray(logits.click_BC)[:size])
      conversion.append(np.asarray(logits.conversion_BC)[:size])
    empty = [np.zeros((0, ad_RC.shape[1]), np.float32)]
    return np.concatenate(click or empty), np.concatenate(conversion or empty)

  def __call__(self, contexts: Sequence[Example], ad_RC: np.ndarray) -> Scores:
    """Rates and eCPM of ads in the context of each request.

    Args:
      contexts: of R requests.
      ad_RC: int32, -1 = none.
    """
    click_RC, conversion_RC = self.raw(contexts, ad_RC)
    there_RC = ad_RC >= 0
    click_RC, conversion_RC = (
      np.where(there_RC, p, 0).astype(np.float32)
      for p in (self.click(click_RC), self.conversion(conversion_RC))
    )
    return Scores(
      click_RC, conversion_RC, 1000 * self.bid_A[np.maximum(ad_RC, 0)] * click_RC * conversion_RC
    )

  def rank(self, contexts: Sequence[Example], ad_RC: np.ndarray) -> np.ndarray:
    """The same ads by expected eCPM, highest first, -1 at the end: the final ranker."""
    ecpm_RC = np.where(ad_RC >= 0, self(contexts, ad_RC).ecpm_RC, -1)
    return np.take_along_axis(ad_RC, np.argsort(-ecpm_RC, axis=1, kind="stable"), axis=1)


def train_reward(run: RewardRun, workdir: Place, *, resume: bool = False) -> dict[str, float]:
  """Trains, calibrates on validation, measures on test; writes all of it to WORKDIR.

  Returns:
    click/METRIC and conversion/METRIC on test, see `probability_metrics`.

  Raises:
    ConfigError: the folder is taken, or another process works in it.
    LogError: the logs hold no impression without a click.
    DivergedError: see `train_loop.train`.
  """
  with lock.held(workdir, "a training"):
    return _train_reward(run, workdir, resume)


def _train_reward(run: RewardRun, workdir: Place, resume: bool) -> dict[str, float]:
  settings = workdir / "reward.json"
  if storage.exists(settings) and not resume:
    raise ConfigError(f"{workdir}: holds a reward model already; pass --resume or another folder")
  run = same_run(run, workdir, "reward")
  data = open_reward_data(run, *SPLITS)
  run = dataclasses.replace(run, fingerprint=data.fingerprint)
  storage.write_text(settings, config_lib.to_json(run))
  task = reward_task(RewardModel(run.model, data.make_batch.vocabulary))
  train_on_impressions(task, run.train, workdir, data)
  scorer = _scorer(run, workdir, data)
  click, conversion = _calibrate(scorer, data.splits["validation"])
  scorer = dataclasses.replace(scorer, click=click, conversion=conversion)
  metrics = judge(scorer, data.splits["test"])
  storage.write_json(workdir / "metrics.json", {
    "calibration": {"click": click._asdict(), "conversion": conversion._asdict()},
    "test": metrics,
  })
  return metrics


def same_run(run: RewardRun, workdir: Place, model: str) -> RewardRun:
  """The run that has been begun in `workdir`, with the fingerprint of its data; else `run`.

  Raises:
    ConfigError: that one has other settings.
  """
  settings = workdir / f"{model}.json"
  if not storage.exists(settings):
    return run
  there = config_lib.read_json(RewardRun, storage.fetch(settings))
  if dataclasses.replace(there, fingerprint=run.fingerprint) != run:
    raise ConfigError(f"{workdir}: the {model} model there has other settings")
  return there


def open_reward(workdir: Place, *, data: Place | None = None) -> RewardScorer:
  """A trained reward model; `data` is where its data lie now, None = where they lay.

  Raises:
    ConfigError: none in that folder, or not finished.
  """
  if not storage.exists(workdir / "metrics.json"):
    raise ConfigError(f"{workdir}: holds no finished reward model; run `gr4ad reward` first")
  run = config_lib.read_json(RewardRun, storage.fetch(workdir / "reward.json"))
  if data is not None:
    run = dataclasses.replace(run, data=storage.absolute(data))
  fitted = config_lib.read_values(storage.fetch(workdir / "metrics.json"))["calibration"]
  return dataclasses.replace(
    _scorer(run, workdir, open_reward_data(run)), click=Platt(**fitted["click"]),
    conversion=Platt(**fitted["conversion"]),
  )


def judge(scorer: RewardScorer, impressions: Impressions) -> dict[str, float]:
  """click/... over shown ads and conversion/... over clicked ones, of calibrated rates."""
  scores = scorer(impressions.contexts, impressions.shown_RC)
  shown_RC, action_RC = impressions.shown_RC >= 0, impressions.action_RC
  clicked_RC = action_RC >= Action.CLICK
  parts = {
    "click": probability_metrics(scores.click_RC[shown_RC], clicked_RC[shown_RC]),
    "conversion": probability_metrics(
      scores.conversion_RC[clicked_RC], action_RC[clicked_RC] == Action.CONVERSION
    ),
  }
  return {f"{head}/{name}": x for head, part in parts.items() for name, x in part.items()}


class RewardData(NamedTuple):
  """What a ranker learns from."""

  make_batch: RewardBatchMaker
  bid_A: np.ndarray  # float32, currency per conversion
  splits: dict[str, Impressions]
  fingerprint: str


def open_reward_data(run: RewardRun, *splits: str) -> RewardData:
  """Fields and bids of a run's data, and the impressions of these splits.

  Raises:
    ConfigError: a file is not what was written, or the data are not those of the run.
  """
  logs, examples, found = open_logs(storage.place(run.data), fingerprint=run.fingerprint)
  train_E = training_events(logs, examples)
  make_batch = reward_batch_maker(logs, run.model, examples.features.sizes, train_E=train_E)
  maker = ExampleMaker(logs, examples.config)
  return RewardData(
    make_batch, bids_of(logs, train_E),
    {name: read_impressions(maker, name) for name in splits}, found,
  )


def _scorer(run: RewardRun, workdir: Place, data: RewardData) -> RewardScorer:
  model = RewardModel(run.model, data.make_batch.vocabulary)
  params, _ = read_params(reward_task(model), run.train, workdir)
  logits = jax.jit(lambda params, batch: model.apply({"params": params}, batch))
  return RewardScorer(
    data.make_batch, data.bid_A, Platt(), Platt(), logits, params, data.fingerprint
  )


def train_on_impressions(task: Task, config: TrainConfig, folder: Place, data: RewardData) -> None:
  """Trains a task of `RewardBatch`es; validation is the first batches in a fixed random order."""
  learned, judged = data.splits["train"], data.splits["validation"]
  batches = train_batches(
    range(len(learned.contexts)), functools.partial(of_rows, data.make_batch, learned),
    batch_size=config.batch_size, seed=config.seed, parse=int,
  )
  order = np.random.default_rng(0).permutation(len(judged.contexts))
  size = min(config.batch_size, len(order))
  starts = range(0, size * max(1, min(config.eval_batches, len(order) // size)), size)
  validation = [of_rows(data.make_batch, judged, order[at : at + size]) for at in starts]
  train(task, config, batches=batches, folder=folder, validation=validation)


def _calibrate(scorer: RewardScorer, impressions: Impressions) -> tuple[Platt, Platt]:
  click_RC, conversion_RC = scorer.raw(impressions.contexts, impressions.shown_RC)
  shown_RC, clicked_RC = impressions.shown_RC >= 0, impressions.action_RC >= Action.CLICK
  converted_RC = impressions.action_RC == Action.CONVERSION
  return (
    fit_platt(click_RC[shown_RC], clicked_RC[shown_RC]),
    fit_platt(conversion_RC[clicked_RC], converted_RC[clicked_RC]),
  )
