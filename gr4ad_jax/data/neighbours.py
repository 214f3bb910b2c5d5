"""The neighbours of a history: ads that tend to follow its latest ads, each with numbers.

A table counts which ad users took within a few steps after which other, and holds what ads say of
themselves. Neighbours followed the latest ads or came before them, followed what followed them or
what came after the same ads, or are described alike. `transitions.py` makes the table.

Exported artifacts take this file along: it imports NumPy alone.

Letters: A ads, N entries of a table, T latest ads of a history, P pairs, K numbers of each ad, X
rows asked for, M ads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

WINDOW, STEP_DECAY = 5, 0.7  # a pair counts as far as this, and less for each step beyond the first
LATEST, HISTORY_DECAY = 10, 0.6  # the ads of a history that count, and less for each later one
BETWEEN = 64  # ads that two steps go by way of, those with the largest counts
NUMBERS = (
  "followed", "came before", "followed what followed", "followed the same", "described alike",
  "followed the latest", "followed, as a share", "pairs that lead to it",
)
# What the first five weigh in the rule that a model starts at. An ad counts by its description as
# far as anybody came to it: half where `SHRINKAGE` pairs lead to it.
WEIGHTS = (1.0, 0.3, 0.6, 0.6, 0.6)
ALIKE, LEAD = NUMBERS.index("described alike"), NUMBERS.index("pairs that lead to it")
SHRINKAGE = 5.0
LEAST = 1e-6  # of the rule for an ad that many came to

UNIT_K = np.array([20, 20, 20, 20, 4, 20, 400, 1])  # as UNIT_F and the others of shortlist.py
MEAN_K = np.array([2.5, 1.2, 2, 2, 0.8, 1.6, 1.3, 4.1])
SPREAD_K = np.array([1.5, 1.7, 1.4, 1.4, 0.8, 1.7, 0.9, 1.2])
_SCALE, _BELOW = 1024, 1 << 15
_DECIMALS = 5  # less is what adding and taking away left


class Rows(NamedTuple):
  """A sparse matrix, row by row."""

  start: np.ndarray  # int64 [rows + 1], where each begins among the entries
  column_N: np.ndarray  # int32
  value_N: np.ndarray  # float32

  def add_up(self, row_X: np.ndarray, weight_X: np.ndarray, columns: int) -> np.ndarray:
    """float64 [columns], the sum of these rows times their weights."""
    length_X = (self.start[1:] - self.start[:-1])[row_X]
    end_X = np.cumsum(length_X)
    entry = np.repeat(self.start[row_X] - end_X + length_X, length_X)
    entry += np.arange(len(entry))
    value = self.value_N[entry] * np.repeat(weight_X, length_X)
    return _sums(self.column_N[entry], value, columns)


class NeighbourTable(NamedTuple):
  """What is known of A ads, from where a model may learn."""

  pairs: Rows  # [i, j] of A by A: how often j came within a few steps after i
  back: Rows  # the same by j
  terms: Rows  # what each ad says of itself, unit rows
  ads: Rows  # the same by term
  source_A: np.ndarray  # float64, all pairs that begin with i
  target_A: np.ndarray  # float64, all that lead to j


def to_arrays(table: NeighbourTable) -> dict[str, np.ndarray]:
  """All that a table holds, by name."""
  matrices = {name: x for name, x in table._asdict().items() if isinstance(x, Rows)}
  arrays = {
    f"{name}_{part}": x for name, rows in matrices.items() for part, x in rows._asdict().items()
  }
  return arrays | {"source_A": table.source_A, "target_A": table.target_A}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> NeighbourTable:
  """The table of `to_arrays`."""
  matrices = (
    Rows(*(arrays[f"{name}_{part}"] for part in Rows._fields))
    for name in NeighbourTable._fields[:4]
  )
  return NeighbourTable(*matrices, arrays["source_A"], arrays["target_A"])


class Pairs(NamedTuple):
  """Some of the counted pairs."""

  first_P: np.ndarray  # int, ads
  then_P: np.ndarray
  weight_P: np.ndarray  # float64


NO_PAIRS = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def neighbour_numbers(
  table: NeighbourTable, latest_T: np.ndarray, without: Pairs = NO_PAIRS
) -> np.ndarray:
  """float64 [K, A], the NUMBERS of every ad.

  Args:
    table: what is known.
    latest_T: the distinct ads of a history, most recent first; those beyond the table say nothing.
    without: pairs that do not count.
  """
  num_ads = len(table.source_A)
  weight_T = HISTORY_DECAY ** np.arange(len(latest_T[:LATEST]))
  known_T = latest_T[:LATEST] < num_ads
  latest_T, weight_T = latest_T[:LATEST][known_T], weight_T[known_T]
  source_A = table.source_A - _sums(without.first_P, without.weight_P, num_ads)
  target_A = table.target_A - _sums(without.then_P, without.weight_P, num_ads)

  def step(ad_X: np.ndarray, weight_X: np.ndarray, rows: Rows = table.pairs) -> np.ndarray:
    """Counts of what followed these ads, or came before them."""
    first_P, then_P = without[:2] if rows is table.pairs else without[1::-1]
    weight_A = _sums(ad_X, weight_X, num_ads)
    count_A = rows.add_up(ad_X, weight_X, num_ads)
    count_A -= _sums(then_P, weight_A[first_P] * without.weight_P, num_ads)
    return _counted(count_A)

  def by_way_of(count_A: np.ndarray) -> np.ndarray:
    """What followed the ads that count most, as far as they are followed by anything."""
    ad_X = np.argpartition(-count_A, min(BETWEEN, num_ads) - 1)[:BETWEEN]
    ad_X = ad_X[(count_A[ad_X] > 0) & (_counted(source_A[ad_X]) > 0)]
    return step(ad_X, count_A[ad_X] / source_A[ad_X])

  followed_A, before_A = step(latest_T, weight_T), step(latest_T, weight_T, table.back)
  term_N = table.terms.add_up(latest_T, weight_T, len(table.ads.start) - 1)
  said = np.flatnonzero(term_N)
  return np.stack([
    followed_A, before_A, by_way_of(followed_A), by_way_of(before_A),
    table.ads.add_up(said, term_N[said], num_ads),
    step(latest_T[:1], weight_T[:1]), step(latest_T, weight_T / (source_A[latest_T] + 1)),
    _counted(target_A),
  ])


def _sums(index_X: np.ndarray, weight_X: np.ndarray, size: int) -> np.ndarray:
  return np.bincount(index_X, weight_X, size).astype(np.float64)  # without any they are whole


def _counted(count_A: np.ndarray) -> np.ndarray:
  return np.maximum(np.round(count_A, _DECIMALS), 0)


def neighbours(
  number_KA: np.ndarray, met_P: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """The ads that the rule puts first, none of them met, and the numbers of all of these.

  Args:
    number_KA: from `neighbour_numbers`.
    met_P: ads that the user met.
    most: ads at the most.

  Returns:
    ad_N int32 [most], the likeliest first, -1 = none, and number_XK int16, round(1024 * log(1 + x *
    unit)) of the ads met and then of these; 0 for ads beyond the table.
  """
  num_ads = number_KA.shape[1]
  known_A = number_KA[LEAD] / (number_KA[LEAD] + SHRINKAGE)
  rule_A = np.dot(WEIGHTS[:ALIKE], number_KA[:ALIKE])
  rule_A += (WEIGHTS[ALIKE] * number_KA[ALIKE] + LEAST) * known_A
  rule_A[met_P[met_P < num_ads]] = -1
  ad_N = np.argpartition(-rule_A, min(most, num_ads) - 1)[:most]
  ad_N = ad_N[np.lexsort((ad_N, -rule_A[ad_N]))]
  near_N = np.full(most, -1, np.int32)
  near_N[: len(ad_N)] = np.where(rule_A[ad_N] >= 0, ad_N, -1)
  number_KA = np.concatenate([number_KA, np.zeros((len(NUMBERS), 1))], axis=1)
  number_XK = number_KA[:, np.minimum(np.append(met_P, near_N), num_ads)].T
  stored_XK = np.rint(_SCALE * np.log1p(number_XK * UNIT_K))
  return near_N, np.minimum(stored_XK, _BELOW - 1).astype(np.int16)
