"""The report's parts that judge a run: metrics, loss curves, semantic IDs, users."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gr4ad_jax.report.page import (
  MISSING,
  Html,
  details,
  integer,
  join,
  number,
  percent,
  section,
  table,
  tag,
)
from gr4ad_jax.report.plots import Interval, Line, interval_plot, key, line_plot
from gr4ad_jax.report.tokenizer_report import headline, lines_tables
from gr4ad_jax.report.verdict import (
  METRICS,
  SCOPES,
  Comparison,
  Outcome,
  baseline_label,
  baseline_names,
  interval_of,
  methods,
)
from gr4ad_jax.tokenizer.health_line import HealthLine

# Metric -> (column, one sentence); what the verdict rests on comes first.
_METRICS = {
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
_LOSSES = {
  "loss": ("Total loss", "the weighted sum that training minimises"),
  "sid_loss": ("Semantic-ID loss", "surprise at the ad engaged with, in nats"),
  "ecpm_loss": ("Value loss", "surprise at the bucket of its value, in nats"),
  "mtp_loss": ("Auxiliary loss", "the same, by the layers without tokens"),
}
_OPTIMISATION = {
  "grad_norm": "Gradient norm",
  "learning_rate": "Learning rate",
  "examples_per_second": "Examples per second",
}


def metrics_section(metrics: Mapping[str, float], comparisons: Sequence[Comparison]) -> Html:
  """Two tables (all targets, new targets), the comparisons, a plot, and what the metrics mean.

  Args:
    metrics: flat name -> number.
    comparisons: of these metrics.
  """
  names = baseline_names(metrics)
  rows = [(label[0].upper() + label[1:], prefix) for label, prefix in methods(metrics).items()]
  parts = [
    tag("p", "Every method ranks the whole catalogue for the same held-out requests. The best of a "
        "column is bold; the small range is its 95% interval, from resampled users."),
  ]
  for scope, words in SCOPES.items():
    content = _metric_table(metrics, rows, scope)
    if content:
      parts += [tag("h3", words.removeprefix("over ").capitalize()), content]
  if "without_bonus/recall@50" in metrics:
    parts.append(tag(
      "p", "This run is set to prefer ads that are new to the user (search.new_ad_bonus); without "
      "that bonus, the same beams repeat more of what the user bought.", class_="soft"))
  if "own_history" in names:
    parts.append(tag(
      "p", "Own history ranks the ads that the user already engaged with. Among targets new to the "
      "user it can only be right by the popular ads that fill up its list.", class_="soft"))
  parts += [_comparison_table(comparisons), _interval_plots(metrics, rows)]
  shown = [m for m in _METRICS if m in metrics]
  meanings = [tag("div", tag("dt", _METRICS[m][0]), tag("dd", _METRICS[m][1])) for m in shown]
  parts += [tag("h3", "What the metrics mean"), tag("dl", *meanings, class_="columns")]
  return section("metrics", "Metrics", *parts)


def _metric_table(
  metrics: Mapping[str, float], methods: Sequence[tuple[str, str]], scope: str
) -> Html | None:
  columns = [m for m in _METRICS if any(p + scope + m in metrics for _, p in methods)]
  if not columns:
    return None
  best = {
    m: max(metrics[p + scope + m] for _, p in methods if p + scope + m in metrics) for m in columns
  }
  rows = []
  for label, prefix in methods:
    cells = []
    for m in columns:
      estimate = interval_of(metrics, prefix + scope + m)
      if estimate is None:
        cells.append(tag("td", MISSING))
        continue
      text = f"{estimate.value:.3f}" if m.startswith("ndcg") else percent(estimate.value)
      cells.append(tag(
        "td", text, _range(estimate), class_="best" if estimate.value == best[m] else None,
        title=f"{prefix}{scope}{m} = {estimate.value:.6g}",
      ))  # fmt: skip
    rows.append([label, *cells])
  return table(["", *(_METRICS[m][0] for m in columns)], rows, class_="metrics ours")


def _range(estimate: Interval) -> Html | None:
  if estimate.low is None or estimate.high is None:
    return None
  return tag("small", f"{percent(estimate.low).removesuffix('%')}–{percent(estimate.high)}")


def _comparison_table(comparisons: Sequence[Comparison]) -> Html | None:
  """Ours minus each baseline, with the outcome in words."""
  if not comparisons:
    return None
  places = list(dict.fromkeys((c.scope, c.metric) for c in comparisons))
  rows = []
  for name in dict.fromkeys(c.baseline for c in comparisons):
    found = {(c.scope, c.metric): c for c in comparisons if c.baseline == name}
    rows.append([
      baseline_label(name).capitalize(),
      *(_comparison_cell(found[place]) if place in found else MISSING for place in places),
    ])  # fmt: skip
  head = [
    f"{_METRICS[m][0]}, {'new' if scope else 'all'} targets" for scope, m in places
  ]
  return join([
    tag("h3", "GR4AD minus baseline"),
    tag("p", "In percentage points. Above and below: the two intervals in the tables do not "
        "overlap. Paired: they do, but that of the difference excludes 0.", class_="soft"),
    table(["", *head], rows, class_="metrics"),
  ])  # fmt: skip


def _comparison_cell(comparison: Comparison) -> Html:
  words, style = _OUTCOMES[comparison.outcome]
  difference = comparison.difference
  interval = None
  if difference.low is not None and difference.high is not None:
    interval = tag("small", f"{_points(difference.low)} to {_points(difference.high)}")
  return tag("td", _points(difference.value), interval, tag("small", words, class_=style))


def _points(difference: float) -> str:
  text = f"{100 * difference:+.1f}".replace("-", "−")
  return "0.0" if text[1:] == "0.0" else text


def _interval_plots(
  metrics: Mapping[str, float], methods: Sequence[tuple[str, str]]
) -> Html | None:
  figures = []
  for m in METRICS:
    rows = [
      (label, interval_of(metrics, prefix + m), interval_of(metrics, f"{prefix}new/{m}"))
      for label, prefix in methods
    ]
    if any(estimate for _, *pair in rows for estimate in pair):
      title = f"{_METRICS[m][0]} with 95% intervals"
      caption = tag("figcaption", tag("b", title))
      figures.append(tag("figure", caption, interval_plot(rows, title=title)))
  if not figures:
    return None
  legend = tag(
    "p", key("all targets", "other", filled=True), key("targets new to the user", "other",
                                                         filled=False), class_="soft",
  )  # fmt: skip
  return join([tag("h3", "The two main metrics"), legend, tag("div", *figures, class_="plots")])


def training_section(
  log: Sequence[Mapping[str, Any]], checkpoint_step: float | None
) -> Html:
  """Loss curves of training and validation.

  Args:
    log: rows of train_log.jsonl, at least one.
    checkpoint_step: the step that was evaluated, marked in the plots.
  """
  plots = []
  for name, (title, explanation) in _LOSSES.items():
    lines = _lines(log, name)
    if lines and any(line.y != [0.0] * len(line.y) for line in lines):
      plots.append(_curve(lines, title, explanation, checkpoint_step))
  legend = [key("training", "first")]
  if any(row["kind"] == "validation" for row in log):
    legend.append(key("validation", "second", filled=True))
  if checkpoint_step is not None:
    legend.append(tag("span", f"dashed: evaluated checkpoint, step {integer(checkpoint_step)}"))
  extra = [
    _curve(lines, title, None, checkpoint_step)
    for name, title in _OPTIMISATION.items() if (lines := _lines(log, name))
  ]
  return section(
    "training", "Training", tag("p", _training_verdict(log, checkpoint_step)),
    tag("p", *legend, class_="soft"), tag("div", *plots, class_="plots"),
    details("Gradient norm, learning rate, speed", tag("div", *extra, class_="plots"))
    if extra else None,
  )  # fmt: skip


def _lines(log: Sequence[Mapping[str, Any]], name: str) -> list[Line]:
  lines = []
  for kind, style in (("train", "first"), ("validation", "second")):
    rows = [r for r in log if r["kind"] == kind and math.isfinite(r.get(name, math.nan))]
    if rows:
      lines.append(Line(kind, [r["step"] for r in rows], [r[name] for r in rows], style))
  return lines


def _curve(lines, title: str, explanation: str | None, checkpoint_step: float | None) -> Html:
  caption = tag("figcaption", tag("b", title), f": {explanation}" if explanation else None)
  return tag("figure", caption, line_plot(lines, title=title, mark_x=checkpoint_step))


def _training_verdict(log: Sequence[Mapping[str, Any]], checkpoint_step: float | None) -> str:
  last_step = max(row["step"] for row in log)
  rows = [r for r in log if r["kind"] == "validation" and math.isfinite(r.get("loss", math.nan))]
  if not rows:
    return f"Trained to step {integer(last_step)}; no validation loss was measured."
  best, last = min(rows, key=lambda r: r["loss"]), rows[-1]
  text = (
    f"Trained to step {integer(last_step)}. The validation loss was lowest at step "
    f"{integer(best['step'])} ({number(best['loss'], 4)})"
  )
  if best is last:
    text += (
      ", the last one measured: more steps may still help." if len(rows) > 1
      else ", the only one measured."
    )  # fmt: skip
  else:
    text += (
      f" and {number(last['loss'], 4)} at the end: steps after the lowest point did not help on "
      "data that the model had not seen."
    )
  if checkpoint_step is not None and checkpoint_step != best["step"]:
    text += f" The numbers of this page are of step {integer(checkpoint_step)}."
  return text


def health_section(health: Mapping[str, Any]) -> Html:
  """What the codes do to the ads, one plain verdict a line.

  Args:
    health: from `health_verdicts.as_record`.
  """
  lines = [HealthLine(**line) for line in health["lines"]]
  sentence, _ = headline(lines)
  return section(
    "tokenizer", "Semantic IDs",
    tag("p", "Each ad is written as a short sequence of codes, its semantic ID (SID); the model "
        "generates codes, and an index turns them into ads. Fine, look, will hurt: rules of "
        "thumb."),
    tag("p", sentence),
    *lines_tables(lines),
  )  # fmt: skip
