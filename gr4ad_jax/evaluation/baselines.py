"""Popularity, item-to-item co-occurrence and own history: what a model has to beat.

All three see only the past: counts over all users come from events before `train_end_s`, a
request's history from its user's events strictly before the request. Lists are full: ads with equal
scores, zero included, follow in the order of popularity.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.interactions import (
  PairCounts,
  check_catalogue,
  count_histories,
  count_pairs,
  decay,
)
from gr4ad_jax.evaluation.baseline_settings import (
  BaselineSettings,
  CooccurrenceSettings,
  OwnHistorySettings,
  PopularitySettings,
)
from gr4ad_jax.evaluation.question import Question, blocks, rank_by_score, seen_ads


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
  ranked_RK = np.full((len(question.requests.user_R), question.k), -1, np.int32)
  if not question.without_seen:
    ranked_RK[:, : question.num_ads] = popular_A[: question.k]
    return ranked_RK
  for rows in blocks(question):
    seen_RA = np.zeros((len(ranked_RK[rows]), question.num_ads), bool)
    seen_RA[seen_ads(question, rows)] = True
    # However much a user has seen, this many of the popular ads are enough to fill the list.
    enough_N = popular_A[: question.k + seen_RA.sum(axis=1).max(initial=0)]
    seen_RN = seen_RA[:, enough_N]
    first_RK = np.argsort(seen_RN, axis=1, kind="stable")[:, : question.k]
    left_RK = ~np.take_along_axis(seen_RN, first_RK, axis=1)
    ranked_RK[rows, : first_RK.shape[1]] = np.where(left_RK, enough_N[first_RK], -1)
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
  return keep_largest(similar_AA, settings.neighbours)


def keep_largest(matrix: sp.csr_matrix, keep: int) -> sp.csr_matrix:
  """The matrix, changed in place: of each row only the largest entries are left."""
  for at in np.flatnonzero(np.diff(matrix.indptr) > keep):
    row = matrix.data[matrix.indptr[at] : matrix.indptr[at + 1]]
    row[np.argpartition(row, -keep)[:-keep]] = 0
  matrix.eliminate_zeros()
  return matrix


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
