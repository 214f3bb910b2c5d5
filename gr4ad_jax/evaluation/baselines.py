"""Popularity, item-to-item co-occurrence and own history: what a model has to beat.

All three see only the past: counts over all users come from events before `train_end_s`, a
request's history from its user's events strictly before the request. Lists are full: ads with equal
scores, zero included, follow in the order of popularity.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.evaluation.baseline_settings import (
  BaselineSettings,
  CooccurrenceSettings,
  OwnHistorySettings,
  PopularitySettings,
)
from gr4ad_jax.evaluation.interactions import (
  PairCounts,
  check_catalogue,
  count_histories,
  count_pairs,
  decay,
)
from gr4ad_jax.evaluation.question import Question, rank_by_score


def popularity(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads with most events of late, the same for every request.

  Args:
    question: what is asked.
    settings: of all baselines.

  Returns:
    ranked_RK: int32 ad indices, best first; -1 beyond the catalogue, or what is left of it.

  Raises:
    ValueError: an ad outside the catalogue, a request before train_end_s.
  """
  popular_A = popular_ads(question, settings.popularity)
  if question.without_seen:
    return rank_by_score(question, lambda rows: _zeros(question, rows), popular_A)
  ranked_RK = np.full((len(question.requests.user_R), question.k), -1, np.int32)
  ranked_RK[:, : question.num_ads] = popular_A[: question.k]
  return ranked_RK


def own_history(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads that the user engaged with most and most recently, then the popular ones.

  Args, Returns, Raises: as `popularity`. The history ends at the request, not at train_end_s.
  """
  popular_A = popular_ads(question, settings.popularity)
  return rank_by_score(
    question, lambda rows: histories(question, settings.own_history, rows).toarray(), popular_A
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
  similar_AA = similar_ads(counts, settings)
  return rank_by_score(
    question, lambda rows: (histories(question, history, rows) @ similar_AA).toarray(), popular_A
  )


def histories(question: Question, settings: OwnHistorySettings, rows: slice) -> sp.csr_matrix:
  """float32 [rows, num_ads]: what users did strictly before some of the requests."""
  return count_histories(
    question.interactions, user_R=question.requests.user_R[rows],
    time_s_R=question.requests.time_s_R[rows], num_ads=question.num_ads,
    half_life_s=settings.half_life_s, organic_weight=settings.organic_weight,
  )  # fmt: skip


def _zeros(question: Question, rows: slice) -> np.ndarray:
  return np.zeros((len(question.requests.user_R[rows]), question.num_ads), np.float32)
