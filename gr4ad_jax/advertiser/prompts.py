"""Prompts: a user's history as a summary, within a number of characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.advertiser.histories import Rows, Source

TASK = "Name the advertiser that this user converts with next."
END = "Next advertiser:"
MOST_POPULAR = 50


class Known(NamedTuple):
  """What a prompt tells, best or newest first.

  Attributes:
    popular: names.
    profile: of the user in words; "" = nothing.
    converted: (name, times, days since the last time or -1).
    lately: titles.
  """

  popular: Sequence[str]
  profile: str
  converted: Sequence[tuple[str, int, int]]
  lately: Sequence[str]


def write_prompt(known: Known, *, most_chars: int) -> str:
  """A prompt of whole entries. Too long, it loses popular names, then titles, then conversions.

  Each list loses its last entry first. What is left of an empty list is nothing, not even its
  heading; task and profile stay, so that a limit below their length is not kept.
  """
  popular, lately = list(known.popular), list(known.lately)
  converted = [_entry(*entry) for entry in known.converted]

  def text() -> str:
    lists = (("Popular", popular), ("Converted with", converted), ("Lately", lately))
    lines = [f"{head}: {' | '.join(entries)}" for head, entries in lists if entries]
    if known.profile:
      lines.insert(0, f"User: {known.profile}")
    return "\n".join([TASK, *lines, END])

  for entries in (popular, lately, converted):
    while entries and len(text()) > most_chars:
      entries.pop()
  return text()


def _entry(name: str, times: int, days: int) -> str:
  return f"{name} ({times})" if days < 0 else f"{name} ({times}, {days} d)"


def known_of(source: Source, rows: Rows, row: int) -> Known:
  """What is known of a row's user at its cut."""
  count_A = source.popularity[int(rows.cut_s_R[row])]
  best = np.argsort(-count_A, kind="stable")[:MOST_POPULAR]
  at = rows.history(row)
  item, age = rows.item_E[at][::-1], rows.age_E[at][::-1]
  name_N = source.names.name_A[source.names.advertiser_N[item]]
  converted = {}  # newest first
  for name, days in zip(name_N, age.tolist(), strict=True):
    times, since = converted.get(name, (0, days))
    converted[name] = times + 1, since
  return Known(
    [source.names.name_A[a] for a in best if count_A[a]], source.profile_U[rows.user_R[row]],
    [(name, *of) for name, of in converted.items()],
    [source.title_N[n] for n in item if source.title_N[n]],
  )


def prompts_of(source: Source, rows: Rows, *, most_chars: int) -> list[str]:
  """The prompt of each row."""
  return [
    write_prompt(known_of(source, rows, row), most_chars=most_chars) for row in range(len(rows))
  ]
