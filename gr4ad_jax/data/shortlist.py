"""A request's shortlist: the ads that simple rules would show, each with what is known in numbers.

On it stand ads whose products the user engaged with, and ads that many engage with now. Their
numbers are what an engineer would give to a ranker: decayed counts of the user's own engagements at
several half-lives, current shares of all engagements at several, the user's affinity to the ad's
advertiser, category and text, how alike it is to what else the user took, its price, and how much
is known of the user. All of it comes from before the request. The copy path of a model points into
the shortlist.

Exported artifacts take this file along: it imports NumPy alone.

Letters: N events, trending ads or rows of a table, D periods, P ads met, H half-lives (or ways to
count), M ads of a shortlist, F numbers of each, A ads, K kinds of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

DAY_S = 86_400
PERIOD_S = 3600  # how often what many engage with is counted anew
HALF_LIVES_DAYS = (7.0, 28.0, 112.0, 400.0)  # of a user's engagements
SHARE_HALF_LIVES_DAYS = (0.125, 0.5, 1.5, 7.0, 28.0)  # of the engagements of all users
# Flyers and campaigns change at midnight and on Mondays: (periods, of which are past at 1970).
# 1970 began on a Thursday, UTC.
CALENDAR = ((DAY_S // PERIOD_S, 0), (7 * DAY_S // PERIOD_S, 3 * DAY_S // PERIOD_S))
NUM_SHARES = len(SHARE_HALF_LIVES_DAYS) + len(CALENDAR)
NUM_COUNTS = 2 * len(HALF_LIVES_DAYS)  # promoted, then organic
NUMBERS = (
  *(f"promoted engagements, half-life {days:g} d" for days in HALF_LIVES_DAYS),
  *(f"organic engagements, half-life {days:g} d" for days in HALF_LIVES_DAYS),
  *(f"share of all engagements, half-life {days:g} d" for days in SHARE_HALF_LIVES_DAYS),
  "share of the day's engagements so far", "of the week's",
  "engagements with the advertiser", "with the category", "with the parent category",
  "with the text", "likeness to what the user took",
  "price", "engagements of the user",
)
# The rule that a model starts at: own history, and what is trending.
COUNT = HALF_LIVES_DAYS.index(112.0)
ORGANIC = len(HALF_LIVES_DAYS) + COUNT
SHARES = slice(NUM_COUNTS, NUM_COUNTS + NUM_SHARES)
LIKENESS = NUMBERS.index("likeness to what the user took")
SHARE, SLOW_SHARE = (NUM_COUNTS + SHARE_HALF_LIVES_DAYS.index(days) for days in (1.5, 7.0))
ORGANIC_WEIGHT, SHARE_WEIGHT = 0.3, 160.0

UNIT_F = np.ones(len(NUMBERS), np.float32)  # a number x is stored by log(1 + x * unit)
UNIT_F[SHARES] = 1e6
UNIT_F[LIKENESS] = 20
# About the means and deviations of log (1 + x unit) over shortlists of household logs.
MEAN_F = np.array(
  [0.05, 0.1, 0.2, 0.3, 0.1, 0.2, 0.4, 0.6, 4, 4, 5, 5, 5, 4, 4, 1, 0.5, 1, 0.3, 2, 1, 5]
)
SPREAD_F = np.array(
  [0.2, 0.3, 0.4, 0.5, 0.3, 0.4, 0.6, 0.8, 3.5, 3, 3, 2.5, 2, 3.5, 3, 1, 0.7, 1, 0.6, 0.5, 0.6, 1]
)
SCALE = 1024  # stored numbers to a factor of e: whole ones, as all else in a context
BELOW = 1 << 15


class AdFacts(NamedTuple):
  """What shortlists need to know of every ad."""

  key_AK: np.ndarray  # int32, hashes of advertiser, category, parent category and text
  price_A: np.ndarray  # float32, 0 = unknown


class ShareTable(NamedTuple):
  """Engagements of every ad, for each period in which it was engaged with, as that period ends.

  Columns H count them decayed at SHARE_HALF_LIVES_DAYS, then since the day and the week began
  (CALENDAR). Rows D are the periods of a log, and the one after it.
  """

  first_period: np.ndarray  # int64 [], times of PERIOD_S since 1970 at which row 0 begins
  key_N: np.ndarray  # int64, `share_key` of ad and period, sorted
  score_NH: np.ndarray  # float32
  total_DH: np.ndarray  # float32, of all ads, as each row's period begins


def share_key(ad: np.ndarray, period: np.ndarray | int) -> np.ndarray:
  """int64: ad, then period."""
  return (np.asarray(ad, np.int64) << 32) | period


def keeps(period: np.ndarray, now: np.ndarray | int) -> np.ndarray:
  """float [..., H], what a score of one period counts in a later period, `now`."""
  period, now = np.broadcast_arrays(np.asarray(period)[..., None], np.asarray(now)[..., None])
  decay = np.exp2((period - now) * PERIOD_S / DAY_S / np.array(SHARE_HALF_LIVES_DAYS))
  same = [(period + past) // length == (now + past) // length for length, past in CALENDAR]
  return np.concatenate([decay, *same], axis=-1)


def shares_at(table: ShareTable, row: int, ad_P: np.ndarray) -> np.ndarray:
  """float32 [P, H], what share of all engagements each ad has as the period of this row begins."""
  if not len(table.key_N):
    return np.zeros((len(ad_P), NUM_SHARES), np.float32)
  now = int(table.first_period) + row
  last_P = np.searchsorted(table.key_N, share_key(ad_P, now)) - 1  # its last period before
  key_P = table.key_N[last_P]
  known_P = (last_P >= 0) & (key_P >> 32 == ad_P)
  kept_PH = keeps(np.where(known_P, key_P & 0xFFFFFFFF, now - 1), now)
  share_PH = table.score_NH[last_P] * kept_PH / np.maximum(table.total_DH[row], 1e-30)
  return np.where(known_P[:, None], share_PH, 0).astype(np.float32)


def met_ads(
  ads: np.ndarray, ad_time_s: np.ndarray, organic_ads: np.ndarray, organic_time_s: np.ndarray,
  *, now_s: int, limit: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The ads that a user met, and how often, where an engagement counts 0.5 ** (age / half-life).

  Args:
    ads, ad_time_s: ads engaged with before now, and when, unix seconds.
    organic_ads, organic_time_s: ads of the products of organic events, -1 = none.
    now_s: unix seconds.
    limit: most ads; those that count most are kept.

  Returns:
    ad_P int32, and count_PH float16: promoted engagements at each of HALF_LIVES_DAYS, then organic.
  """
  num_halves, has_ad = len(HALF_LIVES_DAYS), organic_ads >= 0
  ad_N = np.append(ads, organic_ads[has_ad])
  if not len(ad_N):
    return np.zeros(0, np.int32), np.zeros((0, NUM_COUNTS), np.float16)
  days_N = (now_s - np.append(ad_time_s, organic_time_s[has_ad])) / DAY_S
  weight_NH = np.exp2(-days_N[:, None] / np.array(HALF_LIVES_DAYS))
  count_NH = np.zeros((len(ad_N), NUM_COUNTS))
  count_NH[: len(ads), :num_halves] = weight_NH[: len(ads)]
  count_NH[len(ads) :, num_halves:] = weight_NH[len(ads) :]
  order = np.argsort(ad_N, kind="stable")
  ad_P, first = np.unique(ad_N[order], return_index=True)
  count_PH = np.add.reduceat(count_NH[order], first)
  score_P = count_PH[:, COUNT] + ORGANIC_WEIGHT * count_PH[:, ORGANIC]
  best = np.argsort(-score_P, kind="stable")[:limit]
  return ad_P[best].astype(np.int32), count_PH[best].astype(np.float16)


def shortlist(
  met_P: np.ndarray, met_count_PH: np.ndarray, trending_N: np.ndarray,
  shares_of: Callable[[np.ndarray], np.ndarray], facts: AdFacts, size: int,
  *, likeness_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
  near: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The likeliest of the ads that the user met or that many engage with now, and their numbers.

  They are ordered by log (1 + own engagements) + 160 share + 40 slower share + .05 log (1 + own
  engagements with the parent category), which finds 7 of 10 targets of household logs among 512.

  Args:
    met_P, met_count_PH: from `met_ads`.
    trending_N: int, distinct ads that many engage with.
    shares_of: ads -> [ads, H], their current shares of all engagements.
    facts: of all ads.
    size: of these ads.
    likeness_of: ads met, how often, and ads -> `tastes.likeness` of the latter; None = not known.
    near: where nothing is trending, neighbours of the history, which stand behind the others, and
      numbers of the ads met and of these, as `neighbours.neighbours` gives them; None = none.

  Returns:
    ad_M int32, -1 = none, and number_MF int32, round(SCALE * log(1 + x * unit)), -1 = none, with
    those of `near` behind the NUMBERS. M is the size and the room for neighbours.
  """
  own, count_PH = met_P, met_count_PH.astype(np.float64)
  near_N, near_XK = (own[:0], np.zeros((len(own), 0))) if near is None else near
  listed = np.append(own, trending_N[~np.isin(trending_N, own)])
  ad, num_own = np.append(listed, near_N[near_N >= 0]), len(own)
  x_NF = np.zeros((len(ad), len(NUMBERS)))
  x_NF[:num_own, :NUM_COUNTS] = count_PH
  x_NF[:, SHARES] = shares_of(ad)
  # Affinities: what the user's engagements with ads of the same key add up to.
  score_P = count_PH[:, COUNT] + count_PH[:, ORGANIC]
  for kind, key_A in enumerate(facts.key_AK.T):
    _, number = np.unique(key_A[ad], return_inverse=True)
    x_NF[:, SHARES.stop + kind] = np.bincount(number[:num_own], score_P, len(ad))[number]
  if likeness_of is not None:
    x_NF[:, LIKENESS] = likeness_of(own, score_P, ad)
  x_NF[:, -2], x_NF[:, -1] = facts.price_A[ad], score_P.sum()
  likely_N = (
    np.log1p(x_NF[:, COUNT] + x_NF[:, ORGANIC]) + 160 * x_NF[:, SHARE] + 40 * x_NF[:, SLOW_SHARE]
    + 0.05 * np.log1p(x_NF[:, NUMBERS.index("with the parent category")])
  )
  best = np.argsort(-likely_N[: len(listed)], kind="stable")[:size]
  best = np.append(best, np.arange(len(listed), len(ad)))
  stored_NF = np.minimum(np.rint(SCALE * np.log1p(x_NF[best] * UNIT_F)), BELOW - 1)
  ad_M = np.full(size + len(near_N), -1, np.int32)
  number_MF = np.full((len(ad_M), len(NUMBERS) + near_XK.shape[1]), -1, np.int32)
  ad_M[: len(best)] = ad[best]
  number_MF[: len(best), : len(NUMBERS)] = stored_NF
  if near is not None:
    number_MF[: len(best), len(NUMBERS) :] = near_XK[best]
  return ad_M, number_MF
