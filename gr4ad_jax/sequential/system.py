"""The trained baselines: what each is made of on one data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax.catalog.prepared import PreparedLogs
from gr4ad_jax.data.pipeline import pad
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.splits import split_requests
from gr4ad_jax.ranker.batch import RewardBatch
from gr4ad_jax.ranker.data import reward_batch_maker
from gr4ad_jax.ranker.two_tower import TwoTower, match_scores, two_tower_task
from gr4ad_jax.sequential.batch import HistoryMaker
from gr4ad_jax.sequential.config import SasrecConfig, TwoTowerConfig
from gr4ad_jax.sequential.sasrec import Sasrec, sasrec_task
from gr4ad_jax.training.task import Task


class System(NamedTuple):
  """A model of all ads at once.

  Attributes:
    task: what is trained.
    make_batch: examples -> what it reads.
    scores: (params, batch) -> float32 [B, A], a score of every ad.
    num_ads: A.
  """

  task: Task
  make_batch: Callable[[Sequence[Example]], Any]
  scores: Callable[[Any, Any], jax.Array]
  num_ads: int


def sasrec(config: SasrecConfig, data: PreparedLogs) -> System:
  """SASRec on the ads that a request's user met before."""
  logs, examples = data.logs, data.examples
  num_ads = len(logs.ads.ad_id)
  model = Sasrec(config.model, num_ads)
  count_A = np.bincount(logs.events.ad[training_targets(data)], minlength=num_ads)
  return System(
    sasrec_task(model, count_A / count_A.sum()),
    HistoryMaker(config.model.max_history, examples.config.max_targets, logs.contents.ad),
    lambda params, batch: model.apply({"params": params}, batch, method=Sasrec.scores), num_ads,
  )


def two_tower(config: TwoTowerConfig, data: PreparedLogs) -> System:
  """Two towers that learn from engagements alone: a softmax over those of a batch, logQ-corrected.

  So they need no impression without a click. How often an ad stands in a batch is its share of the
  targets of training.
  """
  logs, examples = data.logs, data.examples
  maker = reward_batch_maker(
    logs, config.model, examples.features.sizes, train_E=training_targets(data)
  )
  model = TwoTower(config.model, maker.vocabulary)
  width = examples.config.max_targets

  def make_batch(rows: Sequence[Example]) -> RewardBatch:
    actions = pad([e.action_C for e in rows], width, dtype=np.int8)
    return maker(rows, pad([e.target_C for e in rows], width), actions)

  def scores(params: Any, batch: RewardBatch) -> jax.Array:
    apply = functools.partial(model.apply, {"params": params})
    user_BD = apply(batch, method=TwoTower.user)
    ad_AD = apply(maker.ad_field_AX[1:], method=TwoTower.ad)
    return match_scores(user_BD, ad_AD[None])

  return System(two_tower_task(model), make_batch, scores, len(logs.ads.ad_id))


def training_targets(data: PreparedLogs) -> np.ndarray:
  """bool [E], the engagements with ads in the requests that are learned from."""
  splits = split_requests(data.logs.events, data.examples.config)
  return splits.engaged_E & (splits.split_R[data.logs.events.request] == 0)
