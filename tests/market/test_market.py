"""The simulated market: its truth by hand, revenue by brute force, its log against its truth."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.market import world as market_lib
from gr4ad_jax.market.log import arrivals, market_logs, simulate_day, write_market
from gr4ad_jax.market.policy import Cascade, Shown, build_shelves
from gr4ad_jax.market.world import (
  START_S,
  MarketConfig,
  Requests,
  best_ads,
  expected_revenue,
  taste,
  truth,
)
from gr4ad_jax.market.worlds import build_market, fit_market

SMALL = MarketConfig(
  world="synthetic", num_users=300, num_ads=80, num_advertisers=9, num_categories=6,
  num_contents=40, days=8, sessions_per_day=1.0, slots=3,
)


@pytest.fixture(scope="module")
def market():
  return build_market(SMALL)


@pytest.fixture(scope="module")
def logs(market):
  return market_logs(market)


def week(market) -> Requests:
  return Requests(*(np.concatenate(c) for c in zip(*(arrivals(market, d) for d in range(5, 8)),
                                                   strict=True)))


def test_rates_by_hand(market):
  user, ad, day = 17, 5, 6.25
  market = dataclasses.replace(market, launch_A=np.zeros_like(market.launch_A))
  requests = Requests(np.array([user]), np.array([START_S + int(day * 86400)]), np.array([1]))
  angle = 2 * np.pi * day / market.period_U[user] + market.phase_U[user]
  liked = market.taste_UD[user] + 0.6 * (
    np.cos(angle) * market.drift_UXD[user, 0] + np.sin(angle) * market.drift_UXD[user, 1]
  )
  liking = 3 * np.tanh(float(liked @ market.taste_AD[ad].astype(np.float64)) / 3)
  period, phase = market.fashion_GX[market.category_A[ad]]
  click = (market.click_intercept + liking + market.appeal_A[ad]
           + 0.6 * np.sin(2 * np.pi * day / period + phase) + 0.3)
  conversion = (market.conversion_intercept + 0.5 * liking + market.persuasion_A[ad] + 0.4
                - 0.4 * abs(market.price_z_A[ad] - market.wealth_U[user]))
  click, conversion = 1 / (1 + np.exp(-click)), 1 / (1 + np.exp(-conversion))
  got = truth(market, requests, np.array([[ad, -1]]))
  np.testing.assert_allclose(got.click, [[click, 0]], rtol=1e-3)
  np.testing.assert_allclose(got.conversion, [[conversion, 0]], rtol=1e-3)
  np.testing.assert_allclose(
    got.ecpm, [[1000 * market.bid_A[ad] * click * conversion, 0]], rtol=2e-3
  )


def test_an_ad_earns_nothing_before_its_launch(market):
  ad = int(np.argmax(market.launch_A))
  launch = int(market.launch_A[ad])
  assert launch > 0
  times = START_S + 86400 * np.array([launch - 0.5, launch + 0.5])
  requests = Requests(np.array([0, 0]), times.astype(np.int64), np.array([0, 0]))
  got = truth(market, requests, np.full((2, 1), ad)).ecpm
  assert got[0, 0] == 0 < got[1, 0]


def slow_revenue(market, requests, ranked_RK, share):
  """Request by request, ad by ad; budgets are looked at every hour."""
  spent, day_spend, hour_spend = {}, {}, {}
  order = np.argsort((requests.time_s_R - START_S) // 3600, kind="stable")
  last_hour = last_day = None
  out = np.zeros(len(order))
  for r in order:
    hour = (requests.time_s_R[r] - START_S) // 3600
    if hour != last_hour:
      for v, x in hour_spend.items():
        day_spend[v] = day_spend.get(v, 0) + x
      hour_spend, last_hour = {}, hour
    if hour // 24 != last_day:
      day_spend, last_day = {}, hour // 24
    left, seen = market.config.slots, set()
    one = Requests(*(x[r : r + 1] for x in requests))
    for ad in ranked_RK[r]:
      if ad < 0 or ad in seen or not left:
        continue
      seen.add(ad)
      earns = float(truth(market, one, np.array([[ad]])).ecpm[0, 0]) / 1000
      v = int(market.advertiser_A[ad])
      open_ = share is None or day_spend.get(v, 0) < market.budget_V[v] * share
      if earns > 0 and open_:
        left -= 1
        out[r] += earns
        hour_spend[v] = hour_spend.get(v, 0) + earns
        spent[v] = spent.get(v, 0) + earns
  return out, spent


@pytest.mark.parametrize("share", [None, 0.05])
def test_expected_revenue_by_brute_force(market, share):
  requests = Requests(*(x[::7] for x in week(market)))
  rng = np.random.default_rng(0)
  ranked_RK = rng.integers(-1, market.num_ads, (len(requests.user_R), 8)).astype(np.int32)
  got = expected_revenue(market, requests, ranked_RK, traffic_share=share)
  revenue, spent = slow_revenue(market, requests, ranked_RK, share)
  np.testing.assert_allclose(got.revenue_R, revenue, rtol=1e-5, atol=1e-9)
  for v, x in spent.items():
    assert got.spent_V[v] == pytest.approx(x, rel=1e-5)
  if share:
    assert (got.revenue_R != expected_revenue(market, requests, ranked_RK).revenue_R).any()


def test_an_advertiser_without_budget_is_never_shown(market):
  poor = int(np.bincount(market.advertiser_A).argmax())
  budget_V = market.budget_V.copy()
  budget_V[poor] = 0
  broke = dataclasses.replace(market, budget_V=budget_V)
  requests = week(broke)
  every = np.tile(np.arange(market.num_ads, dtype=np.int32), (len(requests.user_R), 1))
  assert expected_revenue(broke, requests, every, traffic_share=1.0).spent_V[poor] == 0
  events = simulate_day(
    broke, 0, Cascade(broke, build_shelves(broke)), shelves=build_shelves(broke)
  )
  shown = events["ad_id"].dropna().to_numpy().astype(int)
  assert len(shown) and poor not in market.advertiser_A[shown]


def test_a_ranker_that_does_not_err_shows_the_best_of_its_candidates_first(market):
  config = dataclasses.replace(SMALL, ranker_error=0.0, exploration=0.0)
  exact = dataclasses.replace(market, config=config, error_A=np.zeros_like(market.error_A))
  requests, every = week(exact), np.ones(len(exact.budget_V), bool)
  shown = Cascade(exact, build_shelves(exact))(requests, every, np.random.default_rng(0))
  earns = truth(exact, requests, shown.ad_RK).ecpm
  assert (shown.ad_RK >= 0).all() and (np.diff(earns, axis=1) <= 1e-4).all()
  np.testing.assert_allclose(shown.ecpm_RK, earns, rtol=1e-5)
  assert all(len(set(ads)) == len(ads) for ads in shown.ad_RK.tolist())
  best = truth(exact, requests, best_ads(exact, requests, SMALL.slots)).ecpm
  assert earns.sum() > 0.8 * best.sum()  # of eighty ads most are candidates


def test_an_advertiser_whose_budget_is_gone_leaves_for_the_rest_of_the_day(market):
  """Any conversion costs more than this budget; it is looked at every hour, and new every day."""
  poor = dataclasses.replace(market, budget_V=np.full(len(market.budget_V), 1e-6))
  shelves = build_shelves(poor)
  left = set()
  for day in (4, 5):
    events = simulate_day(poor, day, Cascade(poor, shelves), shelves=shelves)
    events = events[events["ad_id"].notna()]
    owner = market.advertiser_A[events["ad_id"].to_numpy().astype(int)]
    hour = (events["time"].to_numpy() - START_S) // 3600
    assert set(owner) >= left  # those who left the day before are back
    left = set()
    for advertiser in set(owner):
      paid = hour[(owner == advertiser) & (events["action"].to_numpy() == 2)]
      if len(paid) and (hour > paid.min()).any():
        left.add(advertiser)
        assert not ((owner == advertiser) & (hour > paid.min())).any()
    assert left


def test_nothing_earns_more_than_the_best_ads(market):
  requests = Requests(*(x[:200] for x in week(market)))
  best = expected_revenue(market, requests, best_ads(market, requests, 3)).revenue_R
  rng = np.random.default_rng(1)
  for _ in range(5):
    other = rng.integers(0, market.num_ads, (200, 3)).astype(np.int32)
    assert (expected_revenue(market, requests, other).revenue_R <= best + 1e-9).all()


@pytest.mark.parametrize("ranked, message", [
  (np.zeros((3, 2), np.int32), "for 1 requests"),
  (np.full((1, 2), 80, np.int32), "-1 to 79"),
])
def test_lists_that_do_not_fit_are_refused(market, ranked, message):
  with pytest.raises(ValueError, match=message):
    expected_revenue(market, Requests(*(x[:1] for x in week(market))), ranked)


def test_what_is_drawn_follows_the_truth(market):
  """Clicks, conversions and revenue of a policy's log against their expectations."""
  rich = dataclasses.replace(market, budget_V=np.full(len(market.budget_V), np.inf))
  shelves = build_shelves(rich)
  cascade, calls = Cascade(rich, shelves), []

  def watched(requests, open_V, rng) -> Shown:
    calls.append((requests, cascade(requests, open_V, rng)))
    return calls[-1][1]

  frames = pd.concat([simulate_day(rich, day, watched, shelves=shelves) for day in range(8)])
  rates = [truth(rich, requests, shown.ad_RK) for requests, shown in calls]
  click = np.concatenate([r.click.ravel() for r in rates]).astype(np.float64)
  conversion = np.concatenate([r.conversion.ravel() for r in rates]) * click
  on_ads = frames[frames["ad_id"].notna()]
  for drawn, p in (((on_ads.action > 0).sum(), click), ((on_ads.action == 2).sum(), conversion)):
    assert abs(drawn - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
  revenue = sum(
    expected_revenue(rich, requests, shown.ad_RK).revenue_R.sum() for requests, shown in calls
  )
  bid = rich.bid_A[on_ads.ad_id.to_numpy().astype(int)].astype(np.float64)
  deviation = np.sqrt((bid**2 * 0.01).sum())
  assert abs(on_ads["value"].sum() - revenue) < 4 * deviation
  assert np.mean(click) == pytest.approx(SMALL.click_rate, rel=0.15)


def test_days_stand_for_themselves(market):
  shelves = build_shelves(market)
  policy = Cascade(market, shelves)
  first = simulate_day(market, 3, policy, shelves=shelves)
  simulate_day(market, 4, policy, shelves=shelves)
  again = simulate_day(build_market(SMALL), 3, policy, shelves=shelves)
  pd.testing.assert_frame_equal(first, again)
  other = simulate_day(build_market(dataclasses.replace(SMALL, seed=1)), 3, policy,
                       shelves=shelves)
  assert len(other) != len(first) or not (other["time"] == first["time"]).all()


def test_the_log_is_clean_and_keeps_its_rows(market, logs):
  assert not any(logs.cleaning.values())
  assert logs.ads.ad_id.tolist() == [str(a) for a in range(SMALL.num_ads)]
  assert logs.users.user_id.tolist() == [str(u) for u in range(SMALL.num_users)]
  assert (logs.ads.advertiser_id == market.advertiser_V[market.advertiser_A]).all()
  np.testing.assert_array_equal(logs.ads.bid, market.bid_A)
  converted = logs.events.action[logs.events.ad >= 0] == 2
  value = logs.events.value[logs.events.ad >= 0]
  assert (value[converted] > 0).all() and not value[~converted].any()


def test_tastes_stand_still_without_drift_and_move_smoothly_with_it(market):
  users = np.arange(50)
  still = dataclasses.replace(market, config=dataclasses.replace(SMALL, drift=0.0))
  days = [np.full(50, d, np.float32) for d in (0.0, 1.0, 20.0)]
  np.testing.assert_array_equal(taste(still, users, days[0]), taste(still, users, days[2]))
  a, b, c = (taste(market, users, d) for d in days)
  assert 0 < np.abs(b - a).mean() < 0.3 * np.abs(c - a).mean()


def test_organic_behaviour_tells_of_interest(market, logs):
  """Users engage with contents of categories whose ads they click, more than others do."""
  events = logs.events
  organic = events.content >= 0
  liking = taste(market, np.arange(300), np.zeros(300, np.float32)) @ market.taste_GD.T
  met = np.zeros((300, 6))
  category = market.content_category_O[events.content[organic]]
  np.add.at(met, (events.user[organic], category), 1)
  active = met.sum(axis=1) >= 10
  share = met[active] / met[active].sum(axis=1, keepdims=True)
  assert np.corrcoef(share.ravel(), liking[active].ravel())[0, 1] > 0.4


def test_a_fitted_world_keeps_the_tastes_of_its_log(tiny_logs):
  config = MarketConfig(num_users=120, num_ads=30, num_contents=20, days=10, slots=2)
  market = fit_market(config, tiny_logs, np.random.default_rng(0))
  assert set(market.advertiser_V) <= set(tiny_logs.ads.advertiser_id)
  assert market.num_ads == 30 and len(market.taste_UD) == 120
  # Users of the log keep to two categories of four: their tastes for the best beat the worst two.
  liking = np.sort(market.taste_UD @ market.taste_GD.T, axis=1)
  assert liking[:, -2:].mean() - liking[:, :2].mean() > 0.8
  logs = market_logs(market)
  assert not any(n for rule, n in logs.cleaning.items() if "dropped" in rule)


def test_a_fitted_world_needs_enough_products(tiny_logs):
  with pytest.raises(ConfigError, match="num_ads=50"):
    fit_market(MarketConfig(num_ads=50, slots=2), tiny_logs, np.random.default_rng(0))


def test_written_logs_equal_those_in_memory(market, logs, tmp_path):
  counts = write_market(market, tmp_path / "m")
  assert counts["events"] == len(logs.events.user)
  assert counts["impressions"] == int((logs.events.ad >= 0).sum())
  with pytest.raises(ConfigError, match="exists"):
    write_market(market, tmp_path / "m")
  assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("changes, field", [
  ({"slots": 0}, "slots"), ({"sessions_per_day": 0}, "sessions_per_day"),
  ({"click_rate": 1.0}, "click_rate"), ({"drift": -1}, "drift"),
  ({"num_ads": 5, "slots": 3}, "num_ads"), ({"budget": float("nan")}, "budget"),
])
def test_settings_that_cannot_work(changes, field):
  with pytest.raises(ConfigError, match=f"market.{field}"):
    dataclasses.replace(MarketConfig(), **changes)


def test_words_name_the_strongest_tastes():
  taste_ND = np.array([[-2, 0.1, 3, 0, 1, *[0] * 11]], np.float32)
  assert market_lib.taste_words(taste_ND).tolist() == ["red salty aged"]
