"""A file of events of any length -> events sorted by user and time, in constant memory.

The file is read once, after its column of times alone. Rows lie on disk in the order of their
request first, so that the rules of a request see whole requests, then in the order of their user;
about 70 bytes a row each time.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from gr4ad_jax.data.event_rows import EventReader, Numbering, RequestRules, named
from gr4ad_jax.data.log_folder import PART_EVENTS, part_bounds
from gr4ad_jax.data.records import EventTable
from gr4ad_jax.machine.progress import track

_HASHES = 1 << 64


class SortedRuns:
  """Rows on disk in files sorted by one column: a range of its values is read without the rest."""

  def __init__(self, folder: Path, key: str):
    """Writes to a new folder; `key` is the column."""
    folder.mkdir()
    self._folder, self._key = folder, key
    self._lengths: list[int] = []
    self._dtype: np.dtype | None = None

  @property
  def num_rows(self) -> int:
    return sum(self._lengths)

  def add(self, rows: np.ndarray) -> None:
    """Writes one run; rows of equal key keep their order."""
    with self._file(len(self._lengths)).open("wb") as out:  # `tofile` does not say "disk full"
      out.write(rows[np.argsort(rows[self._key], kind="stable")].view(np.uint8))
    self._lengths.append(len(rows))
    self._dtype = rows.dtype

  def read(self, begin: int, end: int) -> np.ndarray:
    """The rows with begin <= key < end, run by run."""
    parts, size = [], self._dtype.itemsize
    for number, length in enumerate(self._lengths):
      with self._file(number).open("rb", buffering=0) as file:
        first, last = (self._find(file, length, value) for value in (begin, end))
        if last > first:
          parts.append(np.fromfile(file, self._dtype, last - first, offset=first * size))
    return np.concatenate(parts) if parts else np.zeros(0, self._dtype)

  def _find(self, file: io.FileIO, length: int, value: int) -> int:
    """Rows of a run with a smaller key; a map of the file would count as memory."""
    size = self._dtype.itemsize

    def key(row: int) -> int:
      read = np.frombuffer(os.pread(file.fileno(), size, row * size), self._dtype)
      return int(read[self._key][0])

    return bisect.bisect_left(range(length), value, key=key)

  def runs(self) -> Iterator[np.ndarray]:
    """All rows, one run after another."""
    for number in range(len(self._lengths)):
      yield np.fromfile(self._file(number), self._dtype)

  def remove(self) -> None:
    """Frees the disk."""
    shutil.rmtree(self._folder)

  def _file(self, number: int) -> Path:
    return self._folder / f"{number:06d}"


@dataclasses.dataclass(frozen=True)
class StreamedEvents:
  """A file of events that has been read and checked.

  Attributes:
    numbering: users, contents and feature values.
    rows: of users, by their final number where they moved, else by the earlier one.
  """

  numbering: Numbering
  rows: SortedRuns

  def parts(self, size: int | None = None) -> Iterator[EventTable]:
    """The events of some users after those of others, about `size` (PART_EVENTS) at a time."""
    users, first_request = self.numbering.user_numbers, 0
    bounds = part_bounds(users.count_N, size)
    parts = list(zip(bounds, bounds[1:], strict=False))
    # The first of a user's rows with a smaller number may be of a user without rows.
    earlier = np.append(np.flatnonzero(users.number_of >= 0), len(users.number_of))
    for begin, end in track(parts, "events by user, parts"):
      rows = self.rows.read(earlier[begin], earlier[end])
      events = self.numbering.events(rows, first_request=first_request)
      first_request += len(np.unique(events.request))
      yield events


def read_events(
  frames: Iterable[pd.DataFrame], reader: EventReader, scratch: Path, *,
  cell: Callable[[int, str], object], part_rows: int | None = None,
) -> StreamedEvents:
  """Reads and checks a table of events.

  Args:
    frames: the table in parts.
    reader: of the table.
    scratch: folder for temporary files, which the caller removes.
    cell: the value in a row and column of the table, for messages.
    part_rows: rows in memory at a time while requests are checked; None = PART_EVENTS.

  Raises:
    LogError: a rule is broken.
  """
  by_request = SortedRuns(scratch / "by_request", "id_high")
  by_user = SortedRuns(scratch / "by_user", "user")

  def keep(rows: np.ndarray) -> None:
    reader.keep(rows)
    by_user.add(rows)

  for frame in frames:
    rows = reader.read(frame)
    by_request.add(rows[named(rows)])
    keep(rows[~named(rows)])
  rules = RequestRules()
  num_parts = -(-by_request.num_rows // (part_rows or PART_EVENTS))
  for part in track(range(num_parts), "events by request, parts"):
    begin, end = (_HASHES * at // num_parts for at in (part, part + 1))
    keep(rules.apply(by_request.read(begin, end)))
  by_request.remove()
  numbering = reader.finish(rules, cell)
  if numbering.user_numbers.moved:
    by_user, numbering = _moved(by_user, numbering, scratch)
  return StreamedEvents(numbering, by_user)


def _moved(
  earlier: SortedRuns, numbering: Numbering, scratch: Path
) -> tuple[SortedRuns, Numbering]:
  """The rows in the order of the final user numbers: first rows of users have been dropped."""
  runs, users = SortedRuns(scratch / "moved", "user"), numbering.user_numbers
  for rows in earlier.runs():
    rows["user"] = users.of(rows["user"])
    runs.add(rows)
  earlier.remove()
  same = dataclasses.replace(users, number_of=np.arange(len(users.name_N)))
  return runs, dataclasses.replace(numbering, user_numbers=same)
