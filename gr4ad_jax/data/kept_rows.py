"""Parsed rows of a source, kept in memory while they are few."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_OF_AN_ARRAY = 150  # bytes beside its numbers, about


class KeptRows(Sequence[Any]):
  """A source whose rows are read and parsed once, and then kept, until memory for them is full.

  To read a stored example and to take it apart costs as much as a training step of a small model.
  """

  def __init__(
    self, source: Sequence[Any], parse: Callable[[Any], Any], *, most_bytes: int = 1 << 29
  ):
    """Reads nothing yet.

    Args:
      source: random access to records, dictionaries of arrays or numbers of rows.
      parse: a record -> a row, which nobody changes.
      most_bytes: of kept records, about.
    """
    self._source, self._parse, self._room = source, parse, most_bytes
    self._kept: dict[int, Any] = {}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, row: int) -> Any:
    if row in self._kept:
      return self._kept[row]
    record = self._source[row]
    parsed = self._parse(record)
    columns = record.values() if isinstance(record, Mapping) else [record]
    size = sum(np.asarray(x).nbytes + _OF_AN_ARRAY for x in columns)
    if size <= self._room:
      self._room -= size
      self._kept[row] = parsed
    return parsed
