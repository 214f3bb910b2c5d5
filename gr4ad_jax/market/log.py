"""What happens in a market, day by day, and the log of it in the ordinary schema.

Every day follows from the market's seed, the day's number and the policy alone, so any day can be
made again, and a log of any length takes constant memory. An event row of an ad holds the deepest
action of that impression.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gr4ad_jax.config import ConfigError, require
from gr4ad_jax.data.completejourney import hour_band
from gr4ad_jax.data.records import DAY_S, Action, Logs
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.machine import atomic
from gr4ad_jax.market.world import (
  SCENES,
  START_S,
  Market,
  Requests,
  ad_text,
  day_of,
  fashion,
  taste,
  truth,
)

CAVEATS = (
  "Simulated market: tastes, rates, bids and clicks are drawn from known formulas. No position "
  "bias, no fatigue, no fraud, no delay between click and conversion.",
)
_NUM_CANDIDATES = 96  # that the cascade's retrieval hands to its ranker
_REQUESTS_PER_SESSION, _SECONDS_BETWEEN = 1.6, 180
_SCENE_SHARES = (0.6, 0.25, 0.15)
_HOURS = np.array([2, 1, 1, 1, 1, 2, 3, 5, 6, 6, 6, 7, 9, 8, 6, 6, 6, 7, 9, 11, 12, 11, 8, 4.0])
_WEEKDAYS = np.array([0.95, 0.95, 1.0, 1.0, 1.05, 1.1, 0.95])
_ROWS = 2048  # requests answered at once


class Shelf(NamedTuple):
  """Items by category, ready to be drawn from in proportion to their weights."""

  order_N: np.ndarray  # items, category after category
  cumulative_N: np.ndarray  # float64, weights in that order, summed up
  start_G: np.ndarray
  end_G: np.ndarray


class Shelves(NamedTuple):
  """What a market's retrieval and its users draw from."""

  ads: Shelf
  contents: Shelf


class Shown(NamedTuple):
  """A policy's answer, best first; -1 = none."""

  ad_RK: np.ndarray  # int32
  ecpm_RK: np.ndarray  # float32, the policy's own estimate, NaN = none


class Policy(Protocol):
  """Chooses ads for requests, among those of advertisers that still have budget."""

  def __call__(
    self, requests: Requests, open_V: np.ndarray, rng: np.random.Generator
  ) -> Shown: ...


def build_shelves(market: Market) -> Shelves:
  """Ads by popularity and contents by weight, in their categories."""
  groups = len(market.category_G)
  return Shelves(
    _shelf(market.category_A, market.popularity_A, groups),
    _shelf(market.content_category_O, market.content_weight_O, groups),
  )


def _shelf(category_N: np.ndarray, weight_N: np.ndarray, num_groups: int) -> Shelf:
  order_N = np.argsort(category_N, kind="stable").astype(np.int32)
  bounds = np.searchsorted(category_N[order_N], np.arange(num_groups + 1))
  return Shelf(order_N, np.cumsum(weight_N[order_N], dtype=np.float64), bounds[:-1], bounds[1:])


def _draw(shelf: Shelf, category: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """An item of each category; of any where it is empty, or -1."""
  before = np.append(0.0, shelf.cumulative_N)
  empty = (category < 0) | (shelf.start_G[category] == shelf.end_G[category])
  low = np.where(empty, 0.0, before[shelf.start_G[category]])
  high = np.where(empty, before[-1], before[shelf.end_G[category]])
  at = np.searchsorted(shelf.cumulative_N, low + rng.random(category.shape) * (high - low), "right")
  return shelf.order_N[np.minimum(at, len(shelf.order_N) - 1)]


def _draw_categories(
  market: Market, taste_RD: np.ndarray, day_R: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
  """[R, count] categories that users like, now."""
  every_G = np.arange(len(market.category_G))
  logit_RG = 1.5 * (taste_RD @ market.taste_GD.T) + fashion(market, every_G, day_R[:, None])
  weight_RG = np.exp(logit_RG - logit_RG.max(axis=1, keepdims=True))
  cumulative_RG = np.cumsum(weight_RG, axis=1)
  cumulative_RG /= cumulative_RG[:, -1:]
  # One search for all rows: row r occupies the numbers r to r + 1.
  flat = (cumulative_RG + np.arange(len(day_R))[:, None]).ravel()
  drawn = rng.random((len(day_R), count)) + np.arange(len(day_R))[:, None]
  found = np.searchsorted(flat, drawn.ravel(), "right").reshape(drawn.shape)
  return np.minimum(found - np.arange(len(day_R))[:, None] * len(every_G), len(every_G) - 1)


@dataclass(frozen=True)
class Cascade:
  """The logging policy: retrieval by category and popularity, then a ranker that errs.

  Retrieval draws half of its candidates from categories that the user likes, a quarter by
  popularity, a quarter uniformly; the ranker sorts them by true eCPM times an error that has a
  lasting part per ad and a part of its own in each request. A share of the slots, `exploration`,
  shows an ad drawn uniformly, so that what is learned from the log knows of ads that do badly.
  """

  market: Market
  shelves: Shelves

  def __call__(self, requests: Requests, open_V: np.ndarray, rng: np.random.Generator) -> Shown:
    market, quarter = self.market, _NUM_CANDIDATES // 4
    day_R = day_of(requests.time_s_R)
    taste_RD = taste(market, requests.user_R, day_R)
    liked_RM = _draw_categories(market, taste_RD, day_R, 2 * quarter, rng)
    num_rows = len(day_R)
    ad_RM = np.concatenate(
      [
        _draw(self.shelves.ads, liked_RM, rng),
        _draw(self.shelves.ads, np.full((num_rows, quarter), -1), rng),
        rng.integers(market.num_ads, size=(num_rows, quarter), dtype=np.int32),
      ],
      axis=1,
    )
    ad_RM = np.sort(ad_RM, axis=1)
    ecpm_RM = truth(market, requests, ad_RM, taste_RD=taste_RD).ecpm
    error_RM = market.error_A[ad_RM]
    error_RM = error_RM + 0.8 * market.config.ranker_error * rng.standard_normal(
      ad_RM.shape, np.float32
    )
    estimate_RM = ecpm_RM * np.exp(error_RM)
    allowed_RM = (ecpm_RM > 0) & open_V[market.advertiser_A[ad_RM]]
    allowed_RM[:, 1:] &= ad_RM[:, 1:] != ad_RM[:, :-1]
    score_RM = np.where(allowed_RM, estimate_RM, -1)
    best_RK = np.argsort(-score_RM, axis=1, kind="stable")[:, : market.config.slots]
    estimate_RK = np.take_along_axis(score_RM, best_RK, axis=1)
    ad_RK = np.where(estimate_RK >= 0, np.take_along_axis(ad_RM, best_RK, axis=1), -1)
    ad_RK = self._explore(requests, ad_RK, open_V, taste_RD, rng)
    same_RK = ad_RK == np.take_along_axis(ad_RM, best_RK, axis=1)
    return Shown(ad_RK, np.where(same_RK & (ad_RK >= 0), estimate_RK, np.nan))

  def _explore(self, requests, ad_RK, open_V, taste_RD, rng) -> np.ndarray:
    """Puts an ad drawn uniformly into some slots, where it may run and is not shown already."""
    market = self.market
    drawn_RK = rng.integers(market.num_ads, size=ad_RK.shape, dtype=np.int32)
    swap_RK = rng.random(ad_RK.shape) < market.config.exploration
    swap_RK &= open_V[market.advertiser_A[drawn_RK]]
    swap_RK &= truth(market, requests, drawn_RK, taste_RD=taste_RD).ecpm > 0
    swapped_RK = np.where(swap_RK, drawn_RK, ad_RK)
    order_RK = np.argsort(swapped_RK, axis=1, kind="stable")
    sorted_RK = np.take_along_axis(swapped_RK, order_RK, axis=1)
    twice_R = ((sorted_RK[:, 1:] == sorted_RK[:, :-1]) & (sorted_RK[:, 1:] >= 0)).any(axis=1)
    return np.where(twice_R[:, None], ad_RK, swapped_RK)


def arrivals(market: Market, day: int) -> Requests:
  """The requests of a day, in time order; they do not depend on the policy."""
  rng = np.random.default_rng([market.config.seed, day, 0])
  rate_U = market.config.sessions_per_day * _WEEKDAYS[(day + 2) % 7] * market.activity_U
  user_N = np.repeat(np.arange(len(rate_U), dtype=np.int32), rng.poisson(rate_U))
  start_s_N = rng.choice(24, len(user_N), p=_HOURS / _HOURS.sum()) * 3600.0
  start_s_N += rng.random(len(user_N)) * 3600
  length_N = rng.geometric(1 / _REQUESTS_PER_SESSION, len(user_N))
  gap_s_R = rng.exponential(_SECONDS_BETWEEN, int(length_N.sum()))
  first_N = np.cumsum(length_N) - length_N
  gap_s_R[first_N] = 0
  since_s_R = np.cumsum(gap_s_R)
  since_s_R -= np.repeat(since_s_R[first_N], length_N)
  time_s_R = np.minimum(np.repeat(start_s_N, length_N) + since_s_R, DAY_S - 1).astype(np.int64)
  scene_R = rng.choice(len(SCENES), len(time_s_R), p=_SCENE_SHARES).astype(np.int8)
  order_R = np.argsort(time_s_R, kind="stable")
  return Requests(
    np.repeat(user_N, length_N)[order_R], START_S + day * DAY_S + time_s_R[order_R],
    scene_R[order_R],
  )


def simulate_day(
  market: Market, day: int, policy: Policy, *, shelves: Shelves
) -> pd.DataFrame:
  """One day of events, as the events table of the schema (docs/own_logs.md).

  Args:
    market: with its truth.
    day: 0 = the first.
    policy: what answers the requests.
    shelves: of the market.
  """
  parts = list(simulate_hours(market, day, policy, shelves=shelves)) or [_frame(market, _empty())]
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
  for rows in np.split(np.arange(len(hour_R)), np.flatnonzero(np.diff(hour_R)) + 1):
    for at in range(0, len(rows), _ROWS):
      block = rows[at : at + _ROWS]
      part = Requests(*(x[block] for x in requests))
      shown = policy(part, spent_V < market.budget_V, rng)
      both = (
        _impressions(market, part, shown, block, day, spent_V, rng),
        _organic(market, part, day, shelves.contents, rng),
      )
      columns = {name: np.concatenate([p[name] for p in both]) for name in both[0]}
      order_E = np.argsort(columns["time"], kind="stable")
      yield _frame(market, {name: column[order_E] for name, column in columns.items()})


def _impressions(market, requests, shown, block, day, spent_V, rng) -> dict[str, np.ndarray]:
  """Draws clicks and conversions, and adds what they cost to `spent_V`."""
  real_RK = shown.ad_RK >= 0
  rates = truth(market, requests, shown.ad_RK)
  click_RK = rng.random(real_RK.shape) < rates.click
  conversion_RK = click_RK & (rng.random(real_RK.shape) < rates.conversion)
  action_RK = np.where(conversion_RK, Action.CONVERSION, np.where(click_RK, Action.CLICK, 0))
  row_N, place_N = np.nonzero(real_RK)
  ad_N = shown.ad_RK[row_N, place_N]
  value_N = np.where(conversion_RK[row_N, place_N], market.bid_A[ad_N], 0)
  np.add.at(spent_V, market.advertiser_A[ad_N], value_N)
  return {
    "user": requests.user_R[row_N],
    "time": requests.time_s_R[row_N],
    "ad": ad_N.astype(np.int64),
    "content": np.full(len(ad_N), -1, np.int64),
    "request": day * 1_000_000_000 + block[row_N].astype(np.int64),
    "action": action_RK[row_N, place_N].astype(np.int8),
    "value": value_N.astype(np.float32),
    "ecpm": shown.ecpm_RK[row_N, place_N].astype(np.float32),
    "scene": requests.scene_R[row_N],
  }


def _organic(market, requests, day, shelf: Shelf, rng) -> dict[str, np.ndarray]:
  """What users did of themselves in the minutes before their requests."""
  mean = market.config.organic_per_request if len(shelf.order_N) else 0
  count_R = rng.poisson(mean, len(requests.user_R))
  row_N = np.repeat(np.arange(len(count_R)), count_R)
  user_N, time_s_N = requests.user_R[row_N], requests.time_s_R[row_N]
  day_N = day_of(time_s_N)
  category_N1 = _draw_categories(market, taste(market, user_N, day_N), day_N, 1, rng)
  content_N = _draw(shelf, category_N1[:, 0], rng)
  time_s_N = np.maximum(time_s_N - rng.integers(1, 120, len(time_s_N)), START_S + day * DAY_S)
  bought_N = rng.random(len(row_N)) < 0.2
  size = len(row_N)
  return {
    "user": user_N,
    "time": time_s_N,
    "ad": np.full(size, -1, np.int64),
    "content": content_N.astype(np.int64),
    "request": np.full(size, -1, np.int64),
    "action": np.where(bought_N, Action.CONVERSION, Action.CLICK).astype(np.int8),
    "value": np.zeros(size, np.float32),
    "ecpm": np.full(size, np.nan, np.float32),
    "scene": requests.scene_R[row_N],
  }


def _empty() -> dict[str, np.ndarray]:
  kinds = {"user": "i4", "time": "i8", "ad": "i8", "content": "i8", "request": "i8",
           "action": "i1", "value": "f4", "ecpm": "f4", "scene": "i1"}
  return {name: np.zeros(0, kind) for name, kind in kinds.items()}


def _frame(market: Market, columns: dict[str, np.ndarray]) -> pd.DataFrame:
  is_ad_E = columns["ad"] >= 0
  return pd.DataFrame({
    "user_id": columns["user"],
    "time": columns["time"],
    "ad_id": _nullable(columns["ad"], is_ad_E),
    "content_id": _nullable(columns["content"], ~is_ad_E),
    "request_id": _nullable(columns["request"], is_ad_E),
    "action": columns["action"],
    "value": columns["value"],
    "ecpm": columns["ecpm"],
    "feature_scene": pd.Categorical.from_codes(columns["scene"], list(SCENES)),
    "feature_hour_band": hour_band(columns["time"]),
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


def market_logs(
  market: Market,
  *,
  policy: Policy | None = None,
  progress: Callable[[Iterable, str, int], Iterable] | None = None,
) -> Logs:
  """The log of all days in memory, checked like any other; the rows of users and ads stay."""
  days = list(market_frames(market, policy=policy, progress=progress))
  return build_logs(
    ads=ads_frame(market), contents=contents_frame(market), users=users_frame(market),
    events=pd.concat(days, ignore_index=True), currency="USD", caveats=CAVEATS,
    source=f"ad market, {market.config.world} world, seed {market.config.seed}",
  )


def market_frames(
  market: Market,
  *,
  policy: Policy | None = None,
  progress: Callable[[Iterable, str, int], Iterable] | None = None,
) -> Iterator[pd.DataFrame]:
  """The events of one day after another; arguments as `market_logs`."""
  shelves = build_shelves(market)
  policy = policy or Cascade(market, shelves)
  days = range(market.config.days)
  for day in progress(days, "market, days", len(days)) if progress else days:
    yield simulate_day(market, day, policy, shelves=shelves)


def write_market(
  market: Market,
  out: Path,
  *,
  stream_days: int = 0,
  progress: Callable[[Iterable, str, int], Iterable] | None = None,
) -> dict[str, int]:
  """Writes ads, contents, users and events (.parquet) and market.json, a day at a time.

  The files are what `gr4ad prepare parquet` reads. `out` appears when all of them are complete.

  Args:
    market: with its truth.
    out: new folder.
    stream_days: the last days go to segments/day-NNNN.parquet, one file each, instead of events:
      what `gr4ad online` learns from.
    progress: like gr4ad_jax.machine.progress.track.

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
      for frame in market_frames(market, progress=progress):
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
  writer, rows = None, 0
  for frame in frames:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table)
    rows += len(frame)
  writer.close()
  return rows
