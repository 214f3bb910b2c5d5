"""Conditions on ads, as "COLUMN=VALUE": which ads a request may get."""

from __future__ import annotations

import difflib
import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd

from gr4ad_jax.catalog.ad_index import AdIndex
from gr4ad_jax.catalog.subsets import pack_subsets
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.pipeline import with_rows
from gr4ad_jax.data.records import AdTable

MOST_COMPARED = 500  # values that a mistyped one is compared with
COLUMNS = ("advertiser_id", "category", "conversion_type", "ad_type", "account_id", "campaign_id")


class Allowed(NamedTuple):
  """The ads that a request may get."""

  keep_A: np.ndarray  # bool
  word_U: np.ndarray  # uint32, the SIDs that hold one, as `pack_subsets` makes it


def allow(index: AdIndex, keep_A: np.ndarray, capacity: int) -> Allowed:
  """Some of the ads as a search takes them; an SID is found where one of its ads is kept.

  Args:
    index: SIDs and ads.
    keep_A: bool, the ads that may be found.
    capacity: of the prefix tree that will be searched.

  Raises:
    ValueError: not one bool for each ad.
  """
  keep_A, num_ads = np.asarray(keep_A), len(index.sid_of_ad_A)
  if keep_A.shape != (num_ads,) or keep_A.dtype != bool:
    raise ValueError(f"keep_A: shape {keep_A.shape} of {keep_A.dtype}, needs [{num_ads}] bool")
  sid_N = index.sid_of_ad_A[keep_A]
  member_1S = np.zeros((1, len(index.sids_SL)), bool)
  member_1S[0, sid_N[sid_N >= 0]] = True  # retired ads hold none
  return Allowed(keep_A, pack_subsets(member_1S, capacity)[0])


class _Column(NamedTuple):
  number_of: dict[str, int]  # value -> number
  number_A: np.ndarray  # int32, of each ad


class Targeting:
  """The columns of a catalogue, ready for conditions; `updated` gives that of a changed one."""

  def __init__(self, ads: AdTable):
    self._columns: dict[str, _Column] = {}
    for name in COLUMNS:
      number_A, values = pd.factorize(getattr(ads, name))
      self._columns[name] = _Column(
        {value: i for i, value in enumerate(values.tolist())}, number_A.astype(np.int32)
      )

  def updated(self, row_N: np.ndarray, ads: AdTable) -> Targeting:
    """The same with other values in some rows; rows past the end must follow without a gap."""
    other = Targeting.__new__(Targeting)
    other._columns = {}
    for name, (number_of, number_A) in self._columns.items():
      number_of = dict(number_of)
      values = getattr(ads, name).tolist()
      new_N = np.array([number_of.setdefault(value, len(number_of)) for value in values])
      other._columns[name] = _Column(number_of, with_rows(number_A, row_N, new_N))
    return other

  def matches(self, condition: str) -> np.ndarray:
    """bool [A]: the ads that meet one "COLUMN=VALUE"; a category holds those below it, too.

    Raises:
      ConfigError: no such column, or a value that no ad has.
    """
    column, found, value = condition.partition("=")
    if not found or column not in COLUMNS:
      raise ConfigError(f"{condition!r}: write COLUMN=VALUE, with one of {', '.join(COLUMNS)}")
    number_of, number_A = self._columns[column]
    meets_N = np.zeros(len(number_of), bool)
    if column == "category":
      below = f"{value} > "
      hits = [i for name, i in number_of.items() if name == value or name.startswith(below)]
      meets_N[hits] = True
    elif value in number_of:
      meets_N[number_of[value]] = True
    if not value or not meets_N.any():
      raise ConfigError(f"{condition!r}: no ad has it; {self._hint(column, value)}")
    return meets_N[number_A]

  def values(self, column: str) -> list[str]:
    """What a condition on this column may name, sorted; of categories the ones above, too."""
    known = set(self._columns[column].number_of)
    if column == "category":
      paths = (itertools.accumulate(text.split(" > "), "{} > {}".format) for text in known)
      known = set(itertools.chain.from_iterable(paths))
    return sorted(known - {""})

  def _hint(self, column: str, value: str) -> str:
    known = self.values(column)
    close = known[:3]
    if len(known) <= MOST_COMPARED:
      close = difflib.get_close_matches(value[:100], known, n=3, cutoff=0.4) or close
    return f"the nearest are {', '.join(map(repr, close))}" if close else "the column is empty"
