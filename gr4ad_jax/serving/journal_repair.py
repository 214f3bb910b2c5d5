"""A store's file that a disk has damaged: what is wrong with it, and what of it can be saved.

SQLite stops at the first page that it cannot read, and writes into a damaged tree fail from then
on. So the rows that can be read are copied into a new file, which takes the place of the old one.
The old one is kept beside it; nothing is deleted.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PAGE, _WAL_HEADER, _FRAME_HEADER = 4096, 32, 24  # bytes, of SQLite's file format
_LEAF = 13  # the first byte of a page that holds rows of a table
_MOST = 10**12 - 1  # numbers of rows have twelve digits in the names of segments; more are damage


def is_damage(error: sqlite3.Error) -> bool:
  """Whether the file's content is at fault, not the disk's room, its rights, or another writer."""
  code = getattr(error, "sqlite_errorcode", 0) & 0xFF
  return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def create_private(path: Path) -> None:
  """Makes an empty file that only its owner reads; from one that is there, strangers are shut out.

  SQLite gives the files beside it the same rights.
  """
  try:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
  except FileExistsError:
    with contextlib.suppress(PermissionError):  # another user's, who has let this one in
      path.chmod(path.stat().st_mode & 0o770)


def fault_of(connection: sqlite3.Connection) -> str | None:
  """The first thing that is wrong with a file, its indexes included; None = nothing is.

  Raises:
    sqlite3.Error: it cannot be read for another reason than damage.
  """
  try:
    found = connection.execute("pragma integrity_check(1)").fetchone()[0]
  except sqlite3.DatabaseError as error:
    if not is_damage(error):
      raise
    found = str(error)
  return None if found == "ok" else " ".join(found.replace("*** in database main ***", "").split())


def written_commits(path: Path) -> list[int]:
  """Places, counted from 1, of the frames in a log of writes (-wal) that end a transaction."""
  wal = _wal(path)
  if not wal.exists() or wal.stat().st_size <= _WAL_HEADER + _FRAME_HEADER:
    return []
  data = wal.read_bytes()
  (page,) = struct.unpack_from(">I", data, 8)
  if page not in (1 << n for n in range(9, 17)):
    page = _PAGE
  # Frames of an earlier round, which were not overwritten yet, have other salts.
  salts = {data[16:24], data[_WAL_HEADER + 8 : _WAL_HEADER + 16]}
  step = _FRAME_HEADER + page
  return [
    number for number, at in enumerate(range(_WAL_HEADER, len(data) - step + 1, step), 1)
    if data[at + 8 : at + 16] in salts and data[at + 4 : at + 8] != b"\0\0\0\0"
  ]


def aside(path: Path) -> Path:
  """A name beside a file for its damaged content."""
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
  return path.with_name(f"{path.name}.damaged-{now}")


def rebuild(path: Path, tables: str) -> tuple[Path, list[str]]:
  """Puts a file with all rows that can be read in the place of a damaged one.

  Args:
    path: of the file, which no connection has open.
    tables: statements that make its tables.

  Returns:
    Where the damaged file is kept, and what of it could not be read, in words.
  """
  fresh, kept, wal = path.with_name(f".{path.name}.rebuilt"), aside(path), _wal(path)
  fresh.unlink(missing_ok=True)
  create_private(fresh)
  with contextlib.closing(sqlite3.connect(fresh)) as new:
    new.executescript(tables)
    with _source(path, fresh) as old, new:
      lost = []
      made = "select name, sql from sqlite_master where type = 'table' and name not like 'sqlite_%'"
      for name, sql in new.execute(made).fetchall():
        lost += _copied(old, new, name, by_number="without rowid" not in sql.lower())
      lost += _settled(old, new)
  if wal.exists() and wal.stat().st_size:
    shutil.copy2(wal, aside(wal))
  os.link(path, kept)
  for suffix in ("-wal", "-shm"):
    path.with_name(path.name + suffix).unlink(missing_ok=True)
  fresh.replace(path)
  return kept, lost


@contextlib.contextmanager
def _source(path: Path, fresh: Path) -> Iterator[sqlite3.Connection]:
  """A connection that reads the damaged file.

  Where its first page is gone, which says what the file is and where its tables begin, a copy of
  the file gets that of a fresh one: the same statements put the same tables into the same places.
  """
  with contextlib.ExitStack() as stack:
    old = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
    known = None
    with _despite_damage():
      # What the log of writes holds becomes part of the file, so that one step replaces all of it.
      old.execute("pragma wal_checkpoint(truncate)").fetchone()
      known = old.execute("select count(*) from sqlite_master").fetchone()
    if known is None:
      copy = path.with_name(f".{path.name}.copy")
      for file, target in ((path, copy), (_wal(path), _wal(copy))):
        stack.callback(target.unlink, missing_ok=True)
        if file.exists():
          shutil.copyfile(file, target)
      stack.callback(path.with_name(f"{copy.name}-shm").unlink, missing_ok=True)
      _graft(copy, fresh.read_bytes()[:_PAGE])
      old = stack.enter_context(contextlib.closing(sqlite3.connect(copy)))
    old.text_factory = readable_text
    yield old


def _graft(file: Path, page: bytes) -> None:
  """Puts another first page into a file."""
  first = bytearray(page)
  first[18:20] = b"\2\2"  # with a log of writes beside it
  struct.pack_into(">I", first, 28, file.stat().st_size // _PAGE)
  first[32:40] = bytes(8)  # no free pages
  first[92:96] = first[24:28]  # so that the number of pages counts
  with file.open("r+b") as stream:
    stream.write(first)


def readable_text(raw: bytes) -> str:
  """A cell's text; what is no UTF-8 must not stop the reading of other rows."""
  return raw.decode(errors="replace")


def readable_rows(
  connection: sqlite3.Connection, query: str, *, first: int, last: int, unread: list[range]
) -> Iterator[tuple]:
  """Rows in the order of their numbers, also those behind damaged pages.

  Args:
    connection: of the file.
    query: ends in "NUMBER >= ? order by NUMBER"; the number is the first column.
    first, last: numbers to look at.
    unread: gets the numbers that cannot be read, whether there are such rows or not.

  Raises:
    sqlite3.Error: a fault that is no damage.
  """

  def next_row(at: int) -> tuple | None:
    with _despite_damage():
      row = connection.execute(f"{query} limit 1", (at,)).fetchone()
      return row if row and row[0] <= last else None
    return None

  at = first
  while at <= last:
    try:
      for row in connection.execute(query, (at,)):
        if row[0] > last:  # of a page that holds something else by now
          continue
        at = row[0] + 1
        yield row
      return
    except sqlite3.DatabaseError as error:
      if not is_damage(error):
        raise
    # The module reads a row ahead: what lies before the damage may not have come.
    if row := next_row(at):
      at = row[0] + 1
      yield row
      continue
    # A damaged page hides many numbers, and one of them may be anything: steps that double find
    # something readable behind it, and halves of the last step where it begins.
    step = 1
    while at + step <= last and not next_row(at + step):
      step *= 2
    hidden, end = at + step // 2, min(at + step, last + 1)
    while end - hidden > 1:
      middle = (hidden + end) // 2
      hidden, end = (hidden, middle) if next_row(middle) else (middle, end)
    unread.append(range(at, end))
    at = end


def spans(numbers: list[range]) -> str:
  """Ascending numbers in words: 3, 7 to 9."""
  joined: list[range] = []
  for each in numbers:
    if joined and joined[-1].stop == each.start:
      joined[-1] = range(joined[-1].start, each.stop)
    else:
      joined.append(each)
  return ", ".join(
    f"{r.start:,}" if len(r) == 1 else f"{r.start:,} to {r.stop - 1:,}" for r in joined
  )


def _copied(
  old: sqlite3.Connection, new: sqlite3.Connection, table: str, *, by_number: bool
) -> list[str]:
  """Copies a table's readable rows; what is missing, in words."""
  with _despite_damage():
    names = {row[1] for row in old.execute(f"pragma table_info({table})")}
    columns = [row[1] for row in new.execute(f"pragma table_info({table})") if row[1] in names]
    if not columns:  # of an earlier version, which had no such table
      return []
    listed, places = ", ".join(columns), ", ".join("?" * len(columns))
    insert = f"insert or ignore into {table}({listed}) values ({places})"
    last = _last_number(old, table) if by_number else None
    if last is None:  # from both ends, as far as it goes
      query = f"select {listed} from {table} order by 1"
      whole = [_insert_until_damage(old, query + order, new, insert) for order in ("", " desc")]
      return [] if whole[0] else [f"some of {table}"]
    unread: list[range] = []
    query = f"select rowid, {listed} from {table} where rowid >= ? order by rowid"
    for number, *row in readable_rows(old, query, first=1, last=last, unread=unread):
      if not new.execute(insert, row).rowcount:  # it breaks a rule of the table
        unread.append(range(number, number + 1))
    unread.sort(key=lambda numbers: numbers.start)
    if unread and "seq" in columns:  # rows below a damaged page of the tree may be whole
      found = {
        number for number, row in _leaf_rows(_file_of(old), len(columns))
        if any(number in numbers for numbers in unread)
        and new.execute(insert, (number, *row[1:])).rowcount
      }
      unread = _without(unread, found)
    return [f"{table} {spans(unread)}"] if unread else []
  return [f"all of {table}"]


def _without(numbers: list[range], found: set[int]) -> list[range]:
  """Ascending ranges without some of their numbers."""
  left = []
  for each in numbers:
    cuts = [each.start - 1, *sorted(n for n in found if n in each), each.stop]
    left += [range(a + 1, b) for a, b in zip(cuts, cuts[1:], strict=False) if b - a > 1]
  return left


def _file_of(connection: sqlite3.Connection) -> Path:
  return Path(connection.execute("pragma database_list").fetchone()[2])


def _leaf_rows(file: Path, num_columns: int) -> Iterator[tuple[int, list[Any]]]:
  """Numbered rows of a table's pages, one page after the other, without the tree above them.

  Rows that go on in other pages are left out. A row may be of another table, or an earlier one: the
  reader knows by its checksum.
  """
  with file.open("rb") as stream:
    while len(page := stream.read(_PAGE)) == _PAGE:
      if page[0] != _LEAF:
        continue
      for cell in range(int.from_bytes(page[3:5], "big")):
        at = int.from_bytes(page[8 + 2 * cell : 10 + 2 * cell], "big")
        with contextlib.suppress(IndexError, struct.error, ValueError):
          number, row = _record(page, at)
          if len(row) == num_columns:
            yield number, row


def _record(page: bytes, at: int) -> tuple[int, list[Any]]:
  """A row's number and cells, by the format of SQLite's records."""
  size, at = _varint(page, at)
  number, at = _varint(page, at)
  header, kinds_at = _varint(page, at)
  if size > _PAGE - 35 or at + size > _PAGE:
    raise ValueError("goes on in other pages")
  cell, end, row = at + header, at + header, []
  while kinds_at < end:
    kind, kinds_at = _varint(page, kinds_at)
    length = (kind - 12) // 2 if kind >= 12 else (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)[kind]
    data, cell = page[cell : cell + length], cell + length
    if kind >= 12:
      row.append(readable_text(data) if kind % 2 else data)
    elif kind == 7:
      row.append(struct.unpack(">d", data)[0])
    else:
      row.append({0: None, 8: 0, 9: 1}.get(kind, int.from_bytes(data, "big", signed=True)))
  return number, row


def _varint(page: bytes, at: int) -> tuple[int, int]:
  """A number of one to nine bytes, and where the next one begins."""
  value = 0
  for place in range(at, at + 8):
    value = value << 7 | page[place] & 0x7F
    if page[place] < 0x80:
      return value, place + 1
  return value << 8 | page[at + 8], at + 9


def _insert_until_damage(
  old: sqlite3.Connection, query: str, new: sqlite3.Connection, insert: str
) -> bool:
  """Whether all rows of a query could be read."""
  with _despite_damage():
    new.executemany(insert, old.execute(query))
    return True
  return False


def _last_number(old: sqlite3.Connection, table: str) -> int | None:
  """The largest number that a row of a table may have; None where nothing tells."""
  for query in (
    f"select max(rowid) from {table}",
    f"select max(seq) from sqlite_sequence where name = '{table}'",
  ):
    with _despite_damage():
      found = old.execute(query).fetchone()[0] or 0
      if isinstance(found, int) and 0 <= found <= _MOST:
        return found
  return None


@contextlib.contextmanager
def _despite_damage() -> Iterator[None]:
  """Ends the block where the file is damaged; other faults are raised."""
  try:
    yield
  except sqlite3.DatabaseError as error:
    if not is_damage(error):
      raise


def _settled(old: sqlite3.Connection, new: sqlite3.Connection) -> list[str]:
  """Puts right what tables say of each other; what is not known any more, in words."""
  # Of two tables in each other's place, an id and a position would be anything.
  new.execute(f"delete from about where id not glob '{'[0-9a-f]' * 8}'")
  new.execute("delete from events where seq > ?", (_MOST,))
  new.execute("delete from positions where typeof(seq) != 'integer' or seq > ?", (_MOST,))
  known = [0]
  for connection, query in (
    (old, "select max(seq) from sqlite_sequence where name = 'events'"),
    (new, "select max(seq) from events"), (new, "select max(seq) from positions"),
  ):
    with _despite_damage():
      number = connection.execute(query).fetchone()[0] or 0
      known.append(number if isinstance(number, int) and number <= _MOST else 0)
  # New events must not take the numbers of earlier ones, which segments and readers know.
  new.execute("delete from sqlite_sequence where name = 'events'")
  new.execute("insert into sqlite_sequence values ('events', ?)", (max(known),))
  if new.execute("select * from about").fetchone() or new.execute(
    "select * from positions where name = 'exported'"
  ).fetchone():
    return []
  # Neither the journal's name, which segments bear, nor how far they go: twice would be worse.
  new.execute("insert or replace into positions values ('exported', ?)", (max(known),))
  return ["which events are in segments, so that no earlier one will be"] if max(known) else []


def _wal(path: Path) -> Path:
  return path.with_name(f"{path.name}-wal")
