"""The simulated market's truth, budgets and log: market/."""

from tests.mutants.mutant import Mutant

_WORLD, _LOG, _POLICY = "market/world.py", "market/log.py", "market/policy.py"
_TESTS = "market/test_market.py::"
_REVENUE = (_TESTS + "test_expected_revenue_by_brute_force",)

MUTANTS = (
  Mutant(
    "a price that does not fit costs conversions", _WORLD,
    "- PRICE_PULL * misfit_RK", "+ PRICE_PULL * misfit_RK", (_TESTS + "test_rates_by_hand",),
  ),
  Mutant(
    "an ad earns nothing before its launch", _WORLD,
    "  real_RK &= market.launch_A[ad_RK] <= day_R[:, None]\n", "",
    (_TESTS + "test_an_ad_earns_nothing_before_its_launch",),
  ),
  Mutant(
    "an ad that stands twice earns once", _WORLD,
    "np.where(repeats(ranked_RK[rows]), -1, ranked_RK[rows])", "ranked_RK[rows]", _REVENUE,
  ),
  Mutant(
    "so many ads are shown as there are slots", _WORLD,
    "(np.cumsum(may_run, axis=1) <= market.config.slots)",
    "(np.cumsum(may_run, axis=1) < market.config.slots)", _REVENUE,
  ),
  Mutant(
    "budgets are those of a day", _WORLD,
    "today, today_V = day, np.zeros_like(spent_V)", "today, today_V = day, today_V", _REVENUE,
  ),
  Mutant(
    "a share of the traffic has that share of the budget", _WORLD,
    "market.budget_V * traffic_share)", "market.budget_V)", _REVENUE,
  ),
  Mutant(
    "conversions follow clicks", _LOG,
    "conversion_RK = click_RK & (", "conversion_RK = (",
    (_TESTS + "test_what_is_drawn_follows_the_truth",),
  ),
  Mutant(
    "conversions use up the advertiser's budget", _LOG,
    "  np.add.at(spent_V, market.advertiser_A[ad_E], value_E)\n", "",
    (_TESTS + "test_an_advertiser_whose_budget_is_gone_leaves_for_the_rest_of_the_day",),
  ),
  Mutant(
    "the logging policy shows first what it expects most of", _POLICY,
    "np.argsort(-score_RM, axis=1", "np.argsort(score_RM, axis=1",
    (_TESTS + "test_a_ranker_that_does_not_err_shows_the_best_of_its_candidates_first",),
  ),
  Mutant(
    "an ad is not shown twice", _POLICY,
    "    allowed_RM[:, 1:] &= ad_RM[:, 1:] != ad_RM[:, :-1]\n", "",
    (_TESTS + "test_a_ranker_that_does_not_err_shows_the_best_of_its_candidates_first",),
  ),
  Mutant(
    "exploration keeps to budgets", _POLICY,
    "    swap_RK &= open_V[market.advertiser_A[drawn_RK]]\n", "",
    (_TESTS + "test_an_advertiser_whose_budget_is_gone_leaves_for_the_rest_of_the_day",),
  ),
)
