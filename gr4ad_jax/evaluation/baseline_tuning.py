"""Chooses the settings of the baselines on validation requests and the time before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from gr4ad_jax.data.interactions import Interactions, PairCounts, count_histories, count_pairs
from gr4ad_jax.evaluation.baseline_settings import (
  BaselineSettings,
  CooccurrenceSettings,
  CounterSettings,
  OwnHistorySettings,
  PopularitySettings,
  RuleSettings,
  TrendingSettings,
)
from gr4ad_jax.evaluation.baselines import own_history, popular_ads, popularity, rank_by_pairs
from gr4ad_jax.evaluation.counter import (
  ScoreParts,
  Transitions,
  count_transitions,
  rank_by_transitions,
  score_parts,
)
from gr4ad_jax.evaluation.question import Question, draw_requests
from gr4ad_jax.evaluation.rule import rank_by_rule, shares_of, trending
from gr4ad_jax.machine.progress import track
from gr4ad_jax.search.ranking import EvalRequests, only_new, recall_per_request

SettingsT = TypeVar("SettingsT")

TRENDING_DAYS = (1.5, 0.25, 0.5, 3.0, 7.0, 14.0, 28.0)
_TRENDING_WEIGHTS = (0.0, 1.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 1000.0)
_MAX_PERIODS = 6
_MAX_REQUESTS = 1000  # drawn to judge on


@dataclass(frozen=True)
class _Trials:
  """What settings are tried on.

  Attributes:
    question: of validation requests, of which some are drawn.
    periods: the same of several periods, for counts over all users.
    count_ages: half-lives of such counts, None = they do not age.
    organic: changes of a weight of organic events.
    step_s: time between neighbouring baskets of a user.
    known: settings chosen for all targets, where these are for new ones.
  """

  question: Question
  periods: list[Question]
  count_ages: list[float | None]
  organic: list[dict[str, float]]
  step_s: float
  known: BaselineSettings | None


def tune_baselines(
  question: Question, *, horizon_s: float | None = None, known: BaselineSettings | None = None
) -> BaselineSettings:
  """Settings with the best mean recall@k on validation requests; nothing later is looked at.

  One setting after the other is tried, and kept where it helps. What sells in one period says
  little of the next, so popularity is judged on several periods, the last of which ends with the
  validation requests.

  Args:
    question: of validation requests. Unless its train_end_s is one time for all, times are taken
      to tell the order inside a user only, and counts over users do not age.
    horizon_s: for how long counts will be used unchanged, the length of the test split; None = the
      length of the validation split.
    known: settings chosen for all targets, where the question is for new ones. What takes longest
      to choose, which pairs of ads are counted, is taken from them.

  Raises:
    ValueError: as `baselines.popularity`; a horizon that is not positive; nothing new to find for
      lists without what was seen.
  """
  if horizon_s is not None and not horizon_s > 0:
    raise ValueError(f"horizon_s = {horizon_s} must be positive")
  trials = _trials(question, horizon_s, known)
  popular = _climb(
    PopularitySettings(half_life_s=trials.count_ages[0]),
    [*({"half_life_s": age} for age in trials.count_ages), *trials.organic],
    lambda rule: np.mean(
      [_recall(period, popularity, BaselineSettings(popularity=rule)) for period in trials.periods]
    ),
    "tuning popularity",
  )
  own = _climb(
    OwnHistorySettings(half_life_s=32 * trials.step_s),
    [*({"half_life_s": x and x * trials.step_s} for x in (8, 128, None)), *trials.organic],
    lambda rule: _recall(
      trials.question, own_history, BaselineSettings(popularity=popular, own_history=rule)
    ),
    "tuning own history",
  )
  together = _tune_cooccurrence(trials, popular, own)
  settings = BaselineSettings(
    popular, together, own, _tune_counter(trials, popular, together),
    RuleSettings(own, trending_weight=0.0), trending=None,
  )
  return _with_trending(trials, settings) if question.times_are_real else settings


def _trials(
  question: Question, horizon_s: float | None, known: BaselineSettings | None
) -> _Trials:
  interactions, requests, end_s_U = question.interactions, question.requests, question.end_s_U
  # The ends stay those of all requests where some are drawn.
  judged = only_new(requests) if question.without_seen else requests
  trials = replace(question, requests=draw_requests(judged, _MAX_REQUESTS), train_end_s=end_s_U)
  count_ages, periods = [None], [trials]
  if question.times_are_real:
    end_s = int(requests.time_s_R.max()) + 1
    horizon_s = float(horizon_s or end_s - question.train_end_s)
    count_ages = [horizon_s, horizon_s / 2, 2 * horizon_s, None]
    past = [
      replace(question, requests=draw_requests(held_out, _MAX_REQUESTS), train_end_s=begin_s)
      for begin_s, held_out in _past_periods(question, end_s, horizon_s)
    ]
    periods = past or periods
  organic = [{"organic_weight": weight} for weight in (0.0, 0.3, 1.0)]
  if interactions.is_ad_E.all():
    organic = []
  step_s = _basket_step_s(interactions.before(end_s_U))
  return _Trials(trials, periods, count_ages, organic, step_s, known)


def _tune_cooccurrence(
  trials: _Trials, popular: PopularitySettings, own: OwnHistorySettings
) -> CooccurrenceSettings:
  question, step_s, known = trials.question, trials.step_s, trials.known
  popular_A = popular_ads(question, popular)
  first = known.cooccurrence if known else CooccurrenceSettings(
    count_half_life_s=trials.count_ages[0], history_half_life_s=8 * step_s,
    organic_weight=own.organic_weight,
  )  # fmt: skip
  counting = [
    {"window": 1}, {"backward_weight": 1.0},
    *({"count_half_life_s": age} for age in trials.count_ages),
  ]  # fmt: skip
  weights = [
    *({"powers": powers} for powers in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.5), (0.0, 0.5))),
    *({"history_half_life_s": x and x * step_s} for x in (1, 2, 32, None)),
  ]  # fmt: skip

  @lru_cache(maxsize=2)  # several trials in a row share their pairs, which take longest to count
  def pairs(**rule: Any) -> PairCounts:
    return count_pairs(
      question.interactions, num_ads=question.num_ads, end_s_U=question.end_s_U, **rule
    )

  def ranked(question: Question, rule: CooccurrenceSettings) -> np.ndarray:
    return rank_by_pairs(question, pairs(**rule.counting), rule, popular_A)

  return _climb(
    first, weights if known else counting + weights,
    lambda rule: _recall(question, ranked, rule), "tuning co-occurrence",
  )  # fmt: skip


def _tune_counter(
  trials: _Trials, popular: PopularitySettings, together: CooccurrenceSettings
) -> CounterSettings:
  """How fast pairs age, and what an organic event counts, is that of co-occurrence."""
  question, known = trials.question, trials.known
  popular_A = popular_ads(question, popular)
  first = known.counter if known else CounterSettings(
    count_half_life_s=together.count_half_life_s, organic_weight=together.organic_weight
  )
  counting = [{"backward_weight": 0.5}, *({"step_decay": decay} for decay in (0.5, 0.9))]
  weights = [
    {"source_power": 0.5, "content_weight": 0.1}, {"source_power": 1.0, "content_weight": 0.01},
    *({"content_weight": weight} for weight in (0.0, 0.01, 0.03, 0.1, 0.3, 3.0, 10.0)),
    {"content_shrinkage": 5.0},
    *({"hop_weight": weight} for weight in (0.0, 0.1, 0.3, 3.0)),
    *({"history_decay": decay} for decay in (0.4, 0.8, 0.95)),
  ]  # fmt: skip

  @lru_cache(maxsize=2)
  def transitions(**counting: Any) -> Transitions:
    return count_transitions(question, **counting)

  @lru_cache(maxsize=2)  # weights alone are tried many times
  def parts(unweighted: CounterSettings, begin: int, end: int) -> ScoreParts:
    return score_parts(
      question, unweighted, transitions(**unweighted.counting), slice(begin, end)
    )

  def ranked(question: Question, rule: CounterSettings) -> np.ndarray:
    unweighted = replace(rule, hop_weight=0.0, content_weight=0.0, content_shrinkage=0.0)
    return rank_by_transitions(
      question, rule, transitions(**rule.counting), popular_A,
      parts=lambda rows: parts(unweighted, rows.start, rows.stop),
    )

  # Twice, for what one weight is worth depends on the others.
  return _climb(
    first, 2 * weights if known else weights + counting + weights,
    lambda rule: _recall(question, ranked, rule), "tuning the counter",
  )  # fmt: skip


def _with_trending(trials: _Trials, settings: BaselineSettings) -> BaselineSettings:
  """Chooses the settings of trending ads alone, then those of the rule, from own history's."""
  question, half_lives = trials.question, [TrendingSettings(days) for days in TRENDING_DAYS]
  of_late = _climb(
    half_lives[0], [{"half_life_days": days} for days in TRENDING_DAYS[1:]],
    lambda rule: _recall(question, trending, replace(settings, trending=rule)), "tuning trending",
  )  # fmt: skip
  rule = RuleSettings(settings.own_history, of_late)
  if question.without_seen:  # the history's term counts only for ads that no list holds
    return replace(settings, rule=rule, trending=of_late)
  shares = lru_cache(shares_of(question))  # a few of them, asked for again and again
  popular_A = popular_ads(question, settings.popularity)

  def ranked(question: Question, rule: RuleSettings) -> np.ndarray:
    return rank_by_rule(question, rule, shares, popular_A)

  def recall(rule: RuleSettings) -> float:
    return _recall(question, ranked, rule)

  weights = [{"trending_weight": weight} for weight in _TRENDING_WEIGHTS]
  # What a weight is worth depends on the half-life, so that both are tried together at first.
  tried = [weight | {"trending": half_life} for half_life in half_lives for weight in weights]
  for _ in range(2):  # what one term is worth depends on the other
    rule = _climb(rule, tried, recall, "tuning the rule")
    tried = weights
    of_rule = rule
    own = _climb(
      rule.own_history,
      [*({"half_life_s": x and x * trials.step_s} for x in (8, 16, 32, 64, 128, None)),
       *trials.organic],
      lambda own, of_rule=of_rule: recall(replace(of_rule, own_history=own)),
      "tuning the rule's history",
    )  # fmt: skip
    rule = replace(rule, own_history=own)
  return replace(settings, rule=rule, trending=of_late)


def _recall(
  question: Question,
  baseline: Callable[[Question, SettingsT], np.ndarray],
  settings: SettingsT,
) -> float:
  """Mean recall@k of a baseline's lists."""
  ranked_RK = baseline(question, settings)
  return recall_per_request(ranked_RK, question.requests, k=question.k).mean()


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


def _past_periods(
  question: Question, end_s: int, horizon_s: float
) -> list[tuple[int, EvalRequests]]:
  """Periods of `horizon_s` up to end_s with a past as long; their baskets of ad events."""
  interactions, periods = question.interactions, []
  earliest_s = interactions.time_s_E.min() + horizon_s
  for number in range(1, _MAX_PERIODS + 1):
    begin_s = int(end_s - number * horizon_s)
    rows = (interactions.time_s_E >= begin_s) & (interactions.time_s_E < begin_s + horizon_s)
    rows = np.flatnonzero(rows & interactions.is_ad_E)
    if begin_s < earliest_s or not len(rows):
      break
    baskets = np.stack([interactions.user_E[rows], interactions.time_s_E[rows]])
    baskets, basket_of = np.unique(baskets, axis=1, return_inverse=True)
    pair_2P = np.unique(np.stack([basket_of, interactions.ad_E[rows]]), axis=1)
    length_R = np.bincount(pair_2P[0])  # P distinct pairs of (basket, ad), R baskets
    column_P = np.arange(pair_2P.shape[1]) - np.repeat(np.cumsum(length_R) - length_R, length_R)
    target_RC = np.full((len(length_R), length_R.max()), -1, np.int32)
    target_RC[pair_2P[0], column_P] = pair_2P[1]
    new_RC = np.zeros(target_RC.shape, bool)
    if question.without_seen:
      seen_RA = count_histories(
        interactions, user_R=baskets[0], time_s_R=baskets[1], num_ads=question.num_ads,
        half_life_s=None, organic_weight=1.0,
      )  # fmt: skip
      new_RC[pair_2P[0], column_P] = np.asarray(seen_RA[pair_2P[0], pair_2P[1]]).ravel() == 0
    held_out = EvalRequests(
      baskets[0].astype(np.int32), baskets[1], target_RC,
      np.zeros(target_RC.shape, np.float32), new_RC,
    )
    if not question.without_seen:
      periods.append((begin_s, held_out))
    elif new_RC.any():
      periods.append((begin_s, only_new(held_out)))
  return periods


def _basket_step_s(past: Interactions) -> float:
  """Median time between neighbouring baskets of a user; 1 s where nobody has two."""
  step_s = np.diff(past.time_s_E)
  step_s = step_s[(np.diff(past.user_E) == 0) & (step_s > 0)]
  return float(np.median(step_s)) if len(step_s) else 1.0
