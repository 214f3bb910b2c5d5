"""Trained baselines: sequential/."""

from tests.mutants.mutant import Mutant

_SASREC, _RANKER, _RUN = "sequential/sasrec.py", "sequential/ranker.py", "sequential/run.py"
_TESTS, _RUNS = "sequential/test_sasrec.py::", "sequential/test_run.py::"

MUTANTS = (
  Mutant(
    "the newest ad of a history stands in the last place", "sequential/batch.py",
    "newest_first_BT[:, ::-1]", "newest_first_BT",
    (_TESTS + "test_a_history_stands_in_order_with_the_newest_ad_last",),
  ),
  Mutant(
    "a drawn ad counts by how rarely it is drawn", _SASREC,
    "drawn_score_BN - log_rate_N[None]", "drawn_score_BN + log_rate_N[None]",
    (_TESTS + "test_sampled_softmax_by_hand",),
  ),
  Mutant(
    "a drawn ad that is the target itself does not count again", _SASREC,
    "jnp.where(itself_BCN, NEG_INF, others_BN[:, None])", "others_BN[:, None] + 0 * itself_BCN",
    (_TESTS + "test_the_sampled_sum_has_no_bias_and_its_gradient_nears_the_full_one",),
  ),
  Mutant(
    "padding of targets costs nothing", _SASREC,
    "jnp.where(target_BC >= 0, -logp_BC, 0.0)", "-logp_BC",
    (_TESTS + "test_full_softmax_by_hand",),
  ),
  Mutant(
    "what a user had seen stands in no list of prospecting", _RANKER,
    "seen_BA[row, seen.before(example.user, example.time_s)] = True",
    "seen_BA[row, seen.before(example.user, 0)] = True",
    (_TESTS + "test_lists_are_those_of_brute_force[sasrec]",),
  ),
  Mutant(
    "a refit learns from the validation requests, too", _RUN,
    "for records in (source, held_out)]", "for records in (source, source)]",
    (_RUNS + "test_a_refit_learns_from_validation_too_and_is_judged_on_test_alone",),
  ),
  Mutant(
    "a baseline of other data is refused", "api.py",
    'if not settings.get("fingerprint", "").startswith(data.fingerprint):', "if not settings:",
    (_RUNS + "test_other_data_and_other_systems_are_refused",),
  ),
)
