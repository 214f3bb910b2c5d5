"""Which ads are engaged with right now: a real-time statistic, known when serving.

A model that learns online follows what is current, one that is trained once does not. So a request
can be given the ads with the largest share of all engagements, decayed by age, and the share of
every ad of its history. They are counted anew every PERIOD_S, for what is promoted may change from
one day to the next; only periods before the request's own count.

Letters: D periods, N ads of a period, H ways to count of `shortlist.ShareTable`, A ads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gr4ad_jax.data.engagements import PeriodEngagements, count_engagements
from gr4ad_jax.data.records import DAY_S, Logs
from gr4ad_jax.data.shortlist import (
  NUM_SHARES,
  PERIOD_S,
  ShareTable,
  keeps,
  share_key,
  shares_at,
)
from gr4ad_jax.data.validation import LogError

HALF_LIFE_DAYS = 3.0
NUM_KEPT = 512  # ads that a period lists
NUM_TREND_BUCKETS = 32
MOST_IDLE_PERIODS = 60 * DAY_S // PERIOD_S  # for longer than that nobody asks for each of them


@dataclasses.dataclass(frozen=True)
class Trending:
  """Ads by share of engagement, for every period of the log and the one after it.

  Attributes:
    ad_DN: int32 [D, N], best first, -1 where fewer ads were engaged with.
    bucket_DN: uint8 [D, N], half-octave bucket of the share.
    table: shares of every ad, at other half-lives too; it knows when row 0 begins.
  """

  ad_DN: np.ndarray
  bucket_DN: np.ndarray
  table: ShareTable

  def rows(self, time_s: np.ndarray) -> np.ndarray:
    """Row of each request time; times outside the log take the nearest row."""
    row = np.asarray(time_s) // PERIOD_S - int(self.table.first_period)
    return np.clip(row, 0, len(self.ad_DN) - 1)

  def listed(self, row: int) -> np.ndarray:
    """int32, the ads that a row lists, best first."""
    return self.ad_DN[row][self.ad_DN[row] >= 0]

  def shares(self, row: np.ndarray | int, ad: np.ndarray) -> np.ndarray:
    """float32 [..., H], see `shares_at`."""
    return shares_at(self.table, row, ad)

  def bucket_of(self, row: int, ad: np.ndarray) -> np.ndarray:
    """Bucket of the share of each ad in one period, int32; 0 where it is not among its ads."""
    order = np.argsort(self.ad_DN[row])
    sorted_N = self.ad_DN[row][order]
    at = np.minimum(np.searchsorted(sorted_N, ad), len(sorted_N) - 1)
    found = (sorted_N[at] == ad) & (ad >= 0)
    return np.where(found, self.bucket_DN[row][order][at].astype(np.int32), 0)


def share_bucket(share: np.ndarray) -> np.ndarray:
  """2^-16 and less -> 0, twice per octave up to a share of 1 -> uint8 in 0..31."""
  bucket = np.floor(2 * np.log2(np.maximum(share, 2.0**-16) * 2**16) + 1e-6)
  return np.clip(bucket, 0, NUM_TREND_BUCKETS - 1).astype(np.uint8)


class LiveTrending:
  """Shares that go on from those of a log: engagements are added, and each period has its row.

  Where nobody has asked for MOST_IDLE_PERIODS, as of a log of years ago, rows begin anew at the
  present period; scores have decayed all the same.
  """

  def __init__(self, logs: Logs):
    """Begins after the log's last period."""
    counts, num_ads = count_engagements(logs.events), len(logs.ads.ad_id)
    self._scores, self._now = _through(counts, num_ads)
    self._count_A = np.zeros(num_ads, np.int64)  # of the period that has no row after it yet
    self._period = int(self._now.table.first_period) + len(self._now.ad_DN) - 1

  def add(self, ad: np.ndarray) -> None:
    """Counts engagements of the present period, -1 = none."""
    ad = ad[ad >= 0]
    most = int(ad.max(initial=-1)) + 1
    grow = max(0, most - len(self._count_A))
    self._scores.grow(grow)
    self._count_A = np.append(self._count_A, np.zeros(grow, np.int64))
    np.add.at(self._count_A, ad, 1)

  def at(self, now_s: float) -> Trending:
    """The shares by period, up to those that a request at this time sees."""
    present = int(now_s // PERIOD_S)
    if present - self._period > MOST_IDLE_PERIODS:
      self._now = _with_rows(self._now, [self._next_row()])
      self._scores.pass_by(self._period, present)
      self._period = present - 1
      self._now = _before(self._now, present)
    new = []
    while self._period < present:
      new.append(self._next_row())
    if new:
      self._now = _with_rows(self._now, new)
    return self._now

  def _next_row(self) -> _Row:
    self._period += 1
    count_A, self._count_A = self._count_A, np.zeros_like(self._count_A)
    return self._scores.next_row(self._period, count_A, self._now.ad_DN.shape[1])


def build_trending(logs: Logs) -> Trending:
  """Shares of clicks and conversions, decayed by age, period by period."""
  return shares(count_engagements(logs.events), len(logs.ads.ad_id))


def shares(counts: PeriodEngagements, num_ads: int) -> Trending:
  """The shares of every period, from the counts of a whole log."""
  return _through(counts, num_ads)[1]


@dataclasses.dataclass(frozen=True)
class _Row:
  """What a period adds to a `Trending`: its list, and the table's rows of the one before it."""

  ad_N: np.ndarray
  bucket_N: np.ndarray
  key_C: np.ndarray  # of the ads that were engaged with just before
  score_CH: np.ndarray
  total_H: np.ndarray


class _Scores:
  """Decayed counts of all ads."""

  def __init__(self, num_ads: int):
    self._order_A = np.zeros(num_ads)
    self._score_AH = np.zeros((num_ads, NUM_SHARES))

  def grow(self, num_ads: int) -> None:
    """So many ads more."""
    self._order_A = np.pad(self._order_A, (0, num_ads))
    self._score_AH = np.pad(self._score_AH, ((0, num_ads), (0, 0)))

  def pass_by(self, period: int, present: int) -> None:
    """After the row of a period, `next_row` gives that of a later one, with nothing between."""
    self._order_A *= 0.5 ** ((present - 1 - period) * PERIOD_S / DAY_S / HALF_LIFE_DAYS)
    self._score_AH *= keeps(period - 1, present - 2)

  def next_row(self, period: int, count_A: np.ndarray, kept: int) -> _Row:
    """The row of a period, after the counts of the one before it."""
    self._order_A = self._order_A * 0.5 ** (PERIOD_S / DAY_S / HALF_LIFE_DAYS) + count_A
    self._score_AH = self._score_AH * keeps(period - 2, period - 1) + count_A[:, None]
    score_A = self._order_A
    # Equal scores by ad number, so that a row does not depend on the sort.
    best = np.argpartition(-score_A, kept - 1)[:kept]
    best = best[np.lexsort((best, -score_A[best]))]
    real = score_A[best] > 0
    bucket = share_bucket(score_A[best] / max(score_A.sum(), 1e-300))
    ad_C = np.flatnonzero(count_A)
    return _Row(
      np.where(real, best, -1).astype(np.int32), np.where(real, bucket, 0).astype(np.uint8),
      share_key(ad_C, period - 1), self._score_AH[ad_C].astype(np.float32),
      (self._score_AH.sum(axis=0) * keeps(period - 1, period)).astype(np.float32),
    )


def _through(counts: PeriodEngagements, num_ads: int) -> tuple[_Scores, Trending]:
  """The decayed counts after the last period, and the shares of all periods."""
  first_period = int(counts.period[0])
  num_rows = int(counts.period[-1]) - first_period + 2
  bounds = np.searchsorted(counts.period, first_period + np.arange(num_rows))
  scores, kept = _Scores(num_ads), min(NUM_KEPT, num_ads)

  def rows() -> Iterator[_Row]:
    for row in range(1, num_rows):
      before = slice(bounds[row - 1], bounds[row])
      count_A = np.zeros(num_ads, np.int64)
      count_A[counts.ad[before]] = counts.count[before]
      yield scores.next_row(first_period + row, count_A, kept)

  return scores, _with_rows(_nothing(first_period, kept), list(rows()))


def _nothing(first_period: int, kept: int) -> Trending:
  """One row, before any engagement."""
  return Trending(
    np.full((1, kept), -1, np.int32), np.zeros((1, kept), np.uint8),
    ShareTable(
      np.array(first_period, np.int64), np.zeros(0, np.int64),
      np.zeros((0, NUM_SHARES), np.float32), np.zeros((1, NUM_SHARES), np.float32),
    ),
  )


NO_TRENDING = _nothing(0, 0)  # where data have none


def _with_rows(trending: Trending, new: Sequence[_Row]) -> Trending:
  """The same with further periods."""
  table = trending.table
  key_N = np.concatenate([table.key_N, *(row.key_C for row in new)])
  order = np.argsort(key_N, kind="stable")
  return Trending(
    np.concatenate([trending.ad_DN, np.stack([row.ad_N for row in new])]),
    np.concatenate([trending.bucket_DN, np.stack([row.bucket_N for row in new])]),
    ShareTable(
      table.first_period, key_N[order],
      np.concatenate([table.score_NH, *(row.score_CH for row in new)])[order],
      np.concatenate([table.total_DH, np.stack([row.total_H for row in new])]),
    ),
  )


def _before(trending: Trending, period: int) -> Trending:
  """The same scores without a row; the next one will be that of a period."""
  table = trending.table
  return Trending(
    trending.ad_DN[:0], trending.bucket_DN[:0],
    table._replace(first_period=np.array(period, np.int64), total_DH=table.total_DH[:0]),
  )


def arrays_of(trending: Trending) -> dict[str, np.ndarray]:
  """All that a `Trending` holds, by name."""
  arrays = {"ad_DN": trending.ad_DN, "bucket_DN": trending.bucket_DN}
  return arrays | {f"table_{name}": x for name, x in trending.table._asdict().items()}


def save_trending(trending: Trending, path: Path) -> None:
  """Writes one .npz file."""
  np.savez_compressed(path, **arrays_of(trending))


def load_trending(path: Path) -> Trending:
  """Reads what `save_trending` wrote.

  Raises:
    LogError: an earlier version wrote it.
  """
  with path.open("rb") as file, np.load(file) as arrays:
    if "first_day" in arrays.files:
      raise LogError(
        f"{path.parent}: an earlier version prepared it, which counted by the day: run `gr4ad "
        "prepare --overwrite` again"
      )
    table = ShareTable(*(arrays[f"table_{name}"] for name in ShareTable._fields))
    return Trending(arrays["ad_DN"], arrays["bucket_DN"], table)
