"""Small plots as inline SVG: they take the page's colours, light or dark, and scale with it.

Each is drawn 400 units wide, so that its text stays readable on a phone; wide screens show several
side by side. Functions here find the places, the templates in `templates/plots` draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gr4ad_jax.report.page import render

_FRAME = {"width": 400, "height": 200, "left": 56, "right": 388, "top": 8, "floor": 166}
_MAX_STEPS = 400  # of a rank plot: one a unit of width
_HEADROOM = 1.15  # over the largest count, for its number
_ROW = 34  # height of a row of intervals


@dataclass(frozen=True)
class Interval:
  """One measured share; low and high are None where no interval is known."""

  value: float
  low: float | None = None
  high: float | None = None

  @property
  def known(self) -> bool:
    """Whether both ends are known."""
    return self.low is not None and self.high is not None

  @property
  def ends(self) -> tuple[float, float]:
    """Both ends; the value itself where they are not known."""
    return (self.low, self.high) if self.known else (self.value, self.value)


@dataclass(frozen=True)
class Line:
  """A curve: points in order of x; `style` "first" or "second" picks colour and dots."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  style: str = "first"

  @property
  def points(self) -> list[tuple[float, float]]:
    """(x, y) of each point."""
    return list(zip(self.x, self.y, strict=True))


@dataclass(frozen=True)
class Figure:
  """A plot with its caption and, of a map, (colour, name) of each group."""

  title: str
  caption: str
  drawn: Markup
  legend: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Scale:
  """Where numbers lie along a side of a plot: `low` at `start`, `high` at `end`."""

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    share = (value - self.low) / ((self.high - self.low) or 1)
    return round(float(self.start + share * (self.end - self.start)), 1)


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
  """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
  if not high > low:
    return [low]
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def _levels(y_of: Scale, marked: Sequence[float]) -> list[tuple[float, str]]:
  """Place and label of each tick, with the decimals that tell them apart: 2.8, 3.0, 3.2."""
  step = marked[1] - marked[0] if len(marked) > 1 else abs(marked[0]) or 1.0
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  spec = f",.{decimals}f" if decimals <= 5 else ".1e"
  return [(y_of(tick), format(tick, spec)) for tick in marked]


def interval_plot(
  rows: Sequence[tuple[str, Interval | None, Interval | None]], *, title: str
) -> Markup:
  """Shares with their intervals: per row a filled dot and, under it, a hollow one.

  Args:
    rows: (name, filled, hollow); the first row is drawn in the page's main colour.
    title: read out by screen readers.
  """
  top = max(max(e.ends[1], e.value) for _, *pair in rows for e in pair if e is not None) or 1.0
  drawn = []
  for i, (name, filled, hollow) in enumerate(rows):
    apart = 7 if None not in (filled, hollow) else 0  # two share the height of the row
    marks = [(filled, i * _ROW + 17 - apart, True), (hollow, i * _ROW + 17 + apart, False)]
    drawn.append((name, [mark for mark in marks if mark[0] is not None]))
  return render(
    "plots/intervals.svg", title=title, rows=drawn, row_height=_ROW, shares=ticks(0, top, count=4),
    x_of=Scale(0, top, 108, 348),  # names to the left, the last value to the right
    width=_FRAME["width"], height=len(rows) * _ROW + 26,
  )  # fmt: skip


def line_plot(lines: Sequence[Line], *, title: str, mark_x: float | None = None) -> Markup:
  """Curves over training steps.

  Args:
    lines: at least one point in all; the second style gets a dot on every point.
    title: read out by screen readers.
    mark_x: a dashed vertical line there.
  """
  xs = [x for line in lines for x in line.x] + ([] if mark_x is None else [mark_x])
  ys = [y for line in lines for y in line.y]
  low, high = min(ys), max(ys)
  room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
  x_of = Scale(min(0, *xs), max(xs), _FRAME["left"], _FRAME["right"])
  y_of = Scale(low - room, high + room, _FRAME["floor"], _FRAME["top"])
  return render(
    "plots/curves.svg", title=title, lines=lines, mark_x=mark_x, x_of=x_of, y_of=y_of,
    levels=_levels(y_of, ticks(y_of.low, y_of.high)),
    steps=[tick for tick in ticks(x_of.low, x_of.high, count=4) if tick % 1 == 0], **_FRAME,
  )  # fmt: skip


def rank_plot(
  count_N: np.ndarray, *, title: str, x_name: str, even: float | None = None
) -> Markup:
  """Counts, largest first, as a filled staircase from 0.

  Args:
    count_N: [N] falling.
    title: read out by screen readers.
    x_name: what the N things are.
    even: a dashed horizontal line at this count.
  """
  top = _HEADROOM * max(float(count_N.max()), even or 0.0, 1.0)
  x_of = Scale(0, len(count_N), _FRAME["left"], _FRAME["right"])
  y_of = Scale(0, top, _FRAME["floor"], _FRAME["top"])
  # Where steps are more than units of width, each unit shows its largest count.
  edge_M = np.unique(np.linspace(0, len(count_N), min(len(count_N), _MAX_STEPS) + 1).astype(int))
  return render(
    "plots/ranks.svg", title=title, x_name=x_name, count=len(count_N), largest=count_N[0],
    even_y=None if even is None else y_of(even),
    levels=_levels(y_of, [tick for tick in ticks(0, top, count=4) if tick % 1 == 0]),
    steps=[
      (x_of(first), x_of(last), y_of(count_N[first]))
      for first, last in itertools.pairwise(edge_M)
    ],
    **_FRAME,
  )  # fmt: skip


def bar_plot(bars: Sequence[tuple[str, float, str]], *, title: str) -> Markup:
  """Horizontal bars of shares: (name, share, text beside the bar)."""
  top = max(share for _, share, _ in bars) or 1.0
  x_of = Scale(0, top, 66, 272)  # names to the left, texts to the right
  return render(
    "plots/bars.svg", title=title, rows=bars, x_of=x_of, left=x_of(0), width=_FRAME["width"]
  )


def map_plot(
  point_N2: np.ndarray, colour_N: np.ndarray, *, title: str, centre_N2: np.ndarray | None = None
) -> Markup:
  """Points in the plane; colour 0 (the rest) lies under the others.

  Args:
    point_N2: [N, 2].
    colour_N: [N] 0 to 8, classes of the page.
    title: read out by screen readers.
    centre_N2: [N, 2], within the range of the points: each is tied to its centre by a thin line.
  """
  side, low_2, high_2 = _FRAME["width"], point_N2.min(0), point_N2.max(0)

  def placed(x_N2: np.ndarray) -> np.ndarray:
    return np.round(6 + (x_N2 - low_2) / np.maximum(high_2 - low_2, 1e-9) * (side - 12), 1)

  place_N2 = placed(point_N2)
  tie_N4 = np.empty((len(point_N2), 0))
  if centre_N2 is not None:
    tie_N4 = np.hstack([place_N2, placed(centre_N2)])
  groups = []
  for colour in np.unique(colour_N):
    rows = colour_N == colour
    groups.append((colour, tie_N4[rows].tolist() if tie_N4.size else [], place_N2[rows].tolist()))
  return render("plots/map.svg", title=title, groups=groups, width=side)
