"""Plots of the tokenizer's page as inline SVG, in the page's colours: ranks, bars, maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.report.page import Html, tag
from gr4ad_jax.report.plots import tick_label, ticks
from gr4ad_jax.tokenizer.retrieval import unit_rows

_WIDTH, _HEIGHT = 400, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 32
_MAX_STEPS = 400  # of a rank plot: one a unit of width
_HEADROOM = 1.15  # over the largest count, for its number
_SIDE = 400  # of a map
NUM_COLOURS = 8

# Okabe and Ito's palette, which colour-blind people can tell apart, darker on paper; 0 = the rest.
MAP_STYLE = """
:root{--c0:#a9b1b8;--c1:#0072b2;--c2:#c45500;--c3:#00845f;--c4:#b8558f;--c5:#a67c00;--c6:#0a9fae;
  --c7:#7a3b16;--c8:#5b3fa0}
@media (prefers-color-scheme:dark){:root{--c0:#5b646d;--c1:#4ea1e0;--c2:#f08a45;--c3:#35c79b;
  --c4:#e59ac4;--c5:#e8c33d;--c6:#5fdbe6;--c7:#c98f6b;--c8:#ab94ec}}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}
.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}.c8{color:var(--c8)}
.legend{font-size:.84rem;margin-top:.3rem}
.legend i{width:.7rem;height:.7rem;border-radius:50%;background:currentColor;flex:none}
.lines{width:100%;max-width:52rem}
.option{white-space:nowrap}
"""


def rank_plot(
  count_N: np.ndarray, *, title: str, x_name: str, even: float | None = None
) -> Html:
  """Counts, largest first, as a filled staircase from 0.

  Args:
    count_N: [N] falling.
    title: read out by screen readers.
    x_name: what the N things are.
    even: a dashed horizontal line at this count.
  """
  top = _HEADROOM * max(float(count_N.max()), even or 0.0, 1.0)
  width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
  floor = _TOP + height

  def y_of(value: float) -> float:
    return _TOP + height * (1 - value / top)

  parts = []
  levels = [tick for tick in ticks(0, top, count=4) if tick == round(tick)]
  for tick in levels:
    y = f"{y_of(tick):.1f}"
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
    label = tick_label(tick, levels)
    parts.append(tag("text", label, x=_LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
  # Where steps are more than units of width, each unit shows its largest count.
  edge_M = np.unique(np.linspace(0, len(count_N), min(len(count_N), _MAX_STEPS) + 1).astype(int))
  path = f"M{_LEFT} {floor}"
  for first, last in zip(edge_M, edge_M[1:], strict=False):
    left, right = (_LEFT + width * edge / len(count_N) for edge in (first, last))
    y = y_of(count_N[first])
    path += f"L{left:.1f} {y:.1f}L{right:.1f} {y:.1f}"
  path += f"L{_WIDTH - _RIGHT} {floor}Z"
  shape = tag("path", d=path, fill="currentColor", fill_opacity=0.25, stroke="currentColor")
  parts.append(tag("g", shape, class_="first"))
  if even is not None:
    y = f"{y_of(even):.1f}"
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="mark"))
  for text, x, anchor in (
    ("1", _LEFT, "middle"), (f"{len(count_N):,}", _WIDTH - _RIGHT, "end"),
    (x_name, _LEFT + width / 2, "middle"),
  ):  # fmt: skip
    parts.append(tag("text", text, x=x, y=_HEIGHT - 12, text_anchor=anchor))
  largest = f"{count_N[0]:,}"
  parts.append(tag("text", largest, x=_LEFT + 3, y=f"{y_of(count_N[0]) - 5:.1f}", class_="name"))
  return tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)


def bar_plot(bars: Sequence[tuple[str, float, str]], *, title: str) -> Html:
  """Horizontal bars of shares: (name, share, text beside the bar)."""
  left, row, room = 66, 27, 128
  top = max(share for _, share, _ in bars) or 1.0
  parts = []
  for i, (name, share, words) in enumerate(bars):
    y, end = i * row, left + (_WIDTH - left - room) * share / top
    parts.append(tag("text", name, x=left - 8, y=y + 18, text_anchor="end", class_="name"))
    bar = tag("rect", x=left, y=y + 5, width=f"{max(end - left, 1):.1f}", height=row - 10,
              fill="currentColor", fill_opacity=0.6)  # fmt: skip
    parts.append(tag("g", bar, class_="first"))
    parts.append(tag("text", words, x=f"{end + 6:.1f}", y=y + 18))
  return tag(
    "svg", *parts, viewBox=f"0 0 {_WIDTH} {len(bars) * row + 4}", role="img", aria_label=title
  )


def map_plot(
  point_N2: np.ndarray, colour_N: np.ndarray, *, title: str, centre_N2: np.ndarray | None = None
) -> Html:
  """Points in the plane; colour 0 (the rest) lies under the others.

  Args:
    point_N2: [N, 2].
    colour_N: [N] 0 to `NUM_COLOURS`.
    title: read out by screen readers.
    centre_N2: [N, 2], within the range of the points: each is tied to its centre by a thin line.
  """
  low_2, high_2 = point_N2.min(0), point_N2.max(0)

  def place(x_N2):
    return 6 + (x_N2 - low_2) / np.maximum(high_2 - low_2, 1e-9) * (_SIDE - 12)

  place_N2, parts = place(point_N2), []
  colours = np.unique(colour_N)
  if centre_N2 is not None:
    ends_N4 = np.hstack([place_N2, place(centre_N2)])
    for colour in colours:
      path = "".join(
        f"M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}" for x, y, u, v in ends_N4[colour_N == colour]
      )
      parts.append(tag(
        "path", d=path, class_=f"c{colour}", stroke="currentColor", stroke_opacity=0.45
      ))  # fmt: skip
  for colour in colours:
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in place_N2[colour_N == colour])
    parts.append(tag(
      "path", d=path, class_=f"c{colour}", fill="none", stroke="currentColor",
      stroke_width=5 if centre_N2 is None else 3.5, stroke_linecap="round", stroke_opacity=0.75,
    ))  # fmt: skip
  return tag("svg", *parts, viewBox=f"0 0 {_SIDE} {_SIDE}", role="img", aria_label=title)


def code_centres(point_N2: np.ndarray, code_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where the codes of points lie, and colours for them, so that codes which lie close differ.

  Args:
    point_N2: [N, 2] places.
    code_N: [N] codes; the largest choose first, each the colour whose nearest code is farthest.

  Returns:
    [N, 2], for each point the median place of its code (a few strays do not move it); and [N]
    colours, 1 to `NUM_COLOURS`.
  """
  _, of_N, count_C = np.unique(code_N, return_inverse=True, return_counts=True)
  of_N = of_N.reshape(-1)
  groups = np.split(np.argsort(of_N, kind="stable"), count_C.cumsum()[:-1])
  centre_C2 = np.stack([np.median(point_N2[rows], axis=0) for rows in groups])
  colour_C = np.zeros(len(count_C), int)
  nearest_K = np.empty(NUM_COLOURS)
  for c in np.argsort(-count_C, kind="stable"):
    distance_C = np.square(centre_C2 - centre_C2[c]).sum(-1)
    for k in range(NUM_COLOURS):
      nearest_K[k] = distance_C[colour_C == k + 1].min(initial=np.inf)
    colour_C[c] = nearest_K.argmax() + 1
  return centre_C2[of_N], colour_C[of_N]


def two_dimensions(x_ND: np.ndarray, *, seed: int) -> np.ndarray | None:
  """t-SNE of the rows' directions; None for fewer than five rows.

  Args:
    x_ND: [N, D] finite, distinct.
    seed: the same seed gives the same map.

  Returns:
    [N, 2].

  Source: van der Maaten and Hinton (2008), as scikit-learn has it.
  """
  if len(x_ND) < 5:
    return None
  from sklearn.manifold import TSNE  # slow to import, and only needed here
  from threadpoolctl import threadpool_limits

  unit_ND = unit_rows(x_ND)
  flat = unit_ND.shape[1] < 2 or np.ptp(unit_ND, axis=0).max() < 1e-6
  tsne = TSNE(
    init="random" if flat else "pca",
    perplexity=min(30.0, (len(x_ND) - 1) / 3),
    random_state=seed,
  )
  with threadpool_limits(1):  # its threads wait for each other: 9 s alone, 80 s on a busy machine
    return tsne.fit_transform(unit_ND)
