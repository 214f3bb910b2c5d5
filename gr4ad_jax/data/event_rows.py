"""Rows of an events table, in parts of any size: rules of a row, rules of a request, numbering.

An `EventReader` sees the parts of a file one after another and remembers what a row's meaning
depends on: which ids there were, whether text holds numbers. Rows then are numpy records of fixed
width, which `RequestRules` sees in whole requests, and `Numbering` turns into an `EventTable`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd

from gr4ad_jax.data import validation
from gr4ad_jax.data.records import Action, AdTable, ContentTable, EventTable, UserTable
from gr4ad_jax.data.validation import InvalidRows, RowChecks

FEATURE_PREFIX = "feature_"
_REQUIRED = ("user_id", "time", "ad_id", "action")
_OPTIONAL = ("content_id", "request_id", "value", "ecpm")
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


class EventReader:
  """Reads the parts of one events table in turn; memory grows with ids and feature values only."""

  def __init__(
    self, file: str, counts: dict[str, int], *, ads: AdTable, contents: ContentTable | None,
    users: UserTable | None, invalid_rows: InvalidRows,
  ):
    """Begins before the first row.

    Args:
      file: name for messages.
      counts: cleaning counts, added to.
      ads: the catalogue.
      contents, users: the tables; None takes them from the events, with nothing known but ids.
      invalid_rows: what happens to a row that breaks a rule.
    """
    self.counts = counts
    self.num_rows = 0
    self.ads = Ids(ads.ad_id)
    self.contents = Ids(contents.content_id if contents else None)
    self.users = Ids(users.user_id if users else None)
    self.features: dict[str, dict[str, int]] = {}  # feature -> value -> number
    self.file, self.invalid_rows = file, invalid_rows
    self._dropped = collections.Counter()
    self._has_numbers: set[str] = set()
    self._unix_seconds: bool | None = None
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
    validation.require_columns(
      frame, _REQUIRED, file, optional=_OPTIONAL, prefix=FEATURE_PREFIX
    )
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
    rows["time_s"], unreadable_E = self._times(frame["time"])
    checks.reject(unreadable_E, "time", "must be a timestamp or unix seconds, years 1970 to 5138")
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
    dropped = {**self._dropped, **rules.dropped}
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

  def _times(self, series: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    if self._unix_seconds is None and pd.api.types.infer_dtype(series, skipna=True) == "string":
      self._unix_seconds = validation.in_unix_seconds(series)
    return validation.time_column(series, self.file, unix_seconds=self._unix_seconds)

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
  """The rules within a request: one user, and time that does not run backwards.

  Attributes:
    dropped: rule -> rows dropped by it; the second rule sees only the rows that the first one left.
  """

  _RULES = (
    ("request_id", "a request must belong to one user"),
    ("time", "must not run backwards within a request"),
  )

  def __init__(self):
    self.dropped = {f"dropped, {column}: {rule}": 0 for column, rule in self._RULES}
    self._first = [_NEVER] * len(self._RULES)
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
    rows = self._without(0, rows, rows["user"][new_E][group_E] != rows["user"])
    latest_E = pd.Series(rows["time_s"]).groupby(rows["request"]).cummax().to_numpy()
    return self._without(1, rows, latest_E > rows["time_s"])

  def refuse(self, file: str, cell: Callable[[int, str], object]) -> None:
    """Names the first row that broke a rule.

    Raises:
      LogError: a row did.
    """
    for (column, rule), count, row in zip(
      self._RULES, self.dropped.values(), self._first, strict=True
    ):
      if count:
        raise validation.at_row(
          file, row, column, cell(row, column), rule + validation.more_rows(count)
        )

  def _without(self, number: int, rows: np.ndarray, broken_E: np.ndarray) -> np.ndarray:
    column, rule = self._RULES[number]
    self.dropped[f"dropped, {column}: {rule}"] += int(broken_E.sum())
    first = int(rows["row"][broken_E].min(initial=_NEVER))
    self._first[number] = min(self._first[number], first)
    return rows[~broken_E]


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
