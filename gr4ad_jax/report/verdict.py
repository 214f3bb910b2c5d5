"""Is the model better than the simple baselines? Comparisons of metrics.json and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from gr4ad_jax.report.page import listing
from gr4ad_jax.report.plots import Interval

METRICS = ("recall@50", "value_recall@50")
SCOPES = {"": "over all targets", "prospecting/": "in prospecting"}
_NAMES = {
  "popularity": "popularity", "cooccurrence": "co-occurrence", "own_history": "own history",
  "counter": "transition counter", "rule": "rule of two terms",
  "trees": "boosted trees", "trees_likeness": "boosted trees with likeness",
  "sasrec": "SASRec", "two_tower": "two towers", "gr4ad": "GR4AD", "gpr": "GPR",
  "hstu": "HSTU", "onerec": "OneRec",
}


class Outcome(IntEnum):
  """How ours stands to a baseline; the sign is the direction, 2 = separate intervals are apart."""

  BELOW = -2
  BELOW_PAIRED = -1
  UNDECIDED = 0
  ABOVE_PAIRED = 1
  ABOVE = 2


@dataclass(frozen=True)
class Comparison:
  """One metric of one baseline, beside ours."""

  scope: str
  """Prefix of the metric: a key of SCOPES."""
  metric: str
  """One of METRICS."""
  baseline: str
  difference: Interval
  """Ours minus theirs; its interval, where known, is from the same resampled users for both."""
  outcome: Outcome


def baseline_names(metrics: Mapping[str, float]) -> list[str]:
  """Baselines of these metrics: the known ones first, in their fixed order."""
  found = {key.split("/")[1] for key in metrics if key.startswith("baseline/")}
  return [name for name in _NAMES if name in found] + sorted(found - set(_NAMES))


def baseline_label(name: str) -> str:
  """The name of a baseline in words."""
  return _NAMES.get(name, name.replace("_", " "))


def methods(metrics: Mapping[str, float], *, system: str) -> dict[str, str]:
  """Label -> prefix of every ranked list that was measured, the system's own first."""
  return {system: ""} | {
    baseline_label(name): f"baseline/{name}/" for name in baseline_names(metrics)
  }


def interval_of(metrics: Mapping[str, float], key: str) -> Interval | None:
  """The metric with its interval, None where it was not measured."""
  if key not in metrics:
    return None
  return Interval(metrics[key], metrics.get(f"{key}/ci_low"), metrics.get(f"{key}/ci_high"))


def compare_with_baselines(metrics: Mapping[str, float]) -> list[Comparison]:
  """Every baseline, scope and metric that metrics.json holds.

  ABOVE: our whole interval lies above theirs. ABOVE_PAIRED: the two overlap, but the interval of
  the paired difference lies above 0. BELOW and BELOW_PAIRED likewise.

  Args:
    metrics: flat name -> number, as `evaluate` writes them.
  """
  comparisons = []
  for scope in SCOPES:
    for name in baseline_names(metrics):
      for metric in METRICS:
        ours = interval_of(metrics, scope + metric)
        theirs = interval_of(metrics, f"baseline/{name}/{scope}{metric}")
        if ours is None or theirs is None:
          continue
        difference = interval_of(metrics, f"difference/{name}/{scope}{metric}")
        difference = difference or Interval(ours.value - theirs.value)
        outcome = _outcome(ours, theirs, difference)
        comparisons.append(Comparison(scope, metric, name, difference, outcome))
  return comparisons


def _outcome(ours: Interval, theirs: Interval, difference: Interval) -> Outcome:
  if None not in (ours.low, theirs.high) and ours.low > theirs.high:
    return Outcome.ABOVE
  if None not in (ours.high, theirs.low) and ours.high < theirs.low:
    return Outcome.BELOW
  if difference.low is not None and difference.low > 0:
    return Outcome.ABOVE_PAIRED
  if difference.high is not None and difference.high < 0:
    return Outcome.BELOW_PAIRED
  return Outcome.UNDECIDED


def verdict(comparisons: Sequence[Comparison], *, system: str) -> tuple[str, str]:
  """The comparisons in one sentence.

  Args:
    comparisons: from `compare_with_baselines`.
    system: whose metrics they are.

  Returns:
    The sentence, and "good" (above every baseline everywhere, all intervals apart), "poor" (above
    none anywhere) or "fair" (between the two).
  """
  if not comparisons:
    return "There is no baseline to compare with in these metrics.", "fair"
  scopes = [scope for scope in SCOPES if any(c.scope == scope for c in comparisons)]
  measures = [m.replace("_", " ") for m in METRICS if any(c.metric == m for c in comparisons)]
  outcomes = {c.outcome for c in comparisons}
  won = outcomes == {Outcome.ABOVE}
  if won:
    names = list(dict.fromkeys(baseline_label(c.baseline) for c in comparisons))
    sentence = (
      f"{system} is clearly above every baseline ({listing(names)}) in {listing(measures)}, "
      f"{listing([SCOPES[scope] for scope in scopes])}."
    )
  else:
    clauses = [f"{SCOPES[scope]}, {_standing(comparisons, scope)}" for scope in scopes]
    sentence = f"In {listing(measures)}, {system} is, {'; '.join(clauses)}."
  missing = [words for scope, words in SCOPES.items() if scope not in scopes]
  if missing:
    sentence += f" Nothing was measured {listing(missing)}."
  return sentence, "good" if won else "fair" if max(outcomes) > 0 else "poor"


def _standing(comparisons: Sequence[Comparison], scope: str) -> str:
  """Baselines grouped by how ours stands to them, best news first."""
  groups: dict[tuple[int, str], list[str]] = {}
  for name in dict.fromkeys(c.baseline for c in comparisons if c.scope == scope):
    mine = {c.metric: c.outcome for c in comparisons if (c.scope, c.baseline) == (scope, name)}
    words = _direction(mine)
    groups.setdefault((-sum(mine.values()), words), []).append(baseline_label(name))
  return ", ".join(words.format(listing(names)) for (_, words), names in sorted(groups.items()))


def _direction(outcomes: Mapping[str, Outcome]) -> str:
  """How ours stands to one baseline over all measures; {} takes its name."""
  low, high = min(outcomes.values()), max(outcomes.values())
  if low > 0 or high < 0:
    clearly = "clearly" if min(abs(low), abs(high)) == 2 else "slightly"
    return f"{clearly} {'above' if low > 0 else 'below'} {{}}"
  if low == high == 0:
    return "not clearly different from {}"
  parts = [
    f"{'above' if outcome > 0 else 'below'} {{}} in {metric.replace('_', ' ')}"
    for metric, outcome in outcomes.items() if outcome != 0
  ]
  return parts[0] + " only" if len(parts) == 1 else f"{parts[0]} but {parts[1].replace(' {}', '')}"
