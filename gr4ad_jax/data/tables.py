"""Input tables in memory -> records: the rules that ads, contents and users must keep."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gr4ad_jax.data import validation
from gr4ad_jax.data.columns import require_table
from gr4ad_jax.data.event_rows import EventReader, Ids, whole_table
from gr4ad_jax.data.records import (
  AD_TYPES,
  DEFAULT_AD_TYPE,
  AdTable,
  ContentTable,
  Logs,
  UserTable,
)
from gr4ad_jax.data.validation import InvalidRows, RowChecks


def ad_table(frame: pd.DataFrame, file: str, counts: dict[str, int]) -> AdTable:
  """Reads the ad catalogue, rows in the given order.

  Args:
    frame: ad_id, advertiser_id, category, text; optional price, conversion_type, ad_type,
      account_id, campaign_id, bid, embedding.
    file: name for messages.
    counts: cleaning counts, added to.

  Raises:
    LogError: a rule is broken.
  """
  require_table(frame, "ads", file)
  ad_id = _unique_ids(frame, "ad_id", file)
  advertiser_A, advertisers = validation.factorize_ids(frame["advertiser_id"], file)
  checks = RowChecks(file, frame)
  checks.reject(advertiser_A < 0, "advertiser_id", "ids must not be missing")
  price_A = bid_A = np.full(len(frame), np.nan, np.float32)
  if "price" in frame.columns:
    price_A = validation.money_column(frame, "price", file, checks, nullable=True)
    counts["ads: price missing, kept as unknown"] = int(np.isnan(price_A).sum())
  if "bid" in frame.columns:
    bid_A = validation.money_column(frame, "bid", file, checks, nullable=True)
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


def _content_table(
  frame: pd.DataFrame, file: str, counts: dict[str, int], *, ads: AdTable
) -> ContentTable:
  """Reads organic contents: content_id, category, text; optional ad_id (null = not promoted)."""
  require_table(frame, "contents", file)
  ad_O = np.full(len(frame), -1)
  if "ad_id" in frame.columns:
    given_O, names = validation.factorize_ids(frame["ad_id"], file)
    ad_O = Ids(ads.ad_id).numbers(names)[given_O]
    checks = RowChecks(file, frame)
    checks.reject((given_O >= 0) & (ad_O < 0), "ad_id", "must be an ad_id of the ads table")
  return ContentTable(
    content_id=_unique_ids(frame, "content_id", file),
    ad=ad_O.astype(np.int32),
    category=_names(frame, "category", file, "contents", counts),
    text=_names(frame, "text", file, "contents", counts),
  )


def _user_table(frame: pd.DataFrame, file: str, counts: dict[str, int]) -> UserTable:
  """Reads users: user_id and categorical columns."""
  require_table(frame, "users", file)
  columns = [str(column) for column in frame.columns if column != "user_id"]
  return UserTable(
    user_id=_unique_ids(frame, "user_id", file),
    features={column: _names(frame, column, file, "users", counts) for column in columns},
  )


@dataclass(frozen=True)
class Known:
  """The tables beside the events; None = taken from the events."""

  ads: AdTable
  contents: ContentTable | None
  users: UserTable | None


def known_tables(
  frames: Mapping[str, pd.DataFrame | None], files: Mapping[str, str], counts: dict[str, int]
) -> Known:
  """Reads "ads" and what is there of "contents" and "users"; adds cleaning counts.

  Raises:
    LogError: a rule is broken.
  """
  frames = {name: f.reset_index(drop=True) for name, f in frames.items() if f is not None}
  ads, contents, users = ad_table(frames["ads"], files["ads"], counts), None, None
  if "contents" in frames:
    contents = _content_table(frames["contents"], files["contents"], counts, ads=ads)
  if "users" in frames:
    users = _user_table(frames["users"], files["users"], counts)
  return Known(ads, contents, users)


# Ten parameters: the tables of a log, where they come from, and what becomes of rows that break a
# rule.
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
  # Ten parameters: four tables, and what `Logs` says of them.
  files = {name: name for name in ("ads", "contents", "users", "events")} | dict(files or {})
  counts = dict(cleaning or {})
  known = known_tables({"ads": ads, "contents": contents, "users": users}, files, counts)
  reader = EventReader(files["events"], counts, **vars(known), invalid_rows=invalid_rows)
  numbering, event_table = whole_table(reader, events)
  return Logs(
    ads=known.ads,
    contents=numbering.contents,
    users=numbering.users,
    events=event_table,
    source=source,
    currency=currency,
    caveats=caveats,
    cleaning=counts,
  )


def _unique_ids(frame: pd.DataFrame, column: str, file: str) -> np.ndarray:
  codes_E, names_N = validation.factorize_ids(frame[column], file)
  checks = RowChecks(file, frame)
  checks.reject(codes_E < 0, column, "ids must not be missing")
  checks.reject(pd.Series(codes_E).duplicated().to_numpy(), column, "ids must be unique")
  return names_N


def _names(
  frame: pd.DataFrame, column: str, file: str, table: str, counts: dict[str, int]
) -> np.ndarray:
  if column not in frame.columns:
    return np.full(len(frame), "", object)
  read = validation.text_column if column == "text" else validation.category_column
  values_E = read(frame[column], file)
  counts[f"{table}: {column} missing, kept as unknown"] = int((values_E == "").sum())
  return values_E


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
