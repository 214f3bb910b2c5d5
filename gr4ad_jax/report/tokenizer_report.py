"""The tokenizer's health report for people: a table on the terminal and one HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gr4ad_jax.embedding.rows import distinct_rows
from gr4ad_jax.report.page import (
  Html,
  details,
  integer,
  join,
  listing,
  number,
  numeric,
  page,
  percent,
  section,
  table,
  tag,
  write_page,
)
from gr4ad_jax.report.tokenizer_plots import (
  MAP_STYLE,
  bar_plot,
  code_centres,
  map_plot,
  rank_plot,
  two_dimensions,
)
from gr4ad_jax.tokenizer.health_line import HealthLine
from gr4ad_jax.tokenizer.health_verdicts import worst

MAX_POINTS = 2_000  # of a map: a few seconds of t-SNE
NUM_NAMED = 7  # groups with a colour of their own in the map; the others share one
ADS_PER_SID = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, 50), (51, None))

_TITLES = {
  "lines": "Verdicts", "codes": "Codes", "tree": "Tree", "map": "Map", "numbers": "Numbers"
}  # fmt: skip
_OPTION = re.compile(r"(--[a-z-]+(?: (?:ad_id|suffix|hash|balanced_kmeans|uae)\b)?)")
_STYLES = {"fine": "good", "look": "fair", "will hurt": "poor"}
_COLOURS = {"fine": "green", "look": "yellow", "will hurt": "red"}


def health_table(lines: Sequence[HealthLine], *, title: str, reasons: bool = True) -> Group:
  """The lines for a terminal of 80 columns or more, to be printed with rich.

  Args:
    lines: from `health_verdicts.verdicts`.
    title: over the table.
    reasons: False leaves out the reasons of what is fine.
  """
  parts = [Text(title, style="bold")]
  for name, group in groupby(lines, key=lambda line: line.group):
    grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
    grid.add_column(width=9)
    grid.add_column(width=8, justify="right")
    grid.add_column(overflow="fold", max_width=76)
    for line in group:
      colour = _COLOURS[line.verdict]
      words = Text(line.label)
      if reasons or line.verdict != "fine":
        words.append(f"\n{line.reason}", style="dim")
      grid.add_row(Text(line.verdict, style=colour), _value(line), words)
    parts += [Text(f"\n{name}", style="bold"), Padding(grid, (0, 0, 0, 1))]
  sentence, verdict = headline(lines)
  parts += [Text(), Text(sentence, style=_COLOURS[verdict])]
  return Group(*parts)


def headline(lines: Sequence[HealthLine]) -> tuple[str, str]:
  """One sentence on all lines, and the verdict of the worst."""
  line = worst(lines)
  if line.verdict == "fine":
    return f"All {len(lines)} lines are fine.", "fine"
  hurt, look = (sum(one.verdict == verdict for one in lines) for verdict in ("will hurt", "look"))
  counts = [f"{hurt} will hurt"] * bool(hurt) + [f"{look} ask for a look"] * bool(look)
  found = f"{_place(line)}: {_value(line)}"
  return f"Of {len(lines)} lines, {listing(counts)}. {found}. {line.reason}", line.verdict


def _place(line: HealthLine) -> str:
  """The label, with the level that it speaks of."""
  level = f"{line.group.split(',')[0]}, " if line.group.startswith("Level") else ""
  return f"{level}{line.label}"


def _options(reason: str) -> list[object]:
  """The reason with its command line options set as code that does not break."""
  return [
    tag("code", part, class_="option") if part.startswith("--") else part
    for part in re.split(_OPTION, reason)
  ]


def _value(line: HealthLine) -> str:
  text = {"share": percent, "count": integer, "number": number}[line.unit]
  return text(line.value)


def write_tokenizer_report(
  folder: Path,
  *,
  title: str,
  metrics: Mapping[str, float],
  lines: Sequence[HealthLine],
  codes_AL: np.ndarray,
  codebook_sizes: Sequence[int],
  embedding_AD: np.ndarray | None = None,
  group_A: Sequence[str] | np.ndarray | None = None,
  group_name: str = "category",
  seed: int = 0,
) -> Path:
  """Writes `report.html`: verdicts, use of the codes, the tree, and a map of the embeddings.

  Args:
    folder: exists or is made.
    title: what was tokenized.
    metrics: from `health.measure`.
    lines: their verdicts.
    codes_AL: [A, L] the measured codes.
    codebook_sizes: codes of each level.
    embedding_AD: [A, D]; without it the page has no map.
    group_A: [A] names that colour the map, such as top categories; "" = unknown.
    group_name: what they are.
    seed: of the sample of at most `MAX_POINTS` distinct embeddings, and of t-SNE.

  Returns:
    The page: one file that refers to no other; all text from the logs is escaped.
  """
  parts = [
    _headline_section(title, metrics, lines, codebook_sizes),
    _lines_section(lines),
    _codes_section(metrics, codes_AL, codebook_sizes),
    _tree_section(metrics, codes_AL),
    _map_section(codes_AL, embedding_AD, group_A, group_name, seed),
    _numbers_section(metrics),
  ]
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = page(f"Semantic IDs of {title}", parts, navigation=_TITLES)
  return write_page(folder / "report.html", text)


def _headline_section(title, metrics, lines, codebook_sizes) -> Html:
  sentence, verdict = headline(lines)
  tiles = [
    (integer(metrics["num_ads"]), "ads"),
    (integer(metrics["num_sids"]), "different SIDs"),
    (" × ".join(f"{size:,}" for size in codebook_sizes), "codes per level"),
    (percent(metrics["sid_collision_rate"]), "of the ads share their SID"),
  ]
  if "sid_collision_value_share" in metrics:
    tiles.append((percent(metrics["sid_collision_value_share"]), "of the value is on shared SIDs"))
  return tag(
    "header",
    tag("style", Html(MAP_STYLE)),
    tag("h1", f"Semantic IDs of {title}"),
    tag("p", "Each ad is written as a short sequence of codes, its semantic ID (SID); the model "
        "will generate codes, and an index turns them into ads. This page says whether these SIDs "
        "are worth training on.", class_="soft"),
    tag("p", tag("span", *_options(sentence)), *_summary(lines),
        class_=f"verdict {_STYLES[verdict]}"),
    tag("div", *(tag("div", tag("b", value), tag("span", label)) for value, label in tiles),
        class_="tiles"),
  )  # fmt: skip


def _summary(lines: Sequence[HealthLine]) -> list[Html]:
  """The names of the lines that are not fine, worst first."""
  result = []
  for verdict, words in (("will hurt", "Will hurt: "), ("look", "Look: ")):
    names = [f"{_place(line)} {_value(line)}" for line in lines if line.verdict == verdict]
    if names:
      result.append(tag("small", tag("b", words, class_=_STYLES[verdict]), "; ".join(names)))
  return result


def lines_tables(lines: Sequence[HealthLine]) -> list[Html]:
  """A heading and a table for each group of lines."""
  parts = []
  for name, group in groupby(lines, key=lambda line: line.group):
    rows = [
      [
        join([line.label, tag("small", *_options(line.reason))]),
        numeric(_value(line), tag("small", line.verdict, class_=_STYLES[line.verdict])),
      ]
      for line in group
    ]
    parts += [tag("h3", name), table((), rows, class_="lines")]
  return parts


def _lines_section(lines: Sequence[HealthLine]) -> Html:
  return section(
    "lines", _TITLES["lines"],
    tag("p", "Fine, look, will hurt: rules of thumb, set where published systems stand. What will "
        "hurt is worth another ", tag("code", "gr4ad tokenize"), " before any training."),
    *lines_tables(lines),
  )  # fmt: skip


def _codes_section(metrics, codes_AL, codebook_sizes) -> Html:
  figures = []
  for level, size in enumerate(codebook_sizes):
    count_V = np.sort(np.bincount(codes_AL[:, level], minlength=size))[::-1]
    name = f"Level {level + 1}"
    caption = (
      f": ads on each of its {size:,} codes, largest first. A flat line near the dashed even share "
      "is good; a spike on the left is a collapsed code, a stretch at 0 are dead codes."
    )
    drawn = rank_plot(
      count_V, title=f"{name}, ads per code", even=len(codes_AL) / size, x_name="codes"
    )
    figures.append(_figure(name, caption, drawn))
  _, held_S = np.unique(codes_AL, axis=0, return_counts=True)
  bars = []
  for low, high in ADS_PER_SID:
    inside_S = (held_S >= low) & (held_S <= (high or np.inf))
    name = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
    if inside_S.any() or low == 1:
      share, sids = held_S[inside_S].sum() / len(codes_AL), int(inside_S.sum())
      bars.append((name, share, f"{percent(share)}, {sids:,} SIDs"))
  caption = (
    ": share of ads by how many have the same SID. All on the first bar is best; the model cannot "
    "rank the ads of the others among themselves."
  )
  figures.append(_figure("Ads per SID", caption, bar_plot(bars, title="Ads per SID")))
  return section("codes", _TITLES["codes"], tag("div", *figures, class_="plots"))


def _tree_section(metrics, codes_AL) -> Html:
  rows, figures = [], []
  for level in range(1, codes_AL.shape[1] + 1):
    key = f"level{level}/"
    rows.append([
      f"Level {level}", numeric(integer(metrics[key + "prefixes"])),
      numeric(number(metrics[key + "children_mean"])),
      numeric(integer(metrics[key + "children_max"])),
    ])  # fmt: skip
    if level == 1:
      continue
    prefixes_PL = np.unique(codes_AL[:, :level], axis=0)
    children_P = np.unique(prefixes_PL[:, :-1], axis=0, return_counts=True)[1]
    what = "first code" if level == 2 else f"first {level - 1} codes"
    caption = (
      f": next codes after each {what}, largest first. A gentle slope is good; a spike is a prefix "
      "too wide for the beam, a long floor at 1 a level that adds nothing there."
    )
    title = f"Level {level}"
    drawn = rank_plot(
      np.sort(children_P)[::-1], title=f"{title}, next codes per prefix", x_name="prefixes"
    )
    figures.append(_figure(title, caption, drawn))
  return section(
    "tree", _TITLES["tree"],
    tag("p", "The search walks from code to code: after each prefix it may only take a code that "
        "leads to an ad."),
    table(["", "Prefixes so far", "Next codes, mean", "Most"], rows, class_="metrics"),
    tag("div", *figures, class_="plots"),
  )  # fmt: skip


def _map_section(codes_AL, embedding_AD, group_A, group_name, seed) -> Html:
  if embedding_AD is None:
    reason = "No embeddings were given, so there is no map of them."
    return section("map", _TITLES["map"], tag("p", reason, class_="soft"))
  first_U = distinct_rows(np.asarray(embedding_AD, np.float32)).first_U
  row_N = np.random.default_rng(seed).permutation(first_U)[:MAX_POINTS]
  point_N2 = two_dimensions(np.asarray(embedding_AD)[row_N], seed=seed)
  if point_N2 is None:
    reason = f"{len(row_N)} different embeddings are too few for a map."
    return section("map", _TITLES["map"], tag("p", reason, class_="soft"))
  figures = []
  if group_A is not None:
    name_N = np.asarray(group_A).astype(str)[row_N]
    colour_N, names = _largest_groups(name_N)
    caption = (
      f": coloured by {group_name}. Clumps of one colour say that the embedding knows the "
      f"{group_name}; colours mixed everywhere say that it does not, and codes cannot either."
    )
    legend = tag("p", *(
      tag("span", tag("i", class_=f"c{colour}"), name, class_="key") for colour, name in names
    ), class_="legend")  # fmt: skip
    drawn = map_plot(point_N2, colour_N, title=f"Embeddings by {group_name}")
    figures.append(_figure("Embeddings", caption, join([drawn, legend])))
  caption = (
    ": each dot tied to the middle of its first code (colours repeat). Short ties are good: near "
    "ads begin with one code. Lines across the map say that level 1 does not follow the embedding."
  )
  centre_N2, colour_N = code_centres(point_N2, codes_AL[row_N, 0])
  drawn = map_plot(point_N2, colour_N, title="Embeddings by first code", centre_N2=centre_N2)
  figures.append(_figure("First codes", caption, drawn))
  return section(
    "map", _TITLES["map"],
    tag("p", f"t-SNE of {len(row_N):,} of {len(first_U):,} different embeddings, a dot each. Near "
        "dots are near embeddings; distances between clumps, and their sizes, mean nothing."),
    tag("div", *figures, class_="plots"),
  )  # fmt: skip


def _largest_groups(name_N: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
  """Colours 1.. for the largest named groups and 0 for the rest, with the legend's entries."""
  names, of_N, count_G = np.unique(name_N, return_inverse=True, return_counts=True)
  order_G = [g for g in np.argsort(-count_G, kind="stable") if names[g]][:NUM_NAMED]
  colour_G = np.zeros(len(names), int)
  colour_G[order_G] = np.arange(len(order_G)) + 1
  legend = [(i + 1, str(names[g])) for i, g in enumerate(order_G)]
  if not colour_G.all():
    legend.append((0, "others"))
  return colour_G[of_N.reshape(-1)], legend


def _figure(title: str, caption: str, drawn: Html) -> Html:
  return tag("figure", tag("figcaption", tag("b", title), caption), drawn)


def _numbers_section(metrics: Mapping[str, float]) -> Html:
  rows = [[name, numeric(f"{value:,.6g}")] for name, value in metrics.items()]
  return section("numbers", _TITLES["numbers"], details("All measured numbers", table((), rows)))
