"""Pieces of the report: one comparison, the plots, escaping, numbers for people."""

import re

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from gr4ad_jax.report.page import (
  amount,
  compact,
  duration,
  integer,
  listing,
  number,
  percent,
  points,
  render,
)
from gr4ad_jax.report.plots import Interval, Line, interval_plot, line_plot, ticks
from gr4ad_jax.report.verdict import Outcome, compare_with_baselines


@pytest.mark.parametrize(
  ("ours", "theirs", "difference", "outcome"),
  [
    (0.35, 0.32, (0.02, 0.04), Outcome.ABOVE),
    (0.34, 0.33, (0.005, 0.015), Outcome.ABOVE_PAIRED),
    (0.34, 0.33, (-0.005, 0.025), Outcome.UNDECIDED),
    (0.34, 0.33, None, Outcome.UNDECIDED),
    (0.33, 0.34, (-0.015, -0.005), Outcome.BELOW_PAIRED),
    (0.32, 0.35, None, Outcome.BELOW),
    (0.34, 0.32, None, Outcome.UNDECIDED),  # the intervals touch at 0.33
  ],
)
def test_outcome_of_one_comparison(ours, theirs, difference, outcome):
  metrics = {
    "recall@50": ours, "recall@50/ci_low": round(ours - 0.01, 9),
    "recall@50/ci_high": round(ours + 0.01, 9),
    "baseline/popularity/recall@50": theirs,
    "baseline/popularity/recall@50/ci_low": round(theirs - 0.01, 9),
    "baseline/popularity/recall@50/ci_high": round(theirs + 0.01, 9),
  }  # fmt: skip
  if difference:
    metrics["difference/popularity/recall@50"] = ours - theirs
    metrics["difference/popularity/recall@50/ci_low"] = difference[0]
    metrics["difference/popularity/recall@50/ci_high"] = difference[1]
  (comparison,) = compare_with_baselines(metrics)
  assert comparison.outcome == outcome
  assert comparison.difference.value == pytest.approx(ours - theirs)


@pytest.mark.parametrize(
  "lines",
  [
    [Line("one point", [5], [2.0])],
    [Line("constant", [1, 2, 3], [0.0, 0.0, 0.0])],
    [Line("large", [1, 10**7], [1e9, 1e-9]), Line("second", [2], [5.0], "second")],
  ],
)
def test_curves_stay_inside_the_picture(lines):
  drawn = line_plot(lines, title="t", mark_x=3)
  width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
  numbers = re.findall(r' (c?[xy][12]?)="([^"]+)"', drawn)
  assert len(numbers) > 5
  for name, value in numbers:
    assert -1e-6 <= float(value) <= (width if "x" in name else height), (name, value)
  for path in re.findall(r' d="M([^"]+)"', drawn):
    for point in path.split("L"):
      x, y = map(float, point.split())
      assert 0 <= x <= width and 0 <= y <= height


def test_interval_plot_places_values_in_order_and_survives_zero():
  rows = [("ours", Interval(0.4, 0.3, 0.5), Interval(0.1)), ("other", Interval(0.2), None)]
  drawn = interval_plot(rows, title="t")
  x = [float(v) for v in re.findall(r'<circle cx="([^"]+)"', drawn)]
  zero, full = x[1] - (x[0] - x[1]) / 3, x[0] + (x[0] - x[1]) / 3  # where 0 and 0.5 lie
  assert x[2] == pytest.approx(zero + 0.4 * (full - zero), abs=0.2)
  assert full < 400
  assert "nan" not in interval_plot([("nothing", Interval(0.0), Interval(0.0))], title="t")


def test_ticks_are_round_numbers_inside_the_range():
  assert ticks(0, 0.37, count=4) == pytest.approx([0, 0.1, 0.2, 0.3])
  assert ticks(23.6, 42.2) == pytest.approx([25, 30, 35, 40])
  assert ticks(3, 3) == [3]


def test_templates_escape_all_but_markup():
  drawn = render("tokenizer/map.html", map={"words": "<&>", "figures": []})
  assert "<p>&lt;&amp;&gt;</p>" in drawn
  assert "<p><&></p>" in render("tokenizer/map.html", map={"words": Markup("<&>"), "figures": []})
  with pytest.raises(UndefinedError, match="has no attribute 'words'"):
    render("tokenizer/map.html", map={"figures": []})


def test_numbers_are_rounded_for_people():
  assert [percent(v) for v in (0.3482, 0.00999, 0.00123, 0, 1, 1e-9, None)] == [
    "34.8%", "1.0%", "0.12%", "0%", "100%", "<0.0001%", "–",
  ]  # fmt: skip
  assert [number(v) for v in (0, 0.01752, 12.34, 1523.4, float("nan"))] == [
    "0", "0.0175", "12.3", "1,523", "–",
  ]  # fmt: skip
  assert [compact(v) for v in (98304, 2431616, 1.2e9)] == ["98,304", "2.43M", "1.20B"]
  assert integer(1234567.0) == "1,234,567"
  assert (amount(1234.5, "USD"), amount(2, "")) == ("USD 1,234.50", "2.00")
  assert (amount(0.0034218, "USD"), amount(0, "USD")) == ("USD 0.00342", "USD 0.00")
  assert [duration(s) for s in (90, 3600 * 5, 86_400, 86_400 * 31, 86_400 * 182)] == [
    "2 min", "5 h", "1 day", "31 days", "26 weeks",
  ]  # fmt: skip
  assert [points(d) for d in (0.0214, -0.003, -0.0001)] == ["+2.1", "−0.3", "0.0"]
  assert [listing(n) for n in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
    "", "a", "a and b", "a, b and c",
  ]  # fmt: skip
