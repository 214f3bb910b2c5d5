"""Table 1's summary, verdict and metrics on numbers that a reader can redo."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import _market, table1_ablation
from gr4ad_jax.config import override_all
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.market.log import arrivals
from gr4ad_jax.market.world import MarketConfig, best_ads, expected_revenue, truth

SMALL = MarketConfig(
  world="synthetic", num_users=200, num_ads=80, num_advertisers=8, num_categories=5,
  num_contents=40, days=20, sessions_per_day=1.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("market")


@pytest.fixture(scope="module")
def test_requests(folder):
  market, data = _market.prepared_market(folder, SMALL)
  again, _ = _market.prepared_market(folder, SMALL)
  assert np.array_equal(market.bid_A, again.bid_A)
  with pytest.raises(ValueError, match="another market"):
    _market.prepared_market(folder, dataclasses.replace(SMALL, seed=5))
  return _market.open_market_test(market, data, "test", num_revenue=50, num_recall=40)


class Oracle:
  """A final ranker that knows the truth."""

  def __init__(self, test):
    self.test = test

  def __call__(self, contexts, ad_RK):
    return SimpleNamespace(ecpm_RC=truth(self.test.market, self.test.requests, ad_RK).ecpm)

  def rank(self, contexts, ad_RK):
    ecpm_RK = self(contexts, ad_RK).ecpm_RC
    return np.take_along_axis(ad_RK, np.argsort(-ecpm_RK, axis=1, kind="stable"), axis=1)


def test_the_scene_of_a_request_is_read_back(test_requests):
  """The market is asked about the same user, time and scene as the model."""
  events = {  # request time and user -> scene, from the simulation itself
    (int(u), int(t)): int(s)
    for day in range(SMALL.days)
    for u, t, s in zip(*arrivals(test_requests.market, day), strict=True)
  }
  r = test_requests.requests
  same = [events[(u, t)] == s for u, t, s in zip(r.user_R.tolist(), r.time_s_R.tolist(),
                                                 r.scene_R.tolist(), strict=True)]
  assert np.mean(same) > 0.95  # two requests of one user can fall into one second


def test_metrics_of_the_best_lists(test_requests):
  test = test_requests
  targets = np.full((len(test.held_out), 50), -1, np.int32)
  targets[:, : test.targets.target_RC.shape[1]] = test.targets.target_RC
  got = _market.list_metrics(test, Oracle(test), test.best_RK, targets)
  assert got["ndcg_ecpm@50"] == pytest.approx(1.0)
  assert got["recall@50"] == 1.0
  best = best_ads(test.market, test.requests, 50)
  assert got["whole_revenue"] == pytest.approx(
    expected_revenue(test.market, test.requests, best,
                     traffic_share=test.traffic_share).revenue_R.mean()
  )
  earns_RK = truth(test.market, test.requests, best).ecpm / 1000
  may_RK = [open_V[test.market.advertiser_A[ads]]
            for open_V, ads in zip(test.open_RV, best, strict=True)]
  four = [earns[may][:4].sum() for earns, may in zip(earns_RK, may_RK, strict=True)]
  assert got["revenue@50"] == pytest.approx(np.mean(four), rel=1e-5)
  assert got["revenue@10"] <= got["revenue@50"]
  worst = _market.list_metrics(test, Oracle(test), test.best_RK[:, ::-1], -np.ones_like(targets))
  assert worst["recall@50"] == 0 and worst["ndcg_ecpm@50"] < 1
  assert worst["own_revenue"] < worst["revenue@50"] == pytest.approx(got["revenue@50"])


def test_a_score_counts_as_much_as_its_weight(test_requests):
  """At 0 the ranker decides alone, at a huge weight the score, in between their weighed sum."""
  test, oracle = test_requests, Oracle(test_requests)
  ad_RK = test.best_RK[:, ::-3].copy()  # worst first
  ad_RK[:, -1] = -1
  score_RK = -np.arange(ad_RK.shape[1], dtype=np.float32) + np.zeros(ad_RK.shape, np.float32)
  weights = (0.0, 0.3, 1e9)
  found = _market.Found(ad_RK, score_RK)
  got = _market.mixed_revenue(test, oracle, found, {6: weights, 50: weights})
  alone, mixed, own = got[50]
  assert alone == pytest.approx(test.arm_revenue(oracle.rank(test.contexts, ad_RK)))
  assert own == pytest.approx(test.arm_revenue(ad_RK))
  log_ecpm_RK = np.log(oracle(test.contexts, ad_RK).ecpm_RC[:, :-1])
  rows = [
    [ad for _, ad in sorted(zip(-(log_ecpm + 0.3 * score), ads, strict=True))]
    for log_ecpm, score, ads in zip(log_ecpm_RK, score_RK[:, :-1], ad_RK[:, :-1], strict=True)
  ]
  assert mixed == pytest.approx(test.arm_revenue(np.array(rows, np.int32)))
  assert own < mixed < alone
  assert got[6][2] == pytest.approx(test.arm_revenue(ad_RK[:, :6]))


def test_advertisers_are_out_once_the_log_has_spent_their_budget(folder, test_requests):
  test, market = test_requests, test_requests.market
  logs = read_logs(folder / "data" / "logs")
  budget_V = np.full(len(market.budget_V), 0.05)
  budget_V[0] = 0
  open_RV = _market.open_advertisers(
    dataclasses.replace(market, budget_V=budget_V), logs, test.requests
  )
  events = logs.events
  for row in range(0, len(open_RV), 7):
    now_s, spent_V = int(test.requests.time_s_R[row]), np.zeros(len(budget_V))
    for ad, value, time_s in zip(events.ad, events.value, events.time_s, strict=True):
      if ad >= 0 and time_s // 86_400 == now_s // 86_400 and time_s < now_s:
        spent_V[market.advertiser_A[int(logs.ads.ad_id[ad])]] += value
    assert (open_RV[row] == (spent_V < budget_V)).all()
  assert not open_RV[:, 0].any() and 0 < open_RV[:, 1:].mean() < 1


def test_rows_differ_in_copying_and_in_steps_as_they_say():
  options, rows = table1_ablation.Options(), table1_ablation.ROWS
  first = {
    name: table1_ablation._config(row, options, 3, stage=1)
    for name, row in rows.items() if name != "dlrm"
  }
  assert [name for name, config in first.items() if not config.model.copy_path] == ["gr4ad_paper"]
  assert first["gr4ad"].train.num_steps == options.settings.first_steps
  # 600 steps of 256 requests are 2,400 of 64, of which the second stage takes 250.
  assert first["gr4ad_long"].train.num_steps == 2_150
  assert table1_ablation._config(rows["gr4ad_long"], options, 3, stage=2).train.num_steps == 250
  paper = override_all(options, {"model.copy_path": "false"})
  assert not table1_ablation._config(rows["gr4ad"], paper, 3, stage=1).model.copy_path


def found(**revenue):
  return {
    name: {
      "revenue@10": values, "revenue@50": [2.0] * len(values), "recall@50": [0.8] * len(values),
      "mixed_revenue@10": values, "mixed_revenue@50": [3.0] * len(values),
    }
    for name, values in revenue.items()
  }


def test_lifts_are_paired_by_seed():
  results = table1_ablation.summary(found(dlrm=[1.0, 2.0, 4.0], vsl=[1.1, 2.2, 4.4],
                                          rspo=[1.21, 2.42, 4.84]))
  assert results["vsl/revenue_lift"] == pytest.approx(0.1)
  assert results["vsl/revenue_lift_ci_low"] == pytest.approx(0.1)
  assert results["rspo_over_vsl/revenue_lift"] == pytest.approx(0.1)
  assert results["dlrm/revenue_lift"] == results["vsl/revenue_lift@50"] == 0


def test_lost_recall_fails_loudly(monkeypatch, tmp_path, capsys):
  kept = {"vsl/recall@50": 0.8, "rspo/recall@50": 0.793, "uvr/recall@50": 0.81}
  assert table1_ablation.check(kept) == []
  lost = kept | {"rspo/recall@50": 0.79}
  assert "rspo" in table1_ablation.check(lost)[0]
  for numbers, code in ((kept, 0), (lost, 1)):
    (tmp_path / "r.json").write_text(str(numbers).replace("'", '"'))
    monkeypatch.setattr(sys, "argv", ["x", "--check", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as stop:
      table1_ablation.main()
    assert stop.value.code == code
  assert "below" in capsys.readouterr().out


def test_the_table_shows_what_is_there():
  results = table1_ablation.summary(
    {name: metrics | {"own_revenue": [1.0] * 3, "ndcg_ecpm@50": [0.5] * 3} for name, metrics in
     found(dlrm=[1.0, 1.1, 0.9], vsl=[1.2, 1.3, 1.1], rspo=[1.3, 1.4, 1.2],
           uvr=[1.4, 1.4, 1.3]).items()}
  ) | {"vsl/qps_ratio": 0.75}
  text = table1_ablation.table(results)
  assert "| + VSL | +20" in text and "-25% | -25% |" in text
  assert "rspo over vsl" in text and "RSPO and UVR keep 99%" in text
  assert set(table1_ablation.plots(results)) == {"table1"}
