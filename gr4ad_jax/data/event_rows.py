"""Rows of an events table, in parts of any size: rules of a row, rules of a request, numbering.

An `EventReader` sees the parts of a file one after another and remembers what a row's meaning
depends on: which ids there were, whether text holds numbers. Rows then are numpy records of fixed
width, which `RequestRules` sees in whole requests, and `Numbering` turns into an `EventTable`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from gr4ad_jax.data import times, validation
from gr4ad_jax.data.columns import require_table
from gr4ad_jax.data.records import Action, AdTable, ContentTable, EventTable, UserTable
from gr4ad_jax.data.times import Times
from gr4ad_jax.data.validation import InvalidRows, RowChecks

FEATURE_PREFIX = "feature_"
MOST_STRAYS = 5  # that are named
_HASH_KEYS = ("request id, high", "request id, low ")  # 16 bytes each
_NEVER = np.iinfo(np.int64).max


class Ids:
  """Numbers of ids: rows of a table, or by first appearance where there is none."""

  def __init__(self, known: np.ndarray | None):
    """`known` [N] str objects are the ids of the table."""
    self.given = known is not None
    self._index = pd.Index(known) if self.given else None
    self._number: dict[str, int] = {}
    self._first_row = np.full(0, _NEVER)
    self._count = np.zeros(0, np.int64)

  def numbers(self, names_N: np.ndarray) -> np.ndarray:
    """Number of each name, -1 = not in the table; one more entry serves the code -1."""
    if self.given:
      return np.append(self._index.get_indexer(names_N), -1)
    number = self._number
    return np.array([*(number.setdefault(name, len(number)) for name in names_N), -1], np.int64)

  def keep(self, number_E: np.ndarray, row_E: np.ndarray) -> None:
    """Counts rows that stay, -1 = none."""
    number_E, row_E = number_E[number_E >= 0], row_E[number_E >= 0]
    more = (len(self._index) if self.given else len(self._number)) - len(self._count)
    if more:
      self._first_row = np.append(self._first_row, np.full(more, _NEVER))
      self._count = np.append(self._count, np.zeros(more, np.int64))
    np.minimum.at(self._first_row, number_E, row_E)
    self._count += np.bincount(number_E, minlength=len(self._count))

  def renumbered(self) -> Renumbered:
    """The final numbers: as they are in a table, else by the first row that stayed."""
    if self.given:
      used = np.arange(len(self._count))
      return Renumbered(self._index.to_numpy(), used, self._count)
    used = np.argsort(self._first_row, kind="stable")[: np.count_nonzero(self._count)]
    new = np.full(len(self._count), -1)
    new[used] = np.arange(len(used))
    names = np.array([*self._number, None], object)[:-1]
    return Renumbered(names[used], new, self._count[used])


@dataclasses.dataclass(frozen=True)
class Renumbered:
  """Ids in their final order: names [N], the final number of each earlier one, rows [N]."""

  name_N: np.ndarray
  number_of: np.ndarray
  count_N: np.ndarray

  def of(self, number_E: np.ndarray) -> np.ndarray:
    """Final numbers; -1 stays."""
    return np.append(self.number_of, -1)[number_E].astype(np.int32)

  @property
  def moved(self) -> bool:
    """Whether the order of ids differs from the earlier one."""
    used = self.number_of[self.number_of >= 0]
    return bool((np.diff(used) < 0).any())


class EventReading(NamedTuple):
  """What is known of an events table before its rows are read.

  Attributes:
    times: of the whole column; None = only what each part shows.
    actions: the log's own words in lower case -> an Action.
  """

  times: Times | None = None
  actions: Mapping[str, int] = {}


class Stray(NamedTuple):
  """A row whose time cannot be right."""

  row: int  # of the file
  cell: str
  time_s: int
  why: str


class EventReader:
  """Reads the parts of one events table in turn; memory grows with ids and feature values only."""

  def __init__(
    self, file: str, counts: dict[str, int], *, ads: AdTable, contents: ContentTable | None,
    users: UserTable | None, invalid_rows: InvalidRows,
    how: EventReading | None = None,
  ):
    """Begins before the first row.

    Args:
      file: name for messages.
      counts: cleaning counts, added to.
      ads: the catalogue.
      contents, users: the tables; None takes them from the events, with nothing known but ids.
      invalid_rows: what happens to a row that breaks a rule.
      how: what is known of the table; None = times as each part shows them, none of them stray.
    """
    # Eight parameters: the tables, and how the events are read.
    self.counts = counts
    self.num_rows = 0
    self.ads = Ids(ads.ad_id)
    self.contents = Ids(contents.content_id if contents else None)
    self.users = Ids(users.user_id if users else None)
    self.features: dict[str, dict[str, int]] = {}  # feature -> value -> number
    self.file, self.invalid_rows = file, invalid_rows
    self._dropped = collections.Counter()
    self.strays: list[Stray] = []  # the first ones
    self._how = how or EventReading()
    self._has_numbers: set[str] = set()
    self._given = contents, users

  def read(self, frame: pd.DataFrame) -> np.ndarray:
    """The next rows of the table, those that keep every rule of a row.

    Returns:
      Records: `row` of the file; `id_high`, `id_low`, a hash of the request id; `request`, 0 where
      `RequestRules` will number it and different negative numbers where a row has no request id;
      the columns of an EventTable with numbers from `users`, `contents` and `features`.

    Raises:
      LogError: a rule is broken and rows are not dropped, or a column is not as it must be.
    """
    file = self.file
    require_table(frame, "events", file)
    first_row = self.num_rows
    self.num_rows += len(frame)
    frame = frame.set_axis(pd.RangeIndex(first_row, self.num_rows))
    checks = RowChecks(file, frame, invalid_rows=self.invalid_rows, first_row=first_row)
    features = [name for name in map(str, frame.columns) if name.startswith(FEATURE_PREFIX)]
    rows = np.zeros(len(frame), [
      ("row", "i8"), ("id_high", "u8"), ("id_low", "u8"), ("request", "i8"), ("user", "i4"),
      ("time_s", "i8"), ("ad", "i4"), ("content", "i4"), ("action", "i1"), ("value", "f4"),
      ("ecpm", "f4"), ("features", "i4", (len(features),)),
    ])
    rows["row"] = np.arange(first_row, self.num_rows)

    user_E, names = validation.factorize_ids(frame["user_id"], file)
    checks.reject(user_E < 0, "user_id", "ids must not be missing")
    rows["user"] = user_E = self.users.numbers(names)[user_E]
    if self.users.given:
      checks.reject(user_E < 0, "user_id", "must be a user_id of the users table")
    self._times(frame, rows, checks)
    is_organic_E = self._items(frame, rows, checks)
    rows["action"] = action_E = self._actions(frame["action"])
    rule = "must be one of " + ", ".join(action.name.lower() for action in Action)
    checks.reject(action_E < 0, "action", rule)
    if "value" in frame.columns:
      rows["value"] = self._money(frame, "value", checks, nullable=False)
    rows["ecpm"] = np.nan
    if "ecpm" in frame.columns:
      rows["ecpm"] = self._money(frame, "ecpm", checks, nullable=True)
    rows["request"] = -1 - rows["row"]
    if "request_id" in frame.columns:
      self._request_ids(frame, rows, checks, is_organic_E)
    for column, name in enumerate(features):
      rows["features"][:, column] = self._feature_values(frame, name)
    self._dropped.update(checks.dropped)
    return rows[checks.alive_E]

  def keep(self, rows: np.ndarray) -> None:
    """Counts rows that have kept all rules."""
    self.users.keep(rows["user"], rows["row"])
    self.contents.keep(rows["content"], rows["row"])

  def finish(self, rules: RequestRules, cell: Callable[[int, str], object]) -> Numbering:
    """What the rows that were kept mean.

    Args:
      rules: that have seen all rows.
      cell: the value in a row and column of the file.

    Raises:
      LogError: a rule is broken and rows are not dropped, or no row is left.
    """
    if self.invalid_rows == "error":
      rules.refuse(self.file, cell)
    dropped = {**self._dropped, **rules.counts}
    self.counts |= {f"events: {rule}": count for rule, count in dropped.items()}
    users, contents = self.users.renumbered(), self.contents.renumbered()
    if not users.count_N.sum():
      raise validation.NoValidRows(
        f"{self.file}: no valid row is left of {self.num_rows}: at least one is required"
      )
    content_table, user_table = self._given
    if content_table is None:
      unknown_O = np.full(len(contents.name_N), "", object)
      ad_O = np.full(len(contents.name_N), -1, np.int32)
      content_table = ContentTable(contents.name_N, ad_O, unknown_O, unknown_O)
    values = {name: np.array([*of, None], object)[:-1] for name, of in self.features.items()}
    return Numbering(
      users, contents, user_table or UserTable(users.name_N, {}), content_table, values
    )

  def _times(self, frame: pd.DataFrame, rows: np.ndarray, checks: RowChecks) -> None:
    known = self._how.times
    time_s_E, unreadable_E = times.time_column(
      frame["time"], self.file, unit=known and known.unit
    )
    rows["time_s"] = time_s_E
    for why, stray_E in (known.strays(time_s_E) if known else {}).items():
      out_E = checks.leave_out(stray_E & ~unreadable_E, "time", why)
      for at in np.flatnonzero(out_E)[: MOST_STRAYS - len(self.strays)].tolist():
        cell = validation.shown(frame["time"].iloc[at])
        self.strays.append(Stray(int(rows["row"][at]), cell, int(time_s_E[at]), why))
    wrong_E = unreadable_E | (time_s_E < 0) | (time_s_E >= times.MAX_UNIX_SECONDS)
    checks.reject(wrong_E, "time", "must be a timestamp or unix seconds, years 1970 to 5138")

  def _items(self, frame: pd.DataFrame, rows: np.ndarray, checks: RowChecks) -> np.ndarray:
    """Fills in ads and contents; returns which rows name a content."""
    given_ad_E, names = validation.factorize_ids(frame["ad_id"], self.file)
    rows["ad"] = ad_E = self.ads.numbers(names)[given_ad_E]
    content_E, names = np.full(len(frame), -1), np.array([], object)
    if "content_id" in frame.columns:
      content_E, names = validation.factorize_ids(frame["content_id"], self.file)
    is_ad_E, is_organic_E = given_ad_E >= 0, content_E >= 0
    rule = "a row must have an ad_id or a content_id, this one has"
    checks.reject(~is_ad_E & ~is_organic_E, "ad_id", f"{rule} neither")
    checks.reject(is_ad_E & is_organic_E, "ad_id", f"{rule} both")
    checks.reject(is_ad_E & (ad_E < 0), "ad_id", "must be an ad_id of the ads table")
    rows["content"] = content_E = self.contents.numbers(names)[content_E]
    if self.contents.given:
      rule = "must be a content_id of the contents table"
      checks.reject(is_organic_E & (content_E < 0), "content_id", rule)
    return is_organic_E

  def _actions(self, series: pd.Series) -> np.ndarray:
    """Reads action names (any case) or numbers; -1 = missing or unknown."""
    codes_E, names_N = validation.factorize_ids(series, self.file)
    known = {name: int(a) for a in Action for name in (a.name.lower(), str(int(a)))}
    known |= self._how.actions
    return np.array([*(known.get(name.lower(), -1) for name in names_N), -1])[codes_E]

  def _money(
    self, frame: pd.DataFrame, column: str, checks: RowChecks, *, nullable: bool
  ) -> np.ndarray:
    amount_E = validation.money_column(
      frame, column, self.file, checks, nullable=nullable,
      has_numbers=column in self._has_numbers,
    )
    if not np.isnan(amount_E).all():
      self._has_numbers.add(column)
    return amount_E

  def _request_ids(
    self, frame: pd.DataFrame, rows: np.ndarray, checks: RowChecks, is_organic_E: np.ndarray
  ) -> None:
    given_E, names = validation.factorize_ids(frame["request_id"], self.file)
    there_E = given_E >= 0
    checks.reject(~there_E & ~is_organic_E, "request_id", "an ad event must have a request_id")
    # Two hashes of 64 bits: the same for two of a billion ids once in 10^20 logs.
    for field, key in zip(("id_high", "id_low"), _HASH_KEYS, strict=True):
      hash_N = pd.util.hash_array(names, hash_key=key, categorize=False)
      rows[field][there_E] = hash_N[given_E[there_E]]
    rows["request"][there_E] = 0

  def _feature_values(self, frame: pd.DataFrame, column: str) -> np.ndarray:
    values_E = validation.category_column(frame[column], self.file)
    number = self.features.setdefault(column.removeprefix(FEATURE_PREFIX), {})
    codes_E, values = pd.factorize(values_E)
    key = f"events: {column} missing, kept as unknown"
    self.counts[key] = self.counts.get(key, 0) + int((values_E == "").sum())
    return np.array([number.setdefault(v, len(number)) for v in values], np.int32)[codes_E]


class RequestRules:
  """The rule within a request: it belongs to one user. Its rows may come in any order of time.

  Attributes:
    counts: rule -> rows; dropped ones, and those that an earlier row of the file comes after.
  """

  _RULE = "a request must belong to one user"
  _DROPPED = f"dropped, request_id: {_RULE}"
  _SORTED = "time: before that of an earlier row of its request, sorted"

  def __init__(self):
    self.counts = {self._DROPPED: 0, self._SORTED: 0}
    self._first = _NEVER
    self._num_requests = 0

  def apply(self, rows: np.ndarray) -> np.ndarray:
    """Numbers whole requests and leaves out rows that break a rule, in any order of the rows."""
    # Rows of a request side by side, in the order of the file: the first one says whose it is.
    rows = rows[np.lexsort((rows["row"], rows["id_low"], rows["id_high"]))]
    new_E = np.ones(len(rows), bool)
    new_E[1:] = np.diff(rows["id_high"]).astype(bool) | np.diff(rows["id_low"]).astype(bool)
    group_E = np.cumsum(new_E) - 1
    rows["request"] = self._num_requests + group_E
    self._num_requests += int(new_E.sum())
    broken_E = rows["user"][new_E][group_E] != rows["user"]
    self.counts[self._DROPPED] += int(broken_E.sum())
    self._first = min(self._first, int(rows["row"][broken_E].min(initial=_NEVER)))
    rows = rows[~broken_E]
    latest_E = pd.Series(rows["time_s"]).groupby(rows["request"]).cummax().to_numpy()
    self.counts[self._SORTED] += int((latest_E > rows["time_s"]).sum())
    return rows

  def refuse(self, file: str, cell: Callable[[int, str], object]) -> None:
    """Names the first row that broke the rule.

    Raises:
      LogError: a row did.
    """
    if count := self.counts[self._DROPPED]:
      rule = self._RULE + validation.more_rows(count)
      value = cell(self._first, "request_id")
      raise validation.at_row(file, self._first, "request_id", value, rule)


@dataclasses.dataclass(frozen=True)
class Numbering:
  """What the numbers in kept rows mean, and the tables they refer to.

  Attributes:
    user_numbers, content_numbers: from the numbers in rows to those of the tables.
    users, contents: the tables; those of ids without a table have no features and no text.
    features: request feature -> its values by number.
  """

  user_numbers: Renumbered
  content_numbers: Renumbered
  users: UserTable
  contents: ContentTable
  features: dict[str, np.ndarray]

  def events(self, rows: np.ndarray, *, first_request: int = 0) -> EventTable:
    """All events of some users, sorted by user and time; requests are numbered on."""
    user_E = self.user_numbers.of(rows["user"])
    order = np.lexsort((rows["row"], rows["time_s"], user_E))
    rows = rows[order]
    columns = ("time_s", "ad", "action", "value", "ecpm")
    return EventTable(
      user=user_E[order],
      content=self.content_numbers.of(rows["content"]),
      request=(first_request + pd.factorize(rows["request"])[0]).astype(np.int32),
      features={
        name: values[rows["features"][:, column]]
        for column, (name, values) in enumerate(self.features.items())
      },
      **{name: rows[name].copy() for name in columns},
    )


def named(rows: np.ndarray) -> np.ndarray:
  """Which rows have a request id."""
  return rows["request"] >= 0


def whole_table(reader: EventReader, frame: pd.DataFrame) -> tuple[Numbering, EventTable]:
  """Reads a table that is in memory."""
  rules, rows = RequestRules(), reader.read(frame)
  rows = np.concatenate([rows[~named(rows)], rules.apply(rows[named(rows)])])
  reader.keep(rows)
  numbering = reader.finish(rules, lambda row, column: frame[column].iloc[row])
  return numbering, numbering.events(rows)
