"""GPR: gpr/."""

from tests.mutants.mutant import Mutant

_HSD, _MODEL, _GROUPS, _REFINING, _SWITCHES = (
  f"gpr/test_{name}.py::test_" for name in ("hsd", "model", "groups", "refining", "switches")
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
    "without values an ad is worth the mean of training", "gpr/model.py",
    "value_BW = jnp.zeros(code_BW.shape)", "value_BW = jnp.ones(code_BW.shape)",
    (_SWITCHES + "a_baseline_s_search_says_what_its_training_says_and_values_all_ads_alike",),
  ),
)
