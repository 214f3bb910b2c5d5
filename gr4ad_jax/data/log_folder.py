"""The folder that logs are stored in; events lie in parts, each holding all events of some users.

    folder/ads.parquet  contents.parquet  users.parquet
    folder/events.parquet    a row group for each part
    folder/log.json          source, currency, caveats, cleaning, rows and digest of each table
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr4ad_jax.data.event_rows import FEATURE_PREFIX
from gr4ad_jax.data.records import (
  DEFAULT_AD_TYPE,
  AdTable,
  ContentTable,
  EventTable,
  Logs,
  Naming,
  UserTable,
)
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine import atomic, digests

FORMAT = 1  # of the stored folder
PREPARE_AGAIN = "run `gr4ad prepare` again, and train again"
PART_EVENTS = 1 << 18  # more only where one user has more
# Columns that stored logs may lack, being younger than the format, and what they then hold.
LATER_COLUMNS = {
  "ad_type": np.array(DEFAULT_AD_TYPE, object), "account_id": np.array("", object),
  "campaign_id": np.array("", object), "bid": np.float32(np.nan),
}
Table = TypeVar("Table", AdTable, ContentTable, UserTable, EventTable)
TABLES = {"ads": AdTable, "contents": ContentTable, "users": UserTable, "events": EventTable}
NO_EVENTS = EventTable(
  *(np.zeros(0, kind) for kind in ("i4", "i8", "i4", "i4", "i4", "i1", "f4", "f4")), features={}
)


def write_logs(logs: Logs, folder: Path) -> None:
  """Writes ads, contents, users, events (.parquet) and log.json; the folder as `write_parts`."""
  events, user_E = logs.events, logs.events.user
  bounds = part_bounds(np.bincount(user_E, minlength=len(logs.users.user_id)))
  rows = np.searchsorted(user_E, bounds)
  parts = (events.rows(slice(a, b)) for a, b in zip(rows, rows[1:], strict=False))
  write_parts(logs, parts, folder)


def write_parts(logs: Logs, parts: Iterable[EventTable], folder: Path) -> None:
  """Writes logs whose events come part by part.

  Args:
    logs: everything but the events.
    parts: the events of some users after those of others, requests numbered on.
    folder: appears, or is replaced, only when all files are complete.

  Raises:
    LogError: the folder exists and holds something other than logs.
  """
  folder = Path(folder)
  check_replaceable(folder)
  with atomic.new_folder(folder) as fresh:
    for name in ("ads", "contents", "users"):
      pq.write_table(_to_arrow(getattr(logs, name)), fresh / f"{name}.parquet", compression="zstd")
    # A part is one row group, however many rows it has.
    write_tables(fresh / "events.parquet", map(_to_arrow, parts), most_rows=1 << 40)
    files = [fresh / f"{name}.parquet" for name in TABLES]
    about = {
      "format": FORMAT,
      "source": logs.source,
      "currency": logs.currency,
      "caveats": list(logs.caveats),
      "cleaning": logs.cleaning,
      "naming": dataclasses.asdict(logs.naming),
      "rows": {name: pq.read_metadata(fresh / f"{name}.parquet").num_rows for name in TABLES},
      "digests": digests.of_files(fresh, files),
    }
    (fresh / "log.json").write_text(json.dumps(about, indent=2) + "\n")


def write_tables(file: Path, tables: Iterable[pa.Table], *, most_rows: int | None = None) -> int:
  """Writes tables one after another, in row groups of their own; returns the rows of all.

  Args:
    file: to write.
    tables: at least one.
    most_rows: of a row group; None = a million.
  """
  writer, rows = None, 0
  try:
    for table in tables:
      writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
      writer.write_table(table, most_rows)
      rows += table.num_rows
  finally:
    if writer:
      writer.close()
  return rows


def check_replaceable(folder: Path) -> None:
  """Refuses to write over what is no stored log.

  Raises:
    LogError: the folder exists and holds something else.
  """
  if folder.exists() and not (folder / "log.json").exists() and any(folder.iterdir()):
    raise LogError(f"{folder}: holds other files: must be absent, empty or written by prepare")


def part_bounds(count_U: np.ndarray, size: int | None = None) -> np.ndarray:
  """First users of parts of about `size` (PART_EVENTS) events each, and the end.

  Args:
    count_U: events of each user.
    size: events of a part.
  """
  begin_U = np.cumsum(count_U) - count_U
  # Users without events behind the last event would begin a part of nothing.
  part_U = np.minimum(begin_U, count_U.sum() - 1) // (size or PART_EVENTS)
  return np.append(np.flatnonzero(np.diff(part_U, prepend=-1)), len(count_U))


def read_logs(folder: Path) -> Logs:
  """Reads what write_logs wrote; columns that an earlier version did not have get defaults.

  Raises:
    LogError: the folder holds no logs, is incomplete, or is of another format version.
  """
  return _read(folder, TABLES)


class LogPart(NamedTuple):
  """The logs of some users; rows of users and requests are counted from the first ones."""

  logs: Logs
  first_user: int
  first_request: int


class LogParts:
  """Stored logs, of whose events one part is in memory at a time.

  Attributes:
    logs: everything but the events.
    num_events: of all parts.
    first_s, last_s: unix seconds of the first and the last event.
  """

  def __init__(self, folder: Path):
    """Opens what `write_logs` wrote.

    Raises:
      LogError: as `read_logs`; the events do not lie in parts.
    """
    self._folder = folder
    self.logs = _read(folder, ("ads", "contents", "users"))
    self._file = Path(folder) / "events.parquet"
    metadata = pq.read_metadata(self._file)
    at = {metadata.schema.column(i).name: i for i in range(metadata.num_columns)}

    def bounds(name: str) -> list[tuple[int, int]]:
      groups = map(metadata.row_group, range(metadata.num_row_groups))
      statistics = [group.column(at[name]).statistics for group in groups]
      return [(s.min, s.max) for s in statistics]

    users, requests, times = bounds("user"), bounds("request"), bounds("time_s")
    if any(a[1] >= b[0] for a, b in zip(users, users[1:], strict=False)):
      raise LogError(f"{self._file}: a user's events lie in several row groups: prepare again")
    self.num_events = metadata.num_rows
    self.first_s, self.last_s = min(t[0] for t in times), max(t[1] for t in times)
    # Users without events stand in no row group: they go to the part before them.
    self._first_user = [0, *(u[0] for u in users[1:]), len(self.logs.users.user_id)]
    self._first_request = [r[0] for r in requests]

  def __len__(self) -> int:
    return len(self._first_request)

  def __reduce__(self) -> tuple:
    return LogParts, (self._folder,)  # another process opens the folder itself

  def read(self, number: int) -> LogPart:
    """One part."""
    user, request = self._first_user[number], self._first_request[number]
    with pq.ParquetFile(self._file) as file:  # a process of its own may be reading
      table = file.read_row_group(number, use_threads=False)
    events = _from_arrow(table, EventTable)
    events = dataclasses.replace(
      events, user=events.user - np.int32(user), request=events.request - np.int32(request)
    )
    users = self.logs.users
    mine = slice(user, self._first_user[number + 1])
    users = UserTable(users.user_id[mine], {n: v[mine] for n, v in users.features.items()})
    return LogPart(dataclasses.replace(self.logs, users=users, events=events), user, request)


def _read(folder: Path, names: Iterable[str]) -> Logs:
  folder = Path(folder)
  file = folder / "log.json"
  read = {"events": NO_EVENTS}
  try:
    about = json.loads(file.read_text(encoding="utf-8"))
    if about["format"] != FORMAT:
      raise LogError(f"{file}: format {about['format']}: must be {FORMAT}, prepare again")
    notes = {key: about[key] for key in ("source", "currency", "cleaning")}
    caveats, rows = tuple(about["caveats"]), about["rows"]
    naming = Naming(**{key: tuple(rules) for key, rules in about.get("naming", {}).items()})
    for name in names:
      file = folder / f"{name}.parquet"
      table = pq.ParquetFile(file).read()
      read[name] = _from_arrow(table, TABLES[name])
      if table.num_rows != rows[name]:
        raise LogError(f"{file}: {table.num_rows} rows: log.json says {rows[name]}, prepare again")
  except (OSError, json.JSONDecodeError, pa.ArrowException, KeyError, TypeError) as error:
    reason = type(error).__name__
    raise LogError(f"{file}: not readable ({reason}): must be written by prepare") from None
  return Logs(**read, caveats=caveats, naming=naming, **notes)


def _to_arrow(table: AdTable | ContentTable | UserTable | EventTable) -> pa.Table:
  columns = {}
  for field in dataclasses.fields(table):
    values = getattr(table, field.name)
    if field.name == "features":
      for name, values_N in values.items():
        strings = pa.array(values_N, pa.string())
        columns[FEATURE_PREFIX + name] = strings.dictionary_encode()
    elif field.name == "embedding_AD":
      if values is not None:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    else:
      columns[field.name] = pa.array(values, pa.string() if values.dtype == object else None)
  return pa.table(columns)


def _from_arrow(table: pa.Table, record: type[Table]) -> Table:
  fields = {}
  for field in dataclasses.fields(record):
    if field.name == "features":
      names = [name for name in table.column_names if name.startswith(FEATURE_PREFIX)]
      fields["features"] = {
        name.removeprefix(FEATURE_PREFIX): _numpy(table[name]) for name in names
      }
    elif field.name == "embedding_AD" and "embedding_AD" not in table.column_names:
      fields["embedding_AD"] = None
    elif field.name in LATER_COLUMNS and field.name not in table.column_names:
      fields[field.name] = np.repeat(LATER_COLUMNS[field.name], table.num_rows)
    else:
      fields[field.name] = _numpy(table[field.name])
  return record(**fields)


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
  column = column.combine_chunks()
  if pa.types.is_fixed_size_list(column.type):
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
  if pa.types.is_dictionary(column.type):  # one shared str object per distinct value
    return column.dictionary.to_numpy(zero_copy_only=False)[column.indices.to_numpy()]
  return column.to_numpy(zero_copy_only=False)
