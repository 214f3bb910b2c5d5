"""An ad market whose truth is known: click and conversion rates, bids, budgets, exact revenue.

Advertisers pay per conversion (oCPC): eCPM = 1000 * bid * pCTR * pCVR. Users have tastes that
drift smoothly, ads lie in the same space, and

    liking     = taste(user, day) . ad, bent to lie within MOST_LIKING standard deviations
    logit pCTR = intercept + CLICK_TASTE * liking + appeal(ad) + fashion(category, day) + scene
    logit pCVR = intercept + CONVERSION_TASTE * liking + persuasion(ad) + scene
                 - PRICE_PULL * |price(ad) - wealth(user)|        both in standard deviations

so that the expected revenue of any list of ads can be computed instead of sampled. Slots have no
position bias, impressions do not tire a user, and auctions are won by eCPM at the advertiser's own
bid. `worlds` makes markets, `log` logs them.

Source: 3.4 and 4.1 of the GR4AD paper (arXiv 2602.22732) leave the market open; all numbers here
are our choice, calibrated in docs/market.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Interval

from gr4ad_jax.config import Bounded, Count, NotNegative, Positive, Share, require
from gr4ad_jax.data.records import DAY_S

START_S = 1_735_689_600  # 2025-01-01, a Wednesday
SCENES = ("feed", "search", "detail")
CLICK_TASTE, CONVERSION_TASTE, PRICE_PULL, MOST_LIKING = 1.0, 0.5, 0.4, 3.0
_WORDS = np.array(
  "red blue soft firm sweet salty light heavy fresh aged large small bright dark quiet loud warm "
  "cold smooth rough plain fancy round square fast slow sharp mild rich lean dry creamy".split(),
  object,
)  # two for each dimension of taste
_BLOCK = 2048  # requests answered at once
_CLICK_SCENE, _CONVERSION_SCENE = np.array([0.0, 0.3, -0.3]), np.array([0.0, 0.4, 0.1])


@dataclasses.dataclass(frozen=True)
class MarketConfig(Bounded, section="market"):
  """What a market is made of; together with the seed it fixes every number of it."""

  world: Literal["fitted", "synthetic"] = "fitted"
  """Tastes, prices and advertisers fitted to Complete Journey, or drawn at any size."""
  num_users: Count = 4_000
  """Users; in the fitted world each follows a household."""
  num_ads: Count = 2_500
  """Ads; in the fitted world the products bought by most households."""
  num_advertisers: Count = 200
  """Advertisers of the synthetic world; the fitted one has the real manufacturers."""
  num_categories: Count = 40
  """Categories of the synthetic world; the fitted one has the real ones."""
  num_contents: Count = 2_500
  """Organic contents; half of them show the product of an ad."""
  days: Count = 35
  """Length of the log."""
  sessions_per_day: Positive = 1.0
  """Visits of the average user a day; a visit has 1.6 requests on average."""
  organic_per_request: NotNegative = 1.5
  """Organic contents that a user engages with before a request."""
  slots: Count = 4
  """Ads shown in answer to a request."""
  click_rate: Annotated[float, Interval(gt=0, lt=1)] = 0.1
  """Mean pCTR of what the logging policy shows."""
  conversion_rate: Annotated[float, Interval(gt=0, lt=1)] = 0.2
  """Mean pCVR of what it shows, weighted by pCTR."""
  drift: NotNegative = 0.6
  """How far tastes and fashions move about their means; 0 = they stand still."""
  budget: NotNegative = 1.5
  """Median daily budget over what the advertiser would spend in a day without one."""
  ranker_error: NotNegative = 1.5
  """Standard deviation of the logging policy's error in log eCPM."""
  exploration: Share = 0.1
  """Share of the logging policy's slots that show an ad drawn uniformly."""
  seed: int = 0
  """Seed of everything that is drawn."""

  def _check(self):
    require(self.num_ads >= 2 * self.slots, "market.num_ads", self.num_ads,
            f"needs twice market.slots={self.slots}")


@dataclasses.dataclass(frozen=True)
class Market:
  """A market with its truth. U users, A ads, V advertisers, G categories, O contents, D taste.

  Attributes:
    config: what it was made of.
    user_features: name -> [U] str objects.
    taste_UD: float32, mean taste.
    drift_UXD: float32 [U, 2, D], the plane in which the taste circles about its mean.
    period_U, phase_U: float32, days and radians of that circle.
    wealth_U: float32, standard deviations.
    activity_U: float32, mean 1.
    taste_AD: float32 or float16.
    appeal_A, persuasion_A: float32, logits.
    price_A, bid_A: float32, currency; `price_z_A` is log price in standard deviations.
    launch_A: int16, the first day of the ad; a fifth of the ads come in the first 3/5 of the log.
    popularity_A: float32 > 0, how often the logging policy's retrieval draws the ad.
    category_A, advertiser_A: int32.
    category_G, advertiser_V: str objects, names.
    text_A: str objects; None = `ad_text` makes them of the taste.
    taste_GD: float32, mean of the category's ads.
    fashion_GX: float32 [G, 2], days and radians of the category's season.
    budget_V: float32, currency a day.
    content_ad_O: int32, ad of the same product, -1 = none.
    content_category_O: int32.
    content_weight_O: float32.
    content_text_O: str objects.
    click_intercept, conversion_intercept: logits.
    error_A: float32, the logging policy's lasting error about an ad, in log eCPM.
  """

  config: MarketConfig
  user_features: dict[str, np.ndarray]
  taste_UD: np.ndarray
  drift_UXD: np.ndarray
  period_U: np.ndarray
  phase_U: np.ndarray
  wealth_U: np.ndarray
  activity_U: np.ndarray
  taste_AD: np.ndarray
  appeal_A: np.ndarray
  persuasion_A: np.ndarray
  price_A: np.ndarray
  price_z_A: np.ndarray
  bid_A: np.ndarray
  launch_A: np.ndarray
  popularity_A: np.ndarray
  category_A: np.ndarray
  advertiser_A: np.ndarray
  category_G: np.ndarray
  advertiser_V: np.ndarray
  text_A: np.ndarray | None
  taste_GD: np.ndarray
  fashion_GX: np.ndarray
  budget_V: np.ndarray
  content_ad_O: np.ndarray
  content_category_O: np.ndarray
  content_weight_O: np.ndarray
  content_text_O: np.ndarray
  click_intercept: float
  conversion_intercept: float
  error_A: np.ndarray

  @property
  def num_ads(self) -> int:
    """A; ads are numbered from 0, and so are their ids in the log."""
    return len(self.bid_A)


class Requests(NamedTuple):
  """R ad requests."""

  user_R: np.ndarray  # int32
  time_s_R: np.ndarray  # int64, unix seconds
  scene_R: np.ndarray  # int8, of SCENES


class Truth(NamedTuple):
  """What would happen if an ad were shown; same shape as the ads asked about."""

  click: np.ndarray  # float32, pCTR
  conversion: np.ndarray  # float32, pCVR given a click
  ecpm: np.ndarray  # float32, 1000 * bid * pCTR * pCVR; 0 where the ad has not been launched


class Revenue(NamedTuple):
  """Expected revenue of R answered requests."""

  revenue_R: np.ndarray  # float64, currency a request
  spent_V: np.ndarray  # float64, currency that each advertiser pays in all


def day_of(time_s: np.ndarray) -> np.ndarray:
  """float32 days since the market opened."""
  return ((np.asarray(time_s) - START_S) / DAY_S).astype(np.float32)


def taste(market: Market, user_R: np.ndarray, day_R: np.ndarray) -> np.ndarray:
  """float32 [R, D], each user's taste at that time."""
  angle_R = 2 * np.pi * day_R / market.period_U[user_R] + market.phase_U[user_R]
  around_RX = np.stack([np.cos(angle_R), np.sin(angle_R)], axis=1).astype(np.float32)
  moved_RD = np.einsum("RX,RXD->RD", around_RX, market.drift_UXD[user_R])
  return market.taste_UD[user_R] + np.float32(market.config.drift) * moved_RD


def fashion(market: Market, category: np.ndarray, day: np.ndarray) -> np.ndarray:
  """float32, what the season adds to the logit of a click; broadcasts."""
  period, phase = market.fashion_GX[category, 0], market.fashion_GX[category, 1]
  return np.float32(market.config.drift) * np.sin(2 * np.pi * day / period + phase)


def truth(
  market: Market, requests: Requests, ad_RK: np.ndarray, *, taste_RD: np.ndarray | None = None
) -> Truth:
  """The true rates of K ads for each request; -1 = no ad, all zeros.

  Args:
    market: with its truth.
    requests: R requests.
    ad_RK: int32.
    taste_RD: of the users at that time, where the caller has it.
  """
  day_R = day_of(requests.time_s_R)
  if taste_RD is None:
    taste_RD = taste(market, requests.user_R, day_R)
  real_RK, ad_RK = ad_RK >= 0, np.maximum(ad_RK, 0)
  liking_RK = np.einsum("RD,RKD->RK", taste_RD, market.taste_AD[ad_RK].astype(np.float32))
  liking_RK = MOST_LIKING * np.tanh(liking_RK / MOST_LIKING)
  click_RK = (
    market.click_intercept + CLICK_TASTE * liking_RK + market.appeal_A[ad_RK]
    + fashion(market, market.category_A[ad_RK], day_R[:, None])
    + _CLICK_SCENE[requests.scene_R][:, None]
  )
  misfit_RK = np.abs(market.price_z_A[ad_RK] - market.wealth_U[requests.user_R][:, None])
  conversion_RK = (
    market.conversion_intercept + CONVERSION_TASTE * liking_RK + market.persuasion_A[ad_RK]
    - PRICE_PULL * misfit_RK + _CONVERSION_SCENE[requests.scene_R][:, None]
  )
  real_RK &= market.launch_A[ad_RK] <= day_R[:, None]
  click_RK, conversion_RK = (
    np.where(real_RK, 1 / (1 + np.exp(-x)), 0).astype(np.float32) for x in (click_RK, conversion_RK)
  )
  return Truth(click_RK, conversion_RK, 1000 * market.bid_A[ad_RK] * click_RK * conversion_RK)


def expected_revenue(
  market: Market, requests: Requests, ranked_RK: np.ndarray, *, traffic_share: float | None = None
) -> Revenue:
  """What R requests earn in expectation when the first `slots` ads that may run are shown.

  Args:
    market: with its truth.
    requests: R requests.
    ranked_RK: int32 ads, the one to show first at the front, -1 = none; repeats count once.
    traffic_share: the share of the market's requests of that time that these are; advertisers then
      stop for the day once their expected spend has reached that share of the daily budget, hour
      by hour. An advertiser without budget is never shown. None = budgets are not looked at.

  Raises:
    ValueError: a shape that does not fit, or an ad that the market does not have.
  """
  num_requests = len(requests.user_R)
  if ranked_RK.ndim != 2 or len(ranked_RK) != num_requests:
    raise ValueError(f"ranked_RK: shape {ranked_RK.shape} for {num_requests} requests")
  if ranked_RK.size and not -1 <= ranked_RK.min() <= ranked_RK.max() < market.num_ads:
    raise ValueError(f"ranked_RK: ads must be -1 to {market.num_ads - 1}")
  revenue_R = np.zeros(num_requests)
  spent_V = np.zeros(len(market.budget_V))
  today_V, today = np.zeros_like(spent_V), None
  hour_R = (requests.time_s_R - START_S) // 3600
  for rows in hour_blocks(hour_R):
    ranked = np.where(repeats(ranked_RK[rows]), -1, ranked_RK[rows])
    part = Requests(*(x[rows] for x in requests))
    earns = truth(market, part, ranked).ecpm.astype(np.float64) / 1000
    may_run = earns > 0
    if traffic_share is not None:
      day = int(hour_R[rows[0]] // 24)
      if day != today:
        today, today_V = day, np.zeros_like(spent_V)
      may_run &= (today_V < market.budget_V * traffic_share)[market.advertiser_A[ranked]]
    shown = may_run & (np.cumsum(may_run, axis=1) <= market.config.slots)
    revenue_R[rows] = np.where(shown, earns, 0).sum(axis=1)
    spend_V = np.bincount(
      market.advertiser_A[ranked[shown]], weights=earns[shown], minlength=len(spent_V)
    )
    spent_V += spend_V
    today_V += spend_V
  return Revenue(revenue_R, spent_V)


def ad_text(market: Market, rows: slice = slice(None)) -> np.ndarray:
  """str objects, the creatives; where the world has none, category and words of the taste."""
  if market.text_A is not None:
    return market.text_A[rows]
  words = taste_words(market.taste_AD[rows])
  names = market.category_G[market.category_A[rows]]
  brands = market.advertiser_V[market.advertiser_A[rows]]
  texts = [f"{n} {w} {b}" for n, w, b in zip(names, words, brands, strict=True)]
  return np.array(texts, object)


def taste_words(taste_AD: np.ndarray) -> np.ndarray:
  """str objects: a word for each of the three strongest dimensions, in its direction."""
  dims = taste_AD.shape[1]
  if dims > len(_WORDS) // 2:
    raise ValueError(f"taste of {dims} dimensions: there are words for {len(_WORDS) // 2}")
  first_A3 = np.argpartition(-np.abs(taste_AD), 3, axis=1)[:, :3]
  sign_A3 = np.take_along_axis(taste_AD, first_A3, axis=1) > 0
  word_A3 = _WORDS[np.sort(2 * first_A3 + sign_A3, axis=1)]
  return np.array([" ".join(row) for row in word_A3.tolist()], object)


def best_ads(market: Market, requests: Requests, k: int) -> np.ndarray:
  """int32 [R, k]: the k ads of the catalogue with the highest true eCPM; nothing can earn more.

  Budgets aside. Looks at every ad: for markets of up to some ten thousand.
  """
  best_RK = np.empty((len(requests.user_R), k), np.int32)
  every_A = np.arange(market.num_ads, dtype=np.int32)
  step = max(1, 2_000_000 // len(every_A))
  for at in range(0, len(best_RK), step):
    part = Requests(*(x[at : at + step] for x in requests))
    every_RA = np.broadcast_to(every_A, (len(part.user_R), len(every_A)))
    ecpm_RA = truth(market, part, every_RA).ecpm
    best_RK[at : at + step] = np.argsort(-ecpm_RA, axis=1, kind="stable")[:, :k]
  return best_RK


def hour_blocks(hour_R: np.ndarray) -> Iterator[np.ndarray]:
  """Rows of the requests of one hour after another, at most 2,048 at a time."""
  order_R = np.argsort(hour_R, kind="stable")
  for rows in np.split(order_R, np.flatnonzero(np.diff(hour_R[order_R])) + 1):
    for at in range(0, len(rows), _BLOCK):
      yield rows[at : at + _BLOCK]


def repeats(ad_RK: np.ndarray) -> np.ndarray:
  """bool: the same ad stands further to the front."""
  order_RK = np.argsort(ad_RK, axis=1, kind="stable")
  sorted_RK = np.take_along_axis(ad_RK, order_RK, axis=1)
  again_RK = np.zeros(ad_RK.shape, bool)
  again_RK[:, 1:] = sorted_RK[:, 1:] == sorted_RK[:, :-1]
  repeats_RK = np.empty_like(again_RK)
  np.put_along_axis(repeats_RK, order_RK, again_RK, axis=1)
  return repeats_RK
