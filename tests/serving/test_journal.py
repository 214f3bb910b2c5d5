"""The store's file on disks that damage it: what is kept, what is named, who may read it."""

import os
import random
import sqlite3
import subprocess
import sys

import pandas as pd
import pytest

from gr4ad_jax.serving.clock import Clock
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.journal import Event, Journal
from gr4ad_jax.serving.segments import Segments, export_segment

PAGE = 4096


@pytest.fixture(autouse=True)
def wide(monkeypatch):
  monkeypatch.setenv("COLUMNS", "1000")  # one line each


def event(number: int) -> Event:
  return Event(f"u{number % 7}", 1_700_000_000 + number, f"ad{number}", None, 2, None, 1.5, None,
               {"scene": "feed"})


@pytest.fixture
def written(tmp_path):
  """A store's file with events 1 to 300, of which 150 are exported, and two ads."""
  path = tmp_path / "journal.sqlite"
  journal = Journal(path)
  journal.add_events([event(number) for number in range(1, 301)])
  journal.put_ads({ad: {"ad_id": ad, "text": "thing"} for ad in ("new1", "new2")})
  journal.set_position("exported", 150)
  name = journal.id
  journal.close()
  return path, name


def damage(path, page: int, how: str) -> None:
  data, rng = bytearray(path.read_bytes()), random.Random(page)
  place = slice(page * PAGE, (page + 1) * PAGE)
  data[place] = bytes(PAGE) if how == "zeros" else rng.randbytes(PAGE)
  path.write_bytes(data)


def pages_of(path, table: str) -> list[int]:
  """Pages, from 0, that hold rows or places of a table, the root first."""
  connection = sqlite3.connect(path)
  try:
    (root,) = connection.execute(
      "select rootpage from sqlite_master where name = ?", (table,)
    ).fetchone()
  finally:
    connection.close()
  if table != "events":
    return [root - 1]
  data = path.read_bytes()
  # An interior page names its children: 4 bytes where each of its cells begins, and the last one.
  start = (root - 1) * PAGE
  count = int.from_bytes(data[start + 3 : start + 5], "big")
  cells = [start + 12 + 2 * i for i in range(count)]
  places = [start + int.from_bytes(data[at : at + 2], "big") for at in cells] + [start + 8]
  return [root - 1, *(int.from_bytes(data[at : at + 4], "big") - 1 for at in places)]


@pytest.mark.parametrize("how", ["zeros", "noise"])
@pytest.mark.parametrize(
  "table",
  ["the file itself", "events", "events_of_user", "about", "positions", "sqlite_sequence"],
)
def test_a_damaged_page_above_or_beside_the_rows_costs_no_event(written, capsys, table, how):
  path, name = written
  damage(path, 0 if table == "the file itself" else pages_of(path, table)[0], how)
  journal = Journal(path)
  told = capsys.readouterr().err
  assert str(path) in told and "damaged" in told
  assert [seq for seq, _ in journal.after(0, 1000)] == list(range(1, 301))
  assert len(journal.of_user("u3", 1000)) == 43 and len(journal.ads()) == 2
  assert (journal.id == name) == (table != "about")
  assert journal.position("exported") == (0 if table == "positions" else 150)
  journal.add_events([event(301)])
  assert journal.last_seq == 301  # numbers are not given twice
  journal.close()
  assert len(list(path.parent.glob("journal.sqlite.damaged-*"))) == 1


@pytest.mark.parametrize("leaf", [1, 3])
def test_a_damaged_page_of_events_costs_its_own_and_the_others_go_on(written, capsys, leaf):
  path, _ = written
  pages = pages_of(path, "events")
  damage(path, pages[leaf], "noise")
  journal = Journal(path)
  told = capsys.readouterr().err.replace(",", "")
  found = [seq for seq, _ in journal.after(0, 1000)]
  gone = sorted(set(range(1, 301)) - set(found))
  assert 20 < len(gone) < 100 and gone == list(range(gone[0], gone[-1] + 1))
  assert f"{path}: damaged" in told and f"events {gone[0]} to {gone[-1]}" in told
  # What lies behind the damage is exported, with the numbers it had.
  assert export_segment(journal, path.parent / "segments") == len([s for s in found if s > 150])
  journal.close()
  again = Journal(path)  # once rebuilt, nothing is wrong any more
  assert capsys.readouterr().err == "" and len(again.after(0, 1000)) == len(found)
  again.close()


def test_torn_pages_everywhere_do_not_keep_a_store_from_opening(written, capsys):
  """Half of every page but the first two is noise, so that any number may be a row's."""
  path, _ = written
  with path.open("r+b") as stream:
    for page in range(2, path.stat().st_size // PAGE):
      stream.seek(page * PAGE + PAGE // 2)
      stream.write(b"\xab" * (PAGE // 2))
  journal = Journal(path)
  told = capsys.readouterr().err
  assert f"{path}: damaged" in told and "not to be read" in told and "events" in told
  assert journal.add_events([event(1)]).last_seq < 1_000_000
  journal.close()


def test_a_row_that_is_not_what_was_written_is_left_out_and_named(written, tmp_path, capsys):
  path, _ = written
  with sqlite3.connect(path) as connection:
    for seq, column, value in (
      (3, "user_id", "u4"), (200, "action", 99), (201, "features", "{"), (202, "value", 2e9),
      (203, "user_id", b"\xff\xfe"), (300, "crc", 1), (204, "time_s", 4_000_000_000),
    ):
      connection.execute(f"update events set {column} = ? where seq = ?", (value, seq))
    connection.execute("update ads set fields = '{' where ad_id = 'new1'")
  connection.close()
  journal = Journal(path)
  assert journal.last_time_s == event(299).time_s  # a clock may begin there
  assert len(journal.after(0, 1000)) == 293
  assert [ad for ad, _, _ in journal.ads()] == ["new2"]
  assert export_segment(journal, tmp_path / "segments") == 144  # of 151 to 299
  assert export_segment(journal, tmp_path / "segments") == 0
  journal.add_events([event(301)])
  assert export_segment(journal, tmp_path / "segments") == 1
  told = capsys.readouterr().err
  for seq in (3, 200, 201, 202, 203, 204, 300):
    assert told.count(f"{path}: event {seq} (") == 1  # once, however often it is read
  assert "ad 'new1'" in told and journal.num_unreadable == 8
  journal.close()


def test_a_note_of_what_is_exported_that_cannot_be_is_not_believed(written, tmp_path):
  path, _ = written
  journal, folder = Journal(path), tmp_path / "segments"
  journal.set_position("exported", 10**12)
  journal.add_events([event(301)])
  assert export_segment(journal, folder) == 0  # rather none than all of them again
  journal.set_position("exported", 150)
  assert export_segment(journal, folder) == 151
  (file,) = folder.iterdir()
  (folder / f"{file.stem} (copy).parquet").write_bytes(file.read_bytes())
  journal.set_position("exported", 10**12)
  journal.add_events([event(302)])
  assert export_segment(journal, folder) == 1  # the files know
  journal.close()


def test_rows_of_a_version_without_checksums_are_read(tmp_path):
  path = tmp_path / "journal.sqlite"
  with sqlite3.connect(path) as connection:
    connection.execute(
      "create table events(seq integer primary key autoincrement, user_id text not null,"
      " time_s integer not null, ad_id text, content_id text, action integer not null,"
      " request_id text, value real not null, ecpm real, features text not null)"
    )
    connection.execute(
      "insert into events values (7, 'u1', 5, 'ad1', null, 2, null, 0, null, '{}')"
    )
  connection.close()
  journal = Journal(path)
  journal.add_events([event(1)])
  assert [(seq, e.user_id) for seq, e in journal.after(0, 10)] == [(7, "u1"), (8, "u1")]
  journal.close()


def test_a_file_that_is_nothing_any_more_is_kept_and_a_new_one_begun(tmp_path, capsys):
  path = tmp_path / "journal.sqlite"
  path.write_bytes(b"no database at all " * 1000)
  journal = Journal(path)
  assert journal.add_events([event(1)]).last_seq == 1
  journal.close()
  (kept,) = tmp_path.glob("journal.sqlite.damaged-*")
  assert kept.read_bytes().startswith(b"no database") and str(path) in capsys.readouterr().err
  path.write_bytes(b"")
  Journal(path).close()
  assert f"{path}: is empty" in capsys.readouterr().err


def test_a_damaged_log_of_writes_is_named(tmp_path, capsys):
  """Killed before SQLite has moved its log of writes into the file; then a bit of it changes."""
  program = (
    "import os, signal, sys; from pathlib import Path;"
    "from gr4ad_jax.serving.journal import Event, Journal; j = Journal(Path(sys.argv[1]));"
    "[j.add_events([Event('u', n, 'ad', None, 2, None, 0.0, None, {})]) for n in range(30)];"
    "os.kill(os.getpid(), signal.SIGKILL)"
  )
  path = tmp_path / "journal.sqlite"
  subprocess.run([sys.executable, "-c", program, path], check=False)
  wal = path.with_name("journal.sqlite-wal")
  whole = wal.read_bytes()
  Journal(path).close()
  assert capsys.readouterr().err == ""  # a kill alone damages nothing
  subprocess.run([sys.executable, "-c", program, path], check=False)
  data = bytearray(wal.read_bytes())
  assert len(data) > 20 * PAGE and len(whole) > 20 * PAGE
  data[len(data) // 2] ^= 1
  wal.write_bytes(data)
  journal = Journal(path)
  assert 30 < len(journal.after(0, 100)) < 60
  told = capsys.readouterr().err
  assert f"{wal}: damaged" in told and "transactions in it cannot be read" in told
  journal.close()


def test_only_the_owner_reads_what_users_did(tmp_path):
  before = os.umask(0)
  try:
    path = tmp_path / "store" / "journal.sqlite"
    journal = Journal(path)
    journal.add_events([event(1)])
    export_segment(journal, tmp_path / "segments")
    files = [*path.parent.iterdir(), *(tmp_path / "segments").iterdir()]
    assert len(files) == 4  # with what SQLite keeps beside it
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    journal.close()
    path.chmod(0o644)  # of an earlier version
    Journal(path).close()
    assert path.stat().st_mode & 0o007 == 0
  finally:
    os.umask(before)


def test_what_killed_exports_left_is_swept_wherever_they_ran(tmp_path):
  journal, folder = Journal(tmp_path / "journal.sqlite"), tmp_path / "segments"
  folder.mkdir()
  # As a container names it, whose machine and process numbers nobody else knows.
  ours = folder / f".events-20260101T000000000000-{journal.id}-000.0a1b2c3d-1-9f.tmp"
  others = folder / ".events-20260101T000000000000-abcdef01-000.0a1b2c3d-1-9f.tmp"
  for file in (ours, others):
    file.write_bytes(b"half")
  journal.add_events([event(1)])
  segments = Segments(journal, folder, (), Clock("real", begin_s=0), ServingConfig())
  segments.sweep()
  segments.write()
  assert others.exists() and not ours.exists()
  (file,) = folder.glob("events-*.parquet")
  assert len(pd.read_parquet(file)) == 1
  journal.close()
