"""Metrics, intervals and baselines: evaluation/."""

from tests.mutants.mutant import Mutant

_RANKING, _BASELINES, _PAIRS, _QUESTION, _RIVALS = (
  "search/ranking.py", "evaluation/baselines.py", "data/interactions.py",
  "evaluation/question.py", "evaluation/rivals.py",
)
_COUNTER, _COUNTED = "evaluation/counter.py", "evaluation/test_counter.py::test_by_hand"
_METRICS, _FLOORS, _RULE = (
  "search/test_ranking.py::", "evaluation/test_baselines.py::", "evaluation/test_rule.py::"
)
_WHOLE = ("test_a_fourth_system.py::test_is_evaluated_beside_the_baselines",)

MUTANTS = (
  Mutant(
    "baselines are tuned on validation requests", _RIVALS,
    'validation = eval_requests(group_requests(read_split(examples, "validation")))',
    'validation = eval_requests(group_requests(read_split(examples, "test")))', _WHOLE,
  ),
  Mutant(
    "baselines count events over all users up to validation", _RIVALS,
    "train_end_s=config.validation_start_s if by_time",
    "train_end_s=config.test_start_s if by_time", _WHOLE,
  ),
  Mutant(
    "a difference is ours less the baseline's", "evaluation/evaluate.py",
    "ours_RK, list_RK, requests=requests", "list_RK, ours_RK, requests=requests",
    _WHOLE,
  ),
  Mutant(
    "targets of one request are counted together", "search/held_out.py",
    "groups.setdefault(example.request, [])", "groups.setdefault(len(groups), [])",
    ("evaluation/test_requests.py::test_parts_of_a_request_are_judged_together",),
  ),
  Mutant(
    "an organic engagement is none with an ad", "data/interactions.py",
    "events.ad[event_N] >= 0", "events.ad[event_N] >= -1",
    ("evaluation/test_requests.py::test_baselines_see_engagements_with_products_of_ads",),
  ),
  Mutant(
    "recall is a share of the request's targets", _RANKING,
    "recall_R = hit_RC.sum(axis=1) / np.maximum(target_RC.sum(axis=1), 1)",
    "recall_R = hit_RC.any(axis=1) * 1.0", (_METRICS + "test_by_hand",),
  ),
  Mutant(
    "DCG is divided by that of the best list of as many targets", _RANKING,
    "best_K[np.clip(target_RC.sum(axis=1), 1, k) - 1]", "best_K[-1]", (_METRICS + "test_by_hand",),
  ),
  Mutant(
    "new targets are those of users who never met the product", _RANKING,
    "real_RC & requests.new_RC)", "real_RC & ~requests.new_RC)", (_METRICS + "test_by_hand",),
  ),
  Mutant(
    "a bootstrap draws users, who bring all of their requests", _RANKING,
    "users, user_R = np.unique(requests.user_R[keep_R], return_inverse=True)",
    "users, user_R = np.unique(np.arange(keep_R.sum()), return_inverse=True)",
    (_METRICS + "test_one_user_has_an_interval_without_width",),
  ),
  Mutant(
    "intervals hold 95 in a hundred", _RANKING,
    "np.percentile(values_X, (2.5, 97.5))", "np.percentile(values_X, (5, 95))",
    (_METRICS + "test_interval_of_single_requests_is_that_of_a_mean",),
  ),
  Mutant(
    "both methods of a difference see the same resampled users", _RANKING,
    "rng = np.random.default_rng(0)", "rng = np.random.default_rng()",
    (_METRICS + "test_requests_of_a_user_stay_together",),
  ),
  Mutant(
    "counts over users end where the user's time ends", _PAIRS,
    "past_E = self.time_s_E < end_s_U[self.user_E]",
    "past_E = self.time_s_E <= end_s_U[self.user_E]", (_FLOORS + "test_popularity_by_hand",),
  ),
  Mutant(
    "a baseline's history ends strictly before the request", _PAIRS,
    "stop_R = np.searchsorted(key_E, user_R * span + (time_s_R - origin))",
    'stop_R = np.searchsorted(key_E, user_R * span + (time_s_R - origin), side="right")',
    (_FLOORS + "test_the_future_changes_nothing",),
  ),
  Mutant(
    "older events count less", _PAIRS,
    "np.exp2((time_s - now_s) / half_life_s)", "np.exp2((now_s - time_s) / half_life_s)",
    (_FLOORS + "test_own_history_by_hand",),
  ),
  Mutant(
    "an ad does not follow from itself in one basket", _PAIRS,
    "  pairs_AA.setdiag(0)\n", "", (_FLOORS + "test_pairs_equal_plain_loops",),
  ),
  Mutant(
    "baskets of two users never pair", _PAIRS,
    "np.flatnonzero(user_G[step:] == user_G[:-step])",
    "np.flatnonzero(user_G[step:] == user_G[step:])", (_FLOORS + "test_pairs_equal_plain_loops",),
  ),
  Mutant(
    "what trends ends with the hour before the request's", _PAIRS,
    "ends_D = np.searchsorted(period_N, period_D)",
    'ends_D = np.searchsorted(period_N, period_D, side="right")',
    (_RULE + "test_nothing_of_the_request_s_own_hour_or_later_trends",),
  ),
  Mutant(
    "engagements fade while hours go by", _PAIRS,
    "score_A *= 0.5 **", "score_A += 0.5 **", (_RULE + "test_shares_by_hand",),
  ),
  Mutant(
    "lists for prospecting hold nothing that was seen without promotion", _QUESTION,
    "half_life_s=None,\n    organic_weight=1.0,", "half_life_s=None,\n    organic_weight=0.0,",
    (_RULE + "test_lists_without_what_was_seen",),
  ),
  Mutant(
    "for prospecting only new targets choose the settings", "evaluation/baseline_tuning.py",
    "judged = only_new(requests) if question.without_seen else requests", "judged = requests",
    (_RULE + "test_tuning_for_new_targets_sees_no_others",),
  ),
  Mutant(
    "leave-one-out counts no validating request", _RIVALS,
    "else end_s_of_users(history, validation, None)", "else None",
    ("evaluation/test_counter.py::test_leave_one_out_counts_what_was_trained_on",),
  ),
  Mutant(
    "the counter's history ages by steps", _PAIRS,
    "organic_weight) * step_decay**step_H", "organic_weight) * step_decay",
    (_COUNTED, "evaluation/test_counter.py::test_only_the_latest_baskets_count"),
  ),
  Mutant(
    "pairs of more steps count less", _PAIRS,
    "step_decay ** (later_P - earlier_P - 1.0)", "step_decay ** (later_P * 0.0)", (_COUNTED,),
  ),
  Mutant(
    "the second hop shares what leads to the ad between", _COUNTER,
    "pairs_AA[at : at + _ROWS] @ share_AA", "share_AA[at : at + _ROWS] @ share_AA", (_COUNTED,),
  ),
  Mutant(
    "content of ads that nobody comes to counts little", _COUNTER,
    "target_A / np.maximum(target_A + settings.content_shrinkage, 1e-9)", "target_A >= 0",
    (_COUNTED,),
  ),
  Mutant(
    "trees train on requests before those they are judged on", _RIVALS,
    'eval_requests(group_requests(read_split(examples, "train")))',
    'eval_requests(group_requests(read_split(examples, "test")))',
    ("evaluation/test_trees.py::test_trees_learn_from_training_requests",),
  ),
  Mutant(
    "of co-occurring ads the closest are kept", _BASELINES,
    "row[np.argpartition(row, -keep)[:-keep]] = 0", "row[np.argpartition(row, -keep)[-keep:]] = 0",
    (_FLOORS + "test_only_the_closest_neighbours_are_kept",),
  ),
  Mutant(
    "equal scores follow in the order of popularity", _QUESTION,
    "tie_A[popular_A] = np.arange(num_ads)[::-1]", "tie_A[popular_A] = np.arange(num_ads)",
    (_FLOORS + "test_own_history_by_hand",),
  ),
  Mutant(
    "leave-one-out counts a user's events up to the own request", _QUESTION,
    "    np.minimum.at(end_s_U, requests.user_R, requests.time_s_R)\n", "    pass\n",
    (_FLOORS + "test_leave_one_out_ends_at_the_own_request",),
  ),
  Mutant(
    "tuning keeps what helps", "evaluation/baseline_tuning.py",
    "(trial_score := score(trial)) > best", "(trial_score := score(trial)) < best",
    (_FLOORS + "test_tuning_finds_what_helps",),
  ),
)
