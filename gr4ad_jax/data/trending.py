"""Which ads are engaged with right now: a real-time statistic of earlier days, known when serving.

A model that learns online follows what is current, one that is trained once does not. So a request
can be given the ads with the largest share of all engagements, decayed by age, and the share of
every ad of its history. Only days before the request's day count.

Letters: D days, N ads of a day, H half-lives of `shortlist.SHARE_HALF_LIVES_DAYS`, A ads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from gr4ad_jax.data.engagements import DailyEngagements, daily_engagements
from gr4ad_jax.data.records import DAY_S, Logs
from gr4ad_jax.data.shortlist import SHARE_HALF_LIVES_DAYS, Shares

HALF_LIFE_DAYS = 3.0
NUM_KEPT = 1024  # ads of a day whose share is known; others count as 0
NUM_TREND_BUCKETS = 32
_HALF_LIVES_DAYS = np.array((HALF_LIFE_DAYS, *SHARE_HALF_LIVES_DAYS))


@dataclasses.dataclass(frozen=True)
class Trending:
  """Ads by share of engagement, for every day of the log and the day after it.

  Attributes:
    first_day: days since 1970 of row 0.
    ad_DN: int32 [days, N], best first, -1 where fewer ads were engaged with.
    bucket_DN: uint8 [days, N], half-octave bucket of the share.
    share_DNH: float32 [days, N, H], the shares at other half-lives.
  """

  first_day: int
  ad_DN: np.ndarray
  bucket_DN: np.ndarray
  share_DNH: np.ndarray

  def rows(self, time_s: np.ndarray) -> np.ndarray:
    """Row of each request time; times outside the log take the nearest row."""
    day = np.asarray(time_s) // DAY_S - self.first_day
    return np.clip(day, 0, len(self.ad_DN) - 1)

  def shares(self, row: int) -> Shares:
    """The ads of a day, for its shortlists."""
    real_N = self.ad_DN[row] >= 0
    return Shares(self.ad_DN[row][real_N], self.share_DNH[row][real_N])

  def bucket_of(self, row: int, ad: np.ndarray) -> np.ndarray:
    """Bucket of the share of each ad on one day, int32; 0 where it is not among the day's ads."""
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
  """Shares that go on from those of a log: engagements are added, and each day has its row."""

  def __init__(self, logs: Logs):
    """Begins after the log's last day."""
    counts, num_ads = daily_engagements(logs.events), len(logs.ads.ad_id)
    self._score_AH, self._now = _scores(counts, num_ads)
    self._count_A = np.zeros(num_ads)  # of the day that has no row after it yet
    self._day = self._now.first_day + len(self._now.ad_DN) - 1

  def add(self, ad: np.ndarray) -> None:
    """Counts engagements of the present day, -1 = none."""
    ad = ad[ad >= 0]
    most = int(ad.max(initial=-1)) + 1
    grow = max(0, most - len(self._count_A))
    self._score_AH = np.pad(self._score_AH, ((0, grow), (0, 0)))
    self._count_A = np.append(self._count_A, np.zeros(grow))
    np.add.at(self._count_A, ad, 1)

  def at(self, now_s: float) -> Trending:
    """The shares by day, up to those that a request at this time sees."""
    kept, new = self._now.ad_DN.shape[1], []
    while self._day < now_s // DAY_S:
      self._day += 1
      self._score_AH = _later(self._score_AH, self._count_A)
      self._count_A = np.zeros_like(self._count_A)
      new.append(_largest(self._score_AH, kept))
    if new:
      earlier = (self._now.ad_DN, self._now.bucket_DN, self._now.share_DNH)
      days = (np.stack(rows) for rows in zip(*new, strict=True))
      together = zip(earlier, days, strict=True)
      self._now = Trending(self._now.first_day, *map(np.concatenate, together))
    return self._now


def build_trending(logs: Logs) -> Trending:
  """Shares of clicks and conversions, decayed with a half-life of 3 days, day by day."""
  return shares(daily_engagements(logs.events), len(logs.ads.ad_id))


def shares(counts: DailyEngagements, num_ads: int) -> Trending:
  """The shares of every day, from the counts of a whole log."""
  return _scores(counts, num_ads)[1]


def _scores(counts: DailyEngagements, num_ads: int) -> tuple[np.ndarray, Trending]:
  """The decayed counts after the last day, and the shares of all days."""
  first_day = int(counts.day[0])
  num_days = int(counts.day[-1]) - first_day + 2
  bounds = np.searchsorted(counts.day, first_day + np.arange(num_days))
  kept = min(NUM_KEPT, num_ads)
  ad_DN = np.full((num_days, kept), -1, np.int32)
  bucket_DN = np.zeros((num_days, kept), np.uint8)
  share_DNH = np.zeros((num_days, kept, len(SHARE_HALF_LIVES_DAYS)), np.float32)
  score_AH = np.zeros((num_ads, len(_HALF_LIVES_DAYS)))
  for row in range(1, num_days):
    yesterday = slice(bounds[row - 1], bounds[row])
    count_A = np.zeros(num_ads, np.int64)
    count_A[counts.ad[yesterday]] = counts.count[yesterday]
    score_AH = _later(score_AH, count_A)
    ad_DN[row], bucket_DN[row], share_DNH[row] = _largest(score_AH, kept)
  return score_AH, Trending(first_day, ad_DN, bucket_DN, share_DNH)


def _later(score_AH: np.ndarray, count_A: np.ndarray) -> np.ndarray:
  """The counts a day later."""
  return score_AH * 0.5 ** (1 / _HALF_LIVES_DAYS) + count_A[:, None]


def _largest(score_AH: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A day's row: ads, best first, buckets of their shares, and shares at the other half-lives."""
  # Equal scores by ad number, so that a day's row does not depend on the sort.
  score_A = score_AH[:, 0]
  best = np.argpartition(-score_A, kept - 1)[:kept]
  best = best[np.lexsort((best, -score_A[best]))]
  real = score_A[best] > 0
  share_NH = score_AH[best] / np.maximum(score_AH.sum(axis=0), 1e-300)
  return (
    np.where(real, best, -1), np.where(real, share_bucket(share_NH[:, 0]), 0), share_NH[:, 1:]
  )


def save_trending(trending: Trending, path: Path) -> None:
  """Writes one .npz file."""
  np.savez_compressed(path, **dataclasses.asdict(trending))


def load_trending(path: Path) -> Trending:
  """Reads what `save_trending` wrote."""
  names = [field.name for field in dataclasses.fields(Trending)][1:]
  with path.open("rb") as file, np.load(file) as arrays:
    return Trending(int(arrays["first_day"]), *(arrays[name] for name in names))
