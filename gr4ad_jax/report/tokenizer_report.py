"""The tokenizer's health as one HTML page for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gr4ad_jax.machine import atomic
from gr4ad_jax.report import health_lines
from gr4ad_jax.report.embedding_map import EmbeddingMap, embedding_map
from gr4ad_jax.report.page import integer, number, percent, render
from gr4ad_jax.report.plots import Figure, bar_plot, rank_plot
from gr4ad_jax.tokenizer.health_line import HealthLine

if TYPE_CHECKING:  # it imports JAX
  from gr4ad_jax.tokenizer.stage import Tokenized

ADS_PER_SID = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, 50), (51, None))
_SECTIONS = {
  "lines": "Verdicts", "codes": "Codes", "tree": "Tree", "map": "Map", "numbers": "Numbers"
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
  """What the page shows.

  Attributes:
    title: what was tokenized.
    metrics: from `health.measure`.
    lines: their verdicts.
    codes_AL: [A, L] the measured codes.
    codebook_sizes: codes of each level.
    embedding_AD: [A, D]; without it the page has no map.
    group_A: [A] names that colour the map, such as top categories; "" = unknown.
    group_name: what they are.
  """

  title: str
  metrics: Mapping[str, float]
  lines: Sequence[HealthLine]
  codes_AL: np.ndarray
  codebook_sizes: Sequence[int]
  embedding_AD: np.ndarray | None = None
  group_A: np.ndarray | None = None
  group_name: str = "category"


def findings(made: Tokenized) -> Findings:
  """What the tokenizer's stage has made, coloured by top categories."""
  ads = made.logs.ads
  return Findings(
    made.logs.source, made.health, made.lines, made.sids.codes_AL, made.sids.codebook_sizes,
    embedding_AD=made.embedded.ad_AD,
    group_A=np.array([path.split(" > ")[0] for path in ads.category], object),
  )  # fmt: skip


def write_tokenizer_report(folder: Path, found: Findings, *, seed: int = 0) -> Path:
  """Writes `report.html`: verdicts, use of the codes, the tree, and a map of the embeddings.

  Args:
    folder: exists or is made.
    found: what the page shows.
    seed: of the map's sample of embeddings, and of t-SNE.

  Returns:
    The page: one file that refers to no other; all text from the logs is escaped.
  """
  sentence, verdict = health_lines.headline(found.lines)
  drawn = EmbeddingMap("No embeddings were given, so there is no map of them.", [])
  if found.embedding_AD is not None:
    drawn = embedding_map(
      found.embedding_AD, found.codes_AL[:, 0], group_A=found.group_A,
      group_name=found.group_name, seed=seed,
    )  # fmt: skip
  text = render(
    "tokenizer.html", kind="tokenizer", title=f"Semantic IDs of {found.title}", sections=_SECTIONS,
    tiles=_tiles(found), headline=health_lines.with_options(sentence),
    style=health_lines.STYLES[verdict], summary=health_lines.summary(found.lines),
    health_groups=health_lines.groups(found.lines), code_figures=_code_figures(found),
    levels=_levels(found), tree_figures=_tree_figures(found.codes_AL), map=drawn,
    numbers=[(name, f"{value:,.6g}") for name, value in found.metrics.items()],
  )  # fmt: skip
  path = Path(folder) / "report.html"
  atomic.write_text(path, text)
  return path


def _tiles(found: Findings) -> list[tuple[str, str]]:
  metrics = found.metrics
  tiles = [
    (integer(metrics["num_ads"]), "ads"),
    (integer(metrics["num_sids"]), "different SIDs"),
    (" × ".join(f"{size:,}" for size in found.codebook_sizes), "codes per level"),
    (percent(metrics["sid_collision_rate"]), "of the ads share their SID"),
  ]
  if "sid_collision_value_share" in metrics:
    tiles.append((percent(metrics["sid_collision_value_share"]), "of the value is on shared SIDs"))
  return tiles


def _code_figures(found: Findings) -> list[Figure]:
  """Ads on each code of each level, and ads by how many share their SID."""
  codes_AL, figures = found.codes_AL, []
  for level, size in enumerate(found.codebook_sizes):
    count_V = np.sort(np.bincount(codes_AL[:, level], minlength=size))[::-1]
    title = f"Level {level + 1}"
    figures.append(Figure(
      title,
      f"ads on each of its {size:,} codes, largest first. A flat line near the dashed even share "
      "is good; a spike on the left is a collapsed code, a stretch at 0 are dead codes.",
      rank_plot(
        count_V, title=f"{title}, ads per code", even=len(codes_AL) / size, x_name="codes"
      ),
    ))  # fmt: skip
  _, held_S = np.unique(codes_AL, axis=0, return_counts=True)
  bars = []
  for low, high in ADS_PER_SID:
    inside_S = (held_S >= low) & (held_S <= (high or np.inf))
    name = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
    if inside_S.any() or low == 1:
      share = held_S[inside_S].sum() / len(codes_AL)
      bars.append((name, share, f"{percent(share)}, {inside_S.sum():,} SIDs"))
  figures.append(Figure(
    "Ads per SID",
    "share of ads by how many have the same SID. All on the first bar is best; the model cannot "
    "rank the ads of the others among themselves.",
    bar_plot(bars, title="Ads per SID"),
  ))  # fmt: skip
  return figures


def _levels(found: Findings) -> list[tuple[str, str, str, str]]:
  """Level, its prefixes, and the next codes after the prefixes before it: mean and most."""
  metrics, num_levels = found.metrics, len(found.codebook_sizes)
  return [
    (f"Level {level}", integer(metrics[f"level{level}/prefixes"]),
     number(metrics[f"level{level}/children_mean"]), integer(metrics[f"level{level}/children_max"]))
    for level in range(1, num_levels + 1)
  ]


def _tree_figures(codes_AL: np.ndarray) -> list[Figure]:
  """Next codes after each prefix."""
  figures = []
  for level in range(2, codes_AL.shape[1] + 1):
    prefixes_PL = np.unique(codes_AL[:, :level], axis=0)
    children_P = np.unique(prefixes_PL[:, :-1], axis=0, return_counts=True)[1]
    title, what = f"Level {level}", "first code" if level == 2 else f"first {level - 1} codes"
    figures.append(Figure(
      title,
      f"next codes after each {what}, largest first. A gentle slope is good; a spike is a prefix "
      "too wide for the beam, a long floor at 1 a level that adds nothing there.",
      rank_plot(
        np.sort(children_P)[::-1], title=f"{title}, next codes per prefix", x_name="prefixes"
      ),
    ))  # fmt: skip
  return figures
