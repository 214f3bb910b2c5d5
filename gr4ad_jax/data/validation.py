"""Column and row checks for input tables; a fault is one line: where it is, and the rule.

E counts the rows of a table, whatever they are, and N the different names in a column.
"""

import decimal
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

InvalidRows = Literal["error", "drop"]

MAX_EXACT_FLOAT = 2.0**53  # floats above it no longer hold every integer
# Integer ids that went through a float, as pandas and Spark write them: 102.0, 1.02E8, 1e+16.
_FLOAT_ID = re.compile(r"-?(?:0|[1-9]\d*)\.0+|-?[1-9](?:\.\d+[eE]\+?|[eE]\+)\d+")
_IDS = "must be an integer or a string (a float above 2^53 has lost digits)"


class LogError(ValueError):
  """Bad input logs; the message is one line that names file, row, column, value and rule."""


class NoValidRows(LogError):
  """Every row breaks a rule."""


class RowError(LogError):
  """Bad input at one row and column.

  Attributes:
    whole_column: the row is an example of what is wrong with the type of the column.
  """

  whole_column = False

  def __init__(
    self, file: str, row: int, column: str, value_and_rule: str, *, read_as: str = ""
  ):
    also = f" (read as '{read_as}')" if read_as else ""
    super().__init__(f"{file}: row {row}, column '{column}'{also}, {value_and_rule}")
    self.file, self.row, self.column, self.value_and_rule = file, row, column, value_and_rule


def at_row(file: str, row: int, column: str, value: object, rule: str) -> RowError:
  """The error for one cell; data rows count from 0, `rule` says what a valid value is."""
  return RowError(file, row, column, f"value {shown(value)}: {rule}")


def shown(value: object) -> str:
  """A cell in a message, on one line."""
  value = value.item() if isinstance(value, np.generic) else value
  plain = isinstance(value, (pd.Timestamp, decimal.Decimal))
  words = " ".join((str if plain else repr)(value).split())
  return words if len(words) <= 60 else words[:57] + "..."


def more_rows(count: int) -> str:
  """What a message about the first of `count` offenders says of the others."""
  return f" ({count - 1:,} more such rows)" if count > 1 else ""


class RowChecks:
  """Applies row rules to one table: stops at the first offender, or drops and counts offenders.

  Attributes:
    alive_E: [E] bool, rows that no rule has dropped.
    dropped: rule -> rows dropped by it; a rule sees only the rows that earlier rules left.
  """

  def __init__(
    self, file: str, frame: pd.DataFrame, *, invalid_rows: InvalidRows = "error",
    first_row: int = 0,
  ):
    """Begins with all rows alive; `first_row` is the number of the first one in the file."""
    if invalid_rows not in ("error", "drop"):
      raise ValueError(f"invalid_rows is {invalid_rows!r}: must be 'error' or 'drop'")
    self._first_row = first_row
    self.alive_E = np.ones(len(frame), bool)
    self.dropped = Counter()
    self._file = file
    self._frame = frame
    self._drop = invalid_rows == "drop"

  def leave_out(self, bad_E: np.ndarray, column: str, why: str) -> np.ndarray:
    """Drops the rows of `bad_E` [E], which break no rule, and counts them; bool [E], which now."""
    bad_E = bad_E & self.alive_E
    self.dropped[f"left out, {column}: {why}"] += int(bad_E.sum())
    self.alive_E &= ~bad_E
    return bad_E

  def reject(self, bad_E: np.ndarray, column: str, rule: str) -> None:
    """Applies a rule about a column, which the rows of `bad_E` [E] break.

    Raises:
      LogError: a row breaks the rule and rows are not dropped.
    """
    bad_E = bad_E & self.alive_E
    count = int(bad_E.sum())
    if count and not self._drop:
      row = int(bad_E.argmax())
      raise at_row(
        self._file, self._first_row + row, column, self._frame[column].iloc[row],
        rule + more_rows(count),
      )
    self.dropped[f"dropped, {column}: {rule}"] += count
    self.alive_E &= ~bad_E


def read_columns(
  file: Path, columns: tuple[str, ...], *, optional: tuple[str, ...] | None = None
) -> pd.DataFrame:
  """Columns of a parquet file, whole numbers with gaps as they are.

  Args:
    file: to read.
    columns: that it must have.
    optional: that it may have besides, and no others; None = it may have any, which are not read.

  Raises:
    LogError: it cannot be read, lacks one, has one too many, or has no rows.
  """
  try:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    some = [column for column in columns if column in names] if optional is None else None
    frame = parquet.read(columns=some).to_pandas(integer_object_nulls=True)
  except (OSError, pa.ArrowException) as error:
    raise LogError(f"{file}: not readable as parquet ({type(error).__name__})") from None
  require_columns(frame, columns, str(file), optional=optional or ())
  return frame


def require_columns(
  frame: pd.DataFrame,
  required: Sequence[str],
  file: str,
  *,
  optional: Sequence[str] = (),
  prefix: str | None = None,
) -> None:
  """Checks which columns a table has, and that it has rows.

  Args:
    frame: the table.
    required: columns it must have.
    file: name for messages.
    optional: columns it may have.
    prefix: further columns must begin with this; None allows no further columns, "" all.

  Raises:
    LogError: a column is missing, doubled or unknown (a misspelt optional column must not pass
      for an absent one), or there are no rows.
  """
  present = [str(column) for column in frame.columns]
  for column in required:
    if column not in present:
      have = ", ".join(present) or "none"
      raise LogError(f"{file}: column '{column}' is missing: required; columns present: {have}")
  for column in frame.columns[frame.columns.duplicated()]:
    raise LogError(f"{file}: column '{column}' occurs twice: column names must be unique")
  known = (*required, *optional)
  for column in present:
    if column not in known and (prefix is None or not column.startswith(prefix)):
      further = f"; further columns begin with '{prefix}'" if prefix else ""
      raise LogError(f"{file}: column '{column}' is unknown: must be {', '.join(known)}{further}")
  if not len(frame):
    raise LogError(f"{file}: the table is empty: at least one row is required")


def wrong_type(series: pd.Series, file: str, row: int, rule: str) -> RowError:
  """The error for a whole column, shown at one place in it."""
  rule = f"{rule} (the column's dtype is {series.dtype})"
  error = at_row(file, int(series.index[row]), str(series.name), series.iloc[row], rule)
  error.whole_column = True
  return error


def _id_text(value: object) -> str | None:
  """An id as a string; None where it is neither a string nor an exact integer."""
  if isinstance(value, str):
    if not _FLOAT_ID.fullmatch(value) or not float(value).is_integer():
      return value
    value = float(value)
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    return str(int(value))
  if isinstance(value, decimal.Decimal) and value == value.to_integral_value():
    return str(int(value))
  if isinstance(value, (float, np.floating)) and float(value).is_integer():
    return str(int(value)) if abs(value) <= MAX_EXACT_FLOAT else None
  return None


def factorize_ids(series: pd.Series, file: str) -> tuple[np.ndarray, np.ndarray]:
  """Turns a column of ids (integers or strings) into numbers and names.

  Args:
    series: [E] ids; null and "" are missing; 7, 7.0, "7" and "7.0" are the same id.
    file: name for messages.

  Returns:
    codes_E [E] int64 (-1 = missing) and names_N [N] str objects, in order of first appearance.

  Raises:
    LogError: a value is neither an integer nor a string.
  """
  try:
    codes_E, unique_N = pd.factorize(series, use_na_sentinel=True)
  except TypeError:  # lists and the like cannot be hashed
    row = next(row for row, value in enumerate(series) if not isinstance(value, Hashable))
    raise wrong_type(series, file, row, _IDS) from None
  names = [_id_text(value) for value in np.asarray(unique_N, dtype=object)]
  if None in names:
    raise wrong_type(series, file, int((codes_E == names.index(None)).argmax()), _IDS)
  name_codes_N, names_N = pd.factorize(np.array([n or None for n in names], dtype=object))
  lookup = np.append(name_codes_N, -1)  # the sentinel -1 of codes_E reads the last entry
  return lookup[codes_E], np.asarray(names_N, dtype=object)


def category_column(series: pd.Series, file: str) -> np.ndarray:
  """Reads a categorical column [E], strings, integers or booleans, as str objects; "" = null.

  Raises:
    LogError: a value is of another type (fractions must be bucketed first).
  """
  if pd.api.types.infer_dtype(series, skipna=True) == "boolean":
    series = series.astype(object).map({True: "true", False: "false"}).rename(series.name)
  codes_E, names_N = factorize_ids(series, file)
  return np.append(names_N, np.array([""], object))[codes_E]


def text_column(series: pd.Series, file: str) -> np.ndarray:
  """Reads a column of strings [E] as str objects; "" = null.

  Raises:
    LogError: a value is not a string.
  """
  values_E = series.astype(object).to_numpy(copy=True)
  values_E[series.isna().to_numpy()] = ""
  wrong_E = np.fromiter((not isinstance(v, str) for v in values_E), bool, len(values_E))
  if wrong_E.any():
    raise wrong_type(series, file, int(wrong_E.argmax()), "must be a string")
  return values_E


def number_column(
  series: pd.Series, file: str, *, has_numbers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a numeric column.

  Args:
    series: [E] numbers; an object column may hold single cells that are not numbers.
    file: name for messages.
    has_numbers: earlier rows of the column are numbers, so that these may all be something else.

  Returns:
    numbers_E [E] float64 (NaN = null or not a number) and not_a_number_E [E] bool, cells that hold
    something else.

  Raises:
    LogError: the whole column is text, boolean or time.
  """
  empty_E = series.isna().to_numpy()
  if empty_E.all():
    return np.full(len(series), np.nan), np.zeros(len(series), bool)
  kind = pd.api.types.infer_dtype(series, skipna=True)
  if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
    numbers_E = pd.to_numeric(series).to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers_E, np.zeros(len(series), bool)
  cells_E = series.astype(object).to_numpy()
  is_number_E = np.array([
    isinstance(cell, (int, float, np.number)) and not isinstance(cell, bool) for cell in cells_E
  ]) & ~empty_E
  wrong_E = ~is_number_E & ~empty_E
  if not is_number_E.any() and not has_numbers:
    raise wrong_type(series, file, int(wrong_E.argmax()), "must be a number")
  return np.where(is_number_E, cells_E, np.nan).astype(np.float64), wrong_E


def money_column(
  frame: pd.DataFrame, column: str, file: str, checks: RowChecks, *, nullable: bool,
  has_numbers: bool = False,
) -> np.ndarray:
  """A column of amounts >= 0 as float32; NaN is null, where that is allowed.

  The rules go to `checks`; `has_numbers` is that of `number_column`.

  Raises:
    LogError: a rule is broken and rows are not dropped.
  """
  amount_E, wrong_E = number_column(frame[column], file, has_numbers=has_numbers)
  with np.errstate(over="ignore"):
    amount_E = amount_E.astype(np.float32)
  wrong_E |= np.isinf(amount_E) if nullable else ~np.isfinite(amount_E)
  rule = "must be a finite number or null" if nullable else "must be a finite number"
  checks.reject(wrong_E, column, rule)
  checks.reject(amount_E < 0, column, "must be >= 0")
  return amount_E


def embedding_column(series: pd.Series, file: str) -> np.ndarray:
  """Reads a column of equally long lists of finite numbers.

  Args:
    series: [A] lists or arrays of D numbers.
    file: name for messages.

  Returns:
    embedding_AD [A, D] float32.

  Raises:
    LogError: a list is missing, not as long as the first, or holds a number that is not finite.
  """
  cells = list(series)
  lengths = (len(c) if isinstance(c, (list, tuple, np.ndarray)) else -1 for c in cells)
  length_A = np.fromiter(lengths, int, len(cells))
  wrong_A = (length_A != length_A[0]) | (length_A < 1)
  if wrong_A.any():
    row = int(wrong_A.argmax())
    rule = f"embeddings must be lists of the same length, row 0 has {max(length_A[0], 0)} numbers"
    raise at_row(file, row, str(series.name), cells[row], rule)
  try:
    embedding_AD = np.stack([np.asarray(c, dtype=np.float32) for c in cells])
  except (TypeError, ValueError):
    raise wrong_type(series, file, 0, "embeddings must be lists of numbers") from None
  bad_A = ~np.isfinite(embedding_AD).all(axis=1)
  if bad_A.any():
    row = int(bad_A.argmax())
    raise at_row(file, row, str(series.name), cells[row], "embeddings must be finite")
  return embedding_AD
