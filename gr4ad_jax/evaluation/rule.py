"""What the user does again and again, and what everyone does these days: two terms and their sum.

Both terms see only the past: the history ends strictly before the request, the engagements of all
users before its hour. Other than counts that end with training, these follow the
days of the test, as a statistic of a running system does; they need times that are real.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gr4ad_jax.data.interactions import trending_shares
from gr4ad_jax.evaluation.baseline_settings import BaselineSettings, RuleSettings, TrendingSettings
from gr4ad_jax.evaluation.baselines import histories, popular_ads
from gr4ad_jax.evaluation.question import Question, rank_by_score

Shares = Callable[[TrendingSettings], tuple[np.ndarray, np.ndarray]]


def trending(question: Question, settings: BaselineSettings) -> np.ndarray:
  """The ads with the largest share of engagements before the request's period.

  Args, Returns, Raises: as `baselines.popularity`.

  Raises:
    ValueError: the settings have none for trending ads.
  """
  if settings.trending is None:
    raise ValueError("settings.trending is None: there is no list of trending ads")
  share_DA, row_R = shares_of(question)(settings.trending)
  popular_A = popular_ads(question, settings.popularity)
  return rank_by_score(question, lambda rows: share_DA[row_R[rows]], popular_A)


def rule(question: Question, settings: BaselineSettings) -> np.ndarray:
  """Own history + trending_weight * share of engagements before the request's period.

  Args, Returns, Raises: as `baselines.popularity`.
  """
  popular_A = popular_ads(question, settings.popularity)
  return rank_by_rule(question, settings.rule, shares_of(question), popular_A)


def shares_of(question: Question) -> Shares:
  """Settings -> what `interactions.trending_shares` gives for the requests."""

  def shares(settings: TrendingSettings) -> tuple[np.ndarray, np.ndarray]:
    return trending_shares(
      question.interactions, time_s_R=question.requests.time_s_R, num_ads=question.num_ads,
      half_life_days=settings.half_life_days,
    )  # fmt: skip

  return shares


def rank_by_rule(
  question: Question, settings: RuleSettings, shares: Shares, popular_A: np.ndarray
) -> np.ndarray:
  """`rule`, with shares that may be known already; the weight 0 asks for none."""

  def own(rows: slice) -> np.ndarray:
    return histories(question, settings.own_history, rows).toarray()

  if not settings.trending_weight:
    return rank_by_score(question, own, popular_A)
  share_DA, row_R = shares(settings.trending)
  weighted_DA = np.float32(settings.trending_weight) * share_DA
  return rank_by_score(question, lambda rows: own(rows) + weighted_DA[row_R[rows]], popular_A)
