"""The user's own logs: files with the columns that `tables.build_logs` documents."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from gr4ad_jax.data import tables
from gr4ad_jax.data.columns import action_words, check_naming, require_used
from gr4ad_jax.data.config import Parquet
from gr4ad_jax.data.event_rows import EventReader, EventReading, Stray
from gr4ad_jax.data.event_stream import read_events
from gr4ad_jax.data.log_folder import NO_EVENTS, check_replaceable, write_parts
from gr4ad_jax.data.records import Logs, Naming
from gr4ad_jax.data.table_files import TableFiles
from gr4ad_jax.data.times import MAX_UNIX_SECONDS, TimeSurvey
from gr4ad_jax.data.validation import RowError, more_rows
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.progress import track

READ_ROWS = 1 << 19  # of the events, in memory at a time


def store_parquet_logs(
  source: Parquet, folder: Path, *, read_rows: int = READ_ROWS, part_events: int | None = None
) -> list[str]:
  """Reads and validates logs from files and stores them as `log_folder.write_logs` does.

  Memory does not grow with the number of events. Temporary files beside `folder` take about 140
  bytes an event.

  Args:
    source: where the files are, and how they are read.
    folder: appears, or is replaced, only when all files are complete.
    read_rows: events read at a time.
    part_events: events of a stored part; None = log_folder.PART_EVENTS.

  Returns:
    Lines to show: columns and rows that were left out.

  Raises:
    LogError: a file is not readable or breaks a rule, or `folder` holds something other than logs.
    ConfigError: names of columns or actions that do not fit the files.
  """
  check_replaceable(folder)
  naming = Naming(source.map, source.ignore_columns, source.actions)
  check_naming(naming)
  places = {
    "ads": source.ads, "contents": source.contents, "users": source.users, "events": source.events
  }
  files = {
    name: TableFiles(storage.fetch(place), name, naming) for name, place in places.items() if place
  }
  require_used(
    naming, [file.chosen for file in files.values()],
    list(dict.fromkeys(column for file in files.values() for column in file.columns)),
  )
  for file in files.values():
    file.check_columns()
  with _by_names_of_the_owner(files):
    counts: dict[str, int] = {}
    frames = {name: file.whole() for name, file in files.items() if name != "events"}
    known = tables.known_tables(frames, {name: f.name for name, f in files.items()}, counts)
    del frames
    events = files["events"]
    survey, frames = TimeSurvey(events.name), events.frames(read_rows, only=("time",))
    for frame in track(frames, "times", events.num_rows, step=read_rows):
      survey.add(frame["time"])
    reader = EventReader(
      events.name, counts, **vars(known), invalid_rows=source.invalid_rows,
      how=EventReading(survey.finish(time.time()), action_words(naming)),
    )
    with atomic.scratch_folder(folder) as scratch:
      read = read_events(
        track(events.frames(read_rows), "events read", survey.num_rows, step=read_rows), reader,
        scratch, cell=events.cell, part_rows=part_events,
      )
      logs = Logs(
        ads=known.ads, contents=read.numbering.contents, users=read.numbering.users,
        events=NO_EVENTS, source=f"files {Path(files['ads'].name).name}, {Path(events.name).name}",
        currency=source.currency, caveats=(), cleaning=counts, naming=naming,
      )
      write_parts(logs, read.parts(part_events), folder)
  left_out = sum(n for rule, n in counts.items() if rule.startswith("events: left out, time"))
  return [*_columns_left_out(files), *_rows_left_out(events, reader.strays, left_out)]


def read_table(path: Path, naming: Naming = Naming()) -> pd.DataFrame:  # noqa: B008
  """A whole table of events.

  Raises:
    LogError: it is not readable, or a column is missing or unknown.
  """
  file = TableFiles(path, "events", naming)
  file.check_columns()
  return file.whole()


@contextlib.contextmanager
def _by_names_of_the_owner(files: Mapping[str, TableFiles]) -> Iterator[None]:
  """Errors name the part of a folder, and the column as it is called there."""
  try:
    yield
  except RowError as error:
    for file in files.values():
      if file.name == error.file:
        raise file.as_written(error) from None
    raise


def _columns_left_out(files: Mapping[str, TableFiles]) -> list[str]:
  return [
    f"{file.name}: columns left out: {', '.join(n or '(no name)' for n in file.chosen.left_out)}"
    for file in files.values() if file.chosen.left_out
  ]


def _rows_left_out(events: TableFiles, strays: list[Stray], count: int) -> list[str]:
  lines = []
  for stray in strays:
    file, row = events.place(stray.row)
    when = ""
    if 0 <= stray.time_s < MAX_UNIX_SECONDS:
      when = f" ({datetime.datetime.fromtimestamp(stray.time_s, datetime.UTC):%Y-%m-%d %H:%M:%S})"
    column = events.chosen.source["time"]
    lines.append(
      f"{file}: row {row}, column '{column}', value {stray.cell}{when}: left out, {stray.why}"
    )
  if lines:
    lines[-1] += more_rows(count - len(lines) + 1)
  return lines
