"""The user's own logs: parquet or CSV files with the columns that `schema.build_logs` documents."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.schema import build_logs
from gr4ad_jax.data.validation import InvalidRows, LogError

_CSV_NUMBERS = ("price", "value", "ecpm")


def read_parquet_logs(
  ads: Path,
  events: Path,
  *,
  users: Path | None = None,
  contents: Path | None = None,
  currency: str = "currency units",
  invalid_rows: InvalidRows = "error",
) -> Logs:
  """Reads and validates logs from files.

  Args:
    ads: ad catalogue, .parquet, .csv or .csv.gz.
    events: what users did.
    users: categorical user features; None takes the users from the events.
    contents: organic contents; None takes them from the events, with unknown text.
    currency: unit of price, value and eCPM.
    invalid_rows: "error" or "drop", for event rows.

  Returns:
    The logs.

  Raises:
    LogError: a file is not readable or breaks a rule.
  """
  paths = {"ads": ads, "events": events, "users": users, "contents": contents}
  paths = {name: Path(path) for name, path in paths.items() if path is not None}
  frames = {name: read_table(path) for name, path in paths.items()}
  return build_logs(
    **frames,
    files={name: str(path) for name, path in paths.items()},
    source=f"files {paths['ads'].name}, {paths['events'].name}",
    currency=currency,
    invalid_rows=invalid_rows,
  )


def read_table(path: Path) -> pd.DataFrame:
  if not path.is_file():
    raise LogError(f"{path}: no such file: expected .parquet, .csv or .csv.gz")
  try:
    if path.suffix == ".parquet":
      # Integer ids with nulls stay integers: as floats, large ones would lose digits.
      return pq.ParquetFile(path).read().to_pandas(integer_object_nulls=True)
    if path.name.endswith((".csv", ".csv.gz")):
      return _read_csv(path)
  except (OSError, pa.ArrowException) as error:
    reason = " ".join(str(error).split())[:120]
    raise LogError(f"{path}: not readable as {path.suffix[1:]}: {reason}") from None
  raise LogError(f"{path}: suffix {path.suffix!r}: must be .parquet, .csv or .csv.gz")


def _read_csv(path: Path) -> pd.DataFrame:
  """Reads all cells as text, so that ids keep leading zeros and "NA" is a name; then numbers."""
  parse = csv.ParseOptions(newlines_in_values=True)
  names = csv.open_csv(path, parse_options=parse).schema.names
  convert = csv.ConvertOptions(
    column_types={name: pa.string() for name in names}, null_values=[""], strings_can_be_null=True
  )
  frame = csv.read_csv(path, parse_options=parse, convert_options=convert).to_pandas()
  for column in frame.columns.intersection(_CSV_NUMBERS):
    numbers = pd.to_numeric(frame[column], errors="coerce")
    unread = numbers.isna() & frame[column].notna()
    if unread.any():  # cells that are no numbers stay text, for validation to name them
      numbers = numbers.astype(object).where(~unread, frame[column].astype(object))
    frame[column] = numbers
  return frame
