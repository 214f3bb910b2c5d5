"""GPR's Table 3 on numbers that a reader can redo."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import _market, gpr_table3
from experiments.gpr_table3 import (
  ROWS,
  Found,
  Options,
  final_values,
  ranking,
  seed_results,
  summary,
)
from gr4ad_jax.market.world import MarketConfig, truth

MARKET = MarketConfig(
  world="synthetic", num_users=60, num_ads=60, num_advertisers=6, num_categories=4,
  num_contents=30, days=20,
)


def test_the_order_of_candidates_by_hand():
  """eCPM 1, 3, 2 in the order of log P: two of three pairs stand wrongly; a tie counts half."""
  ecpm_RK = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 9.0]])
  logp_RK = np.array([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
  there_RK = np.array([[True, True, True], [True, True, False]])
  second = 1 / np.log2(3)
  got = ranking(ecpm_RK, logp_RK, there_RK)  # the second request has no unequal pair
  assert got["ndcg"] == pytest.approx((1 + 3 * second + 2 / 2) / (3 + 2 * second + 1 / 2))
  assert got["opr"] == pytest.approx(1 / 3)
  tied = ranking(ecpm_RK[:1], np.array([[-1.0, -1.0, -3.0]]), there_RK[:1])
  assert tied["opr"] == pytest.approx((0.5 + 0 + 1) / 3)


def test_final_values_lie_between_the_least_and_the_largest_of_all_rows():
  """1 to 5 over both rows: 1, 2, 3 are 0, 1/4, 1/2."""
  got = final_values({
    "mtp": np.array([[1.0, 2.0], [3.0, np.nan]]), "hepo": np.array([[5.0, 1.0], [3.0, 3.0]]),
  })
  assert got["mtp"] == pytest.approx({"avg_final_value": 0.25, "max_final_value": 0.375})
  assert got["hepo"] == pytest.approx({"avg_final_value": 0.5, "max_final_value": 0.75})


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A made-up market whose final ranker knows the truth."""
  folder = tmp_path_factory.mktemp("table3")
  market, data = _market.prepared_market(folder, MARKET)
  test = _market.open_market_test(market, data, "test", num_revenue=40, num_recall=1)

  def rank(contexts, ad_RK):
    ecpm_RK = truth(market, test.requests, ad_RK).ecpm
    return np.take_along_axis(ad_RK, np.argsort(-ecpm_RK, axis=1, kind="stable"), axis=1)

  activity_R = gpr_table3._activity(data, np.array([c.user for c in test.contexts]))
  return gpr_table3.Shared(
    Options(), data, data, SimpleNamespace(rank=rank), test, activity_R
  )


def test_better_candidates_are_worth_more_in_every_part_of_the_table(shared):
  test = shared.test
  logp_RK = -np.arange(20.0)[None] + np.zeros((40, 1))
  lists = {"mtp": test.best_RK[:, ::-1][:, :20], "vaft": test.best_RK[:, 20:40],
           "dpo": test.best_RK[:, 10:30], "hepo": test.best_RK[:, :20],
           "arr": test.best_RK[:, 1:21]}
  found = {name: Found(lists[name], logp_RK) for name in ROWS}
  got = seed_results(found, shared)
  assert got["hepo/ndcg"] == pytest.approx(1) and got["hepo/opr"] > 0.99 > 0.5 > got["mtp/opr"]
  for metric in ("avg_final_value", "max_final_value", "revenue@10"):
    assert got[f"hepo/{metric}"] > got[f"dpo/{metric}"] > got[f"vaft/{metric}"]
  # The market's own account of the same lists.
  assert got["hepo/revenue@10"] == pytest.approx(test.arm_revenue(test.best_RK[:, :10]), rel=1e-5)
  share = np.bincount(shared.activity_R, minlength=5) / 40
  assert (share > 0).all()
  by_activity = sum(share[i] * got[f"hepo/q{i + 1}/revenue@10"] for i in range(5))
  assert by_activity == pytest.approx(got["hepo/revenue@10"])
  parts = got["hepo/new/revenue@10"] + got["hepo/old/revenue@10"]
  assert parts == pytest.approx(got["hepo/revenue@10"]) and got["hepo/new/revenue@10"] > 0
  results = summary([got, {name: 1.01 * number for name, number in got.items()}])
  table = gpr_table3.table(results)
  assert "| hepo | " in table and "hepo over dpo" in table
  assert gpr_table3.plots(results).keys() == {"gpr_table3"}


def test_rows_are_compared_seed_by_seed():
  lists = ((0.1, 0.3, 2.0, 3.0), (0.3, 0.5, 4.0, 6.0))
  by_seed = [
    {f"{row}/ndcg": mtp for row in ROWS} | {f"{row}/revenue@10": paid for row in ROWS}
    | {"hepo/ndcg": hepo, "hepo/revenue@10": more} for mtp, hepo, paid, more in lists
  ]
  got = summary(by_seed)
  assert got["hepo/ndcg"] == pytest.approx(0.4) and got["hepo/ndcg/seed1"] == 0.5
  for end in ("", "/ci_low", "/ci_high"):
    assert got[f"hepo_over_mtp/ndcg{end}"] == pytest.approx(0.2)
    assert got[f"hepo_over_mtp/revenue@10{end}"] == pytest.approx(0.5)


def test_each_row_is_of_its_stage_and_begins_with_the_one_before():
  configs = {name: gpr_table3._config(name, Options(), 1) for name in ROWS}
  assert [config.stage for config in configs.values()] == ["mtp", "vaft", "dpo", "hepo", "hepo"]
  assert [config.train.num_steps for config in configs.values()] == [800, 200, 400, 400, 400]
  assert [c.policy.rehearsal_share for c in configs.values()] == [0, 0, 0, 0, 0.3]
  assert {config.train.seed for config in configs.values()} == {1}
  assert [before for before, _ in ROWS.values()] == ["", "mtp", "vaft", "vaft", "vaft"]
