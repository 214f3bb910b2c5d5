"""A table as its owner keeps it, Parquet or text, one file or a folder of parts -> pandas frames.

Parts of a folder are read in the order of their names, at any depth; names that begin with `_` or
`.` are not. A folder called `day=2026-01-31` adds the column `day` to its parts (Hive).
"""

from __future__ import annotations

import contextlib
import gzip
import math
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from gr4ad_jax.data.columns import SCHEMAS, choose, require_columns_of
from gr4ad_jax.data.records import Naming
from gr4ad_jax.data.validation import LogError, RowError

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
_NUMBERS = ("price", "value", "ecpm", "bid")
_HEADER_BYTES = 1 << 20
_MOST_ROWS = 1 << 20  # of a frame, where all are asked for: Arrow holds 2 GB of text in one piece
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class _Part(NamedTuple):
  path: Path
  keys: dict[str, str | None]  # columns that folders give
  columns: list[str]  # of the file
  index: frozenset[str]  # those that pandas wrote as its index


class TableFiles:
  """The files of one table.

  Attributes:
    name: of the file or folder, for messages.
    chosen: which columns are read.
    columns: all that there are.
  """

  def __init__(self, path: Path, table: str, naming: Naming):
    """Looks at the columns of all files.

    Raises:
      LogError: a file is not readable.
      ConfigError: two rules of `naming` give the same column.
    """
    self.name, self._table = str(path), table
    self._parts = [_opened(*part) for part in _find(path)]
    names = [name for part in self._parts for name in part.columns]
    twice = {name for part in self._parts for name in part.columns if part.columns.count(name) > 1}
    unasked = {name for part in self._parts for name in (*part.keys, *part.index)}
    self.columns = [*dict.fromkeys((*names, *unasked)), *twice]
    self.chosen = choose(table, self.columns, naming, unasked=unasked)
    self._first_rows: list[int] = []  # of the parts, as far as they have been read

  def check_columns(self) -> None:
    """Raises LogError where a column is missing, doubled or unknown."""
    require_columns_of(self._table, self.chosen, self.columns, self.name)
    for part in self._parts:
      for ours in SCHEMAS[self._table].required:
        if (theirs := self.chosen.source[ours]) not in (*part.columns, *part.keys):
          raise LogError(f"{part.path}: column '{theirs}' is missing, which other parts have")

  @property
  def num_rows(self) -> int | None:
    """Rows of all parts; None where only reading them would tell."""
    if any(not _is_parquet(part.path) for part in self._parts):
      return None
    return sum(pq.read_metadata(part.path).num_rows for part in self._parts)

  def whole(self) -> pd.DataFrame:
    """All rows.

    Raises:
      LogError: a file is not readable.
    """
    frames = list(self.frames(math.inf))
    return frames[0] if len(frames) == 1 else pd.concat(frames)

  def frames(self, num_rows: float, *, only: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """The rows, about `num_rows` in memory at a time, indexed by their number in the table.

    Args:
      num_rows: rows of a frame; a table without rows gives one frame without any.
      only: our names of columns; () = all.

    Raises:
      LogError: a file is not readable.
    """
    source = {ours: of for ours, of in self.chosen.source.items() if not only or ours in only}
    row, self._first_rows = 0, []
    for part in self._parts:
      self._first_rows.append(row)
      read = [name for name in part.columns if name in source.values()]
      with _readable(part.path):
        for table, decimal_comma in _tables(part.path, read or part.columns[:1], num_rows):
          if table.num_rows:
            columns = {ours: _column(table, part, of) for ours, of in source.items()}
            frame = pa.table(columns).to_pandas(integer_object_nulls=True)
            _read_numbers(frame, decimal_comma=decimal_comma)
            yield frame.set_axis(pd.RangeIndex(row, row + len(frame)))
            row += len(frame)
    if not row:
      yield pd.DataFrame({ours: pd.Series([], dtype=object) for ours in source})

  def cell(self, row: int, column: str) -> object:
    """One cell, by our name of the column."""
    for frame in self.frames(1 << 19, only=(column,)):
      if row in frame.index:
        return frame.at[row, column]
    raise LogError(f"{self.name}: has changed while it was read")

  def place(self, row: int) -> tuple[str, int]:
    """The file that a row lies in, and its number there."""
    number = sum(first <= row for first in self._first_rows) - 1
    return str(self._parts[number].path), row - self._first_rows[number]

  def as_written(self, error: RowError) -> RowError:
    """An error by the names of the owner: of the part, and of the column."""
    file, row = self.place(error.row)
    theirs = self.chosen.source.get(error.column, error.column)
    read_as = error.column if theirs != error.column else ""
    rule = error.value_and_rule
    if error.whole_column and error.column not in SCHEMAS[self._table].required:
      rule += f"; --ignore-columns {self._table}.{theirs} leaves the column out"
    return RowError(file, row, theirs, rule, read_as=read_as)


def _find(path: Path) -> list[tuple[Path, dict[str, str | None]]]:
  """Files of a table, and the columns that their folders give."""
  if path.is_file():
    return [(path, {})]
  if not path.is_dir():
    raise LogError(f"{path}: no such file or folder: expected {', '.join(SUFFIXES)}")
  found = []
  for file in sorted(path.rglob("*")):
    inside = file.relative_to(path).parts
    # What writers leave beside their parts is hidden; an empty part has not even a header.
    if file.is_file() and not any(p.startswith(("_", ".")) for p in inside) and file.stat().st_size:
      keys = dict(folder.split("=", 1) for folder in inside[:-1] if "=" in folder)
      found.append((file, {
        urllib.parse.unquote(key): None if value == _NO_VALUE else urllib.parse.unquote(value)
        for key, value in keys.items()
      }))
  if not found:
    raise LogError(f"{path}: an empty folder: expected parts, {', '.join(SUFFIXES)}")
  return found


def _opened(path: Path, keys: dict[str, str | None]) -> _Part:
  if not path.name.lower().endswith(SUFFIXES) and not _is_parquet(path):
    raise LogError(f"{path}: suffix {path.suffix!r}: must be {', '.join(SUFFIXES)}")
  with _readable(path):
    if not _is_parquet(path):
      with csv.open_csv(path, parse_options=_parsing(path)) as reader:
        names = reader.schema.names
      return _Part(path, keys, names, frozenset(names) & {"", "Unnamed: 0"})
    schema = pq.read_schema(path)
    about = schema.pandas_metadata or {}
    index = frozenset(name for name in about.get("index_columns", []) if isinstance(name, str))
    return _Part(path, keys, schema.names, index)


def _is_parquet(path: Path) -> bool:
  """By its name, or by its first bytes where that does not tell, as with parts of some writers."""
  name = path.name.lower()
  if name.endswith(SUFFIXES):
    return name.endswith(".parquet")
  with path.open("rb") as file:
    return file.read(4) == b"PAR1"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
  try:
    yield
  except (OSError, pa.ArrowException) as error:
    kind = "parquet" if _is_parquet(path) else path.suffix[1:]
    reason = " ".join(str(error).split())[:120]
    raise LogError(f"{path}: not readable as {kind}: {reason}") from None


def _tables(path: Path, columns: list[str], num_rows: float) -> Iterator[tuple[pa.Table, bool]]:
  """Some columns in parts, and whether numbers in text may have a decimal comma."""
  if _is_parquet(path):
    with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where it has checksums
      for batch in file.iter_batches(int(min(num_rows, _MOST_ROWS)), columns=columns):
        # What pandas noted in the file would make an index of a column.
        yield pa.Table.from_batches([batch]).replace_schema_metadata(None), False
    return
  # All cells as text, so that ids keep leading zeros and "NA" is a name.
  convert = csv.ConvertOptions(
    include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), null_values=[""],
    strings_can_be_null=True,
  )
  parse, batches, rows = _parsing(path), [], 0
  with csv.open_csv(path, parse_options=parse, convert_options=convert) as reader:
    for batch in reader:
      batches.append(batch)
      rows += batch.num_rows
      if rows >= num_rows:
        yield pa.Table.from_batches(batches), parse.delimiter == ";"
        batches, rows = [], 0
  if rows:
    yield pa.Table.from_batches(batches), parse.delimiter == ";"


def _parsing(path: Path) -> csv.ParseOptions:
  """With the separator that stands most often in the header."""
  opener = gzip.open if path.name.lower().endswith(".gz") else open
  try:
    with opener(path, "rb") as file:
      header = file.readline(_HEADER_BYTES).decode(errors="replace")
  except EOFError as error:  # of a gzip file that is cut
    raise OSError(error) from None
  bare = "".join(header.split('"')[::2])  # outside quotes
  return csv.ParseOptions(delimiter=max(",;\t|", key=bare.count), newlines_in_values=True)


def _column(table: pa.Table, part: _Part, name: str) -> pa.ChunkedArray | pa.Array:
  """A column in a type that pandas has: text, numbers, timestamps, lists."""
  if name not in part.columns:
    return pa.array([part.keys.get(name)] * table.num_rows, pa.string())
  column = table[name]
  if isinstance(column.type, pa.UuidType):
    return pa.array([value and str(value) for value in column.to_pylist()], pa.string())
  if isinstance(column.type, pa.BaseExtensionType):
    column = column.cast(column.type.storage_type)
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if pa.types.is_date(column.type):
    return column.cast(pa.timestamp("s"))
  if _is_bytes(column.type):
    try:
      return column.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowInvalid:
      raise LogError(
        f"{part.path}: column '{name}': bytes that are not UTF-8 text: write them as text, in hex "
        "for example"
      ) from None
  return column


def _is_bytes(kind: pa.DataType) -> bool:
  kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary,
           pa.types.is_binary_view)
  return any(is_kind(kind) for is_kind in kinds)


def _read_numbers(frame: pd.DataFrame, *, decimal_comma: bool) -> None:
  """Amounts in text become numbers; cells that are none stay text, for validation to name them."""
  for column in frame.columns.intersection(_NUMBERS):
    text = frame[column]
    if not pd.api.types.is_string_dtype(text):
      continue
    plain = text.str.replace(r"^(-?\d+),(\d+)$", r"\1.\2", regex=True) if decimal_comma else text
    numbers = pd.to_numeric(plain, errors="coerce")
    unread = numbers.isna() & text.notna()
    if unread.any():
      numbers = numbers.astype(object).where(~unread, text.astype(object))
    frame[column] = numbers
