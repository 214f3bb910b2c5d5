"""What a server has accepted, on disk before it says so: events of users and changes of ads.

One SQLite file in WAL mode; a call is acknowledged after its transaction is synchronised, so a
server that is killed at any moment has lost nothing that it accepted. The same rows are the users'
latest histories, and `segments.py` writes them as log segments that `gr4ad online` learns from.

A disk may damage the file. At start it is checked as a whole and, where that is needed, rebuilt of
what can be read (`journal_repair.py`); a row whose content has changed since it was written is left
out wherever it is read. Both are said in a line that names the file and the rows. Only the owner
reads the file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gr4ad_jax.data.records import Action
from gr4ad_jax.machine.progress import console
from gr4ad_jax.serving import journal_repair

_TABLES = """
create table if not exists events(
  seq integer primary key autoincrement, user_id text not null, time_s integer not null,
  ad_id text, content_id text, action integer not null, request_id text, value real not null,
  ecpm real, features text not null, crc integer);
create index if not exists events_of_user on events(user_id, seq);
create index if not exists events_by_time on events(time_s);
create table if not exists event_ids(user_id text not null, event_id text not null,
  kept_s integer not null, primary key(user_id, event_id)) without rowid;
create table if not exists ads(ad_id text primary key, fields text, live integer not null,
  crc integer);
create table if not exists about(id text not null);
create table if not exists positions(name text primary key, seq integer not null);
"""
_CHECKED = ("events", "ads")  # tables whose rows have a checksum; earlier versions wrote none
_EVENTS = (
  "select seq, user_id, time_s, ad_id, content_id, action, request_id, value, ecpm, features, crc"
  " from events"
)


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
    """Opens or creates it; what a disk has damaged is told.

    Raises:
      ValueError: the file is there and no journal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    self.path = path
    self._write_lock, self._local = threading.Lock(), threading.local()
    self._connections: list[sqlite3.Connection] = []
    self._unreadable: set[str] = set()
    if path.exists() and not path.stat().st_size:
      console.print(f"{path}: is empty; if it held events, they are gone")
    journal_repair.create_private(path)
    try:
      self._check()
      self._connection.executescript(_TABLES)
      for table in _CHECKED:
        columns = self._connection.execute(f"pragma table_info({table})").fetchall()
        if all(column[1] != "crc" for column in columns):
          self._connection.execute(f"alter table {table} add column crc integer")
      with self._connection as connection:
        connection.execute(
          "insert into about select ? where not exists (select * from about)",
          (uuid.uuid4().hex[:8],),
        )
        self.id: str = connection.execute("select id from about").fetchone()[0]
    except sqlite3.DatabaseError as error:
      self.close()
      raise ValueError(f"{path}: not a usable store ({error})") from None

  def _check(self) -> None:
    """Rebuilds a damaged file, and tells what is missing."""
    commits, wal = journal_repair.written_commits(self.path), self.path.name + "-wal"
    with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as connection:
      fault = journal_repair.fault_of(connection)
      read = 0
      if fault is None and commits:
        read = connection.execute("pragma wal_checkpoint(passive)").fetchone()[1]
    if fault is None and commits and commits[-1] > read:
      console.print(
        f"{self.path.with_name(wal)}: damaged; {sum(place > read for place in commits):,} of "
        f"{len(commits):,} transactions in it cannot be read: the last events may be missing"
      )
    if fault is not None:
      kept, lost = journal_repair.rebuild(self.path, _TABLES)
      missing = f"not to be read: {'; '.join(lost)}" if lost else "all rows could be read"
      console.print(
        f"{self.path}: damaged ({fault}); rebuilt, {missing}; the damaged file is kept as "
        f"{kept.name}"
      )

  @property
  def _connection(self) -> sqlite3.Connection:
    """One for each thread."""
    if not hasattr(self._local, "connection"):
      connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
      connection.execute("pragma journal_mode=wal")
      connection.execute("pragma synchronous=full")
      connection.text_factory = journal_repair.readable_text
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
      connection.executemany(
        "insert into events(user_id, time_s, ad_id, content_id, action, request_id, value, ecpm,"
        " features, crc) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_columns, new),
      )
      return Kept(new, self.last_seq)

  def of_user(self, user_id: str, limit: int | None) -> list[tuple[int, Event]]:
    """The user's last events (None = all), oldest first, with their numbers; no views of ads."""
    return self._events(
      "where user_id = ? and (action > 0 or ad_id is null) order by seq desc limit ?",
      user_id, -1 if limit is None else limit,  # as SQLite says it
    )[::-1]

  def after(self, seq: int, limit: int) -> list[tuple[int, Event]]:
    """Events with larger numbers, in order; those behind damaged ones too."""
    unread: list[range] = []
    rows = journal_repair.readable_rows(
      self._connection, f"{_EVENTS} where seq >= ? order by seq", first=seq + 1,
      last=self.last_seq, unread=unread,
    )
    found = list(itertools.islice(self._readable(rows), limit))
    if unread:
      self._leave_out(f"events {journal_repair.spans(unread)}")
    return found

  def _events(self, which: str, *values: Any) -> list[tuple[int, Event]]:
    return list(self._readable(self._connection.execute(f"{_EVENTS} {which}", values)))

  def _readable(self, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[int, Event]]:
    """Events of rows; those that are not what was written are left out, and told once."""
    for seq, *columns in rows:
      try:
        yield seq, _event(columns)
      except (ValueError, TypeError, AttributeError) as error:
        self._leave_out(f"event {seq:,} ({' '.join(str(error).split())[:80]})")

  def _leave_out(self, what: str) -> None:
    if what not in self._unreadable:
      self._unreadable.add(what)
      console.print(f"{self.path}: {what} cannot be read and is left out")

  @property
  def num_unreadable(self) -> int:
    """Rows, or groups of them, that were left out so far."""
    return len(self._unreadable)

  @property
  def last_seq(self) -> int:
    """Number of the last event ever kept."""
    return self._number("select seq from sqlite_sequence where name = 'events'")

  @property
  def last_time_s(self) -> int:
    """The latest time of an event that is there; 0 where there is none."""
    latest = self._events("order by time_s desc limit 1000")  # some may be damaged, and no times
    return max((event.time_s for _, event in latest), default=0)

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
    rows = [(ad, text := json.dumps(row), _crc((ad, text))) for ad, row in fields.items()]
    with self._write_lock, self._connection as connection:
      connection.executemany(
        "insert or replace into ads(ad_id, fields, live, crc) values (?, ?, 1, ?)", rows
      )

  def remove_ad(self, ad_id: str) -> None:
    """Remembers that an ad went; what it was stays."""
    with self._write_lock, self._connection as connection:
      # A row of its own again, the last one: `ads` lists those that went by when they did.
      connection.execute(
        "insert or replace into ads(ad_id, fields, live, crc) select :ad,"
        " (select fields from ads where ad_id = :ad), 0, (select crc from ads where ad_id = :ad)",
        {"ad": ad_id},
      )

  def forget_ads(self, ad_ids: Sequence[str]) -> None:
    """Remembers nothing of these ads any more."""
    if ad_ids:
      with self._write_lock, self._connection as connection:
        connection.executemany("delete from ads where ad_id = ?", [(ad,) for ad in ad_ids])

  def ads(self) -> list[tuple[str, dict | None, bool]]:
    """Ads that came or went, in this order: id, columns (None = an ad of the log), whether live."""
    rows = self._connection.execute("select ad_id, fields, live, crc from ads order by rowid")
    return [ad for row in rows if (ad := self._ad(*row))]

  def _ad(self, ad_id: str, text: str, live: int, crc: int) -> tuple[str, dict | None, bool] | None:
    try:
      _verify((ad_id, text), crc)
      fields = text and json.loads(text)
      if fields is not None and fields["ad_id"] != ad_id:
        raise ValueError("it names another ad")
      return ad_id, fields, bool(live)
    except (ValueError, TypeError, KeyError) as error:
      self._leave_out(f"ad {ad_id!r} ({' '.join(str(error).split())[:80]})")
      return None

  def forget(self, *, before_s: float, up_to: int) -> None:
    """Removes older events among the first `up_to`, and older ids of events."""
    with self._write_lock, self._connection as connection:
      connection.execute("delete from event_ids where kept_s < ?", (before_s,))
      connection.execute("delete from events where time_s < ? and seq <= ?", (before_s, up_to))

  def close(self) -> None:
    """Closes the file."""
    for connection in self._connections:
      connection.close()


def _columns(event: Event) -> tuple:
  """An event's fields in the order of the columns, as SQLite gives them back; their checksum."""
  row = (
    event.user_id, int(event.time_s), event.ad_id, event.content_id, int(event.action),
    event.request_id, float(event.value), None if event.ecpm is None else float(event.ecpm),
    json.dumps(event.features),
  )
  return *row, _crc(row)


def _event(columns: Sequence[Any]) -> Event:
  *row, crc = columns
  _verify(tuple(row), crc)
  event = Event(*row)
  event = event._replace(action=Action(event.action), features=json.loads(event.features))
  kinds = (event.user_id, str), (event.time_s, int), (event.features, dict)
  if not all(isinstance(*pair) for pair in kinds) or (event.ad_id is None) == (
    event.content_id is None
  ):
    raise ValueError("it is no event")
  return event


def _crc(row: tuple) -> int:
  return zlib.crc32(repr(row).encode())


def _verify(row: tuple, crc: int | None) -> None:
  if crc is not None and crc != _crc(row):
    raise ValueError("it is not what was written")
