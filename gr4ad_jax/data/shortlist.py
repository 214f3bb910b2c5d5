"""A request's shortlist: the ads that simple rules would show, each with what is known in numbers.

On it stand ads whose products the user engaged with, and ads that many engage with now. Their
numbers are what an engineer would give to a ranker: decayed counts of the user's own engagements at
several half-lives, current shares of all engagements at several, the user's affinity to the ad's
advertiser, category and text, how alike it is to what else the user took, its price, and how much
is known of the user. All of it comes from before the request. The copy path of a model points into
the shortlist.

Exported artifacts take this file along: it imports NumPy alone.

Letters: B requests, N events, trending ads or rows of a table, D periods, P ads met, H half-lives
(or ways to count), X ads that may stand on a list, Y those that are not neighbours, M ads of a
shortlist, F numbers of each, A ads, K kinds of keys or numbers of neighbours, Q distinct keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def shares_at(table: ShareTable, row: np.ndarray | int, ad: np.ndarray) -> np.ndarray:
  """float32 [..., H], what share of all engagements ads had as periods began.

  Args:
    table: of all ads.
    row: of the table, one for all ads or as many as there are, by broadcasting.
    ad: int, -1 = none.
  """
  if not len(table.key_N):
    return np.zeros((*ad.shape, NUM_SHARES), np.float32)
  now = int(table.first_period) + row
  last = np.searchsorted(table.key_N, share_key(ad, now)) - 1  # its last period before
  key = table.key_N[last]
  known = (last >= 0) & (key >> 32 == ad)
  kept = keeps(np.where(known, key & 0xFFFFFFFF, now - 1), now)
  share = table.score_NH[last] * kept / np.maximum(table.total_DH[row], 1e-30)
  return np.where(known[..., None], share, 0).astype(np.float32)


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


def shortlists(
  met: Sequence[tuple[np.ndarray, np.ndarray]], listed_BN: np.ndarray,
  shares_of: Callable[[np.ndarray], np.ndarray], facts: AdFacts, size: int,
  *, likeness_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
  near: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The likeliest of the ads that users met or that many engage with now, and their numbers.

  They are ordered by log (1 + own engagements) + 160 share + 40 slower share + .05 log (1 + own
  engagements with the parent category), which finds 7 of 10 targets of household logs among 512.

  Args:
    met: B requests' ads and counts, from `met_ads`.
    listed_BN: int, ads that many engage with, distinct in each request; -1 = none.
    shares_of: [B, X] ads -> [B, X, H], their current shares of all engagements.
    facts: of all ads.
    size: of these ads.
    likeness_of: ads met [B, P], how often, and ads [B, X] -> `tastes.likeness` of the latter; None
      = not known.
    near: where nothing is trending, neighbours of each history, which stand behind the others, and
      numbers of the ads met and of these, as `neighbours.neighbours` gives them; None = none.

  Returns:
    ad_BM int32, the real ones first, and number_BMF int32, round(SCALE * log(1 + x * unit)), with
    those of `near` behind the NUMBERS; -1 = none. M is the size and the room for neighbours.
  """
  num_met = max(len(met_P) for met_P, _ in met)
  own_BP = np.full((len(met), num_met), -1)
  count_BPH = np.zeros((*own_BP.shape, NUM_COUNTS), np.float32)
  for row, (met_P, count_PH) in enumerate(met):
    own_BP[row, : len(met_P)], count_BPH[row, : len(met_P)] = met_P, count_PH
  request_B1 = np.arange(len(met), dtype=np.int64)[:, None] << 32
  own_key_P = np.sort((request_B1 + own_BP)[own_BP >= 0])
  met_too_BN = _found(own_key_P, request_B1 + listed_BN)[1]
  near_BX = np.stack([ad_X for ad_X, _ in near]) if near else own_BP[:, :0]
  ad_BX = np.concatenate([own_BP, np.where(met_too_BN, -1, listed_BN), near_BX], axis=1)
  x_BXF = np.zeros((*ad_BX.shape, len(NUMBERS)), np.float32)
  x_BXF[:, :num_met, :NUM_COUNTS] = count_BPH
  x_BXF[..., SHARES] = shares_of(ad_BX)
  score_BP = count_BPH[..., COUNT].astype(np.float64) + count_BPH[..., ORGANIC]
  for kind, key_A in enumerate(facts.key_AK.T):
    # Affinities: what the user's engagements with ads of the same key add up to.
    key_BX = request_B1 + key_A[ad_BX]
    key_Q, place_P = np.unique(key_BX[:, :num_met][own_BP >= 0], return_inverse=True)
    sum_Q = np.bincount(place_P, score_BP[own_BP >= 0], len(key_Q))
    place_BX, same_BX = _found(key_Q, key_BX)
    x_BXF[..., SHARES.stop + kind] = np.where(same_BX, np.append(sum_Q, 0)[place_BX], 0)
  if likeness_of is not None:
    x_BXF[..., LIKENESS] = likeness_of(own_BP, score_BP, ad_BX)
  x_BXF[..., -2], x_BXF[..., -1] = facts.price_A[ad_BX], score_BP.sum(axis=1, keepdims=True)
  log_BXF = np.log1p(x_BXF * UNIT_F)
  num_listed = num_met + listed_BN.shape[1]
  x_BYF, log_BYF = x_BXF[:, :num_listed], log_BXF[:, :num_listed]
  likely_BY = (
    np.log1p(x_BYF[..., COUNT] + x_BYF[..., ORGANIC]) + 160 * x_BYF[..., SHARE]
    + 40 * x_BYF[..., SLOW_SHARE] + 0.05 * log_BYF[..., NUMBERS.index("with the parent category")]
  )
  likely_BY = np.where(ad_BX[:, :num_listed] >= 0, likely_BY, -np.inf)
  best_BM = np.argsort(-likely_BY, axis=1, kind="stable")[:, :size]
  number_BXF = np.minimum(np.rint(SCALE * log_BXF), BELOW - 1).astype(np.int32)
  if near:
    behind_BX = np.broadcast_to(np.arange(num_listed, ad_BX.shape[1]), near_BX.shape)
    best_BM = np.concatenate([best_BM, behind_BX], axis=1)
    # No gap before the neighbours.
    none_BM = np.take_along_axis(ad_BX, best_BM, axis=1) < 0
    best_BM = np.take_along_axis(best_BM, np.argsort(none_BM, axis=1, kind="stable"), axis=1)
    near_BXK = np.zeros((*ad_BX.shape, near[0][1].shape[1]), np.int32)
    for row, (met_P, _) in enumerate(met):
      near_BXK[row, : len(met_P)] = near[row][1][: len(met_P)]
      near_BXK[row, num_listed:] = near[row][1][len(met_P) :]
    number_BXF = np.concatenate([number_BXF, near_BXK], axis=2)
  ad_BM = np.full((len(met), size + near_BX.shape[1]), -1, np.int32)
  number_BMF = np.full((*ad_BM.shape, number_BXF.shape[2]), -1, np.int32)
  there = slice(best_BM.shape[1])
  ad_BM[:, there] = np.take_along_axis(ad_BX, best_BM, axis=1)
  number_BMF[:, there] = np.take_along_axis(number_BXF, best_BM[..., None], axis=1)
  number_BMF[ad_BM < 0] = -1
  return ad_BM, number_BMF


def _found(sorted_Q: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each key would stand among sorted ones, and whether it is there."""
  place = np.searchsorted(sorted_Q, key)
  return place, np.append(sorted_Q, -1)[place] == key
