"""The tokenizer's verdicts in words, for pages and the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup, escape

from gr4ad_jax.report.page import integer, listing, number, percent
from gr4ad_jax.tokenizer.health_line import HealthLine
from gr4ad_jax.tokenizer.health_verdicts import worst

STYLES = {"fine": "good", "look": "fair", "will hurt": "poor"}  # classes of the page
_OPTION = re.compile(r"--[a-z-]+(?: (?:ad_id|suffix|hash|balanced_kmeans|uae)\b)?")


class Row(NamedTuple):
  """A line as a page shows it."""

  label: str
  reason: Markup
  value: str
  verdict: str
  style: str


def headline(lines: Sequence[HealthLine]) -> tuple[str, str]:
  """One sentence on all lines, and the verdict of the worst."""
  line = worst(lines)
  if line.verdict == "fine":
    return f"All {len(lines)} lines are fine.", "fine"
  hurt, look = (sum(one.verdict == verdict for one in lines) for verdict in ("will hurt", "look"))
  counts = [f"{hurt} will hurt"] * bool(hurt) + [f"{look} ask for a look"] * bool(look)
  found = f"{_place(line)}: {value_of(line)}"
  return f"Of {len(lines)} lines, {listing(counts)}. {found}. {line.reason}", line.verdict


def value_of(line: HealthLine) -> str:
  """The number in its unit."""
  return {"share": percent, "count": integer, "number": number}[line.unit](line.value)


def _place(line: HealthLine) -> str:
  """The label, with the level that it speaks of."""
  level = f"{line.group.split(',')[0]}, " if line.group.startswith("Level") else ""
  return f"{level}{line.label}"


def with_options(text: str) -> Markup:
  """The text with its command line options set as code that does not break."""
  return Markup(_OPTION.sub(r'<code class="option">\g<0></code>', str(escape(text))))


def groups(lines: Sequence[HealthLine]) -> list[tuple[str, list[Row]]]:
  """The lines under their headings."""
  return [
    (name, [
      Row(line.label, with_options(line.reason), value_of(line), line.verdict, STYLES[line.verdict])
      for line in group
    ])
    for name, group in groupby(lines, key=lambda line: line.group)
  ]  # fmt: skip


def summary(lines: Sequence[HealthLine]) -> list[tuple[str, str, list[str]]]:
  """(words, style, names) of the lines that are not fine, worst first."""
  found = []
  for verdict, words in (("will hurt", "Will hurt:"), ("look", "Look:")):
    names = [f"{_place(line)} {value_of(line)}" for line in lines if line.verdict == verdict]
    if names:
      found.append((words, STYLES[verdict], names))
  return found
