"""What a log is: the records, and how input tables in memory become them."""

from collections.abc import Mapping

import pandas as pd

from gr4ad_jax.data import tables
from gr4ad_jax.data.log_folder import TABLES, read_logs, write_logs
from gr4ad_jax.data.records import (
  Action,
  AdTable,
  ContentTable,
  EventTable,
  Logs,
  UserTable,
)
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
  known = tables.known_tables({"ads": ads, "contents": contents, "users": users}, files, counts)
  read = tables.event_table(
    events, files["events"], counts, **vars(known), invalid_rows=invalid_rows
  )
  return Logs(
    ads=known.ads,
    contents=read.contents,
    users=read.users,
    events=read.events,
    source=source,
    currency=currency,
    caveats=tuple(caveats),
    cleaning=counts,
  )
