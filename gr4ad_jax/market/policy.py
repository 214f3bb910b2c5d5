"""What is shown to whom: shelves to draw items from, and the policy that the log is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from gr4ad_jax.market.world import Market, Requests, day_of, fashion, repeats, taste, truth

_NUM_CANDIDATES = 96  # that the cascade's retrieval hands to its ranker


class Shelf(NamedTuple):
  """I items by category, ready to be drawn from in proportion to their weights."""

  order_I: np.ndarray  # items, category after category
  cumulative_I: np.ndarray  # float64, weights in that order, summed up
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


def _shelf(category_I: np.ndarray, weight_I: np.ndarray, num_groups: int) -> Shelf:
  order_I = np.argsort(category_I, kind="stable").astype(np.int32)
  bounds = np.searchsorted(category_I[order_I], np.arange(num_groups + 1))
  return Shelf(order_I, np.cumsum(weight_I[order_I], dtype=np.float64), bounds[:-1], bounds[1:])


def draw_items(shelf: Shelf, category: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """An item of each category; of any where it is empty, or -1."""
  before = np.append(0.0, shelf.cumulative_I)
  empty = (category < 0) | (shelf.start_G[category] == shelf.end_G[category])
  low = np.where(empty, 0.0, before[shelf.start_G[category]])
  high = np.where(empty, before[-1], before[shelf.end_G[category]])
  at = np.searchsorted(shelf.cumulative_I, low + rng.random(category.shape) * (high - low), "right")
  return shelf.order_I[np.minimum(at, len(shelf.order_I) - 1)]


def draw_categories(
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
    market = self.market
    day_R = day_of(requests.time_s_R)
    taste_RD = taste(market, requests.user_R, day_R)
    ad_RM = self._candidates(taste_RD, day_R, rng)
    ecpm_RM = truth(market, requests, ad_RM, taste_RD=taste_RD).ecpm
    noise_RM = rng.standard_normal(ad_RM.shape, np.float32)
    error_RM = market.error_A[ad_RM] + 0.8 * market.config.ranker_error * noise_RM
    estimate_RM = ecpm_RM * np.exp(error_RM)
    # Candidates are sorted by their numbers: the same ad twice stands side by side.
    allowed_RM = (ecpm_RM > 0) & open_V[market.advertiser_A[ad_RM]]
    allowed_RM[:, 1:] &= ad_RM[:, 1:] != ad_RM[:, :-1]
    score_RM = np.where(allowed_RM, estimate_RM, -1)
    best_RK = np.argsort(-score_RM, axis=1, kind="stable")[:, : market.config.slots]
    estimate_RK = np.take_along_axis(score_RM, best_RK, axis=1)
    ad_RK = np.where(estimate_RK >= 0, np.take_along_axis(ad_RM, best_RK, axis=1), -1)
    ad_RK = self._explore(requests, ad_RK, open_V, taste_RD, rng)
    same_RK = ad_RK == np.take_along_axis(ad_RM, best_RK, axis=1)
    return Shown(ad_RK, np.where(same_RK & (ad_RK >= 0), estimate_RK, np.nan))

  def _candidates(
    self, taste_RD: np.ndarray, day_R: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """M ads of each request for the ranker, sorted; an ad may be there twice."""
    num_requests, quarter = len(day_R), _NUM_CANDIDATES // 4
    liked = draw_categories(self.market, taste_RD, day_R, 2 * quarter, rng)
    anywhere = np.full((num_requests, quarter), -1)
    return np.sort(np.concatenate([
      draw_items(self.shelves.ads, liked, rng),
      draw_items(self.shelves.ads, anywhere, rng),
      rng.integers(self.market.num_ads, size=(num_requests, quarter), dtype=np.int32),
    ], axis=1), axis=1)

  def _explore(
    self, requests: Requests, ad_RK: np.ndarray, open_V: np.ndarray, taste_RD: np.ndarray,
    rng: np.random.Generator,
  ) -> np.ndarray:
    """Puts an ad drawn uniformly into some slots, where it may run and is not shown already."""
    market = self.market
    drawn_RK = rng.integers(market.num_ads, size=ad_RK.shape, dtype=np.int32)
    swap_RK = rng.random(ad_RK.shape) < market.config.exploration
    swap_RK &= open_V[market.advertiser_A[drawn_RK]]
    swap_RK &= truth(market, requests, drawn_RK, taste_RD=taste_RD).ecpm > 0
    swapped_RK = np.where(swap_RK, drawn_RK, ad_RK)
    twice_R = (repeats(swapped_RK) & (swapped_RK >= 0)).any(axis=1)
    return np.where(twice_R[:, None], ad_RK, swapped_RK)
