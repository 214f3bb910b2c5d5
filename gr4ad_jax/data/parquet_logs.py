"""The user's own logs: parquet or CSV files with the columns that `tables.build_logs` documents."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from gr4ad_jax.data import tables
from gr4ad_jax.data.event_rows import EventReader
from gr4ad_jax.data.event_stream import read_events
from gr4ad_jax.data.log_folder import NO_EVENTS, check_replaceable, write_parts
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.validation import InvalidRows, LogError
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import track

READ_ROWS = 1 << 19  # of the events, in memory at a time
_CSV_NUMBERS = ("price", "value", "ecpm")


def store_parquet_logs(
  ads: Path,
  events: Path,
  folder: Path,
  *,
  users: Path | None = None,
  contents: Path | None = None,
  currency: str = "currency units",
  invalid_rows: InvalidRows = "error",
  read_rows: int = READ_ROWS,
  part_events: int | None = None,
) -> None:
  """Reads and validates logs from files and stores them as `log_folder.write_logs` does.

  Memory does not grow with the number of events. Temporary files beside `folder` take about 140
  bytes an event.

  Args:
    ads: ad catalogue, .parquet, .csv or .csv.gz.
    events: what users did.
    folder: appears, or is replaced, only when all files are complete.
    users: categorical user features; None takes the users from the events.
    contents: organic contents; None takes them from the events, with unknown text.
    currency: unit of price, value and eCPM.
    invalid_rows: "error" or "drop", for event rows.
    read_rows: events read at a time.
    part_events: events of a stored part; None = log_folder.PART_EVENTS.

  Raises:
    LogError: a file is not readable or breaks a rule, or `folder` holds something other than logs.
  """
  # Nine parameters: four files, a folder, and how they are read.
  check_replaceable(folder)
  paths = {"ads": ads, "events": events, "users": users, "contents": contents}
  paths = {name: Path(path) for name, path in paths.items() if path is not None}
  files = {name: str(path) for name, path in paths.items()}
  frames = {name: read_table(path) for name, path in paths.items() if name != "events"}
  counts: dict[str, int] = {}
  known = tables.known_tables(frames, files, counts)
  del frames
  reader = EventReader(files["events"], counts, **vars(known), invalid_rows=invalid_rows)
  with atomic.scratch_folder(folder) as scratch:
    parts = table_parts(paths["events"], read_rows)
    read = read_events(
      track(parts, "events read", _num_rows(paths["events"]), step=read_rows), reader, scratch,
      cell=lambda row, column: _cell(paths["events"], row, column), part_rows=part_events,
    )
    logs = Logs(
      ads=known.ads, contents=read.numbering.contents, users=read.numbering.users,
      events=NO_EVENTS, source=f"files {paths['ads'].name}, {paths['events'].name}",
      currency=currency, caveats=(), cleaning=counts,
    )
    write_parts(logs, read.parts(part_events), folder)


def _num_rows(path: Path) -> int | None:
  """Rows of a file; None where only reading it would tell."""
  with _readable(path):
    return pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None


def _cell(path: Path, row: int, column: str) -> object:
  for frame in table_parts(path, READ_ROWS):
    if row < len(frame):
      return frame[column].iloc[row]
    row -= len(frame)
  raise LogError(f"{path}: has changed while it was read")


def read_table(path: Path) -> pd.DataFrame:
  """A whole file.

  Raises:
    LogError: it is not readable.
  """
  with _readable(path):
    if path.suffix == ".parquet":
      # Integer ids with nulls stay integers: as floats, large ones would lose digits.
      return pq.ParquetFile(path).read().to_pandas(integer_object_nulls=True)
    return next(_csv_parts(path, math.inf))


def table_parts(path: Path, num_rows: int) -> Iterator[pd.DataFrame]:
  """The same with about `num_rows` rows in memory at a time; a part without rows if there is none.

  Raises:
    LogError: it is not readable.
  """
  with _readable(path):
    if path.suffix != ".parquet":
      yield from _csv_parts(path, num_rows)
      return
    file = pq.ParquetFile(path)
    if not file.metadata.num_rows:
      yield file.read().to_pandas(integer_object_nulls=True)
    for batch in file.iter_batches(num_rows):
      yield pa.Table.from_batches([batch]).to_pandas(integer_object_nulls=True)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
  if not path.is_file():
    raise LogError(f"{path}: no such file: expected .parquet, .csv or .csv.gz")
  if not path.name.endswith((".parquet", ".csv", ".csv.gz")):
    raise LogError(f"{path}: suffix {path.suffix!r}: must be .parquet, .csv or .csv.gz")
  try:
    yield
  except (OSError, pa.ArrowException) as error:
    reason = " ".join(str(error).split())[:120]
    raise LogError(f"{path}: not readable as {path.suffix[1:]}: {reason}") from None


def _csv_parts(path: Path, num_rows: float) -> Iterator[pd.DataFrame]:
  """Reads all cells as text, so that ids keep leading zeros and "NA" is a name; then numbers."""
  parse = csv.ParseOptions(newlines_in_values=True)
  names = csv.open_csv(path, parse_options=parse).schema.names
  convert = csv.ConvertOptions(
    column_types={name: pa.string() for name in names}, null_values=[""], strings_can_be_null=True
  )
  reader = csv.open_csv(path, parse_options=parse, convert_options=convert)
  batches, rows, first = [], 0, True
  for batch in reader:
    batches.append(batch)
    rows += batch.num_rows
    if rows >= num_rows:
      yield _csv_frame(pa.Table.from_batches(batches))
      batches, rows, first = [], 0, False
  if rows or first:
    yield _csv_frame(pa.Table.from_batches(batches, reader.schema))


def _csv_frame(table: pa.Table) -> pd.DataFrame:
  frame = table.to_pandas()
  for column in frame.columns.intersection(_CSV_NUMBERS):
    numbers = pd.to_numeric(frame[column], errors="coerce")
    unread = numbers.isna() & frame[column].notna()
    if unread.any():  # cells that are no numbers stay text, for validation to name them
      numbers = numbers.astype(object).where(~unread, frame[column].astype(object))
    frame[column] = numbers
  return frame
