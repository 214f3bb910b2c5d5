"""Popularity, item-to-item co-occurrence and own history: what a model has to beat.

All three see only the past: counts over all users come from events before `train_end_s`, a
request's history from its user's events strictly before the request. Lists are full: ads with equal
scores, zero included, follow in the order of popularity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.evaluation.interactions import (
  Interactions,
  PairCounts,
  check_catalogue,
  count_histories,
  count_pairs,
  decay,
)
from gr4ad_jax.search.ranking import EvalRequests

_MAX_CELLS = 1 << 23  # scores held at once, requests x ads


@dataclass(frozen=True)
class PopularitySettings:
  """An event counts 0.5 ** (its age at train_end_s / half-life)."""

  half_life_s: float | None = 28 * DAY_S
  """None: events do not age."""
  organic_weight: float = 0.0
  """What an organic event counts beside 1 for an ad event."""


@dataclass(frozen=True)
class OwnHistorySettings:
  """Score of an ad: its events in the user's past, each 0.5 ** (age at the request / half-life)."""

  half_life_s: float | None = 112 * DAY_S
  organic_weight: float = 0.3


@dataclass(frozen=True)
class CooccurrenceSettings:
  """Score of ad j: sum over i of history_i * pairs_ij / norm_ij, where

      norm_ij = (baskets_i + shrinkage) ** source_power * (baskets_j + shrinkage) ** target_power

  history is that of `OwnHistorySettings`, pairs and baskets are those of `count_pairs`. Powers
  (1, 0) give the conditional frequency of j given i, (0.5, 0.5) the cosine.
  """

  window: int = 4
  """Baskets pair with those at most this many steps away; 0 = within a basket only."""
  backward_weight: float = 0.5
  """What a pair counts whose j came first."""
  powers: tuple[float, float] = (1.0, 0.25)
  """source_power, target_power."""
  shrinkage: float = 1.0
  """Baskets added to every count before the powers."""
  count_half_life_s: float | None = 28 * DAY_S
  """Pairs and baskets age to train_end_s; None: they do not."""
  history_half_life_s: float | None = 28 * DAY_S
  organic_weight: float = 0.3
  neighbours: int = 200
  """Largest entries pairs_ij / norm_ij kept per ad i."""

  @property
  def counting(self) -> dict[str, Any]:
    """The arguments of `count_pairs` that say what a pair counts."""
    return {
      "half_life_s": self.count_half_life_s, "organic_weight": self.organic_weight,
      "window": self.window, "backward_weight": self.backward_weight,
    }  # fmt: skip


@dataclass(frozen=True)
class BaselineSettings:
  """Settings of the three baselines; `baseline_tuning.tune_baselines` chooses them."""

  popularity: PopularitySettings = PopularitySettings()
  cooccurrence: CooccurrenceSettings = CooccurrenceSettings()
  own_history: OwnHistorySettings = OwnHistorySettings()


@dataclass(frozen=True)
class Question:
  """What every baseline answers: which ads each request's user engages with next.

  Attributes:
    interactions: engagements of all users; those of the future may be among them.
    requests: R requests, none before train_end_s.
    num_ads: ads of the catalogue.
    k: length of the lists.
    train_end_s: unix s, events from then on do not enter counts over all users. One for all; or one
      per user, int64 [num_users]; or None, leave-one-out: the first request of each user, and no
      end for users without a request.
  """

  interactions: Interactions
  requests: EvalRequests
  num_ads: int
  k: int
  train_end_s: float | np.ndarray | None

  @cached_property
  def end_s_U(self) -> np.ndarray:
    """See `end_s_of_users`."""
    return end_s_of_users(self.interactions, self.requests, self.train_end_s)


def popularity(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads with most events of late, the same for every request.

  Args:
    question: what is asked.
    settings: of all three baselines.

  Returns:
    ranked_RK: int32 ad indices, best first; -1 beyond the catalogue.

  Raises:
    ValueError: an ad outside the catalogue, a request before train_end_s.
  """
  ranked_RK = np.full((len(question.requests.user_R), question.k), -1, np.int32)
  ranked_RK[:, : question.num_ads] = popular_ads(question, settings.popularity)[: question.k]
  return ranked_RK


def own_history(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads that the user engaged with most and most recently, then the popular ones.

  Args, Returns, Raises: as `popularity`. The history ends at the request, not at train_end_s.
  """
  itself_AA = sp.eye(question.num_ads, dtype=np.float32, format="csr")
  return rank_by_similarity(
    question, itself_AA, settings.own_history, popular_ads(question, settings.popularity)
  )


def cooccurrence(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads that users engage with around those of the user's past, then the popular ones.

  A repeat is a pair like any other: an ad of the past is recommended as far as users come back to
  it in another basket.

  Args, Returns, Raises: as `popularity`. The history ends at the request, not at train_end_s.
  """
  popular_A, rule = popular_ads(question, settings.popularity), settings.cooccurrence
  counts = count_pairs(
    question.interactions, num_ads=question.num_ads, end_s_U=question.end_s_U, **rule.counting
  )
  return rank_by_pairs(question, counts, rule, popular_A)


def rank_all(question: Question, settings: BaselineSettings) -> dict[str, np.ndarray]:
  """The lists of all three by name: popularity, cooccurrence, own_history."""
  baselines = (popularity, cooccurrence, own_history)
  return {baseline.__name__: baseline(question, settings) for baseline in baselines}


def end_s_of_users(
  interactions: Interactions, requests: EvalRequests, train_end_s: float | np.ndarray | None
) -> np.ndarray:
  """int64 [users]: when each user's events stop to count, from train_end_s as in `popularity`.

  Raises:
    ValueError: a user without an end, a request before its user's end.
  """
  num_users = 1 + int(max(interactions.user_E.max(initial=-1), requests.user_R.max()))
  if train_end_s is None:
    log_end_s = 1 + max(interactions.time_s_E.max(initial=0), requests.time_s_R.max())
    end_s_U = np.full(num_users, log_end_s, np.int64)
    np.minimum.at(end_s_U, requests.user_R, requests.time_s_R)
  elif np.ndim(train_end_s) == 0:
    end_s_U = np.full(num_users, np.ceil(train_end_s), np.int64)
  else:
    end_s_U = np.asarray(train_end_s, np.int64)
    if len(end_s_U) < num_users:
      raise ValueError(f"train_end_s has {len(end_s_U)} entries for {num_users} users")
  early_R = requests.time_s_R < end_s_U[requests.user_R]
  if early_R.any():
    raise ValueError(
      f"request {np.argmax(early_R)} is earlier than train_end_s: its future would be counted"
    )
  return end_s_U


def popular_ads(question: Question, settings: PopularitySettings) -> np.ndarray:
  """int64 [num_ads]: every ad, the most popular first, equal ones by index."""
  check_catalogue(question.interactions, question.num_ads)
  past = question.interactions.before(question.end_s_U)
  weight_E = np.where(past.is_ad_E, 1, settings.organic_weight)
  weight_E = weight_E * decay(question.end_s_U[past.user_E], past.time_s_E, settings.half_life_s)
  return np.argsort(-np.bincount(past.ad_E, weight_E, question.num_ads), kind="stable")


def similar_ads(counts: PairCounts, settings: CooccurrenceSettings) -> sp.csr_matrix:
  """float32 [num_ads, num_ads]: the largest pairs_ij / norm_ij of every ad i."""
  source_power, target_power = settings.powers
  source_A = (counts.source_A + settings.shrinkage) ** source_power
  target_A = (counts.target_A + settings.shrinkage) ** target_power
  similar_AA = counts.pairs_AA.copy()
  similar_AA.data /= np.repeat(source_A, np.diff(similar_AA.indptr)) * target_A[similar_AA.indices]
  keep = settings.neighbours
  for ad in np.flatnonzero(np.diff(similar_AA.indptr) > keep):
    row = similar_AA.data[similar_AA.indptr[ad] : similar_AA.indptr[ad + 1]]
    row[np.argpartition(row, -keep)[:-keep]] = 0
  similar_AA.eliminate_zeros()
  return similar_AA


def rank_by_pairs(
  question: Question, counts: PairCounts, settings: CooccurrenceSettings, popular_A: np.ndarray
) -> np.ndarray:
  """`cooccurrence` of pairs that are counted already, by `settings.counting`."""
  history = OwnHistorySettings(settings.history_half_life_s, settings.organic_weight)
  return rank_by_similarity(question, similar_ads(counts, settings), history, popular_A)


def rank_by_similarity(
  question: Question, similar_AA: sp.csr_matrix, history: OwnHistorySettings, popular_A: np.ndarray
) -> np.ndarray:
  """Ranks ads by history @ similar; equal scores, zero included, by popularity.

  Args:
    question: what is asked; the history is what the user did strictly before the request.
    similar_AA: float32 >= 0, [i, j]: what i in the history says for j.
    history: weights of its events.
    popular_A: int64, every ad, the most popular first.

  Returns:
    ranked_RK: as `popularity`.
  """
  requests, num_ads = question.requests, question.num_ads
  depth = min(question.k, num_ads)
  # One sortable number per score: the bits of a float32 >= 0 rise with it; below them the place in
  # the order of popularity, so that nothing is equal.
  tie_A = np.empty(num_ads, np.int64)
  tie_A[popular_A] = np.arange(num_ads)[::-1]
  ranked_RK = np.full((len(requests.user_R), question.k), -1, np.int32)
  step = max(1, _MAX_CELLS // num_ads)
  for at in range(0, len(ranked_RK), step):
    rows = slice(at, at + step)
    history_RA = count_histories(
      question.interactions, user_R=requests.user_R[rows], time_s_R=requests.time_s_R[rows],
      num_ads=num_ads, half_life_s=history.half_life_s, organic_weight=history.organic_weight,
    )  # fmt: skip
    score_RA = (history_RA @ similar_AA).toarray()
    key_RA = (score_RA.view(np.int32).astype(np.int64) << 32) | tie_A
    top_RK = np.argpartition(key_RA, num_ads - depth, axis=1)[:, num_ads - depth :]
    order_RK = np.argsort(-np.take_along_axis(key_RA, top_RK, axis=1), axis=1)
    ranked_RK[rows, :depth] = np.take_along_axis(top_RK, order_RK, axis=1)
  return ranked_RK
