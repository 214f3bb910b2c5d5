"""One input table -> one record: the rules that ads, contents, users and events must keep."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from gr4ad_jax.data import validation
from gr4ad_jax.data.records import (
  AD_TYPES,
  DEFAULT_AD_TYPE,
  Action,
  AdTable,
  ContentTable,
  EventTable,
  UserTable,
)
from gr4ad_jax.data.validation import InvalidRows, RowChecks

FEATURE_PREFIX = "feature_"


def ad_table(frame: pd.DataFrame, file: str, counts: dict[str, int]) -> AdTable:
  """Reads the ad catalogue.

  Args:
    frame: ad_id, advertiser_id, category, text; optional price, conversion_type, ad_type,
      account_id, campaign_id, bid, embedding.
    file: name for messages.
    counts: cleaning counts, added to.

  Returns:
    The table, rows in the given order.

  Raises:
    LogError: a rule is broken.
  """
  optional = (
    "price", "conversion_type", "ad_type", "account_id", "campaign_id", "bid", "embedding"
  )
  validation.require_columns(
    frame, ("ad_id", "advertiser_id", "category", "text"), file, optional=optional
  )
  ad_id = _unique_ids(frame, "ad_id", file)
  advertiser_A, advertisers = validation.factorize_ids(frame["advertiser_id"], file)
  checks = RowChecks(file, frame)
  checks.reject(advertiser_A < 0, "advertiser_id", "ids must not be missing")
  price_A = np.full(len(frame), np.nan, np.float32)
  if "price" in frame.columns:
    price_A = _money(frame, "price", file, checks, nullable=True)
    counts["ads: price missing, kept as unknown"] = int(np.isnan(price_A).sum())
  bid_A = np.full(len(frame), np.nan, np.float32)
  if "bid" in frame.columns:
    bid_A = _money(frame, "bid", file, checks, nullable=True)
  conversion_type_A = np.full(len(frame), "", object)
  if "conversion_type" in frame.columns:
    conversion_type_A = _names(frame, "conversion_type", file, "ads", counts)
  embedding_AD = None
  if "embedding" in frame.columns:
    embedding_AD = validation.embedding_column(frame["embedding"], file)
  return AdTable(
    ad_id=ad_id,
    advertiser_id=advertisers[advertiser_A],
    category=_names(frame, "category", file, "ads", counts),
    text=_names(frame, "text", file, "ads", counts),
    price=price_A,
    conversion_type=conversion_type_A,
    ad_type=_ad_types(frame, file, checks, counts),
    account_id=_optional_ids(frame, "account_id", file, counts),
    campaign_id=_optional_ids(frame, "campaign_id", file, counts),
    bid=bid_A,
    embedding_AD=embedding_AD,
  )


def content_table(
  frame: pd.DataFrame, file: str, counts: dict[str, int], *, ads: AdTable
) -> ContentTable:
  """Reads organic contents: content_id, category, text; optional ad_id (null = not promoted).

  Args:
    frame: the table.
    file: name for messages.
    counts: cleaning counts, added to.
    ads: the catalogue that ad_id refers to.

  Returns:
    The table, rows in the given order.

  Raises:
    LogError: a rule is broken.
  """
  validation.require_columns(frame, ("content_id", "category", "text"), file, optional=("ad_id",))
  ad_O = np.full(len(frame), -1)
  if "ad_id" in frame.columns:
    given_O, names = validation.factorize_ids(frame["ad_id"], file)
    ad_O = _rows_of(names, ads.ad_id)[given_O]
    checks = RowChecks(file, frame)
    checks.reject((given_O >= 0) & (ad_O < 0), "ad_id", "must be an ad_id of the ads table")
  return ContentTable(
    content_id=_unique_ids(frame, "content_id", file),
    ad=ad_O.astype(np.int32),
    category=_names(frame, "category", file, "contents", counts),
    text=_names(frame, "text", file, "contents", counts),
  )


def user_table(frame: pd.DataFrame, file: str, counts: dict[str, int]) -> UserTable:
  """Reads users: user_id and categorical columns.

  Args:
    frame: the table.
    file: name for messages.
    counts: cleaning counts, added to.

  Returns:
    The table, rows in the given order.

  Raises:
    LogError: a rule is broken.
  """
  validation.require_columns(frame, ("user_id",), file, prefix="")
  columns = [str(column) for column in frame.columns if column != "user_id"]
  return UserTable(
    user_id=_unique_ids(frame, "user_id", file),
    features={column: _names(frame, column, file, "users", counts) for column in columns},
  )


@dataclass(frozen=True)
class Events:
  """The event table and the tables it refers to, which may have been taken from it."""

  contents: ContentTable
  users: UserTable
  events: EventTable


def event_table(
  frame: pd.DataFrame,
  file: str,
  counts: dict[str, int],
  *,
  ads: AdTable,
  contents: ContentTable | None,
  users: UserTable | None,
  invalid_rows: InvalidRows,
) -> Events:
  """Reads events; a row has exactly one of ad_id and content_id.

  Args:
    frame: user_id, time, ad_id, action; optional content_id, request_id, value, ecpm, feature_*.
    file: name for messages.
    counts: cleaning counts, added to.
    ads: the catalogue.
    contents: the contents; None takes them from the events, category and text unknown.
    users: the users; None takes them from the events.
    invalid_rows: "error" or "drop".

  Returns:
    Events sorted by user and time, and the tables they refer to.

  Raises:
    LogError: a rule is broken.
  """
  optional = ("content_id", "request_id", "value", "ecpm")
  required = ("user_id", "time", "ad_id", "action")
  validation.require_columns(frame, required, file, optional=optional, prefix=FEATURE_PREFIX)
  checks = RowChecks(file, frame, invalid_rows=invalid_rows)

  user_E, user_names = validation.factorize_ids(frame["user_id"], file)
  checks.reject(user_E < 0, "user_id", "ids must not be missing")
  if users is not None:
    user_E = _rows_of(user_names, users.user_id)[user_E]
    checks.reject(user_E < 0, "user_id", "must be a user_id of the users table")
  time_s_E, unreadable_E = validation.time_column(frame["time"], file)
  checks.reject(unreadable_E, "time", "must be a timestamp or unix seconds, years 1970 to 5138")

  given_ad_E, ad_names = validation.factorize_ids(frame["ad_id"], file)
  ad_E = _rows_of(ad_names, ads.ad_id)[given_ad_E]
  content_E, content_names = np.full(len(frame), -1), np.array([], object)
  if "content_id" in frame.columns:
    content_E, content_names = validation.factorize_ids(frame["content_id"], file)
  is_ad_E, is_organic_E = given_ad_E >= 0, content_E >= 0
  rule = "a row must have an ad_id or a content_id, this one has"
  checks.reject(~is_ad_E & ~is_organic_E, "ad_id", f"{rule} neither")
  checks.reject(is_ad_E & is_organic_E, "ad_id", f"{rule} both")
  checks.reject(is_ad_E & (ad_E < 0), "ad_id", "must be an ad_id of the ads table")
  if contents is not None:
    content_E = _rows_of(content_names, contents.content_id)[content_E]
    rule = "must be a content_id of the contents table"
    checks.reject(is_organic_E & (content_E < 0), "content_id", rule)

  action_E = _actions(frame["action"], file)
  rule = "must be one of " + ", ".join(action.name.lower() for action in Action)
  checks.reject(action_E < 0, "action", rule)
  value_E = np.zeros(len(frame), np.float32)
  if "value" in frame.columns:
    value_E = _money(frame, "value", file, checks, nullable=False)
  ecpm_E = np.full(len(frame), np.nan, np.float32)
  if "ecpm" in frame.columns:
    ecpm_E = _money(frame, "ecpm", file, checks, nullable=True)
  request_E = np.arange(len(frame))
  if "request_id" in frame.columns:
    request_E = _requests(frame, file, checks, user_E, time_s_E, is_organic_E)
  features = {
    column.removeprefix(FEATURE_PREFIX): _names(frame, column, file, "events", counts)
    for column in map(str, frame.columns)
    if column.startswith(FEATURE_PREFIX)
  }
  counts.update({f"events: {rule}": count for rule, count in checks.dropped.items()})

  kept = np.flatnonzero(checks.alive_E)
  if not len(kept):
    raise validation.NoValidRows(
      f"{file}: no valid row is left of {len(frame)}: at least one is required"
    )
  if users is None:
    user_E, used = _renumber(user_E, kept)
    users = UserTable(user_names[used], {})
  if contents is None:
    content_E, used = _renumber(content_E, kept)
    unknown_O = np.full(len(used), "", object)
    ad_O = np.full(len(used), -1, np.int32)
    contents = ContentTable(content_names[used], ad_O, unknown_O, unknown_O)
  order = kept[np.lexsort((time_s_E[kept], user_E[kept]))]
  events = EventTable(
    user=user_E[order].astype(np.int32),
    time_s=time_s_E[order],
    ad=ad_E[order].astype(np.int32),
    content=content_E[order].astype(np.int32),
    request=pd.factorize(request_E[order])[0].astype(np.int32),
    action=action_E[order].astype(np.int8),
    value=value_E[order],
    ecpm=ecpm_E[order],
    features={name: values_E[order] for name, values_E in features.items()},
  )
  return Events(contents, users, events)


def _requests(
  frame: pd.DataFrame,
  file: str,
  checks: RowChecks,
  user_E: np.ndarray,
  time_s_E: np.ndarray,
  is_organic_E: np.ndarray,
) -> np.ndarray:
  """Request numbers [E]; an organic event without one is a request of its own."""
  given_E, _ = validation.factorize_ids(frame["request_id"], file)
  checks.reject((given_E < 0) & ~is_organic_E, "request_id", "an ad event must have a request_id")
  request_E = np.where(given_E < 0, len(frame) + np.arange(len(frame)), given_E)

  alive = np.flatnonzero(checks.alive_E)
  broken_E = np.zeros(len(frame), bool)
  first_user = pd.Series(user_E[alive]).groupby(request_E[alive]).transform("first").to_numpy()
  broken_E[alive] = first_user != user_E[alive]
  checks.reject(broken_E, "request_id", "a request must belong to one user")

  alive = np.flatnonzero(checks.alive_E)
  broken_E = np.zeros(len(frame), bool)
  latest = pd.Series(time_s_E[alive]).groupby(request_E[alive]).cummax().to_numpy()
  broken_E[alive] = latest > time_s_E[alive]
  checks.reject(broken_E, "time", "must not run backwards within a request")
  return request_E


def _unique_ids(frame: pd.DataFrame, column: str, file: str) -> np.ndarray:
  codes_N, names_N = validation.factorize_ids(frame[column], file)
  checks = RowChecks(file, frame)
  checks.reject(codes_N < 0, column, "ids must not be missing")
  checks.reject(pd.Series(codes_N).duplicated().to_numpy(), column, "ids must be unique")
  return names_N


def _rows_of(names_N: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """Row of each name among the ids, -1 where there is none; the last entry serves the code -1."""
  return np.append(pd.Index(ids).get_indexer(names_N), -1)


def _names(
  frame: pd.DataFrame, column: str, file: str, table: str, counts: dict[str, int]
) -> np.ndarray:
  read = validation.text_column if column == "text" else validation.category_column
  values_N = read(frame[column], file)
  counts[f"{table}: {column} missing, kept as unknown"] = int((values_N == "").sum())
  return values_N


def _ad_types(
  frame: pd.DataFrame, file: str, checks: RowChecks, counts: dict[str, int]
) -> np.ndarray:
  """Ad kinds in lower case [A]; null, and an absent column, is the default kind."""
  if "ad_type" not in frame.columns:
    return np.full(len(frame), DEFAULT_AD_TYPE, object)
  codes_A, names_N = validation.factorize_ids(frame["ad_type"], file)
  known_N = np.append([name.lower() in AD_TYPES for name in names_N], True).astype(bool)
  checks.reject(~known_N[codes_A], "ad_type", f"must be one of {', '.join(AD_TYPES)}, or null")
  counts[f"ads: ad_type missing, kept as {DEFAULT_AD_TYPE}"] = int((codes_A < 0).sum())
  return np.array([*(name.lower() for name in names_N), DEFAULT_AD_TYPE], object)[codes_A]


def _optional_ids(
  frame: pd.DataFrame, column: str, file: str, counts: dict[str, int]
) -> np.ndarray:
  """Ids of the ads [A]; null, and an absent column, is ""."""
  if column not in frame.columns:
    return np.full(len(frame), "", object)
  codes_A, names_N = validation.factorize_ids(frame[column], file)
  counts[f"ads: {column} missing, kept as unknown"] = int((codes_A < 0).sum())
  return np.append(names_N, np.array([""], object))[codes_A]


def _money(
  frame: pd.DataFrame, column: str, file: str, checks: RowChecks, *, nullable: bool
) -> np.ndarray:
  """A column of amounts >= 0 as float32; null is NaN where it is allowed."""
  amount_E, wrong_E = validation.number_column(frame[column], file)
  with np.errstate(over="ignore"):
    amount_E = amount_E.astype(np.float32)
  if nullable:
    checks.reject(wrong_E | np.isinf(amount_E), column, "must be a finite number or null")
  else:
    checks.reject(wrong_E | ~np.isfinite(amount_E), column, "must be a finite number")
  checks.reject(amount_E < 0, column, "must be >= 0")
  return amount_E


def _actions(series: pd.Series, file: str) -> np.ndarray:
  """Reads action names (any case) or numbers; [E] int64, -1 = missing or unknown."""
  codes_E, names_N = validation.factorize_ids(series, file)
  known = {action.name.lower(): int(action) for action in Action}
  known |= {str(int(action)): int(action) for action in Action}
  return np.array([*(known.get(name.lower(), -1) for name in names_N), -1])[codes_E]


def _renumber(codes_E: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Numbers the codes of kept rows by first appearance; also returns the old codes in use."""
  rows = kept[codes_E[kept] >= 0]
  new_E = np.full(len(codes_E), -1)
  new_E[rows], used = pd.factorize(codes_E[rows])
  return new_E, used
