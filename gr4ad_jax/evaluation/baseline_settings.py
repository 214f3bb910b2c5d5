"""What the baselines can be set to; `baseline_tuning.tune_baselines` chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gr4ad_jax.data.records import DAY_S


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
class TrendingSettings:
  """Score of an ad: its share of all engagements with ads before the request's period."""

  half_life_days: float = 3.0
  """An engagement counts 0.5 ** (its age in days / half-life)."""


@dataclass(frozen=True)
class RuleSettings:
  """Score of an ad: that of `OwnHistorySettings` + trending_weight * that of `TrendingSettings`."""

  own_history: OwnHistorySettings = OwnHistorySettings()
  trending: TrendingSettings = TrendingSettings()
  trending_weight: float = 40.0
  """Events of an own history that a share of 1 is worth; 0 where no time is real."""


@dataclass(frozen=True)
class CounterSettings:
  """Score of ad j: sum over i of latest_i * following_ij, where

      following_ij = (pairs_ij + hop_weight * second_ij) / (pairs_i + 1) ** source_power
                     + content_weight * cosine_ij * pairs_j / (pairs_j + content_shrinkage)
      second_ij    = sum over n of pairs_in * pairs_nj / pairs_n

  latest is that of `interactions.count_latest`, pairs are those of `count_pairs` (pairs_i and
  pairs_n: all that begin there, pairs_j: all that lead to j), cosine is between the terms of both
  ads.
  """

  window: int = 5
  step_decay: float = 0.7
  backward_weight: float = 0.0
  count_half_life_s: float | None = None
  history_steps: int = 10
  history_decay: float = 0.6
  organic_weight: float = 1.0
  source_power: float = 0.0
  hop_weight: float = 1.0
  content_weight: float = 1.0
  content_shrinkage: float = 0.0
  """Where 0, every ad counts in full that some pair leads to, and no other."""
  neighbours: int = 300
  """Largest entries of pairs_ij, and of second_ij, kept per ad i."""

  @property
  def counting(self) -> dict[str, Any]:
    """The arguments of `counter.count_transitions`."""
    return {
      "half_life_s": self.count_half_life_s, "organic_weight": self.organic_weight,
      "window": self.window, "backward_weight": self.backward_weight,
      "step_decay": self.step_decay, "neighbours": self.neighbours,
    }  # fmt: skip


@dataclass(frozen=True)
class BaselineSettings:
  """Settings of all baselines."""

  popularity: PopularitySettings = PopularitySettings()
  cooccurrence: CooccurrenceSettings = CooccurrenceSettings()
  own_history: OwnHistorySettings = OwnHistorySettings()
  counter: CounterSettings = CounterSettings()
  rule: RuleSettings = RuleSettings()
  trending: TrendingSettings | None = TrendingSettings()
  """None: no list of trending ads, for times tell only the order inside a user."""
