"""The reward model: its metrics against oracles, its learning against a known market."""

import dataclasses

import jax
import jax.numpy as jnp
import metrax
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import prepare
from gr4ad_jax.data.impressions import read_impressions
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.market.log import market_logs
from gr4ad_jax.market.world import MarketConfig, Requests, truth
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.ranker.calibration import Platt, fit_platt, probability_metrics
from gr4ad_jax.ranker.config import RewardConfig
from gr4ad_jax.ranker.data import bids_of, reward_batch_maker
from gr4ad_jax.ranker.reward import RewardRun, open_reward, train_reward
from gr4ad_jax.ranker.reward_model import RewardModel, reward_task
from gr4ad_jax.ranker.two_tower import match_loss

MARKET = MarketConfig(
  world="synthetic", num_users=500, num_ads=40, num_advertisers=6, num_categories=4,
  num_contents=30, days=20, sessions_per_day=1.2, click_rate=0.15, conversion_rate=0.3,
  ranker_error=1.0,
)


def batch_maker(logs, maker, **config):
  learned = np.ones(len(logs.events.user), bool)
  return reward_batch_maker(logs, RewardConfig(**config), maker.vocabulary.sizes, train_E=learned)


@pytest.fixture(scope="module")
def market():
  return build_market(MARKET)


@pytest.fixture(scope="module")
def logs(market):
  return market_logs(market)


@pytest.fixture(scope="module")
def maker(logs):
  return ExampleMaker(logs, time_split(logs, validation_days=3, test_days=3))


@pytest.fixture(scope="module")
def trained(logs, tmp_path_factory):
  folder = tmp_path_factory.mktemp("reward")
  prepare.write_prepared(logs, folder / "data", time_split(logs, validation_days=3, test_days=3))
  run = RewardRun(str(folder / "data"))
  run = dataclasses.replace(
    run, train=dataclasses.replace(run.train, num_steps=250, eval_every=125, checkpoint_every=125,
                                   data_parallel=1)
  )
  return folder / "reward", run, train_reward(run, folder / "reward")


def test_metrics_against_a_library():
  rng = np.random.default_rng(0)
  p = rng.random(500).round(2)  # with ties
  label = rng.random(500) < p**2
  got = probability_metrics(p, label)
  with jax.numpy_rank_promotion("allow"):
    auc = metrax.AUCROC.from_model_output(
      predictions=jnp.asarray(p), labels=jnp.asarray(label.astype(np.float32))
    ).compute()
  assert got["auc"] == pytest.approx(float(auc), abs=1e-3)
  inside = np.clip(p, 1e-12, 1 - 1e-12)
  loss = -np.mean(np.where(label, np.log(inside), np.log1p(-inside)))
  assert got["log_loss"] == pytest.approx(loss)


def test_calibration_error_by_hand():
  p, label = np.array([0.1, 0.1, 0.8, 0.8]), np.array([0, 1, 1, 1])
  got = probability_metrics(p, label, bins=2)
  assert got["calibration_error"] == pytest.approx((abs(0.2 - 1) + abs(1.6 - 2)) / 4)
  assert got["mean_ratio"] == pytest.approx(0.45 / 0.75)


def test_metrics_of_one_label():
  got = probability_metrics(np.array([0.2, 0.4]), np.array([0, 0]))
  assert np.isnan(got["auc"]) and np.isnan(got["mean_ratio"])
  assert fit_platt(np.array([0.1, 2.0]), np.array([1, 1])) == Platt()
  nothing = probability_metrics(np.zeros(0), np.zeros(0))
  assert nothing.pop("calibration_error") == 0 and np.isnan(list(nothing.values())).all()


def test_platt_scaling_finds_the_scaling_that_was_applied():
  rng = np.random.default_rng(0)
  logit = rng.normal(0, 2, 20_000)
  label = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * logit - 1)))
  slope, offset = fit_platt(logit, label)
  assert slope == pytest.approx(0.5, abs=0.03) and offset == pytest.approx(-1, abs=0.05)


def test_impressions_hold_every_shown_ad_once_with_its_deepest_action(logs, maker):
  got = read_impressions(maker, "test")
  events = logs.events
  rows = (events.ad >= 0) & (maker.split_R[events.request] == 2)
  expected = dict(zip(zip(events.request[rows], events.ad[rows], strict=True),
                      events.action[rows], strict=True))
  found = {}
  for context, ads, actions in zip(got.contexts, got.shown_RC, got.action_RC, strict=True):
    assert set(context.ad_T) <= set(events.ad[(events.user == context.user)
                                              & (events.time_s < context.time_s)])
    found |= {(context.request, a): x for a, x in zip(ads, actions, strict=True) if a >= 0}
  assert found == expected


def test_logs_without_impressions_are_refused(tiny_logs):
  maker = ExampleMaker(tiny_logs, time_split(tiny_logs, validation_days=7, test_days=7))
  with pytest.raises(LogError, match="action impression"):
    read_impressions(maker, "train")


def test_padding_changes_nothing(logs, maker):
  make = batch_maker(logs, maker, max_history=8)
  model = RewardModel(make.config, make.vocabulary)
  params = jax.jit(reward_task(model).init)(jax.random.key(0))
  rows = read_impressions(maker, "test")
  contexts, ads = rows.contexts[:4], rows.shown_RC[:4, :3]
  wide = batch_maker(logs, maker, max_history=50)
  short = [dataclasses.replace(c, ad_T=c.ad_T[:8], organic_O=c.organic_O[:8]) for c in contexts]
  apply = jax.jit(lambda batch: model.apply({"params": params}, batch))
  a = apply(make(contexts, ads))
  padded = np.pad(ads, ((0, 0), (0, 2)), constant_values=-1)
  b = apply(wide(short, padded))
  np.testing.assert_allclose(a.click_BC, b.click_BC[:, :3], atol=1e-5)
  np.testing.assert_allclose(a.conversion_BC, b.conversion_BC[:, :3], atol=1e-5)


def fresh(logs, maker):
  """A model as it starts, its parameters, the test impressions, and the first 64 as a batch."""
  make = batch_maker(logs, maker)
  model = RewardModel(make.config, make.vocabulary)
  params = jax.jit(reward_task(model).init)(jax.random.key(0))
  rows = read_impressions(maker, "test")
  return model, params, rows, make(rows.contexts[:64], rows.shown_RC[:64], rows.action_RC[:64])


def test_loss_counts_conversions_of_clicked_ads_alone(logs, maker):
  model, params, rows, batch = fresh(logs, maker)
  metrics = jax.jit(reward_task(model).loss)(params, batch, None)
  logits = jax.jit(model.apply)({"params": params}, batch)
  loss = 0.0
  for click, conversion, ad, action in zip(
    np.asarray(logits.click_BC).ravel(), np.asarray(logits.conversion_BC).ravel(),
    rows.shown_RC[:64].ravel(), rows.action_RC[:64].ravel(), strict=True,
  ):
    if ad >= 0:
      loss += np.log1p(np.exp(-click if action >= 1 else click))
      if action >= 1:
        loss += np.log1p(np.exp(-conversion if action == 2 else conversion))
  assert float(metrics["loss"][0] - metrics["match_loss"][0]) == pytest.approx(loss, rel=1e-4)
  assert float(metrics["loss"][1]) == (rows.shown_RC[:64] >= 0).sum()


def test_fields_are_numbered_from_one_and_nothing_is_zero(logs, maker):
  make = batch_maker(logs, maker, max_history=6)
  context = next(
    context for context in read_impressions(maker, "test").contexts
    if len(context.ad_T) > 1 and (logs.contents.ad[context.organic_O] >= 0).any()
  )
  batch = make([context], np.array([[0, 3, -1]], np.int32), np.array([[0, 2, -1]], np.int8))
  assert batch.candidate_BCX[0, :, 0].tolist() == [1, 4, 0]
  assert not batch.candidate_BCX[0, 2].any()
  brands = np.unique(logs.ads.advertiser_id.astype(str)).tolist()
  assert batch.candidate_BCX[0, 1, 1] == 1 + brands.index(logs.ads.advertiser_id[3])
  assert (batch.click_BC.tolist(), batch.conversion_BC.tolist()) == ([[False, True, False]],) * 2
  assert batch.where_BC.tolist() == [[True, True, False]]
  ads, organic = context.ad_T[:6], context.organic_O[:6]
  assert batch.ad_BTX[0, :, 0].tolist() == [*(ads + 1), *[0] * (6 - len(ads))]
  assert batch.organic_BOX[0, : len(organic), 0].tolist() == (organic + 1).tolist()
  # The ad of the same product, which other contents have not.
  assert batch.organic_BOX[0, : len(organic), 2].tolist() == (
    logs.contents.ad[organic] + 1
  ).tolist()


def test_the_towers_learn_from_their_own_loss_alone(logs, maker):
  """Their match is a field of the ranker, whose losses must not bend it; nor the other way."""
  model, params, _, batch = fresh(logs, maker)

  def two(params):
    metrics = reward_task(model).loss(params, batch, None)
    ranker = metrics["click_loss"][0] + metrics["conversion_loss"][0]
    return jnp.stack([ranker, metrics["match_loss"][0]])

  slopes = jax.jit(jax.jacrev(two))(params)
  learns = {
    name: [any(np.any(x[k]) for x in jax.tree.leaves(part)) for k in range(2)]
    for name, part in slopes.items()
  }
  assert learns.pop("towers") == [False, True]
  assert all(not by_match for _, by_match in learns.values())
  assert learns["ad_0"][0] and learns["heads"][0]


def test_a_trained_model_knows_the_market(market, maker, trained):
  folder, _, metrics = trained
  assert metrics["click/auc"] > 0.6
  assert 0.85 < metrics["click/mean_ratio"] < 1.15
  scorer = open_reward(folder)
  contexts = read_impressions(maker, "test").contexts[:300]
  ads = np.broadcast_to(np.arange(MARKET.num_ads, dtype=np.int32), (300, MARKET.num_ads))
  requests = Requests(
    np.array([c.user for c in contexts]), np.array([c.time_s for c in contexts]),
    np.zeros(300, np.int8),
  )
  real = truth(market, requests, ads)
  launched = real.click > 0
  found = scorer(contexts, ads)
  assert np.corrcoef(np.log(found.click_RC[launched]), np.log(real.click[launched]))[0, 1] > 0.45
  np.testing.assert_allclose(
    found.ecpm_RC, 1000 * market.bid_A[ads] * found.click_RC * found.conversion_RC, rtol=1e-5
  )


def test_rates_are_calibrated_on_validation_clicks_on_all_that_is_shown(maker, trained):
  """And conversions on what was clicked; the metrics of the test split come after that."""
  folder, _, metrics = trained
  scorer = open_reward(folder)
  rows = read_impressions(maker, "validation")
  click_RC, conversion_RC = scorer.raw(rows.contexts, rows.shown_RC)
  shown_RC, clicked_RC = rows.shown_RC >= 0, rows.action_RC >= 1
  np.testing.assert_allclose(
    scorer.click, fit_platt(click_RC[shown_RC], clicked_RC[shown_RC]), rtol=1e-3, atol=1e-4
  )
  converted = rows.action_RC[clicked_RC] == 2
  np.testing.assert_allclose(
    scorer.conversion, fit_platt(conversion_RC[clicked_RC], converted), rtol=1e-3, atol=1e-4
  )
  test = read_impressions(maker, "test")
  there_RC, label_RC = test.shown_RC >= 0, test.action_RC >= 1
  p_RC = scorer(test.contexts, test.shown_RC).click_RC
  expected = probability_metrics(p_RC[there_RC], label_RC[there_RC])
  for name, value in expected.items():
    assert metrics[f"click/{name}"] == pytest.approx(value, rel=1e-4), name


def test_ranking_orders_by_ecpm_and_keeps_padding_last(maker, trained):
  scorer = open_reward(trained[0])
  contexts = read_impressions(maker, "test").contexts[:5]
  ads = np.array([[3, -1, 7, 1]] * 5, np.int32)
  ranked = scorer.rank(contexts, ads)
  assert (ranked[:, -1] == -1).all()
  ecpm = scorer(contexts, ranked[:, :3]).ecpm_RC
  assert (np.diff(ecpm, axis=1) <= 0).all()


def test_a_finished_folder_is_kept(trained):
  folder, run, metrics = trained
  with pytest.raises(ConfigError, match="holds a reward model"):
    train_reward(run, folder)
  other = dataclasses.replace(run, model=RewardConfig(width=8))
  with pytest.raises(ConfigError, match="other settings"):
    train_reward(other, folder, resume=True)
  assert train_reward(run, folder, resume=True) == metrics


def test_an_unfinished_folder_is_named(tmp_path):
  with pytest.raises(ConfigError, match="gr4ad reward"):
    open_reward(tmp_path)


def test_bids_fall_back_on_what_conversions_were_worth(tiny_logs):
  learned = np.ones(len(tiny_logs.events.user), bool)
  bids = bids_of(tiny_logs, learned)
  events = tiny_logs.events
  for ad in (0, 7):
    assert bids[ad] == pytest.approx(events.value[events.ad == ad].mean())
  early = events.time_s < np.median(events.time_s)
  mine = early & (events.ad == 7)
  assert bids_of(tiny_logs, early)[7] == pytest.approx(events.value[mine].mean())
  last = events.time_s <= events.time_s.min()  # of the other ads nothing is known then
  some = last & (events.ad >= 0)
  unknown = np.setdiff1d(np.arange(40), events.ad[some])
  np.testing.assert_allclose(bids_of(tiny_logs, last)[unknown], events.value[some].mean())
  given = dataclasses.replace(tiny_logs.ads, bid=np.full(40, 2.5, np.float32))
  assert (bids_of(dataclasses.replace(tiny_logs, ads=given), learned) == 2.5).all()


def test_the_towers_loss_by_hand(logs, maker):
  """A softmax over every ad shown in the batch, each score less the log of the ad's share."""
  make = batch_maker(logs, maker)
  rows = read_impressions(maker, "test")
  some = np.flatnonzero((rows.action_RC >= 1).any(axis=1))[:6]
  batch = make([rows.contexts[r] for r in some], rows.shown_RC[some], rows.action_RC[some])
  rng = np.random.default_rng(0)
  user, ad = rng.normal(size=(6, 3)), rng.normal(size=(*batch.where_BC.shape, 3))
  total, count = match_loss(jnp.float32(user), jnp.float32(ad), batch)
  expected, clicks = 0.0, 0
  for b in range(6):
    score = {
      (i, c): 10 * user[b] @ ad[i, c] - batch.log_share_BC[i, c]
      for i, c in zip(*np.nonzero(batch.where_BC), strict=True)
    }
    norm = np.logaddexp.reduce(list(score.values()))
    for c in np.flatnonzero(batch.click_BC[b] & batch.where_BC[b]):
      expected += norm - score[b, c]
      clicks += 1
  assert (float(total), float(count)) == (pytest.approx(expected, rel=1e-4), clicks)


def test_shares_are_those_of_the_events_learned_from(logs, maker):
  learned = logs.events.time_s < np.median(logs.events.time_s)
  make = reward_batch_maker(logs, RewardConfig(), maker.vocabulary.sizes, train_E=learned)
  shown = np.bincount(logs.events.ad[learned & (logs.events.ad >= 0)], minlength=MARKET.num_ads)
  np.testing.assert_allclose(
    np.exp(make.log_share_A), (shown + 1) / (shown + 1).sum(), rtol=1e-5
  )
