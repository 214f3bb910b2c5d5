"""Chooses the settings of the baselines on validation requests and the time before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from gr4ad_jax.evaluation.baselines import (
  BaselineSettings,
  CooccurrenceSettings,
  OwnHistorySettings,
  PopularitySettings,
  end_s_of_users,
  own_history,
  popular_ads,
  popularity,
  rank_by_similarity,
  similar_ads,
)
from gr4ad_jax.evaluation.interactions import Interactions, count_pairs
from gr4ad_jax.evaluation.ranking import EvalRequests, recall_per_request
from gr4ad_jax.machine.progress import track

SettingsT = TypeVar("SettingsT", PopularitySettings, OwnHistorySettings, CooccurrenceSettings)

_MAX_PERIODS = 6


def tune_baselines(
  interactions: Interactions,
  requests: EvalRequests,
  *,
  num_ads: int,
  k: int,
  train_end_s: float | np.ndarray | None,
  horizon_s: float | None = None,
  max_requests: int = 1000,
  seed: int = 0,
) -> BaselineSettings:
  """Settings with the best mean recall@k on validation requests; nothing later is looked at.

  One setting after the other is tried, and kept where it helps. What sells in one period says
  little of the next, so popularity is judged on several periods, the last of which ends with the
  validation requests.

  Args:
    interactions: engagements of all users; those of the future may be among them.
    requests: validation requests.
    num_ads: ads of the catalogue.
    k: length of the lists.
    train_end_s: as in `baselines.popularity`. Unless it is one time for all, times are taken to
      tell the order inside a user only, and counts over users do not age.
    horizon_s: for how long counts will be used unchanged, the length of the test split; None = the
      length of the validation split.
    max_requests: that many are drawn to judge on.
    seed: of that draw.

  Returns:
    The settings.

  Raises:
    ValueError: as `baselines.popularity`; a horizon that is not positive.
  """
  if horizon_s is not None and not horizon_s > 0:
    raise ValueError(f"horizon_s = {horizon_s} must be positive")
  end_s_U = end_s_of_users(interactions, requests, train_end_s)
  drawn = _draw(requests, max_requests, seed)
  count_ages, periods = [None], [(end_s_U, drawn)]
  if train_end_s is not None and np.ndim(train_end_s) == 0:
    end_s = int(requests.time_s_R.max()) + 1
    horizon_s = float(horizon_s or end_s - train_end_s)
    count_ages = [horizon_s, horizon_s / 2, 2 * horizon_s, None]
    past = _past_periods(interactions, end_s, horizon_s)
    periods = [(begin_s, _draw(held_out, max_requests, seed)) for begin_s, held_out in past]
    periods = periods or [(end_s_U, drawn)]
  organic = [{"organic_weight": weight} for weight in (0.0, 0.3, 1.0)]
  if interactions.is_ad_E.all():
    organic = []
  step_s = _basket_step_s(interactions, end_s_U)

  def popularity_recall(rule: PopularitySettings) -> float:
    settings = BaselineSettings(popularity=rule)
    recall = []
    for begin_s, held_out in periods:
      ranked_RK = popularity(
        interactions, held_out, settings=settings, num_ads=num_ads, k=k, train_end_s=begin_s
      )
      recall.append(recall_per_request(ranked_RK, held_out, k=k).mean())
    return np.mean(recall)

  popular = _climb(
    PopularitySettings(half_life_s=count_ages[0]),
    [*({"half_life_s": age} for age in count_ages), *organic],
    popularity_recall,
    "tuning popularity",
  )
  popular_A = popular_ads(interactions, num_ads, end_s_U=end_s_U, settings=popular)

  def own_recall(rule: OwnHistorySettings) -> float:
    settings = BaselineSettings(popularity=popular, own_history=rule)
    ranked_RK = own_history(
      interactions, drawn, settings=settings, num_ads=num_ads, k=k, train_end_s=end_s_U
    )
    return recall_per_request(ranked_RK, drawn, k=k).mean()

  own = _climb(
    OwnHistorySettings(half_life_s=32 * step_s),
    [*({"half_life_s": x and x * step_s} for x in (8, 128, None)), *organic],
    own_recall,
    "tuning own history",
  )

  # Counting takes most of the time, and several trials share their pairs.
  @lru_cache(maxsize=2)
  def pairs(**rule: Any):
    return count_pairs(interactions, num_ads=num_ads, end_s_U=end_s_U, **rule)

  def cooccurrence_recall(rule: CooccurrenceSettings) -> float:
    counts = pairs(
      half_life_s=rule.count_half_life_s, organic_weight=rule.organic_weight,
      window=rule.window, backward_weight=rule.backward_weight,
    )  # fmt: skip
    ranked_RK = rank_by_similarity(
      interactions, drawn, similar_AA=similar_ads(counts, rule),
      half_life_s=rule.history_half_life_s, organic_weight=rule.organic_weight,
      popular_A=popular_A, k=k,
    )  # fmt: skip
    return recall_per_request(ranked_RK, drawn, k=k).mean()

  together = _climb(
    CooccurrenceSettings(
      count_half_life_s=count_ages[0], history_half_life_s=8 * step_s,
      organic_weight=own.organic_weight,
    ),
    [
      {"window": 1},
      {"backward_weight": 1.0},
      *({"count_half_life_s": age} for age in count_ages),
      *({"powers": powers} for powers in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.5), (0.0, 0.5))),
      *({"history_half_life_s": x and x * step_s} for x in (1, 2, 32, None)),
    ],
    cooccurrence_recall,
    "tuning co-occurrence",
  )  # fmt: skip
  return BaselineSettings(popularity=popular, cooccurrence=together, own_history=own)


def _climb(
  settings: SettingsT,
  changes: Sequence[dict[str, Any]],
  score: Callable[[SettingsT], float],
  description: str,
) -> SettingsT:
  """Applies one change after the other and keeps those that raise the score."""
  best = score(settings)
  for change in track(changes, description):
    trial = replace(settings, **change)
    if trial != settings and (trial_score := score(trial)) > best:
      settings, best = trial, trial_score
  return settings


def _draw(requests: EvalRequests, count: int, seed: int) -> EvalRequests:
  chosen_R = np.random.default_rng(seed).permutation(len(requests.user_R))[:count]
  return EvalRequests(*(getattr(requests, field.name)[chosen_R] for field in fields(requests)))


def _past_periods(
  interactions: Interactions, end_s: int, horizon_s: float
) -> list[tuple[int, EvalRequests]]:
  """Periods of `horizon_s` up to end_s with a past as long; their baskets of ad events."""
  periods = []
  earliest_s = interactions.time_s_E.min() + horizon_s
  for number in range(1, _MAX_PERIODS + 1):
    begin_s = int(end_s - number * horizon_s)
    rows = (interactions.time_s_E >= begin_s) & (interactions.time_s_E < begin_s + horizon_s)
    rows = np.flatnonzero(rows & interactions.is_ad_E)
    if begin_s < earliest_s or not len(rows):
      break
    baskets = np.stack([interactions.user_E[rows], interactions.time_s_E[rows]])
    baskets, of_N = np.unique(baskets, axis=1, return_inverse=True)
    pair_N = np.unique(np.stack([of_N, interactions.ad_E[rows]]), axis=1)
    length_R = np.bincount(pair_N[0])
    column_N = np.arange(pair_N.shape[1]) - np.repeat(np.cumsum(length_R) - length_R, length_R)
    target_RC = np.full((len(length_R), length_R.max()), -1, np.int32)
    target_RC[pair_N[0], column_N] = pair_N[1]
    periods.append((begin_s, EvalRequests(
      baskets[0].astype(np.int32), baskets[1], target_RC,
      np.zeros(target_RC.shape, np.float32), np.zeros(target_RC.shape, bool),
    )))  # fmt: skip
  return periods


def _basket_step_s(interactions: Interactions, end_s_U: np.ndarray) -> float:
  """Median time between neighbouring baskets of a user; 1 s where nobody has two."""
  past = interactions.time_s_E < end_s_U[interactions.user_E]
  step_s = np.diff(interactions.time_s_E[past])
  step_s = step_s[(np.diff(interactions.user_E[past]) == 0) & (step_s > 0)]
  return float(np.median(step_s)) if len(step_s) else 1.0
