"""A transition counter with content: what users took within a few steps after the latest ads.

Directed pairs are counted over all users up to where training ends, the history ends strictly
before the request. Where counts are thin, a second hop and the likeness of brand and category fill
in. On review sequences such a counter is above most published generative models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.interactions import count_latest, count_pairs, scale_rows
from gr4ad_jax.evaluation.baseline_settings import BaselineSettings, CounterSettings
from gr4ad_jax.evaluation.baselines import keep_largest, popular_ads
from gr4ad_jax.evaluation.question import Question, rank_by_score

_ROWS = 1024  # of the second hop, computed at once


class Transitions(NamedTuple):
  """What follows what.

  Attributes:
    pairs_AA: float32, [i, j], j within a few steps after i.
    second_AA: float32, the same by way of a third ad.
    source_A, target_A: float32, all pairs that begin with i, all that lead to j.
  """

  pairs_AA: sp.csr_matrix
  second_AA: sp.csr_matrix
  source_A: np.ndarray
  target_A: np.ndarray


class ScoreParts(NamedTuple):
  """float32 [rows, num_ads]: by pairs, by the second hop, by content (None = none is known)."""

  pairs_RA: np.ndarray
  second_RA: np.ndarray
  like_RA: np.ndarray | None


def counter(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads that users took soon after the latest ones of the request's user, and ads like these.

  Args, Returns, Raises: as `baselines.popularity`. The history ends at the request, not at
  train_end_s.
  """
  popular_A = popular_ads(question, settings.popularity)
  transitions = count_transitions(question, **settings.counter.counting)
  return rank_by_transitions(question, settings.counter, transitions, popular_A)


def count_transitions(question: Question, *, neighbours: int, **counting: Any) -> Transitions:
  """Counts what users did up to where training ends, by the rest of `CounterSettings.counting`."""
  counts = count_pairs(
    question.interactions, num_ads=question.num_ads, end_s_U=question.end_s_U, **counting
  )
  source_A, target_A = (np.asarray(counts.pairs_AA.sum(axis=axis)).ravel() for axis in (1, 0))
  pairs_AA = keep_largest(counts.pairs_AA, neighbours)
  share_AA = scale_rows(pairs_AA, 1 / np.maximum(source_A, np.float32(1e-9)))
  second = [
    keep_largest((pairs_AA[at : at + _ROWS] @ share_AA).tocsr(), neighbours)
    for at in range(0, question.num_ads, _ROWS)
  ]
  return Transitions(pairs_AA, sp.vstack(second, format="csr"), source_A, target_A)


def rank_by_transitions(
  question: Question, settings: CounterSettings, transitions: Transitions, popular_A: np.ndarray,
  *, parts: Callable[[slice], ScoreParts] | None = None,
) -> np.ndarray:
  """`counter` of transitions that are counted already, and of parts of scores that may be known."""
  # An ad that nobody has come to counts little, whatever it says of itself.
  target_A = transitions.target_A
  known_A = target_A / np.maximum(target_A + settings.content_shrinkage, 1e-9)
  content_A = (settings.content_weight * known_A).astype(np.float32)
  parts = parts or (lambda rows: score_parts(question, settings, transitions, rows))

  def score(rows: slice) -> np.ndarray:
    pairs_RA, second_RA, like_RA = parts(rows)
    following_RA = pairs_RA + np.float32(settings.hop_weight) * second_RA
    return following_RA if like_RA is None else following_RA + like_RA * content_A[None]

  return rank_by_score(question, score, popular_A)


def score_parts(
  question: Question, settings: CounterSettings, transitions: Transitions, rows: slice
) -> ScoreParts:
  """The terms of the score of some requests, before their weights."""
  latest_RA = count_latest(
    question.interactions, user_R=question.requests.user_R[rows],
    time_s_R=question.requests.time_s_R[rows], num_ads=question.num_ads,
    steps=settings.history_steps, step_decay=settings.history_decay,
    organic_weight=settings.organic_weight,
  )  # fmt: skip
  divided_A = (transitions.source_A + 1) ** np.float32(-settings.source_power)
  divided_RA = latest_RA.multiply(divided_A[None]).tocsr()
  content_AN, like_RA = question.content_AN, None
  if content_AN is not None:
    like_RA = ((latest_RA @ content_AN) @ content_AN.T).toarray()
  pairs_RA, second_RA = (
    (divided_RA @ following_AA).toarray()
    for following_AA in (transitions.pairs_AA, transitions.second_AA)
  )
  return ScoreParts(pairs_RA, second_RA, like_RA)
