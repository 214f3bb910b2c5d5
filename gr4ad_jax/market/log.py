"""What happens in a market, day by day, and the log of it in the ordinary schema.

Every day follows from the market's seed, the day's number and the policy alone, so any day can be
made again, and a log of any length takes constant memory. An event row of an ad holds the deepest
action of that impression.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from gr4ad_jax.config import ConfigError, require
from gr4ad_jax.data.completejourney import hour_band
from gr4ad_jax.data.log_folder import write_tables
from gr4ad_jax.data.records import DAY_S, Action, Logs
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import track
from gr4ad_jax.market.policy import (
  Cascade,
  Policy,
  Shelf,
  Shelves,
  Shown,
  build_shelves,
  draw_categories,
  draw_items,
)
from gr4ad_jax.market.world import (
  SCENES,
  START_S,
  Market,
  Requests,
  ad_text,
  day_of,
  hour_blocks,
  taste,
  truth,
)

CAVEATS = (
  "Simulated market: tastes, rates, bids and clicks are drawn from known formulas. No position "
  "bias, no fatigue, no fraud, no delay between click and conversion.",
)
_REQUESTS_PER_SESSION, _SECONDS_BETWEEN = 1.6, 180
_SCENE_SHARES = (0.6, 0.25, 0.15)
_HOURS = np.array([2, 1, 1, 1, 1, 2, 3, 5, 6, 6, 6, 7, 9, 8, 6, 6, 6, 7, 9, 11, 12, 11, 8, 4.0])
_ROW = np.dtype([
  ("user", "i4"), ("time", "i8"), ("ad", "i8"), ("content", "i8"), ("request", "i8"),
  ("action", "i1"), ("value", "f4"), ("ecpm", "f4"), ("scene", "i1"),
])
_NOTHING = np.array((0, 0, -1, -1, -1, 0, 0, np.nan, 0), _ROW)
_WEEKDAYS = np.array([0.95, 0.95, 1.0, 1.0, 1.05, 1.1, 0.95])


def arrivals(market: Market, day: int) -> Requests:
  """The requests of a day, in time order; they do not depend on the policy."""
  rng = np.random.default_rng([market.config.seed, day, 0])
  rate_U = market.config.sessions_per_day * _WEEKDAYS[(day + 2) % 7] * market.activity_U
  user_S = np.repeat(np.arange(len(rate_U), dtype=np.int32), rng.poisson(rate_U))
  start_s_S = rng.choice(24, len(user_S), p=_HOURS / _HOURS.sum()) * 3600.0
  start_s_S += rng.random(len(user_S)) * 3600
  length_S = rng.geometric(1 / _REQUESTS_PER_SESSION, len(user_S))
  gap_s_R = rng.exponential(_SECONDS_BETWEEN, int(length_S.sum()))
  first_S = np.cumsum(length_S) - length_S
  gap_s_R[first_S] = 0
  # Seconds since the session began: a running sum that starts again at each first request.
  since_s_R = np.cumsum(gap_s_R)
  since_s_R -= np.repeat(since_s_R[first_S], length_S)
  time_s_R = np.minimum(np.repeat(start_s_S, length_S) + since_s_R, DAY_S - 1).astype(np.int64)
  scene_R = rng.choice(len(SCENES), len(time_s_R), p=_SCENE_SHARES).astype(np.int8)
  order_R = np.argsort(time_s_R, kind="stable")
  return Requests(
    np.repeat(user_S, length_S)[order_R], START_S + day * DAY_S + time_s_R[order_R],
    scene_R[order_R],
  )


def simulate_day(
  market: Market, day: int, policy: Policy, *, shelves: Shelves
) -> pd.DataFrame:
  """One day of events (0 = the first), as the events table of the schema (docs/own_logs.md)."""
  parts = list(simulate_hours(market, day, policy, shelves=shelves)) or [_frame(np.zeros(0, _ROW))]
  whole = pd.concat(parts, ignore_index=True)
  return whole.sort_values("time", kind="stable", ignore_index=True)


def simulate_hours(
  market: Market, day: int, policy: Policy, *, shelves: Shelves
) -> Iterator[pd.DataFrame]:
  """`simulate_day` in pieces of an hour or of 2,048 requests, whichever is less.

  A piece is there before the policy is asked about the next one. Advertisers leave for the rest of
  the day once conversions have cost them their budget, checked between pieces.
  """
  requests = arrivals(market, day)
  rng = np.random.default_rng([market.config.seed, day, 1])
  spent_V = np.zeros(len(market.budget_V))
  hour_R = (requests.time_s_R - START_S) // 3600
  for block in hour_blocks(hour_R):
    part = Requests(*(x[block] for x in requests))
    shown = policy(part, spent_V < market.budget_V, rng)
    rows = np.concatenate([
      _impressions(market, part, shown, block, day, spent_V, rng),
      _organic(market, part, day, shelves.contents, rng),
    ])
    yield _frame(rows[np.argsort(rows["time"], kind="stable")])


def _impressions(
  market: Market, requests: Requests, shown: Shown, block: np.ndarray, day: int,
  spent_V: np.ndarray, rng: np.random.Generator,
) -> np.ndarray:
  """Draws clicks and conversions, and adds what they cost to `spent_V`."""
  real_RK = shown.ad_RK >= 0
  rates = truth(market, requests, shown.ad_RK)
  click_RK = rng.random(real_RK.shape) < rates.click
  conversion_RK = click_RK & (rng.random(real_RK.shape) < rates.conversion)
  action_RK = np.where(conversion_RK, Action.CONVERSION, np.where(click_RK, Action.CLICK, 0))
  row_E, place_E = np.nonzero(real_RK)
  ad_E = shown.ad_RK[row_E, place_E]
  value_E = np.where(conversion_RK[row_E, place_E], market.bid_A[ad_E], 0)
  np.add.at(spent_V, market.advertiser_A[ad_E], value_E)
  rows = np.full(len(ad_E), _NOTHING)
  rows["user"], rows["time"] = requests.user_R[row_E], requests.time_s_R[row_E]
  rows["scene"], rows["ad"] = requests.scene_R[row_E], ad_E
  rows["request"] = day * 1_000_000_000 + block[row_E].astype(np.int64)
  rows["action"], rows["value"] = action_RK[row_E, place_E], value_E
  rows["ecpm"] = shown.ecpm_RK[row_E, place_E]
  return rows


def _organic(
  market: Market, requests: Requests, day: int, shelf: Shelf, rng: np.random.Generator
) -> np.ndarray:
  """What users did of themselves in the minutes before their requests."""
  mean = market.config.organic_per_request if len(shelf.order_I) else 0
  count_R = rng.poisson(mean, len(requests.user_R))
  row_E = np.repeat(np.arange(len(count_R)), count_R)
  user_E, time_s_E = requests.user_R[row_E], requests.time_s_R[row_E]
  day_E = day_of(time_s_E)
  category_E1 = draw_categories(market, taste(market, user_E, day_E), day_E, 1, rng)
  content_E = draw_items(shelf, category_E1[:, 0], rng)
  time_s_E = np.maximum(time_s_E - rng.integers(1, 120, len(time_s_E)), START_S + day * DAY_S)
  bought_E = rng.random(len(row_E)) < 0.2
  rows = np.full(len(row_E), _NOTHING)
  rows["user"], rows["time"], rows["content"] = user_E, time_s_E, content_E
  rows["scene"] = requests.scene_R[row_E]
  rows["action"] = np.where(bought_E, Action.CONVERSION, Action.CLICK)
  return rows


def _frame(rows: np.ndarray) -> pd.DataFrame:
  is_ad_E = rows["ad"] >= 0
  return pd.DataFrame({
    "user_id": rows["user"],
    "time": rows["time"],
    "ad_id": _nullable(rows["ad"], is_ad_E),
    "content_id": _nullable(rows["content"], ~is_ad_E),
    "request_id": _nullable(rows["request"], is_ad_E),
    "action": rows["action"],
    "value": rows["value"],
    "ecpm": rows["ecpm"],
    "feature_scene": pd.Categorical.from_codes(rows["scene"], list(SCENES)),
    "feature_hour_band": hour_band(rows["time"] // 3600 % 24),
  })


def _nullable(values: np.ndarray, there: np.ndarray) -> pd.arrays.IntegerArray:
  return pd.arrays.IntegerArray(values.astype(np.int64), ~there)


def ads_frame(market: Market, rows: slice = slice(None)) -> pd.DataFrame:
  """The ads table of the schema."""
  return pd.DataFrame({
    "ad_id": np.arange(market.num_ads)[rows],
    "advertiser_id": market.advertiser_V[market.advertiser_A[rows]],
    "category": market.category_G[market.category_A[rows]],
    "text": ad_text(market, rows),
    "price": market.price_A[rows],
    "bid": market.bid_A[rows],
    "conversion_type": "purchase",
  })


def contents_frame(market: Market) -> pd.DataFrame:
  """The contents table of the schema."""
  ad_O = market.content_ad_O
  return pd.DataFrame({
    "content_id": np.arange(len(ad_O)),
    "ad_id": _nullable(ad_O, ad_O >= 0),
    "category": market.category_G[market.content_category_O],
    "text": market.content_text_O,
  })


def users_frame(market: Market) -> pd.DataFrame:
  """The users table of the schema."""
  return pd.DataFrame({"user_id": np.arange(len(market.taste_UD))} | market.user_features)


def market_logs(market: Market, *, policy: Policy | None = None) -> Logs:
  """The log of all days in memory, checked like any other; the rows of users and ads stay."""
  days = list(market_frames(market, policy=policy))
  return build_logs(
    ads=ads_frame(market), contents=contents_frame(market), users=users_frame(market),
    events=pd.concat(days, ignore_index=True), currency="USD", caveats=CAVEATS,
    source=f"ad market, {market.config.world} world, seed {market.config.seed}",
  )


def market_frames(market: Market, *, policy: Policy | None = None) -> Iterator[pd.DataFrame]:
  """The events of one day after another; without a policy, as the cascade answers."""
  shelves = build_shelves(market)
  policy = policy or Cascade(market, shelves)
  for day in track(range(market.config.days), "market, days"):
    yield simulate_day(market, day, policy, shelves=shelves)


def write_market(market: Market, out: Path, *, stream_days: int = 0) -> dict[str, int]:
  """Writes ads, contents, users and events (.parquet) and market.json, a day at a time.

  The files are what `gr4ad prepare parquet` reads. `out` appears when all of them are complete.

  Args:
    market: with its truth.
    out: new folder.
    stream_days: the last days go to segments/day-NNNN.parquet, one file each, instead of events:
      what `gr4ad online` learns from.

  Returns:
    Rows of every table, clicks and conversions.

  Raises:
    ConfigError: `out` exists, or no day is left for the events.
  """
  require(0 <= stream_days < market.config.days, "stream_days", stream_days,
          f"must be less than market.days={market.config.days}")
  if out.exists():
    raise ConfigError(f"{out}: exists already; pass another --out")
  with atomic.new_folder(out) as fresh:
    counts = {"users": len(market.taste_UD), "ads": market.num_ads,
              "contents": len(market.content_ad_O)}
    step = 1_000_000
    parts = range(0, counts["ads"], step)
    _write(fresh / "ads.parquet", (ads_frame(market, slice(at, at + step)) for at in parts))
    _write(fresh / "contents.parquet", [contents_frame(market)])
    _write(fresh / "users.parquet", [users_frame(market)])
    actions = np.zeros(3, np.int64)

    def days():
      for frame in market_frames(market):
        nonlocal actions
        on_ads = frame["ad_id"].notna().to_numpy()
        actions = actions + np.bincount(frame["action"].to_numpy()[on_ads], minlength=3)
        yield frame

    every, first = days(), market.config.days - stream_days
    counts["events"] = _write(fresh / "events.parquet", itertools.islice(every, first))
    if stream_days:
      (fresh / "segments").mkdir()
      counts["events in segments"] = sum(
        _write(fresh / "segments" / f"day-{day:04d}.parquet", [frame])
        for day, frame in enumerate(every, first)
      )
    (fresh / "market.json").write_text(json.dumps(asdict(market.config), indent=2) + "\n")
  return counts | {
    "impressions": int(actions.sum()), "clicks": int(actions[1:].sum()),
    "conversions": int(actions[2]),
  }


def _write(path: Path, frames: Iterable[pd.DataFrame]) -> int:
  return write_tables(path, (pa.Table.from_pandas(f, preserve_index=False) for f in frames))
