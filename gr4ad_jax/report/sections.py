"""What the run's page shows of metrics and training: tables, plots, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gr4ad_jax.report.page import integer, number, percent, points
from gr4ad_jax.report.plots import Figure, Line, interval_plot, line_plot
from gr4ad_jax.report.verdict import (
  METRICS,
  SCOPES,
  Comparison,
  Outcome,
  baseline_label,
  interval_of,
)

# Metric -> (column, one sentence); what the verdict rests on comes first.
MEANINGS = {
  "recall@50": (
    "Recall@50",
    "Of the ads that the user then engaged with, the share that is among the 50 ads generated for "
    "the request; mean over requests.",
  ),
  "value_recall@50": (
    "Value recall@50",
    "Of the money in those engagements, the share that belongs to ads among the 50; summed over "
    "all requests.",
  ),
  "recall@10": ("Recall@10", "The same as recall@50 with a list of 10."),
  "ndcg@10": (
    "NDCG@10",
    "Like recall@10, but an ad found near the top counts more; 1 = everything at the very top.",
  ),
  "ndcg@50": ("NDCG@50", "The same with a list of 50."),
  "advertiser_coverage@50": (
    "Advertiser coverage@50",
    "Share of all advertisers with an ad in at least one list of 50: how widely ads are spread, "
    "not how good they are.",
  ),
}
_OUTCOMES = {
  Outcome.ABOVE: ("above", "good"),
  Outcome.ABOVE_PAIRED: ("above (paired)", "good"),
  Outcome.UNDECIDED: ("no clear difference", "fair"),
  Outcome.BELOW_PAIRED: ("below (paired)", "poor"),
  Outcome.BELOW: ("below", "poor"),
}
_CURVES = {
  "loss": ("Total loss", "the weighted sum that training minimises"),
  "logged_loss": (
    "Loss on logged samples", "the same without candidate lists, which validation does not have"
  ),
  "sid_loss": ("Semantic-ID loss", "surprise at the ad engaged with, in nats"),
  "ecpm_loss": ("Value loss", "surprise at the bucket of its value, in nats"),
  "mtp_loss": ("Auxiliary loss", "the same, by the layers without tokens"),
  "grad_norm": ("Gradient norm", ""),
}
OPTIMISATION = ("grad_norm", "learning_rate", "examples_per_second")


class Cell(NamedTuple):
  """A number of a table with small (text, style) lines under it."""

  text: str
  below: list[tuple[str, str]]
  best: bool = False
  title: str | None = None


class CellTable(NamedTuple):
  """Rows of a name and cells; None where nothing was measured."""

  columns: list[str]
  rows: list[tuple[str, list[Cell | None]]]


def metric_tables(
  metrics: Mapping[str, float], prefixes: Mapping[str, str]
) -> dict[str, CellTable]:
  """Heading -> every method by every metric, of all targets and of prospecting.

  Args:
    metrics: flat name -> number, as `evaluate` writes them.
    prefixes: from `verdict.methods`.
  """
  tables = {}
  for scope, words in SCOPES.items():
    best = {}
    for name in MEANINGS:
      found = [metrics[p + scope + name] for p in prefixes.values() if p + scope + name in metrics]
      if found:
        best[name] = max(found)
    rows = [
      (label[0].upper() + label[1:],
       [_metric_cell(metrics, prefix + scope + name, name, best[name]) for name in best])
      for label, prefix in prefixes.items()
    ]  # fmt: skip
    if best:
      tables[_heading(words)] = CellTable([MEANINGS[name][0] for name in best], rows)
  return tables


def _heading(words: str) -> str:
  """A scope without its preposition."""
  return words.split(" ", 1)[1].capitalize()


def _metric_cell(metrics: Mapping[str, float], key: str, name: str, best: float) -> Cell | None:
  estimate = interval_of(metrics, key)
  if estimate is None:
    return None
  text = f"{estimate.value:.3f}" if name.startswith("ndcg") else percent(estimate.value)
  below = []
  if estimate.known:
    below = [(f"{percent(estimate.low).removesuffix('%')}–{percent(estimate.high)}", "")]
  return Cell(text, below, estimate.value == best, f"{key} = {estimate.value:.6g}")


def comparison_table(comparisons: Sequence[Comparison]) -> CellTable:
  """Ours minus each baseline, with the outcome in words."""
  cells: dict[str, dict[tuple[str, str], Cell]] = {}
  for comparison in comparisons:
    difference, outcome = comparison.difference, _OUTCOMES[comparison.outcome]
    below = [outcome]
    if difference.known:
      below = [(f"{points(difference.low)} to {points(difference.high)}", ""), outcome]
    place = comparison.scope, comparison.metric
    cells.setdefault(comparison.baseline, {})[place] = Cell(points(difference.value), below)
  places = list(dict.fromkeys((c.scope, c.metric) for c in comparisons))
  return CellTable(
    [f"{MEANINGS[metric][0]}, {_heading(SCOPES[scope]).lower()}" for scope, metric in places],
    [
      (baseline_label(name).capitalize(), [found.get(place) for place in places])
      for name, found in cells.items()
    ],
  )


def interval_figures(metrics: Mapping[str, float], prefixes: Mapping[str, str]) -> list[Figure]:
  """The metrics of the verdict with their intervals; arguments as `metric_tables`."""
  figures = []
  for name in METRICS:
    rows = [
      (label[0].upper() + label[1:], interval_of(metrics, prefix + name),
       interval_of(metrics, f"{prefix}prospecting/{name}"))
      for label, prefix in prefixes.items()
    ]  # fmt: skip
    if any(estimate for _, *pair in rows for estimate in pair):
      title = f"{MEANINGS[name][0]} with 95% intervals"
      figures.append(Figure(title, "", interval_plot(rows, title=title)))
  return figures


def loss_curves(log: Sequence[Mapping[str, Any]], step: float | None) -> list[Figure]:
  """A plot of each loss that was logged, the known ones first, and of what searches found.

  Args:
    log: rows of train_log.jsonl.
    step: the step that was evaluated, marked in the plots.
  """
  logged = [*_CURVES, *(name for row in log for name in row)]
  if "logged_loss" in logged[len(_CURVES):]:
    # Training's total counts candidate lists, too: validation's is not to be held against it.
    log = [{k: x for k, x in row.items() if k != "loss" or row["kind"] == "train"} for row in log]
  drawn = (name for name in logged if name.endswith("loss") or "@" in name)
  return curves(log, dict.fromkeys(drawn), step)


def curves(
  log: Sequence[Mapping[str, Any]], names: Iterable[str], step: float | None
) -> list[Figure]:
  """A plot of each of these numbers, but for those that are absent or 0 throughout."""
  figures = []
  for name in names:
    title, caption = _CURVES.get(name, (name.replace("_", " ").capitalize(), ""))
    lines = []
    for kind, style in (("train", "first"), ("validation", "second")):
      rows = [r for r in log if r["kind"] == kind and math.isfinite(r.get(name, math.nan))]
      if rows:
        lines.append(Line(kind, [r["step"] for r in rows], [r[name] for r in rows], style))
    if any(y != 0 for line in lines for y in line.y):
      figures.append(Figure(title, caption, line_plot(lines, title=title, mark_x=step)))
  return figures


def training_verdict(log: Sequence[Mapping[str, Any]], step: float | None) -> str:
  """What the validation losses say, in a sentence or two; arguments as `loss_curves`."""
  last_step = integer(max(row["step"] for row in log))
  rows = [r for r in log if r["kind"] == "validation" and math.isfinite(r.get("loss", math.nan))]
  if not rows:
    return f"Trained to step {last_step}; no validation loss was measured."
  best, last = min(rows, key=lambda r: r["loss"]), rows[-1]
  text = (
    f"Trained to step {last_step}. The validation loss was lowest at step {integer(best['step'])} "
    f"({number(best['loss'], 4)})"
  )
  if best is not last:
    text += (
      f" and {number(last['loss'], 4)} at the end: steps after the lowest point did not help on "
      "data that the model had not seen."
    )
  elif len(rows) > 1:
    text += ", the last one measured: more steps may still help."
  else:
    text += ", the only one measured."
  if step is not None and step != best["step"]:
    text += f" The numbers of this page are of step {integer(step)}."
  return text
