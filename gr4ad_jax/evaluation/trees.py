"""Boosted trees on features made by hand: the ranker that an advertiser's analyst would try first.

LightGBM's lambdarank orders the best 600 ads of a plain rule. Its features see only the past: a
user's history strictly before the request, and the hours before the request's. Times must be real.
LightGBM is an extra: `machine.extras.install("trees")`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.interactions import trending_shares
from gr4ad_jax.data.pipeline import pad
from gr4ad_jax.data.records import DAY_S, AdTable
from gr4ad_jax.data.shortlist import SHARE_HALF_LIVES_DAYS
from gr4ad_jax.data.tastes import Tastes, likeness
from gr4ad_jax.evaluation.baseline_settings import OwnHistorySettings
from gr4ad_jax.evaluation.baselines import histories
from gr4ad_jax.evaluation.question import Question, draw_requests, seen_ads
from gr4ad_jax.machine.progress import track
from gr4ad_jax.search.ranking import EvalRequests, only_new

CANDIDATES = 600
_LATEST, _TRAINED, _VALIDATED = 30_000, 9_000, 2_000  # requests: of the latest, some are drawn
_ROUNDS, _PATIENCE = 250, 20
_FEW_ROWS = 200_000
_PARAMS = {
  "objective": "lambdarank", "learning_rate": 0.1, "num_leaves": 31, "min_data_in_leaf": 200,
  "lambdarank_truncation_level": 60, "metric": "ndcg", "eval_at": [50], "verbosity": -1,
  "seed": 0, "deterministic": True, "force_row_wise": True,
}  # fmt: skip
_HISTORIES = (
  *(OwnHistorySettings(days * DAY_S, organic_weight=1.0) for days in (7, 28, 112, 400)),
  *(OwnHistorySettings(days * DAY_S, organic_weight=0.0) for days in (28, 200)),
)
_WIDE = 2  # the history, 112 days, that stands for a user's taste
_PLAIN = [SHARE_HALF_LIVES_DAYS.index(days) for days in (1.5, 7.0)]  # for the plain rule
_CELLS = 1 << 21  # requests x ads at once, in each of a dozen arrays


@dataclass(frozen=True)
class AdGroups:
  """What ads have in common, as columns of features.

  Attributes:
    member_AG: three matrices float32 [A, groups], ad -> its advertiser, category, text.
    group_3A: int64, number of each ad's advertiser, category, text.
    price_A: float32, log(1 + price), 0 = unknown.
  """

  member_AG: tuple[sp.csr_matrix, ...]
  group_3A: np.ndarray
  price_A: np.ndarray


def is_installed() -> bool:
  """Whether LightGBM can be imported; without OpenMP on the machine it cannot, installed or not."""
  try:
    importlib.import_module("lightgbm")
  except (ImportError, OSError):
    return False
  return True


def group_ads(ads: AdTable) -> AdGroups:
  """Advertisers, categories (two parts of the path) and texts of a catalogue."""
  category = np.array([" > ".join(path.split(" > ")[:2]) for path in ads.category], object)
  columns = (ads.advertiser_id, category, ads.text)
  group_3A = np.stack([np.unique(names, return_inverse=True)[1].ravel() for names in columns])
  num_ads = len(ads.ad_id)
  member_AG = tuple(
    sp.csr_matrix((np.ones(num_ads, np.float32), (np.arange(num_ads), group_A)))
    for group_A in group_3A
  )
  return AdGroups(member_AG, group_3A, np.log1p(np.nan_to_num(ads.price)).astype(np.float32))


def trees(question: Question, training: EvalRequests, validation: EvalRequests,
          ads: AdTable, tastes: Tastes | None = None) -> np.ndarray:
  """Trains on training requests, stops early on validation requests, then ranks.

  Args:
    question: what is asked.
    training: requests of the training period.
    validation: of the time after it.
    ads: the catalogue.
    tastes: for one more feature, how alike an ad is to what the user took (data.tastes), which no
      count tells; None = without it.

  Returns:
    ranked_RK: int32 ad indices, best first; -1 beyond the candidates.

  Raises:
    ValueError: no target of training or validation is new, for lists without what was seen.
  """
  import lightgbm

  groups, data = group_ads(ads), []
  # Threads that wait for each other cost more than they bring where there are few rows.
  cells = min(len(training.user_R), _TRAINED) * min(CANDIDATES, question.num_ads)
  threads = 1 if cells < _FEW_ROWS else 0
  latest = np.argsort(training.time_s_R, kind="stable")[-_LATEST:]
  for requests, most in ((training.rows(latest), _TRAINED), (validation, _VALIDATED)):
    if question.without_seen:
      requests = only_new(requests)
    asked = replace(question, requests=draw_requests(requests, most))
    feature, label, size = _examples(asked, groups, tastes)
    options: dict[str, Any] = {"reference": data[0]} if data else {}
    made = lightgbm.Dataset(
      feature, label, group=size, params={"num_threads": threads}, **options
    )
    data.append(made.construct())
    del feature
  model = lightgbm.train(
    _PARAMS | {"num_threads": threads}, data[0], _ROUNDS, valid_sets=[data[1]],
    callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)],
  )
  ranked_RK = np.full((len(question.requests.user_R), question.k), -1, np.int32)
  for rows, ad_RN, feature in _candidates(question, groups, tastes):
    score_RN = model.predict(feature, num_threads=threads).reshape(ad_RN.shape)
    score_RN[ad_RN < 0] = -np.inf
    best_RN = np.argsort(-score_RN, axis=1, kind="stable")[:, : question.k]
    ranked_RK[rows, : best_RN.shape[1]] = np.take_along_axis(ad_RN, best_RN, axis=1)
  return ranked_RK


def _examples(
  question: Question, groups: AdGroups, tastes: Tastes | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Features of all candidates, whether each is a target, and the candidates of each request."""
  features, labels, target_RC = [], [], question.requests.target_RC
  for rows, ad_RN, feature in _candidates(question, groups, tastes):
    hit_RN = (ad_RN[:, :, None] == target_RC[rows, None, :]) & (ad_RN >= 0)[:, :, None]
    features.append(feature)
    labels.append(hit_RN.any(axis=2))
  label_RN = np.concatenate(labels)
  return np.concatenate(features), label_RN.ravel(), np.full(len(label_RN), label_RN.shape[1])


def _candidates(
  question: Question, groups: AdGroups, tastes: Tastes | None
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
  """Some of the requests, their N candidates (-1 = seen), features float32 [rows * N, 16 or 17]."""
  requests, num_ads = question.requests, question.num_ads
  depth, step = min(CANDIDATES, num_ads), max(1, _CELLS // num_ads)
  starts = range(0, len(requests.user_R), step)
  for at in track(starts, "features, requests", len(requests.user_R), step=step):
    rows = slice(at, min(at + step, len(requests.user_R)))
    sparse = [histories(question, settings, rows) for settings in _HISTORIES]
    own = [history_RA.toarray() for history_RA in sparse]
    trend = []
    for days in SHARE_HALF_LIVES_DAYS:  # of these rows alone: every hour has shares of its own
      share_DA, row_R = trending_shares(
        question.interactions, time_s_R=requests.time_s_R[rows], num_ads=num_ads,
        half_life_days=days,
      )
      trend.append(share_DA[row_R])
    grouped = [
      np.log1p((sparse[_WIDE] @ member_AG).toarray())[:, group_A]
      for member_AG, group_A in zip(groups.member_AG, groups.group_3A, strict=True)
    ]
    plain_RA = np.log1p(own[_WIDE]) + 160 * trend[_PLAIN[0]] + 40 * trend[_PLAIN[1]]
    plain_RA += 0.05 * grouped[1]
    if question.without_seen:
      plain_RA[seen_ads(question, rows)] = -1.0
    ad_RN = np.argpartition(plain_RA, num_ads - depth, axis=1)[:, num_ads - depth :]
    columns = [
      *(np.log1p(np.take_along_axis(own_RA, ad_RN, axis=1)) for own_RA in own),
      *(np.log(np.take_along_axis(share_RA, ad_RN, axis=1) + 1e-6) for share_RA in trend),
      *(np.take_along_axis(grouped_RA, ad_RN, axis=1) for grouped_RA in grouped),
      groups.price_A[ad_RN],
      np.repeat(np.log1p(own[_WIDE].sum(axis=1, keepdims=True)), depth, axis=1),
    ]
    if tastes is not None:
      met = _padded(sparse[_WIDE])
      columns.append(likeness(tastes, requests.time_s_R[rows], *met, ad_RN))
    seen_RN = np.take_along_axis(plain_RA, ad_RN, axis=1) < 0
    feature = np.stack(columns, axis=-1, dtype=np.float32).reshape(-1, len(columns))
    yield rows, np.where(seen_RN, -1, ad_RN), feature


def _padded(history_RA: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
  """The ads of each row, [R, P], -1 = none, and their numbers."""
  width, bounds = int(np.diff(history_RA.indptr).max(initial=0)), history_RA.indptr[1:-1]
  ads, counts = (np.split(x, bounds) for x in (history_RA.indices, history_RA.data))
  return pad(ads, width), pad(counts, width, fill=0, dtype=np.float64)
