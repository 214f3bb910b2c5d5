"""The DLRM cascade: two-tower retrieval, then the reward model ranks. The base of Table 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.ranker.data import RewardBatchMaker, full_batches
from gr4ad_jax.ranker.reward import (
  RewardRun,
  open_reward_data,
  same_run,
  train_on_impressions,
)
from gr4ad_jax.ranker.two_tower import TwoTower, match_scores, nearest_ads, two_tower_task
from gr4ad_jax.training.train_loop import read_params


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """A trained two-tower model over its catalogue.

  Attributes:
    make_batch: contexts -> what the model reads.
    ad_AD: unit vectors of all ads.
    user: compiled batch -> unit vectors.
  """

  make_batch: RewardBatchMaker
  ad_AD: np.ndarray
  user: Any

  def __call__(self, contexts: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [R, k] ads for requests, best first, and their `match_scores`, float32."""
    found = []
    for part, rows in full_batches(contexts):
      none = np.full((len(rows), 1), -1, np.int32)
      user_BD = np.asarray(self.user(self.make_batch(rows, none)))[: part.stop - part.start]
      ad_BK = nearest_ads(user_BD, self.ad_AD, k)
      found.append((ad_BK, np.asarray(match_scores(user_BD, self.ad_AD[ad_BK]))))
    ad_RK, score_RK = map(np.concatenate, zip(*found, strict=True))
    return ad_RK, score_RK


def train_retrieval(run: RewardRun, workdir: Place) -> Retrieval:
  """Trains in `workdir`, or continues, or opens what is finished there.

  Raises:
    ConfigError: the folder holds one of other settings.
    LogError: the logs hold no impression without a click.
  """
  run = same_run(run, workdir, "retrieval")
  data = open_reward_data(run, "train", "validation")
  run = dataclasses.replace(run, fingerprint=data.fingerprint)
  storage.write_text(workdir / "retrieval.json", config_lib.to_json(run))
  make_batch = data.make_batch
  model = TwoTower(run.model, make_batch.vocabulary)
  # Validation only names the best checkpoint; one batch does.
  config, task = dataclasses.replace(run.train, eval_batches=1), two_tower_task(model)
  train_on_impressions(task, config, workdir, data)
  params, _ = read_params(task, config, workdir)
  ad_AD = model.apply({"params": params}, make_batch.ad_field_AX[1:], method=TwoTower.ad)
  user = jax.jit(lambda rows: model.apply({"params": params}, rows, method=TwoTower.user))
  return Retrieval(make_batch, np.asarray(ad_AD), user)
