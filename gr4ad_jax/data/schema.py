"""What a log is: the records, how input tables become them, and the folder they are stored in."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gr4ad_jax.data import tables
from gr4ad_jax.data.records import (
  DEFAULT_AD_TYPE,
  Action,
  AdTable,
  ContentTable,
  EventTable,
  Logs,
  UserTable,
)
from gr4ad_jax.data.tables import FEATURE_PREFIX
from gr4ad_jax.data.validation import InvalidRows, LogError

__all__ = [
  "Action",
  "AdTable",
  "ContentTable",
  "EventTable",
  "InvalidRows",
  "LogError",
  "Logs",
  "UserTable",
  "build_logs",
  "read_logs",
  "write_logs",
]

FORMAT = 1  # of the stored folder
# Columns that stored logs may lack, being younger than the format, and what they then hold.
LATER_COLUMNS = {
  "ad_type": DEFAULT_AD_TYPE, "account_id": "", "campaign_id": "", "bid": np.float32(np.nan)
}
TABLES = {"ads": AdTable, "contents": ContentTable, "users": UserTable, "events": EventTable}


def build_logs(
  *,
  ads: pd.DataFrame,
  events: pd.DataFrame,
  users: pd.DataFrame | None = None,
  contents: pd.DataFrame | None = None,
  files: Mapping[str, str] | None = None,
  source: str,
  currency: str,
  caveats: tuple[str, ...] = (),
  cleaning: Mapping[str, int] | None = None,
  invalid_rows: InvalidRows = "error",
) -> Logs:
  """Validates tables and packs them into records. Ids are integers or strings, stored as strings.

  Args:
    ads: ad_id, advertiser_id, category, text; optional price, conversion_type, ad_type ("product"
      where absent), account_id, campaign_id, embedding.
    events: user_id, time, ad_id, action; optional content_id, request_id, value (0 where the
      column is absent), ecpm, feature_*. A row has exactly one of ad_id and content_id. Organic
      rows may lack a request_id and are then requests of their own; so is every row where the
      column is absent.
    users: user_id and categorical columns; None takes the users from the events.
    contents: content_id, category, text; optional ad_id (the ad of the same product). None takes
      the contents from the events, category and text unknown.
    files: "ads", "events", "users", "contents" -> file name for messages; the name itself where
      absent.
    source: where the logs come from.
    currency: unit of price, value and eCPM.
    caveats: what a reader of results must know.
    cleaning: counts of rules that the reader already applied.
    invalid_rows: "error" stops at the first invalid event, "drop" drops such events and counts
      them per rule. Faults of the other tables, and missing columns, are always errors.

  Returns:
    The logs.

  Raises:
    LogError: a rule is broken.
  """
  files = {name: name for name in TABLES} | dict(files or {})
  counts = dict(cleaning or {})
  ad_table = tables.ad_table(ads, files["ads"], counts)
  content_table = user_table = None
  if contents is not None:
    content_table = tables.content_table(contents, files["contents"], counts, ads=ad_table)
  if users is not None:
    user_table = tables.user_table(users, files["users"], counts)
  read = tables.event_table(
    events,
    files["events"],
    counts,
    ads=ad_table,
    contents=content_table,
    users=user_table,
    invalid_rows=invalid_rows,
  )
  return Logs(
    ads=ad_table,
    contents=read.contents,
    users=read.users,
    events=read.events,
    source=source,
    currency=currency,
    caveats=tuple(caveats),
    cleaning=counts,
  )


def write_logs(logs: Logs, folder: Path) -> None:
  """Writes ads, contents, users, events (.parquet) and log.json.

  Args:
    logs: what to write.
    folder: appears, or is replaced, only when all files are complete.

  Raises:
    LogError: the folder exists and holds something other than logs.
  """
  folder = Path(folder)
  if folder.exists() and not (folder / "log.json").exists() and any(folder.iterdir()):
    raise LogError(f"{folder}: holds other files: must be absent, empty or written by prepare")
  folder.parent.mkdir(parents=True, exist_ok=True)
  fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    for name in TABLES:
      pq.write_table(_to_arrow(getattr(logs, name)), fresh / f"{name}.parquet", compression="zstd")
    about = {
      "format": FORMAT,
      "source": logs.source,
      "currency": logs.currency,
      "caveats": list(logs.caveats),
      "cleaning": logs.cleaning,
      "rows": {name: pq.read_metadata(fresh / f"{name}.parquet").num_rows for name in TABLES},
    }
    (fresh / "log.json").write_text(json.dumps(about, indent=2) + "\n")
    fresh.chmod(0o755)
    if folder.exists():
      old = fresh.with_name(fresh.name + "-old")
      folder.rename(old)
      fresh.rename(folder)
      shutil.rmtree(old)
    else:
      fresh.rename(folder)
  except BaseException:
    shutil.rmtree(fresh, ignore_errors=True)
    raise


def read_logs(folder: Path) -> Logs:
  """Reads what write_logs wrote.

  Args:
    folder: the folder given to write_logs.

  Returns:
    The same logs; logs of an earlier version get the defaults of the columns they lack.

  Raises:
    LogError: the folder holds no logs, is incomplete, or is of another format version.
  """
  folder = Path(folder)
  about_file = folder / "log.json"
  try:
    about = json.loads(about_file.read_text())
    if about["format"] != FORMAT:
      raise LogError(f"{about_file}: format {about['format']}: must be {FORMAT}, prepare again")
    notes = {key: about[key] for key in ("source", "currency", "cleaning")}
    caveats, rows = tuple(about["caveats"]), about["rows"]
  except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
    reason = type(error).__name__
    raise LogError(f"{about_file}: not readable ({reason}): must be written by prepare") from None
  read = {}
  for name, record in TABLES.items():
    file = folder / f"{name}.parquet"
    try:
      table = pq.ParquetFile(file).read()
      read[name] = _from_arrow(table, record)
    except (OSError, pa.ArrowException, KeyError) as error:
      reason = type(error).__name__
      raise LogError(f"{file}: not readable ({reason}): must be written by prepare") from None
    if table.num_rows != rows[name]:
      raise LogError(f"{file}: {table.num_rows} rows: log.json says {rows[name]}, prepare again")
  return Logs(**read, caveats=caveats, **notes)


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


def _from_arrow(table: pa.Table, record: type) -> AdTable | ContentTable | UserTable | EventTable:
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
      default = LATER_COLUMNS[field.name]
      kind = object if isinstance(default, str) else np.float32
      fields[field.name] = np.full(table.num_rows, default, kind)
    else:
      fields[field.name] = _numpy(table[field.name])
  return record(**fields)


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
  column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
  if pa.types.is_fixed_size_list(column.type):
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
  if pa.types.is_dictionary(column.type):  # one shared str object per distinct value
    return column.dictionary.to_numpy(zero_copy_only=False)[column.indices.to_numpy()]
  return column.to_numpy(zero_copy_only=False)
