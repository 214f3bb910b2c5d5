"""Cuts, histories, values and batches: data/, and gr4ad/ where it reads them."""

from tests.mutants.mutant import Mutant

_SEQUENCES, _SPLITS = "data/sequences.py", "data/splits.py"
_HAND, _PIPELINE = "data/test_sequences.py::", "data/test_pipeline.py::"
_NEAR = "data/test_neighbours.py::test_"
_PARTS = "data/test_cutting.py::"
_TASTES, _TABLES, _LIKE = "data/tastes.py", "data/taste_tables.py", "data/test_tastes.py::test_"

MUTANTS = (
  Mutant(
    "a request reads the newest table that was there", _TASTES,
    'np.searchsorted(tastes.made_s_D, now_s_B, side="right")[:, None] - 1',
    "np.full((len(now_s_B), 1), len(tastes.made_s_D) - 1)",
    (_LIKE + "the_likeness_by_hand",),
  ),
  Mutant(
    "a rare ad tells more of a user", _TASTES,
    "np.log1p(count_BP) * of(tastes.weight_DA, met_BP)",
    "np.log1p(count_BP)", (_LIKE + "the_likeness_by_hand",),
  ),
  Mutant(
    "a table counts what was before it was made", _TABLES,
    "rows = table_C <= table", "rows = table_C <= table + 1",
    (_LIKE + "a_table_knows_nothing_of_what_comes_after_it",),
  ),
  Mutant(
    "an engagement as a table is made comes too late for it", _TABLES,
    'logs.events.time_s[event_N], side="right")', 'logs.events.time_s[event_N], side="left")',
    (_LIKE + "an_engagement_as_a_table_is_made_is_not_in_it",),
  ),
  Mutant(
    "ads of few users are not known", _TABLES,
    "weight_A[users_A < LEAST_USERS] = 0", "", (_LIKE + "few_users_and_none_give_no_vectors",),
  ),
  Mutant(
    "some users stand for all", _TABLES,
    "chosen_N = user_N % every == 0", "chosen_N = user_N >= 0",
    (_LIKE + "parts_of_a_log_add_up_and_some_users_stand_for_all",),
  ),
  Mutant(
    "a request in the second of a cut belongs to what begins there", _SPLITS,
    'np.searchsorted(cuts, first_s_R, side="right")',
    'np.searchsorted(cuts, first_s_R, side="left")',
    (_HAND + "test_a_request_in_the_second_of_a_cut_belongs_to_what_begins_there",),
  ),
  Mutant(
    "the last day ends after the log's last second", _SPLITS,
    "end_s = last_s + 1", "end_s = last_s",
    (_HAND + "test_days_are_counted_back_from_the_end_of_the_last_second",),
  ),
  Mutant(
    "validation comes before the test, and is none of training", _SPLITS,
    "train_start_s = validation_start_s - train_days", "train_start_s = test_start_s - train_days",
    (_HAND + "test_days_are_counted_back_from_the_end_of_the_last_second",),
  ),
  Mutant(
    "leave-one-out tests on the last request and validates on the one before", _SPLITS,
    "split_R[ordered[last]], split_R[ordered[last - 1]] = 2, 1",
    "split_R[ordered[last]], split_R[ordered[last - 2]] = 2, 1",
    (_HAND + "test_leave_one_out_holds_out_the_last_two_requests",),
  ),
  Mutant(
    "a request begins with its first event", _SPLITS,
    "np.minimum.at(first_s_R, events.request, events.time_s)",
    "first_s_R[events.request] = events.time_s",
    (_HAND + "test_a_request_is_as_old_as_its_first_event",),
  ),
  Mutant(
    "a history ends strictly before its request", _SEQUENCES,
    "num_ads = int(np.searchsorted(self.ad_time_s, now_s))",
    'num_ads = int(np.searchsorted(self.ad_time_s, now_s, side="right"))',
    (_HAND + "test_history_holds_distinct_items_before_the_request",),
  ),
  Mutant(
    "the organic history ends strictly before its request", _SEQUENCES,
    "num_organics = int(np.searchsorted(self.organic_time_s, now_s))",
    'num_organics = int(np.searchsorted(self.organic_time_s, now_s, side="right"))',
    (_HAND + "test_what_is_met_in_the_second_of_a_request_is_no_history",),
  ),
  Mutant(
    "a user's past revenue is that before the request", _SEQUENCES,
    "float(past.ad_value.sum())", "float(self.ad_value.sum())",
    (_HAND + "test_history_holds_distinct_items_before_the_request",),
  ),
  Mutant(
    "the limit keeps what was met last", _SEQUENCES,
    'order = np.argsort(last, kind="stable")[:limit]',
    'order = np.argsort(-last, kind="stable")[:limit]',
    (_HAND + "test_limits_cut_histories_and_split_targets",),
  ),
  Mutant(
    "a target is new where its product was met in this request first", _SEQUENCES,
    "new = seen_s[np.searchsorted(seen, target)] >= now_s",
    "new = seen_s[np.searchsorted(seen, target)] > now_s",
    (_HAND + "test_targets_are_merged_and_marked_new",),
  ),
  Mutant(
    "a target has the deepest action of its request", _SEQUENCES,
    "np.maximum.at(action, inverse, events.action[mine])",
    "action[inverse] = events.action[mine]", (_HAND + "test_targets_are_merged_and_marked_new",),
  ),
  Mutant(
    "a target has the largest eCPM of its request", _SEQUENCES,
    "np.fmax.at(ecpm, inverse, events.ecpm[mine])", "ecpm[inverse] = events.ecpm[mine]",
    (_HAND + "test_a_target_has_the_largest_ecpm_of_its_request",),
  ),
  Mutant(
    "feature values are those of training requests", _SEQUENCES,
    "learned_E = split_R[events.request] == 0", "learned_E = split_R[events.request] >= 0",
    (_HAND + "test_values_that_only_held_out_requests_have_are_unknown",),
  ),
  Mutant(
    "counts are in half octaves", _SEQUENCES,
    "np.floor(2 * np.log2(np.maximum(count, 1)) + 1e-6)",
    "np.floor(np.log2(np.maximum(count, 1)) + 1e-6)",
    (_HAND + "test_buckets_are_half_octaves",),
  ),
  Mutant(
    "examples of a part have the request numbers of the whole log", "data/cutting.py",
    "request=example.request + part.first_request", "request=example.request",
    (_PARTS + "test_parts_give_the_examples_of_the_whole_log",),
  ),
  Mutant(
    "only what training requests were worth fits the values", "data/cutting.py",
    'if name == "train":', "if True:",
    (_PARTS + "test_parts_give_the_examples_of_the_whole_log",),
  ),
  Mutant(
    "training events are none of validation's or the test's time", "data/examples.py",
    "return events.time_s < end_s",
    "return np.ones(len(events.time_s), bool)",
    (_PARTS + "test_parts_give_the_examples_of_the_whole_log",),
  ),
  Mutant(
    "nothing that follows a held-out request is learned from", "data/examples.py",
    "return learned_E & (events.time_s <= held_s_U[events.user])", "return learned_E",
    (_HAND + "test_the_end_of_an_earlier_request_is_not_learned_from_either",),
  ),
  Mutant(
    "what is shown after a held-out request is only history", _SPLITS,
    "    split_R[first_s_R >= held_s_U[user_R]] = -1\n", "",
    (_HAND + "test_what_follows_a_held_out_request_is_not_learned_from",),
  ),
  Mutant(
    "an organic event is an engagement with its product, a view of an ad is none",
    "data/engagements.py", "((events.ad < 0) | engaged_with_ad(events))", "True",
    ("embedding/test_cooccurrence.py::"
     "test_clicks_conversions_and_organic_events_of_a_promoted_product_are_interactions",),
  ),
  Mutant(
    "an hour's lists know nothing of the hour", "data/trending.py",
    "before = slice(bounds[row - 1], bounds[row])",
    "before = slice(bounds[row - 1], [*bounds, len(counts.ad)][row + 1])",
    ("data/test_trending.py::test_shares_decay_and_leave_out_the_hour_itself",),
  ),
  Mutant(
    "an hour's shares know nothing of the hour", "data/shortlist.py",
    "share_key(ad, now)) - 1", "share_key(ad, now + 1)) - 1",
    ("data/test_shortlist.py::test_shares_count_what_came_before_the_hour",),
  ),
  Mutant(
    "what a user met is no other user's of the batch", "data/shortlist.py",
    "key_BX = request_B1 + key_A[ad_BX]", "key_BX = 0 * request_B1 + key_A[ad_BX]",
    ("data/test_shortlist.py::test_a_list_holds_what_is_known_of_own_and_of_trending_ads",),
  ),
  Mutant(
    "neighbours follow without a gap", "data/shortlist.py",
    "np.take_along_axis(ad_BX, best_BM, axis=1) < 0", "best_BM < 0",
    ("data/test_shortlist.py::test_neighbours_stand_behind_the_ads_that_were_met_without_a_gap",),
  ),
  Mutant(
    "the week begins on Monday", "data/shortlist.py",
    "3 * DAY_S // PERIOD_S))", "4 * DAY_S // PERIOD_S))",
    ("data/test_shortlist.py::test_shares_count_what_came_before_the_hour",),
  ),
  Mutant(
    "a request sees the shares of its own hour's row", "data/trending.py",
    "row = np.asarray(time_s) // PERIOD_S - int(self.table.first_period)",
    "row = np.asarray(time_s) // PERIOD_S - int(self.table.first_period) + 1",
    ("data/test_trending.py::test_a_request_sees_the_row_of_its_own_hour",),
  ),
  Mutant(
    "what a request's user does then is taken out of counts", "data/transitions.py",
    "(basket_E >= first)[None]", "(basket_E > first)[None]",
    (_NEAR + "the_ad_to_be_found_does_not_stand_in_the_input",
     _NEAR + "numbers_are_a_recount_without_what_the_user_did_from_then_on"),
  ),
  Mutant(
    "what a user did before a request stays in counts", "data/transitions.py",
    "(basket_E >= first)[None]", "(basket_E >= 0)[None]",
    (_NEAR + "numbers_are_a_recount_without_what_the_user_did_from_then_on",),
  ),
  Mutant(
    "it is taken out of where a second step goes, too", "data/neighbours.py",
    "source_A = table.source_A - ", "source_A = table.source_A - 0 * ",
    (_NEAR + "numbers_are_a_recount_without_what_the_user_did_from_then_on",),
  ),
  Mutant(
    "neighbours are ads that the user never met", "data/neighbours.py",
    "rule_A[met_P[met_P < num_ads]] = -1", "",
    (_NEAR + "neighbours_are_the_best_by_the_rule_and_never_met",),
  ),
  Mutant(
    "ads of one SID come by their engagements in training", "catalog/prepared.py",
    "rows = engaged_with_ad(logs.events) & training_events(logs, examples)",
    "rows = engaged_with_ad(logs.events)",
    (_PIPELINE + "test_ads_of_one_sid_come_by_their_engagements_in_training",),
  ),
  Mutant(
    "lists are made for training requests", "gr4ad/candidates.py",
    'impressions = read_impressions(maker, "train")',
    'impressions = read_impressions(maker, "test")',
    ("gr4ad/test_candidates.py::test_half_of_the_lists_are_what_was_shown",),
  ),
  Mutant(
    "hosts read different rows of one batch", "data/pipeline.py",
    "first = number * batch_size + host * rows", "first = number * batch_size",
    (_PIPELINE + "test_hosts_share_the_batches_of_one",),
  ),
  Mutant(
    "a product's share is that of its ad", "gr4ad/batch_maker.py",
    "time_s_B, organic_BO, look_up(self.content_ad_O, organic_BO)",
    "time_s_B, organic_BO, organic_BO",
    (_PIPELINE + "test_histories_carry_the_shares_of_their_ads_and_products",),
  ),
  Mutant(
    "padded targets weigh nothing", "gr4ad/batch_maker.py",
    "pad(weight, num_targets, fill=0.0, dtype=np.float32)",
    "pad(weight, num_targets, fill=1.0, dtype=np.float32)",
    (_PIPELINE + "test_batches_hold_codes_and_padding",),
  ),
  Mutant(
    "a user's weight is measured by the mean of logarithms", "gr4ad/value.py",
    "float(np.log1p(examples.train_past_value_N).mean())",
    "float(np.log1p(examples.train_past_value_N.mean()))",
    (_PIPELINE + "test_the_mean_that_user_weights_are_measured_by_is_that_of_logs",),
  ),
  Mutant(
    "a bucket of eCPM is worth a thousandth of it an impression", "gr4ad/value.py",
    "/ (IMPRESSIONS_OF_ECPM if uses_ecpm else 1)", "/ 1",
    (_PIPELINE + "test_equal_quantiles_are_merged_and_ecpm_comes_first",),
  ),
  Mutant(
    "weights are divided by their training mean", "gr4ad/value.py",
    "request_N / scale.mean_weight)", "request_N)",
    (_PIPELINE + "test_buckets_are_equiprobable_and_weights_average_to_one",),
  ),
  Mutant(
    "targets of large requests weigh less where that is asked for", "gr4ad/value.py",
    "** -config.request_size_power", "** config.request_size_power",
    (_PIPELINE + "test_user_weight_by_hand",),
  ),
  Mutant(
    "a value on an edge belongs to the bucket that begins there", "gr4ad/value.py",
    'np.searchsorted(np.array(scale.bin_edges, np.float32), x_N, side="right")',
    'np.searchsorted(np.array(scale.bin_edges, np.float32), x_N, side="left")',
    (_PIPELINE + "test_equal_quantiles_are_merged_and_ecpm_comes_first",),
  ),
  Mutant(
    "a candidate without eCPM is padding", "gr4ad/list_batches.py",
    "where_BC[i, part] = np.isfinite(ecpm_C)", "where_BC[i, part] = True",
    ("gr4ad/test_list_batches.py::test_a_list_is_padded_and_carries_what_the_user_did",),
  ),
  Mutant(
    "candidates have value buckets where the run's are of eCPM", "gr4ad/list_batches.py",
    "if make.scale.uses_ecpm:", "if True:",
    ("gr4ad/test_list_batches.py::test_buckets_of_another_unit_are_not_asked_for",),
  ),
)
