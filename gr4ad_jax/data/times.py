"""Times as logs write them -> unix seconds, and rows whose time cannot be that of an event.

A cell is a timestamp, ISO 8601 text or a number, as such or as text: unix seconds, milli-, micro-
or nanoseconds, or a calendar date such as 20260131, 202601311805 and 20260131180500. The numbers of
a column have one unit, that of most of them.

A stray row lies more than a day ahead of the present, or apart from all others: behind a pause of
more than a week in which, at the rate of the log, 30 rows were to be expected. Such a row says
nothing of when the log ends, so that it must not move the splits. One row of a hundred (or a single
one) is left out as apart, one of ten where the pause is of ten years; where more than one of ten
lies ahead of the present, or one of a hundred has another unit, the column is refused.
"""

from __future__ import annotations

import collections
import datetime
from typing import NamedTuple

import numpy as np
import pandas as pd

from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.validation import LogError, wrong_type

MAX_UNIX_SECONDS = 100_000_000_000  # year 5138
MOST_AHEAD_S = DAY_S  # clocks and zones differ; more is a fault
_MOST_APART, _MOST_AHEAD = 0.01, 0.1  # of the rows
_PAUSE_DAYS, _LONG_PAUSE_DAYS = 7, 3_650
_PAUSE_ROWS = 30
_FEWEST_ROWS = 20  # to tell a pause from chance
_NONE, _STAMP, _ZERO = "unreadable", "timestamps", "0 or less"  # 1970 in every unit
# Units of numbers: a second in them, or what makes fourteen digits of them; and their usual size.
_SCALES = {"unix seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
_CALENDAR = {"YYYYMMDD": 1e6, "YYYYMMDDhhmm": 1e2, "YYYYMMDDhhmmss": 1.0}
_SIZES = {name: 1.7e9 * scale for name, scale in _SCALES.items()} | {
  name: 2e13 / factor for name, factor in _CALENDAR.items()
}
_KINDS = (_NONE, _STAMP, _ZERO, *_SIZES)


class Times(NamedTuple):
  """What a survey of a whole column says of it.

  Attributes:
    unit: of its numbers; None = that of most in each part.
    first_s, last_s: unix seconds; rows before and behind them are stray.
    now_s: the present.
  """

  unit: str | None
  first_s: int
  last_s: int
  now_s: float

  def strays(self, time_s_E: np.ndarray) -> dict[str, np.ndarray]:
    """Why rows are left out -> bool [E], which ones."""
    ahead_E = ahead_of(self.now_s, time_s_E)
    apart_E = ~ahead_E & ((time_s_E < self.first_s) | (time_s_E > self.last_s))
    return {
      "more than a day ahead of the present": ahead_E,
      f"more than {_PAUSE_DAYS} days apart from all others": apart_E,
    }


def ahead_of(now_s: float, time_s: np.ndarray) -> np.ndarray:
  """Which times no event can have yet."""
  return time_s > now_s + MOST_AHEAD_S


def time_column(
  series: pd.Series, file: str, *, unit: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Reads timestamps (without a zone: UTC), ISO 8601 strings or numbers.

  Args:
    series: [E] times.
    file: name for messages.
    unit: of numbers; None = that of most of these.

  Returns:
    time_s_E [E] int64 unix seconds, -1 = before 1970, at most MAX_UNIX_SECONDS, and unreadable_E
    [E] bool (with 0 seconds).

  Raises:
    LogError: the whole column is of another type.
  """
  numbers_E, stamp_E = _parsed(series, file)
  unit = unit or _unit_of(collections.Counter(_kinds(numbers_E, stamp_E).tolist()))
  seconds_E = np.where(np.isnat(stamp_E), _in_unit(numbers_E, unit), stamp_E.astype(np.int64))
  unreadable_E = ~np.isfinite(seconds_E)
  seconds_E = np.where(unreadable_E, 0, seconds_E).clip(-1, MAX_UNIX_SECONDS)
  return np.floor(seconds_E).astype(np.int64), unreadable_E


class TimeSurvey:
  """Goes through a column of times part by part; keeps a count for each day."""

  def __init__(self, file: str):
    self._file = file
    self._rows: collections.Counter[tuple[int, int]] = collections.Counter()

  @property
  def num_rows(self) -> int:
    return sum(self._rows.values())

  def add(self, series: pd.Series) -> None:
    """Counts the next rows.

    Raises:
      LogError: the whole column is of another type than times.
    """
    numbers_E, stamp_E = _parsed(series, self._file)
    kind_E = _kinds(numbers_E, stamp_E)
    self._rows[_KINDS.index(_NONE), 0] += int((kind_E == _KINDS.index(_NONE)).sum())
    for kind in set(kind_E.tolist()) - {_KINDS.index(_NONE)}:
      mine_E = kind_E == kind
      seconds_E = (
        stamp_E[mine_E].astype(np.int64) if _KINDS[kind] == _STAMP
        else np.minimum(numbers_E[mine_E], 0) if _KINDS[kind] == _ZERO
        else _in_unit(numbers_E[mine_E], _KINDS[kind])
      )
      seconds_E = np.nan_to_num(seconds_E).clip(-1, MAX_UNIX_SECONDS)
      day_N, count_N = np.unique(seconds_E // DAY_S, return_counts=True)
      for day, count in zip(day_N.astype(int).tolist(), count_N.tolist(), strict=True):
        self._rows[kind, day] += count

  def finish(self, now_s: float) -> Times:
    """What the whole column says.

    Raises:
      LogError: too many rows lie ahead of the present.
    """
    tally = collections.Counter[int]()
    for (kind, _), count in self._rows.items():
      tally[kind] += count
    unit, total = _unit_of(tally), self.num_rows
    few, many = (max(1, int(share * total)) for share in (_MOST_APART, _MOST_AHEAD))
    of_day = collections.Counter[int]()
    for (kind, day), count in self._rows.items():
      if _KINDS[kind] in (unit, _STAMP, _ZERO):
        of_day[day] += count
      elif kind and unit in _SCALES:  # a few of another unit: what they are in that of the others
        size_s = min(_SIZES[_KINDS[kind]] / _SCALES[unit], MAX_UNIX_SECONDS)
        of_day[int(size_s) // DAY_S] += count
    last_day = int(now_s + MOST_AHEAD_S) // DAY_S
    ahead = sum(count for day, count in of_day.items() if day > last_day)
    for kind, count in tally.items():
      if _KINDS[kind] not in (_NONE, _STAMP, _ZERO, unit) and count > few:
        raise LogError(
          f"{self._file}: column 'time': {tally[_KINDS.index(unit)]:,} rows are {unit}, {count:,} "
          f"are {_KINDS[kind]}: the numbers of a column must have one unit"
        )
    if ahead > many:
      today = datetime.datetime.fromtimestamp(now_s, datetime.UTC).date()
      raise LogError(
        f"{self._file}: column 'time' (numbers are read as {unit}): {ahead:,} of {total:,} rows "
        f"lie more than a day ahead of the present ({today}), and one of ten at most may be left "
        "out: are clock and unit right?"
      )
    day_N = np.array(sorted(day for day in of_day if day <= last_day), np.int64)
    count_N = np.array([of_day[day] for day in day_N.tolist()], np.int64)
    first, last = _without_strays(day_N, count_N, few=few, many=many)
    return Times(unit, int(first) * DAY_S, (int(last) + 1) * DAY_S - 1, now_s)


def _without_strays(
  day_N: np.ndarray, count_N: np.ndarray, *, few: int, many: int
) -> tuple[int, int]:
  """First and last day of a log; `few` rows at each end may be left out, or `many` far away."""
  total = int(count_N.sum())
  if not total:
    return 0, MAX_UNIX_SECONDS // DAY_S
  begin, end = 0, len(day_N)
  if total >= _FEWEST_ROWS:
    before_N = np.cumsum(count_N) - count_N
    behind_N = total - before_N - count_N
    core = np.flatnonzero((before_N + count_N > many) & (behind_N + count_N > many))
    days = day_N[core[-1]] - day_N[core[0]] + 1
    pause = max(_PAUSE_DAYS, _PAUSE_ROWS * days / count_N[core[0] : core[-1] + 1].sum())
    gap_N = np.diff(day_N) - 1  # behind each day but the last
    most_N = np.where(gap_N > _LONG_PAUSE_DAYS, many, few)
    left = np.flatnonzero((gap_N > pause) & (before_N[1:] <= most_N))
    right = np.flatnonzero((gap_N > pause) & (behind_N[:-1] <= most_N))
    begin = int(left[-1]) + 1 if len(left) else begin
    end = int(right[0]) + 1 if len(right) else end
  return int(day_N[begin]), int(day_N[end - 1])


def _parsed(series: pd.Series, file: str) -> tuple[np.ndarray, np.ndarray]:
  """Numbers [E] float64 and timestamps [E] datetime64[s]; each row is at most one of them."""
  rule, given, dtype = "must be a timestamp, ISO 8601 or unix seconds", series, series.dtype
  none_E, never_E = np.full(len(series), np.nan), np.full(len(series), np.datetime64("NaT", "s"))
  if isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(dtype):
    series = series.astype(object)
  if series.dtype == object:
    try:
      numbers_E = pd.to_numeric(series, errors="coerce").to_numpy(np.float64, na_value=np.nan)
      text_E = np.isnan(numbers_E) & series.notna().to_numpy()
      stamps = pd.to_datetime(series[text_E], errors="coerce", utc=True, format="ISO8601")
    except (TypeError, ValueError):
      raise wrong_type(given, file, 0, rule) from None
    never_E[text_E] = _naive(stamps)
    return numbers_E, never_E
  if pd.api.types.is_datetime64_any_dtype(dtype):
    return none_E, _naive(series)
  if pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
    return series.to_numpy(dtype=np.float64, na_value=np.nan), never_E
  raise wrong_type(given, file, 0, rule)


def _naive(series: pd.Series) -> np.ndarray:
  if isinstance(series.dtype, pd.DatetimeTZDtype):
    series = series.dt.tz_convert("UTC").dt.tz_localize(None)
  return series.to_numpy().astype("datetime64[s]")


def _kinds(numbers_E: np.ndarray, stamp_E: np.ndarray) -> np.ndarray:
  """int8 [E], what each row looks like by itself: numbers of _KINDS."""
  sizes = MAX_UNIX_SECONDS * np.array([1.0, 1e3, 1e6])
  kind_E = (_KINDS.index("unix seconds") + np.searchsorted(sizes, numbers_E, "right")).astype("i1")
  for unit in _CALENDAR:
    kind_E[np.isfinite(_in_unit(numbers_E, unit))] = _KINDS.index(unit)
  kind_E[numbers_E <= 0] = _KINDS.index(_ZERO)
  kind_E[~np.isfinite(numbers_E)] = _KINDS.index(_NONE)
  kind_E[~np.isnat(stamp_E)] = _KINDS.index(_STAMP)
  return kind_E


def _unit_of(tally: collections.Counter[int]) -> str:
  """The unit of most numbers."""
  return max(_SIZES, key=lambda unit: tally[_KINDS.index(unit)])


def _in_unit(numbers_E: np.ndarray, unit: str) -> np.ndarray:
  """Unix seconds [E] float64; NaN where there is no number, or none of the calendar."""
  if unit in _SCALES:
    return np.where(np.isfinite(numbers_E), numbers_E / _SCALES[unit], np.nan)
  with np.errstate(over="ignore"):
    digits_E = numbers_E * _CALENDAR[unit]
  fits_E = (digits_E >= 1990_00_00_000000) & (digits_E < 2100_00_00_000000)
  fits_E &= numbers_E == np.floor(numbers_E)
  digits_E = np.where(fits_E, digits_E, 1990_01_01_000000).astype(np.int64)
  date_E, clock_E = np.divmod(digits_E, 1_000_000)
  year_E, month_E, day_E = date_E // 10_000, date_E // 100 % 100, date_E % 100
  hour_E, minute_E, second_E = clock_E // 10_000, clock_E // 100 % 100, clock_E % 100
  begin_E = ((year_E - 1970) * 12 + month_E - 1).astype("datetime64[M]")
  stamp_E = begin_E.astype("datetime64[D]") + (day_E - 1)
  fits_E &= (month_E >= 1) & (month_E <= 12) & (stamp_E.astype("datetime64[M]") == begin_E)
  fits_E &= (hour_E < 24) & (minute_E < 60) & (second_E < 60)
  seconds_E = stamp_E.astype(np.int64) * DAY_S + hour_E * 3600 + minute_E * 60 + second_E
  return np.where(fits_E, seconds_E, np.nan)
