"""The reward model, its towers and its calibration: ranker/."""

from tests.mutants.mutant import Mutant

_REWARD, _DATA = "ranker/reward.py", "ranker/data.py"
_TESTS = "ranker/test_reward_model.py::"
_TOWERS = (_TESTS + "test_the_towers_learn_from_their_own_loss_alone",)
_CALIBRATED = (_TESTS + "test_rates_are_calibrated_on_validation_clicks_on_all_that_is_shown",)

MUTANTS = (
  Mutant(
    "no gradient flows through the towers' match", "ranker/reward_model.py",
    "jax.lax.stop_gradient(match_scores(user_BD, ad_BCD))", "match_scores(user_BD, ad_BCD)",
    _TOWERS,
  ),
  Mutant(
    "conversions are judged among clicked ads", "ranker/reward_model.py",
    "jnp.sum(jnp.where(clicked_BC, conversion_BC, 0))",
    "jnp.sum(jnp.where(batch.where_BC, conversion_BC, 0))",
    (_TESTS + "test_loss_counts_conversions_of_clicked_ads_alone",),
  ),
  Mutant(
    "padding of a history is not looked at", "ranker/reward_model.py",
    "  score_BCN = jnp.where(there_BN[:, None], score_BCN, NEG_INF)\n", "",
    (_TESTS + "test_padding_changes_nothing",),
  ),
  Mutant(
    "padding is no part of a history's mean", "ranker/batch.py",
    "jnp.sum(jnp.where(there_BN[..., None], x_BND, 0), axis=1)", "jnp.sum(x_BND, axis=1)",
    (_TESTS + "test_padding_changes_nothing",),
  ),
  Mutant(
    "an ad that is shown often is not held to be liked for it", "ranker/two_tower.py",
    "score_BN = score_BN - batch.log_share_BC", "score_BN = score_BN + batch.log_share_BC",
    (_TESTS + "test_the_towers_loss_by_hand",),
  ),
  Mutant(
    "the nearest ads come first", "ranker/two_tower.py",
    'np.argsort(-np.take_along_axis(score_BA, top_BK, axis=1), axis=1, kind="stable")',
    'np.argsort(np.take_along_axis(score_BA, top_BK, axis=1), axis=1, kind="stable")',
    ("gr4ad/test_candidates.py::test_nearest_ads_by_brute_force",),
  ),
  Mutant(
    "rates are calibrated on validation", _REWARD,
    '_calibrate(scorer, data.splits["validation"])', '_calibrate(scorer, data.splits["train"])',
    _CALIBRATED,
  ),
  Mutant(
    "conversions are calibrated among clicked ads", _REWARD,
    "fit_platt(conversion_RC[clicked_RC], converted_RC[clicked_RC])",
    "fit_platt(conversion_RC[shown_RC], converted_RC[shown_RC])", _CALIBRATED,
  ),
  Mutant(
    "a reward model is judged on test, by calibrated rates", _REWARD,
    'metrics = judge(scorer, data.splits["test"])',
    'metrics = judge(scorer, data.splits["validation"])', _CALIBRATED,
  ),
  Mutant(
    "eCPM is a thousand times bid, pCTR and pCVR", _REWARD,
    "1000 * self.bid_A[np.maximum(ad_RC, 0)] * click_RC * conversion_RC",
    "1000 * self.bid_A[np.maximum(ad_RC, 0)] * click_RC",
    (_TESTS + "test_a_trained_model_knows_the_market",),
  ),
  Mutant(
    "the ranker puts the highest eCPM first", _REWARD,
    'np.argsort(-ecpm_RC, axis=1, kind="stable")', 'np.argsort(ecpm_RC, axis=1, kind="stable")',
    (_TESTS + "test_ranking_orders_by_ecpm_and_keeps_padding_last",),
  ),
  Mutant(
    "ads are numbered from one, as row 0 stands for none", _DATA,
    "self.ad_field_AX[ad_BC + 1]", "self.ad_field_AX[ad_BC]",
    (_TESTS + "test_fields_are_numbered_from_one_and_nothing_is_zero",),
  ),
  Mutant(
    "a content tells of the ad of its product", _DATA,
    "    1 + contents.ad,\n", "    np.maximum(contents.ad, 0),\n",
    (_TESTS + "test_fields_are_numbered_from_one_and_nothing_is_zero",),
  ),
  Mutant(
    "bids are those of conversions that may be learned from", _DATA,
    "rows = np.flatnonzero(train_E & (events.ad >= 0)", "rows = np.flatnonzero((events.ad >= 0)",
    (_TESTS + "test_bids_fall_back_on_what_conversions_were_worth",),
  ),
  Mutant(
    "an ad without conversions takes the mean of all", _DATA,
    "value_A / np.maximum(count_A, 1), overall)", "value_A / np.maximum(count_A, 1), 0)",
    (_TESTS + "test_bids_fall_back_on_what_conversions_were_worth",),
  ),
  Mutant(
    "shares are those of events that may be learned from", _DATA,
    "shown = logs.events.ad[train_E & (logs.events.ad >= 0)]",
    "shown = logs.events.ad[logs.events.ad >= 0]",
    (_TESTS + "test_shares_are_those_of_the_events_learned_from",),
  ),
  Mutant(
    "calibration errors add up however they point", "ranker/calibration.py",
    "abs(p_N[part].sum() - label_N[part].sum())", "(p_N[part].sum() - label_N[part].sum())",
    (_TESTS + "test_calibration_error_by_hand",),
  ),
  Mutant(
    "a wrong prediction may be moved, not only stretched", "ranker/calibration.py",
    "LogisticRegression(C=np.inf, tol=1e-8)",
    "LogisticRegression(C=np.inf, tol=1e-8, fit_intercept=False)",
    (_TESTS + "test_platt_scaling_finds_the_scaling_that_was_applied",),
  ),
)
