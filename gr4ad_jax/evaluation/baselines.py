"""Popularity, item-to-item co-occurrence and own history: what a model has to beat.

All three see only the past: counts over all users come from events before `train_end_s`, a
request's history from its user's events strictly before the request. Lists are full: ads with equal
scores, zero included, follow in the order of popularity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.evaluation.interactions import (
  Interactions,
  PairCounts,
  count_ads,
  count_histories,
  count_pairs,
)
from gr4ad_jax.evaluation.ranking import EvalRequests, recall_per_request
from gr4ad_jax.progress import track

_DAY_S = 86_400
_MAX_CELLS = 1 << 23  # scores held at once, requests x ads
_NEVER_S = np.iinfo(np.int64).max

# What `tune_baselines` tries, in this order.
_ORGANIC_WEIGHTS = (0.3, 0.0, 1.0)
_POWERS = ((1.0, 0.25), (1.0, 0.0), (1.0, 0.4), (0.5, 0.5), (0.0, 0.5))
_WINDOWS = (4, 1)
_NUM_PERIODS = 6


@dataclass(frozen=True)
class PopularitySettings:
  """An event counts 0.5 ** (its age at train_end_s / half-life)."""

  half_life_s: float | None = 28 * _DAY_S
  """None: events do not age."""
  organic_weight: float = 0.0
  """What an organic event counts beside 1 for an ad event."""


@dataclass(frozen=True)
class OwnHistorySettings:
  """Score of an ad: its events in the user's past, each 0.5 ** (age at the request / half-life)."""

  half_life_s: float | None = 112 * _DAY_S
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
  count_half_life_s: float | None = 28 * _DAY_S
  """Pairs and baskets age to train_end_s; None: they do not."""
  history_half_life_s: float | None = 28 * _DAY_S
  organic_weight: float = 0.3
  neighbours: int = 200
  """Largest entries pairs_ij / norm_ij kept per ad i."""


@dataclass(frozen=True)
class BaselineSettings:
  """Settings of the three baselines; `tune_baselines` chooses them."""

  popularity: PopularitySettings = PopularitySettings()
  cooccurrence: CooccurrenceSettings = CooccurrenceSettings()
  own_history: OwnHistorySettings = OwnHistorySettings()


def popularity(
  interactions: Interactions,
  requests: EvalRequests,
  *,
  settings: BaselineSettings,
  num_ads: int,
  k: int,
  train_end_s: float | np.ndarray | None,
) -> np.ndarray:
  """The ads with most events of late, the same for every request.

  Args:
    interactions: engagements of all users; those of the future may be among them.
    requests: R requests, none before train_end_s.
    settings: of all three baselines.
    num_ads: ads of the catalogue.
    k: length of the lists.
    train_end_s: unix s, events from then on do not enter counts over all users. One for all; or one
      per user, int64 [num_users]; or None, leave-one-out: the first request of each user, and no
      end for users without a request.

  Returns:
    ranked_RK: int32 ad indices, best first; -1 beyond the catalogue.

  Raises:
    ValueError: an ad outside the catalogue, a request before train_end_s.
  """
  end_s_U = _end_s_of_users(interactions, requests, num_ads, train_end_s)
  popular_A = _popular_ads(interactions, num_ads, end_s_U, settings.popularity)
  ranked_RK = np.full((len(requests.user_R), k), -1, np.int32)
  ranked_RK[:, :num_ads] = popular_A[:k]
  return ranked_RK


def own_history(
  interactions: Interactions,
  requests: EvalRequests,
  *,
  settings: BaselineSettings,
  num_ads: int,
  k: int,
  train_end_s: float | np.ndarray | None,
) -> np.ndarray:
  """The ads that the user engaged with most and most recently, then the popular ones.

  Args, Returns, Raises: as `popularity`. The history ends at the request, not at train_end_s.
  """
  end_s_U = _end_s_of_users(interactions, requests, num_ads, train_end_s)
  popular_A = _popular_ads(interactions, num_ads, end_s_U, settings.popularity)
  own = settings.own_history
  unchanged_AA = sp.eye_array(num_ads, dtype=np.float32, format="csr")
  return _rank_histories(
    interactions, requests, own.half_life_s, own.organic_weight, unchanged_AA, popular_A, k
  )


def cooccurrence(
  interactions: Interactions,
  requests: EvalRequests,
  *,
  settings: BaselineSettings,
  num_ads: int,
  k: int,
  train_end_s: float | np.ndarray | None,
) -> np.ndarray:
  """The ads that users engage with around those of the user's past, then the popular ones.

  A repeat is a pair like any other: an ad of the past is recommended as far as users come back to
  it in another basket.

  Args, Returns, Raises: as `popularity`. The history ends at the request, not at train_end_s.
  """
  end_s_U = _end_s_of_users(interactions, requests, num_ads, train_end_s)
  popular_A = _popular_ads(interactions, num_ads, end_s_U, settings.popularity)
  rule = settings.cooccurrence
  counts = count_pairs(
    interactions, num_ads=num_ads, end_s_U=end_s_U, half_life_s=rule.count_half_life_s,
    organic_weight=rule.organic_weight, window=rule.window, backward_weight=rule.backward_weight,
  )  # fmt: skip
  return _rank_histories(
    interactions, requests, rule.history_half_life_s, rule.organic_weight,
    _similar_ads(counts, rule), popular_A, k,
  )  # fmt: skip


def rank_all(
  interactions: Interactions,
  requests: EvalRequests,
  *,
  settings: BaselineSettings,
  num_ads: int,
  k: int,
  train_end_s: float | np.ndarray | None,
) -> dict[str, np.ndarray]:
  """The lists of all three by name: popularity, cooccurrence, own_history. Args as `popularity`."""
  return {
    baseline.__name__: baseline(
      interactions, requests, settings=settings, num_ads=num_ads, k=k, train_end_s=train_end_s
    )
    for baseline in track((popularity, cooccurrence, own_history), "baselines")
  }


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

  One pass over one setting after the other keeps what helps. What sells in one period says little
  of the next, so popularity is judged on several periods that end with the validation requests.

  Args:
    interactions: engagements of all users; those of the future may be among them.
    requests: validation requests.
    num_ads: ads of the catalogue.
    k: length of the lists.
    train_end_s: as in `popularity`. Unless it is one time for all, times are taken for the order
      inside a user only, and counts over users do not age.
    horizon_s: how long counts stay as they are in the end, the length of the test split; None = the
      length of the validation split.
    max_requests: that many are drawn for co-occurrence and own history.
    seed: of that draw.

  Returns:
    The settings.

  Raises:
    ValueError: as `popularity`.
  """
  end_s_U = _end_s_of_users(interactions, requests, num_ads, train_end_s)
  last_s = int(requests.time_s_R.max())
  clock = train_end_s is not None and np.ndim(train_end_s) == 0
  if horizon_s is None and clock:
    horizon_s = last_s + 1 - train_end_s
  count_half_lives = (horizon_s, horizon_s / 2, 2 * horizon_s, None) if clock else (None,)
  organic_weights = (1.0,) if interactions.is_ad_E.all() else _ORGANIC_WEIGHTS
  step_s = _basket_step_s(interactions, end_s_U)

  popular = _tune_popularity(...)
