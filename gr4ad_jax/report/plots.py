"""Small plots as inline SVG: they take the page's colours, light or dark, and scale with it.

Each is drawn 400 units wide, so that its text stays readable on a phone; wide screens show several
side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gr4ad_jax.report.page import Html, number, percent, tag

_WIDTH = 400
_ROW = 34
_LEFT, _RIGHT, _BOTTOM = 56, 12, 34
_PLOT_HEIGHT = 210


@dataclass(frozen=True)
class Interval:
  """One measured share; low and high are None where no interval is known."""

  value: float
  low: float | None = None
  high: float | None = None


@dataclass(frozen=True)
class Line:
  """A curve: points in order of x; `style` "first" or "second" picks colour and dots."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  style: str = "first"


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
  """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
  if not high > low:
    return [low]
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def tick_label(tick: float, all_ticks: Sequence[float]) -> str:
  """With the decimals that tell these ticks apart: 2.8, 3.0, 3.2."""
  step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else abs(tick) or 1.0
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  return f"{tick:,.{decimals}f}" if decimals <= 5 else f"{tick:.1e}"


def interval_plot(
  rows: Sequence[tuple[str, Interval | None, Interval | None]], *, title: str
) -> Html:
  """Shares with their intervals: per row a filled dot and, under it, a hollow one.

  Args:
    rows: (name, filled, hollow); the first row is drawn in the page's main colour.
    title: read out by screen readers.
  """
  estimates = [e for _, *pair in rows for e in pair if e is not None]
  top = max((e.high if e.high is not None else e.value) for e in estimates) or 1.0
  left, width = 108, _WIDTH - 108 - 52  # room for the value's text on the right
  height = len(rows) * _ROW + 26

  def x_of(share: float) -> float:
    return left + width * share / top

  parts = []
  for tick in ticks(0, top, count=4):
    x = f"{x_of(tick):.1f}"
    parts.append(tag("line", x1=x, x2=x, y1=0, y2=height - 22, class_="grid"))
    label = f"{100 * tick:.4g}%"
    parts.append(tag("text", label, x=x, y=height - 6, text_anchor="middle"))
  for i, (name, *pair) in enumerate(rows):
    style = "first" if i == 0 else "other"
    both = all(e is not None for e in pair)
    parts.append(tag("text", name, x=0, y=i * _ROW + 21, class_="name"))
    for filled, estimate in zip((True, False), pair, strict=True):
      if estimate is None:
        continue
      y = i * _ROW + (16.5 if not both else 10 if filled else 24)
      parts.append(_whisker(estimate, y, x_of, style, filled))
  return tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=title)


def _whisker(estimate: Interval, y: float, x_of, style: str, filled: bool) -> Html:
  x, end, parts = x_of(estimate.value), x_of(estimate.value), []
  if estimate.low is not None and estimate.high is not None:
    low, end = x_of(estimate.low), x_of(estimate.high)
    line = dict(y1=y, y2=y, stroke="currentColor", stroke_width=2)
    parts.append(tag("line", x1=f"{low:.1f}", x2=f"{end:.1f}", **line))
  parts.append(dot(x, y, filled))
  text = percent(estimate.value)
  parts.append(tag("text", text, x=f"{max(end, x) + 7:.1f}", y=y + 4))
  return tag("g", *parts, class_=style)


def dot(x: float, y: float, filled: bool) -> Html:
  """The mark of an estimate."""
  fill = "currentColor" if filled else "var(--paper)"
  return tag(
    "circle", cx=f"{x:.1f}", cy=y, r=4, fill=fill, stroke="currentColor", stroke_width=2
  )


def line_plot(lines: Sequence[Line], *, title: str, mark_x: float | None = None) -> Html:
  """Curves over training steps.

  Args:
    lines: at least one point in all; the second style gets a dot on every point.
    title: read out by screen readers.
    mark_x: a dashed vertical line there.
  """
  xs = [x for line in lines for x in line.x] + ([] if mark_x is None else [mark_x])
  ys = [y for line in lines for y in line.y]
  low_x, high_x, low_y, high_y = min(0, *xs), max(xs), min(ys), max(ys)
  room = 0.05 * (high_y - low_y) or 0.05 * abs(high_y) or 1.0
  low_y, high_y = low_y - room, high_y + room
  width, height = _WIDTH - _LEFT - _RIGHT, _PLOT_HEIGHT - _BOTTOM

  def x_of(x: float) -> float:
    return _LEFT + width * (x - low_x) / ((high_x - low_x) or 1)

  def y_of(y: float) -> float:
    return 6 + (height - 6) * (high_y - y) / (high_y - low_y)

  parts = []
  levels = ticks(low_y, high_y)
  for tick in levels:
    y = f"{y_of(tick):.1f}"
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
    label = tick_label(tick, levels)
    parts.append(tag("text", label, x=_LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
  for tick in ticks(low_x, high_x, count=4):
    if tick % 1:
      continue
    anchor = "end" if x_of(tick) > _WIDTH - 30 else "middle"
    x = _WIDTH if anchor == "end" else f"{x_of(tick):.1f}"
    parts.append(tag("text", f"{tick:,.0f}", x=x, y=height + 16, text_anchor=anchor))
  parts.append(tag("text", "step", x=_LEFT + width / 2, y=height + 31, text_anchor="middle"))
  if mark_x is not None:
    x = f"{x_of(mark_x):.1f}"
    parts.append(tag("line", x1=x, x2=x, y1=6, y2=height, class_="mark"))
  for line in lines:
    points = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in zip(line.x, line.y, strict=True)]
    path = "M" + "L".join(f"{x} {y}" for x, y in points) if points else ""
    curve = tag("path", d=path, fill="none", stroke="currentColor", stroke_width=1.8)
    dots = [
      tag(
        "circle", tag("title", f"{line.name}, step {step:,.0f}: {number(value, 4)}"),
        cx=x, cy=y, r=3, fill="currentColor",
      )
      for (x, y), step, value in zip(points, line.x, line.y, strict=True)
      if line.style == "second" or len(points) == 1
    ]
    parts.append(tag("g", curve, *dots, class_=line.style))
  return tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_PLOT_HEIGHT}", role="img", aria_label=title)


def key(label: str, style: str, *, filled: bool | None = None) -> Html:
  """One entry of a legend: a dot (filled or hollow), or a line where `filled` is None."""
  line = tag("line", x1=0, x2=26, y1=6, y2=6, stroke="currentColor", stroke_width=2)
  picture = tag(
    "svg", line, dot(13, 6, filled) if filled is not None else None, viewBox="0 0 26 12",
    class_=style, aria_hidden="true",
  )
  return tag("span", picture, label, class_="key")
