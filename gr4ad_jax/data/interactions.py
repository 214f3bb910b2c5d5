"""Who engaged with which ad when, and counts over the past: of days, of histories, of pairs.

Letters: E events, U users, A ads, R requests, D periods, H events of the requests' histories, G
baskets (groups of events), M ads in baskets (members), P pairs of baskets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.engagements import product_engagements
from gr4ad_jax.data.records import DAY_S, Logs
from gr4ad_jax.data.shortlist import PERIOD_S


@dataclass(frozen=True)
class Interactions:
  """Engagements with the products of the catalogue, sorted by user, then time.

  Organic events count where their content is the product of an ad. Events of one user at one time
  form a basket.

  Raises:
    ValueError: lengths that differ, events out of order, a negative index.
  """

  user_E: np.ndarray  # int32, user index
  ad_E: np.ndarray  # int32, ad index
  time_s_E: np.ndarray  # int64, unix s
  is_ad_E: np.ndarray  # bool, False = organic event with the product of the ad

  def __post_init__(self):
    num = len(self.user_E)
    for name in ("ad_E", "time_s_E", "is_ad_E"):
      if getattr(self, name).shape != (num,):
        raise ValueError(f"{name} has shape {getattr(self, name).shape}, not ({num},) like user_E")
    if min(self.user_E.min(initial=0), self.ad_E.min(initial=0)) < 0:
      raise ValueError("user_E and ad_E are indices and must not be negative")
    step = np.diff(self.user_E.astype(np.int64))
    wrong = (step < 0) | ((step == 0) & (np.diff(self.time_s_E) < 0))
    if wrong.any():
      raise ValueError(f"event {np.argmax(wrong) + 1} is out of order; sort by user, then time")

  @classmethod
  def of(cls, logs: Logs) -> Interactions:
    """Those of a log, with products of the catalogue, promoted or organic."""
    event_N, ad_N = product_engagements(logs)
    events = logs.events
    return cls(events.user[event_N], ad_N, events.time_s[event_N], events.ad[event_N] >= 0)

  @cached_property
  def ads_by_period(self) -> tuple[np.ndarray, np.ndarray]:
    """The period of PERIOD_S and the ad of every engagement with an ad, the earliest first."""
    period_N = self.time_s_E[self.is_ad_E] // PERIOD_S
    order_N = np.argsort(period_N, kind="stable")
    return period_N[order_N], self.ad_E[self.is_ad_E][order_N]

  def before(self, end_s_U: np.ndarray) -> Interactions:
    """The events of each user that are earlier than that user's end, int64 unix s."""
    past_E = self.time_s_E < end_s_U[self.user_E]
    return Interactions(*(getattr(self, field.name)[past_E] for field in fields(self)))


@dataclass(frozen=True)
class PairCounts:
  """How often users engage with ad j around ad i."""

  pairs_AA: sp.csr_matrix  # float32, [i, j]
  source_A: np.ndarray  # float32, baskets that hold i
  target_A: np.ndarray  # float32, baskets that hold j


def count_histories(
  interactions: Interactions,
  *,
  user_R: np.ndarray,
  time_s_R: np.ndarray,
  num_ads: int,
  half_life_s: float | None,
  organic_weight: float,
) -> sp.csr_matrix:
  """Events of every ad in the past of a user, strictly before a time.

  Args:
    interactions: engagements of all users.
    user_R: int32, user index.
    time_s_R: int64, unix s.
    num_ads: ads of the catalogue.
    half_life_s: an event counts 0.5 ** (age at that time / half-life); None = 1.
    organic_weight: what an organic event counts beside 1 for an ad event.

  Returns:
    history_RA: float32, sparse.

  Raises:
    ValueError: an ad outside the catalogue.
  """
  check_catalogue(interactions, num_ads)
  row_H, event_H = _past_events(interactions, user_R, time_s_R)
  weight_H = np.where(interactions.is_ad_E[event_H], 1, organic_weight)
  weight_H = weight_H * decay(time_s_R[row_H], interactions.time_s_E[event_H], half_life_s)
  cells = (row_H, interactions.ad_E[event_H])
  return sp.csr_matrix((weight_H.astype(np.float32), cells), (len(user_R), num_ads))


def count_latest(
  interactions: Interactions,
  *,
  user_R: np.ndarray,
  time_s_R: np.ndarray,
  num_ads: int,
  steps: int,
  step_decay: float,
  organic_weight: float,
) -> sp.csr_matrix:
  """`count_histories` of the latest baskets alone, which age by steps, not by time.

  Args:
    interactions, user_R, time_s_R, num_ads, organic_weight: as of `count_histories`.
    steps: baskets that count.
    step_decay: what an event counts for each basket that came after its own.
  """
  check_catalogue(interactions, num_ads)
  row_H, event_H = _past_events(interactions, user_R, time_s_R)
  basket_E = np.cumsum(_begins_basket(interactions))
  latest_R = np.zeros(len(user_R), basket_E.dtype)
  np.maximum.at(latest_R, row_H, basket_E[event_H])
  step_H = latest_R[row_H] - basket_E[event_H]
  row_H, event_H, step_H = (column[step_H < steps] for column in (row_H, event_H, step_H))
  weight_H = np.where(interactions.is_ad_E[event_H], 1, organic_weight) * step_decay**step_H
  cells = (row_H, interactions.ad_E[event_H])
  return sp.csr_matrix((weight_H.astype(np.float32), cells), (len(user_R), num_ads))


def count_pairs(
  interactions: Interactions,
  *,
  num_ads: int,
  end_s_U: np.ndarray,
  half_life_s: float | None,
  organic_weight: float,
  window: int,
  backward_weight: float,
  step_decay: float = 1.0,
) -> PairCounts:
  """Pairs of ads in baskets of one user, at most `window` steps apart in the user's sequence.

  A pair [i, j] with i in the earlier basket counts 1, with i in the later one backward_weight,
  with both in the same basket 1 (i != j: an ad follows from itself in another basket only).

  Args:
    interactions: engagements of all users.
    num_ads: ads of the catalogue.
    end_s_U: int64 unix s, events of a user from then on do not count.
    half_life_s: a pair counts times 0.5 ** (age of its later basket at the end / half-life), a
      basket likewise; None = 1.
    organic_weight: a pair, and a basket of target_A, counts times this where j is organic only.
    window: steps; 0 = the same basket only.
    backward_weight: weight of pairs whose j came first.
    step_decay: what a pair counts for each step between its baskets beyond the first.

  Returns:
    PairCounts over num_ads.

  Raises:
    ValueError: an ad outside the catalogue.
  """
  check_catalogue(interactions, num_ads)
  past = interactions.before(end_s_U)
  first_E = _begins_basket(past)
  user_G = past.user_E[first_E]
  aged_G = decay(end_s_U[user_G], past.time_s_E[first_E], half_life_s).astype(np.float32)

  # An ad counts once in a basket: as an ad event where one of its events there was one.
  cell_E = (np.cumsum(first_E) - 1) * np.int64(num_ads) + past.ad_E
  cell_M, of_E = np.unique(cell_E, return_inverse=True)
  promoted_M = np.bincount(of_E, past.is_ad_E, len(cell_M)) > 0
  weight_M = np.where(promoted_M, 1, organic_weight).astype(np.float32)
  cells, shape = divmod(cell_M, num_ads), (len(user_G), num_ads)
  source_GA = sp.csr_matrix((np.ones_like(weight_M), cells), shape)
  target_GA = sp.csr_matrix((weight_M, cells), shape)
  target_GA.eliminate_zeros()

  # Inside a basket first, where an ad does not follow from itself; then between baskets.
  pairs_AA = (source_GA.T @ scale_rows(target_GA, aged_G)).tocsr()
  pairs_AA.setdiag(0)
  earlier_P, later_P = _pairs_of_baskets(user_G, window)
  aged_P = aged_G[later_P] * (step_decay ** (later_P - earlier_P - 1.0)).astype(np.float32)
  pairs_AA += source_GA[earlier_P].T @ scale_rows(target_GA[later_P], aged_P)
  if backward_weight:
    back_P = np.float32(backward_weight) * aged_P
    pairs_AA += source_GA[later_P].T @ scale_rows(target_GA[earlier_P], back_P)
  pairs_AA = pairs_AA.tocsr()
  pairs_AA.eliminate_zeros()
  return PairCounts(pairs_AA, source_GA.T @ aged_G, target_GA.T @ aged_G)


def trending_shares(
  interactions: Interactions, *, time_s_R: np.ndarray, num_ads: int, half_life_days: float
) -> tuple[np.ndarray, np.ndarray]:
  """Share of every ad in the engagements with ads before a time's period of PERIOD_S.

  Args:
    interactions: engagements of all users; organic ones do not count.
    time_s_R: int64, unix s.
    num_ads: ads of the catalogue.
    half_life_days: an engagement counts 0.5 ** (its age in days / half-life).

  Returns:
    share_DA: float32 [D, num_ads], one row for each distinct period; 0 before any engagement.
    row_R: the row of each time.

  Raises:
    ValueError: an ad outside the catalogue.
  """
  check_catalogue(interactions, num_ads)
  half_life = half_life_days * DAY_S / PERIOD_S
  period_N, ad_N = interactions.ads_by_period
  period_D, row_R = np.unique(time_s_R // PERIOD_S, return_inverse=True)
  share_DA = np.zeros((len(period_D), num_ads), np.float32)
  score_A, begin = np.zeros(num_ads), 0
  ends_D = np.searchsorted(period_N, period_D)
  for row, (period, end) in enumerate(zip(period_D, ends_D, strict=True)):
    if row:
      score_A *= 0.5 ** ((period - period_D[row - 1]) / half_life)
    weight_N = 0.5 ** ((period - period_N[begin:end]) / half_life)
    score_A += np.bincount(ad_N[begin:end], weight_N, num_ads)
    share_DA[row] = score_A / max(score_A.sum(), 1e-300)
    begin = end
  return share_DA, row_R


def check_catalogue(interactions: Interactions, num_ads: int) -> None:
  """Raises ValueError where an ad is outside the catalogue."""
  if interactions.ad_E.max(initial=-1) >= num_ads:
    raise ValueError(f"ad_E holds {interactions.ad_E.max()}, but the catalogue has {num_ads} ads")


def decay(now_s: np.ndarray, time_s: np.ndarray, half_life_s: float | None) -> np.ndarray:
  """What an event of that time still counts now."""
  if half_life_s is None:
    return np.ones(time_s.shape)
  return np.exp2((time_s - now_s) / half_life_s)


def scale_rows(matrix: sp.csr_matrix, factor: np.ndarray) -> sp.csr_matrix:
  """The matrix with each row times its factor."""
  data = matrix.data * np.repeat(factor, np.diff(matrix.indptr))
  return sp.csr_matrix((data, matrix.indices, matrix.indptr), matrix.shape)


def _past_events(
  interactions: Interactions, user_R: np.ndarray, time_s_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Row of the request and index of the event, for every event in the past of a request."""
  # (user, time) as one number, in the order of the events: a search in it finds a request's past.
  origin = min(interactions.time_s_E.min(initial=0), time_s_R.min(initial=0))
  span = np.int64(1 + max(interactions.time_s_E.max(initial=0), time_s_R.max(initial=0)) - origin)
  key_E = interactions.user_E * span + (interactions.time_s_E - origin)
  start_R = np.searchsorted(interactions.user_E, user_R)
  stop_R = np.searchsorted(key_E, user_R * span + (time_s_R - origin))
  length_R = stop_R - start_R
  row_H = np.repeat(np.arange(len(user_R)), length_R)
  return row_H, np.arange(len(row_H)) + np.repeat(stop_R - np.cumsum(length_R), length_R)


def _begins_basket(interactions: Interactions) -> np.ndarray:
  """bool [E], the first event of every basket."""
  first_E = np.ones(len(interactions.user_E), bool)
  first_E[1:] = (np.diff(interactions.user_E) != 0) | (np.diff(interactions.time_s_E) != 0)
  return first_E


def _pairs_of_baskets(user_G: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
  """Earlier and later basket of every pair of one user, 1 to `window` steps apart."""
  earlier, later = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  for step in range(1, window + 1):
    same_G = np.flatnonzero(user_G[step:] == user_G[:-step])
    earlier.append(same_G)
    later.append(same_G + step)
  return np.concatenate(earlier), np.concatenate(later)
