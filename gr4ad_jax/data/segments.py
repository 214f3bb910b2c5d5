"""Segments of a log that goes on: files of events that are added to the logs already there.

A segment is a .parquet or .csv file with the columns of the events table (docs/own_logs.md). Its
users may be new, and have no features then. Rows of unknown ads or contents, and rows of a time
more than a day ahead of the present, cannot be learned from and are left out, counted.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from gr4ad_jax.data.columns import action_words
from gr4ad_jax.data.event_rows import EventReader, EventReading, whole_table
from gr4ad_jax.data.parquet_logs import read_table
from gr4ad_jax.data.records import DAY_S, EventTable, Logs, UserTable
from gr4ad_jax.data.times import ahead_of, time_column
from gr4ad_jax.data.validation import NoValidRows, factorize_ids, require_columns

_AHEAD = "events: dropped, time: more than a day ahead of the present"
SUFFIXES = (".parquet", ".csv", ".csv.gz")


class Appended(NamedTuple):
  """Logs with a segment at their end."""

  logs: Logs
  new_R: np.ndarray  # bool, the requests of the segment
  left_out: dict[str, int]  # rule -> rows of the segment


def segment_files(folder: Path) -> list[Path]:
  """The segments in a folder, by name, which must be their order in time; hidden files are not."""
  return sorted(
    path for path in folder.iterdir()
    if path.name.endswith(SUFFIXES) and not path.name.startswith(".")
  )


def append_segment(
  logs: Logs, file: Path, *, keep_days: float | None = None, now_s: float | None = None
) -> Appended:
  """The logs with the events of a segment.

  Args:
    logs: what is known so far.
    file: the segment.
    keep_days: events older than this, seen from the newest one, are forgotten; None = never.
    now_s: unix seconds of the present; None = those of the machine.

  Raises:
    LogError: the file is not readable or lacks a column.
  """
  frame = read_table(file, logs.naming)
  require_columns(frame, ("user_id", "time"), str(file), prefix="")
  time_s_E, _ = time_column(frame["time"], str(file))
  # One stray row would drag the window of `keep_days` into the future, and histories out of it.
  ahead_E = ahead_of(time.time() if now_s is None else now_s, time_s_E)
  frame, counts = frame[~ahead_E], {_AHEAD: int(ahead_E.sum())}
  if not len(frame):
    return _nothing_new(logs, counts)
  users = _with_users(logs.users, frame["user_id"], str(file))
  old = logs.events
  try:
    reader = EventReader(
      str(file), counts, ads=logs.ads, contents=logs.contents, users=users, invalid_rows="drop",
      how=EventReading(actions=action_words(logs.naming)),
    )
    _, new = whole_table(reader, frame)
  except NoValidRows:  # a quiet hour, or one of new ads alone
    return _nothing_new(logs, counts)
  if keep_days is not None:
    old = old.rows(old.time_s >= int(new.time_s.max()) - keep_days * DAY_S)
  first_new = int(old.request.max(initial=-1)) + 1
  new = dataclasses.replace(new, request=new.request + first_new)
  features = {
    name: np.concatenate([column_E, new.features.get(name, np.full(len(new.user), "", object))])
    for name, column_E in old.features.items()
  }
  joined = EventTable(features=features, **{
    name: np.concatenate([column_E, getattr(new, name)])
    for name, column_E in vars(old).items() if name != "features"
  })
  joined = joined.rows(np.lexsort((joined.time_s, joined.user)))
  request_E, kept = pd.factorize(joined.request)
  events = dataclasses.replace(joined, request=request_E.astype(np.int32))
  return Appended(
    dataclasses.replace(logs, users=users, events=events), np.asarray(kept) >= first_new,
    _left_out(counts),
  )


def _nothing_new(logs: Logs, counts: dict[str, int]) -> Appended:
  no_requests = np.zeros(logs.events.request.max(initial=-1) + 1, bool)
  return Appended(logs, no_requests, _left_out(counts))


def _left_out(counts: dict[str, int]) -> dict[str, int]:
  return {rule: count for rule, count in counts.items() if count and "dropped" in rule}


def _with_users(users: UserTable, user_id: pd.Series, file: str) -> UserTable:
  """The user table with those of a segment at its end."""
  _, names = factorize_ids(user_id, file)
  fresh = names[~np.isin(names.astype(str), users.user_id.astype(str))]
  if not len(fresh):
    return users
  features = {
    name: np.append(column_U, np.full(len(fresh), "", object))
    for name, column_U in users.features.items()
  }
  return UserTable(np.append(users.user_id, fresh), features)
