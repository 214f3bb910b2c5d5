"""Accepted events -> log segments, the files that `gr4ad online` learns from."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import threading
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.machine import atomic
from gr4ad_jax.serving.clock import Clock
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.journal import Journal

SEGMENT_ROWS = 1_000_000  # most events of one segment


@dataclasses.dataclass(frozen=True)
class Segments:
  """Writes a server's events out from time to time, and forgets old ones that are written."""

  journal: Journal
  folder: Path
  feature_names: Sequence[str]
  clock: Clock  # says which events are old
  config: ServingConfig
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def sweep(self) -> None:
    """Removes what exports of an earlier life have left half written; for a server's start."""
    atomic.sweep(self.folder, f"events-*-{self.journal.id}-*")

  def write(self) -> None:
    """Writes all events that no segment holds yet; any thread may call."""
    with self._lock:  # at a server's end, an earlier call may still be at it
      while export_segment(self.journal, self.folder, feature_names=self.feature_names):
        pass
      self.journal.forget(
        before_s=self.clock.now_s - self.config.keep_days * DAY_S,
        up_to=exported(self.journal, self.folder),
      )

  async def write_later(self) -> None:
    """Waits for events to gather and writes them; a job to be done again and again."""
    await asyncio.sleep(self.config.segment_s)
    await asyncio.to_thread(self.write)


def export_segment(journal: Journal, folder: Path, *, feature_names: Sequence[str] = ()) -> int:
  """Writes the events that no segment holds yet as one file; returns how many.

  The file appears whole or not at all. Its name holds the time, so that names sort by it, the
  journal, and the numbers of its first and last event: a call that was killed before the journal
  knew of the file is not repeated.

  Args:
    journal: what was accepted.
    folder: of segments, which other journals may use as well; created where missing.
    feature_names: request features of the log, which the file has as columns.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rows = journal.after(exported(journal, folder), SEGMENT_ROWS)
  if not rows:
    return 0
  events = [event for _, event in rows]
  columns = {
    "user_id": [e.user_id for e in events],
    "time": [e.time_s for e in events],
    "ad_id": pd.array([e.ad_id for e in events], "string"),
    "content_id": pd.array([e.content_id for e in events], "string"),
    # An ad event without a request is one of its own.
    "request_id": [e.request_id or f"event-{journal.id}-{seq}" for seq, e in rows],
    "action": [int(e.action) for e in events],
    "value": [e.value for e in events],
    "ecpm": pd.array([e.ecpm for e in events], "Float64"),
    **{
      f"feature_{name}": pd.array([e.features.get(name) for e in events], "string")
      for name in feature_names
    },
  }
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
  file = folder / f"events-{now}-{journal.id}-{rows[0][0]:012d}-{rows[-1][0]:012d}.parquet"
  with atomic.new_file(file, durable=True, private=True) as out:
    # Checksums tell a learner of bytes that have changed since.
    pd.DataFrame(columns).to_parquet(out, index=False, write_page_checksum=True)
  journal.set_position("exported", rows[-1][0])
  return len(rows)


def exported(journal: Journal, folder: Path) -> int:
  """Number of the last event that a segment holds, or held."""
  files = folder.glob(f"events-*-{journal.id}-*-*.parquet")
  numbers = (file.stem.rpartition("-")[2] for file in files)
  there = [int(number) for number in numbers if number.isdigit()]  # a copy may have another name
  noted, last = journal.position("exported"), journal.last_seq
  if noted > last:  # a disk has changed it: the files know better
    noted = 0 if there else last
  return max(noted, *there, 0)
