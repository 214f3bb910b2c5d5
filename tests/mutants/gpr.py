"""GPR: gpr/."""

from tests.mutants.mutant import Mutant

_HSD, _MODEL, _GROUPS, _REFINING, _SWITCHES, _THOUGHTS = (
  f"gpr/test_{name}.py::test_"
  for name in ("hsd", "model", "groups", "refining", "switches", "thoughts")
)
_VAFT, _POLICY, _ASKED, _HEPO, _SEARCH = (
  f"{name}.py::test_" for name in (
    "gpr/test_vaft", "gpr/test_policy", "gpr/test_asked", "learning/test_hepo",
    "search/test_beam_search",
  )
)

MUTANTS = (
  Mutant(
    "U, O and E see each other within one request alone", "gpr/attention.py",
    "same_SS & (", "(", (_HSD + "eight_tokens_see_what_the_table_says",),
  ),
  Mutant(
    "what was clicked after a request had begun is none of its past", "gpr/attention.py",
    "age_BS[:, None, :] > age_BS[:, :, None]", "age_BS[:, None, :] > age_BS[:, :, None] - 2**20",
    (_HSD + "padding_and_what_came_too_late_are_not_seen",),
  ),
  Mutant(
    "each head's mix is gated by the token's own U", "gpr/attention.py",
    "mixed_BSHK * jax.nn.silu(gate_BSHK)", "mixed_BSHK * jax.nn.silu(query_BSHK)",
    (_HSD + "attention_is_gated_softmax_by_hand",),
  ),
  Mutant(
    "a token that has stopped stays what it is", "gpr/hsd.py",
    "chosen_BGY1 >= recursion", "chosen_BGY1 > 0",
    (_HSD + "a_token_goes_through_the_blocks_as_often_as_it_chooses",),
  ),
  Mutant(
    "contents of a group lie between the request before it and its own", "gpr/groups.py",
    "for at_s in (before_s, time_s)", "for at_s in (before_s, time_s + 3600)",
    (_GROUPS + "groups_by_hand",),
  ),
  Mutant(
    "head j is told an ad of the j-th request", "gpr/label_rows.py",
    "ads_of[at + head]", "ads_of[at]",
    (_GROUPS + "every_engaged_ad_of_a_split_is_one_label_at_its_own_request",),
  ),
  Mutant(
    "probabilities are of the codes that lead on to an ad", "gpr/model.py",
    "jnp.where(leads_on_BPNV, logit_BPNV, NEG_INF)", "logit_BPNV",
    (_MODEL + "codes_that_lead_nowhere_have_no_probability",),
  ),
  Mutant(
    "values pass no gradient on", "gpr/hte.py",
    "self._value(jax.lax.stop_gradient(both), level)", "self._value(both, level)",
    (_MODEL + "nothing_but_the_evaluator_learns_from_values",),
  ),
  Mutant(
    "codes do not teach the denoiser", "gpr/refining.py",
    "jax.lax.stop_gradient(denoise(predict, noise_BPD, self.config.refining))",
    "denoise(predict, noise_BPD, self.config.refining)",
    (_REFINING + "codes_do_not_teach_the_denoiser_and_the_denoiser_does_not_teach_the_tables",),
  ),
  Mutant(
    "a label of the mean value of its action weighs c_a", "gpr/vaft.py",
    "np.log1p(np.maximum(share_N, 0)) / np.log(2)", "np.log1p(np.maximum(share_N, 0))",
    (_VAFT + "a_label_weighs_by_its_action_and_by_its_value_against_the_actions_mean",),
  ),
  Mutant(
    "means of actions are those of training", "gpr/vaft.py",
    "value_N[learned_N & (action_N == action) & np.isfinite(value_N)]",
    "value_N[(action_N == action) & np.isfinite(value_N)]",
    (_VAFT + "weights_of_all_labels_of_a_log_by_hand",),
  ),
  Mutant(
    "a head's loss is a mean by the weights of its labels", "gpr/mtp.py",
    "jnp.sum(weight_BPN * ce_BPN, axis=(0, 1)) / jnp.maximum(total_N, 1e-9)",
    "jnp.sum(weight_BPN * ce_BPN, axis=(0, 1)) / ce_BPN.shape[0]",
    (_VAFT + "a_mean_is_weighted_and_the_weights_own_size_says_nothing",),
  ),
  Mutant(
    "5% of the values lie below the lower quantile", "gpr/hte.py",
    "(share - 1) * apart_BPV", "-apart_BPV", (_MODEL + "quantiles_of_values_by_hand",),
  ),
  Mutant(
    "a beam has its share of children by its value", "search/generator.py",
    "jnp.ceil(self.most * self.promise", "jnp.floor(self.most * self.promise",
    (_SEARCH + "beams_that_promise_little_have_few_children",),
  ),
  Mutant(
    "a beam keeps its most probable children", "search/beam_search.py",
    "jnp.arange(branching)[None, None] < limit_BW[..., None]",
    "jnp.arange(branching)[None, None] <= limit_BW[..., None]",
    (_SEARCH + "beams_that_promise_little_have_few_children",),
  ),
  Mutant(
    "what is rare among the user's successes brings nothing", "learning/hepo.py",
    "jnp.maximum(liked_BCL - usual_BCL, 0.0)", "(liked_BCL - usual_BCL)",
    (_HEPO + "the_worked_example_to_six_digits",),
  ),
  Mutant(
    "J is made large", "learning/hepo.py",
    "-jnp.sum(weight_11L * gain_BCL, axis=-1)", "jnp.sum(weight_11L * gain_BCL, axis=-1)",
    (_HEPO + "the_loss_falls_where_a_good_candidate_gets_more_probable",),
  ),
  Mutant(
    "later levels count for more", "learning/hepo.py",
    "(jnp.arange(levels, dtype=jnp.float32) + 1)", "jnp.ones(levels)",
    (_HEPO + "the_worked_example_to_six_digits",),
  ),
  Mutant(
    "advantages fade by gamma and lambda", "learning/hepo.py",
    "gamma=gamma * lam", "gamma=gamma", (_HEPO + "the_worked_example_to_six_digits",),
  ),
  Mutant(
    "equal rewards give no advantage", "learning/hepo.py",
    "jnp.where(alike_B1, 0.0, apart_BC / (sigma_B1 + eps))", "apart_BC / (sigma_B1 + eps)",
    (_HEPO + "one_candidate_or_equal_rewards_give_no_advantage",),
  ),
  Mutant(
    "advantages take no gradient", "learning/hepo.py",
    "jax.lax.stop_gradient(jnp.where(where_BC[..., None], advantage_BCL, 0.0))",
    "jnp.where(where_BC[..., None], advantage_BCL, 0.0)",
    (_HEPO + "values_returns_and_old_probabilities_take_no_gradient_from_the_policy",),
  ),
  Mutant(
    "targets are brought to the mean of eCPM", "gpr/candidates.py",
    "(self.ecpm / max(mean, 1e-9))", "self.ecpm", (_POLICY + "final_values_by_hand",),
  ),
  Mutant(
    "the latest successes count", "gpr/candidates.py",
    "ads[-MOST_SUCCESSES:]", "ads[:MOST_SUCCESSES]", (_POLICY + "a_users_successes_by_hand",),
  ),
  Mutant(
    "users who ask rarely are rehearsed rarely", "gpr/asked.py",
    "* rarer_U, DAY_S)", ", DAY_S)",
    (_ASKED + "busy_users_are_asked_every_two_hours_of_the_peak_and_others_more_rarely",),
  ),
  Mutant(
    "a rehearsal has the features of a request before it", "gpr/asked.py",
    "ago_M = 1 + rng", "ago_M = -1 + rng",
    (_ASKED + "a_rehearsal_has_the_features_of_one_of_the_latest_twenty_requests_before_it",),
  ),
  Mutant(
    "an HSTU token sees nothing that stands later in the stream", "gpr/attention.py",
    "return _seen(there_BGY, age_BGY, False)", "return allow(there_BGY, age_BGY)",
    (_SWITCHES + "no_gradient_leads_from_anything_later_to_an_hstu_token",),
  ),
  Mutant(
    "HSTU divides by what a token may see, not by the length of the row", "gpr/attention.py",
    "jnp.maximum(jnp.sum(allowed_BSS, axis=-1), 1)",
    "jnp.full(allowed_BSS.shape[:2], allowed_BSS.shape[-1])",
    (_SWITCHES + "hstu_attention_by_hand",),
  ),
  Mutant(
    "HSTU's mix is normalised before it is gated", "gpr/attention.py",
    "normal_BSD * gate_BSHK.reshape(x_BSD.shape)", "mixed_BSHK.reshape(x_BSD.shape) * normal_BSD",
    (_SWITCHES + "hstu_attention_by_hand",),
  ),
  Mutant(
    "an encoder is shown what the last request may see, not its ads", "gpr/attention.py",
    "[:, REQUEST - NUM_TYPES]", "[:, -1]",
    (_SWITCHES + "an_hstu_token_sees_what_came_before_it_an_encoder_the_whole_past",
     _SWITCHES + "a_baseline_is_told_nothing_of_its_own_request_s_ads"),
  ),
  Mutant(
    "a thought is strictly older than the request that sees it", "gpr/thoughts.py",
    "time_s, side=\"left\")", "time_s, side=\"right\")",
    (_THOUGHTS + "the_newest_thoughts_before_each_request_by_hand",
     _THOUGHTS + "each_label_of_a_row_sees_what_its_request_sees_alone"),
  ),
  Mutant(
    "a request sees no later thought of its row", "gpr/tokens.py",
    "(place_11X >= first_BP1) & (place_11X < end_BP1)", "place_11X >= first_BP1",
    (_THOUGHTS + "a_label_hears_of_the_thoughts_that_its_request_sees_and_of_no_others",),
  ),
  Mutant(
    "each label asks for the thoughts of its own request", "gpr/batch_maker.py",
    "row[\"time_s_G\"][asked]", "row[\"time_s_G\"][-1:].repeat(len(asked))",
    (_THOUGHTS + "each_label_of_a_row_sees_what_its_request_sees_alone",),
  ),
  Mutant(
    "a tenth of the rows of training is told no thoughts", "gpr/model.py",
    "1 - WITHOUT_THOUGHTS, sees_BPX.shape[:1]", "1.0, sees_BPX.shape[:1]",
    (_THOUGHTS + "thoughts_of_some_rows_are_left_out_in_training_alone",),
  ),
  Mutant(
    "without values an ad is worth the mean of training", "gpr/model.py",
    "value_BW = jnp.zeros(code_BW.shape)", "value_BW = jnp.ones(code_BW.shape)",
    (_SWITCHES + "a_baseline_s_search_says_what_its_training_says_and_values_all_ads_alike",),
  ),
)
