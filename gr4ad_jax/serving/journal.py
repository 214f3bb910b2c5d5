"""What a server has accepted, on disk before it says so: events of users and changes of ads.

One SQLite file in WAL mode; a call is acknowledged after its transaction is synchronised, so a
server that is killed at any moment has lost nothing that it accepted. The same rows are the users'
latest histories, and `segments.py` writes them as log segments that `gr4ad online` learns from.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gr4ad_jax.data.records import Action

_TABLES = """
create table if not exists events(
  seq integer primary key autoincrement, user_id text not null, time_s integer not null,
  ad_id text, content_id text, action integer not null, request_id text, value real not null,
  ecpm real, features text not null);
create index if not exists events_of_user on events(user_id, seq);
create index if not exists events_by_time on events(time_s);
create table if not exists event_ids(user_id text not null, event_id text not null,
  kept_s integer not null, primary key(user_id, event_id)) without rowid;
create table if not exists ads(ad_id text primary key, fields text, live integer not null);
create table if not exists about(id text not null);
create table if not exists positions(name text primary key, seq integer not null);
"""


class Event(NamedTuple):
  """What a user did; exactly one of ad_id and content_id is there."""

  user_id: str
  time_s: int  # unix seconds
  ad_id: str | None
  content_id: str | None
  action: Action
  request_id: str | None
  value: float  # currency
  ecpm: float | None  # currency
  features: dict[str, str]  # of the request


class Kept(NamedTuple):
  """What a call has added."""

  events: list[Event]  # without those that were known by their ids
  last_seq: int  # number of the last event ever kept


class Journal:
  """The file. Any thread may call; a write returns when it is on disk."""

  def __init__(self, path: Path):
    """Opens or creates it.

    Raises:
      ValueError: the file is there and no journal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    self.path = path
    self._write_lock, self._local = threading.Lock(), threading.local()
    self._connections: list[sqlite3.Connection] = []
    try:
      self._connection.executescript(_TABLES)
      with self._connection as connection:
        connection.execute(
          "insert into about select ? where not exists (select * from about)",
          (uuid.uuid4().hex[:8],),
        )
        self.id: str = connection.execute("select id from about").fetchone()[0]
    except sqlite3.DatabaseError as error:
      raise ValueError(f"{path}: not a usable store ({error})") from None

  @property
  def _connection(self) -> sqlite3.Connection:
    """One for each thread."""
    if not hasattr(self._local, "connection"):
      connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
      connection.execute("pragma journal_mode=wal")
      connection.execute("pragma synchronous=full")
      self._local.connection = connection
      self._connections.append(connection)
    return self._local.connection

  def add_events(
    self, events: Sequence[Event], ids: Sequence[str | None] = (), *, now_s: float = 0.0
  ) -> Kept:
    """Keeps events, all or none, but for those that are known by their ids.

    Args:
      events: what was done.
      ids: a name of each event among those of its user, None = it has none; () = none has.
      now_s: unix seconds; the ids are known until `forget` is called with a later time.
    """
    new = []
    with self._write_lock, self._connection as connection:
      for event, name in zip(events, ids or [None] * len(events), strict=True):
        if name is not None and not connection.execute(
          "insert or ignore into event_ids values (?, ?, ?)", (event.user_id, name, int(now_s))
        ).rowcount:
          continue
        new.append(event)
      # An event's fields are the columns, in their order.
      connection.executemany(
        "insert into events(user_id, time_s, ad_id, content_id, action, request_id, value, ecpm,"
        " features) values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [event._replace(features=json.dumps(event.features)) for event in new],
      )
      return Kept(new, self.last_seq)

  def of_user(self, user_id: str, limit: int) -> list[tuple[int, Event]]:
    """The user's last events with their numbers, oldest first; views of ads are no history."""
    return self._events(
      "where user_id = ? and (action > 0 or ad_id is null) order by seq desc limit ?",
      user_id, limit,
    )[::-1]

  def after(self, seq: int, limit: int) -> list[tuple[int, Event]]:
    """Events with larger numbers, in order."""
    return self._events("where seq > ? order by seq limit ?", seq, limit)

  def _events(self, which: str, *values: Any) -> list[tuple[int, Event]]:
    rows = self._connection.execute(f"select * from events {which}", values)
    return [(seq, _event(columns)) for seq, *columns in rows]

  @property
  def last_seq(self) -> int:
    """Number of the last event ever kept."""
    return self._number("select seq from sqlite_sequence where name = 'events'")

  @property
  def last_time_s(self) -> int:
    """The latest time of an event that is there; 0 where there is none."""
    return self._number("select max(time_s) from events")

  def position(self, name: str) -> int:
    """How far somebody has read; 0 at first."""
    return self._number("select seq from positions where name = ?", name)

  def _number(self, query: str, *values: Any) -> int:
    """The one number that is asked for; 0 where there is none."""
    row = self._connection.execute(query, values).fetchone()
    return (row and row[0]) or 0

  def set_position(self, name: str, seq: int) -> None:
    """Remembers how far somebody has read."""
    with self._write_lock, self._connection as connection:
      connection.execute("insert or replace into positions values (?, ?)", (name, seq))

  def put_ads(self, fields: dict[str, dict]) -> None:
    """Remembers ads that came, with their columns; all or none."""
    rows = [(ad, json.dumps(row)) for ad, row in fields.items()]
    with self._write_lock, self._connection as connection:
      connection.executemany("insert or replace into ads values (?, ?, 1)", rows)

  def remove_ad(self, ad_id: str) -> None:
    """Remembers that an ad went; what it was stays."""
    with self._write_lock, self._connection as connection:
      connection.execute("insert or ignore into ads values (?, null, 0)", (ad_id,))
      connection.execute("update ads set live = 0 where ad_id = ?", (ad_id,))

  def ads(self) -> list[tuple[str, dict | None, bool]]:
    """Ads that came or went: id, columns (None = an ad of the log), whether they are live."""
    rows = self._connection.execute("select ad_id, fields, live from ads order by rowid")
    return [(ad, fields and json.loads(fields), bool(live)) for ad, fields, live in rows]

  def forget(self, *, before_s: float, up_to: int) -> None:
    """Removes older events among the first `up_to`, and older ids of events."""
    with self._write_lock, self._connection as connection:
      connection.execute("delete from event_ids where kept_s < ?", (before_s,))
      connection.execute("delete from events where time_s < ? and seq <= ?", (before_s, up_to))

  def close(self) -> None:
    """Closes the file."""
    for connection in self._connections:
      connection.close()


def _event(columns: Sequence[Any]) -> Event:
  event = Event(*columns)
  return event._replace(action=Action(event.action), features=json.loads(event.features))
