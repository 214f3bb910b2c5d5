"""Layers, decoders, the context and the copy path: nn/ and gr4ad/."""

from tests.mutants.mutant import Mutant

_LAYERS, _LAZY, _CONTEXT = "nn/layers.py", "gr4ad/lazy_decoder.py", "gr4ad/context.py"
_LAYER = ("nn/test_layers.py::test_a_layer_is_attention_and_swiglu_as_they_are_written",)
_DECODERS = "gr4ad/test_decoders.py::"
_FIELDS = (_DECODERS + "test_every_field_of_the_context_is_read_and_rows_never_mix",)
_FORCED = _DECODERS + "test_steps_equal_teacher_forcing"
_STEPS, _COPIES = (f"{_FORCED}[lazy-static level]",), (f"{_FORCED}[lazy, copy path-static level]",)
_ENCODER = "nn/history_encoder.py"
_ENCODED = "nn/test_history_encoder.py::test_"
_ITEMS, _SCORED = "gr4ad/item_scorer.py", "gr4ad/test_item_scorer.py::test_"
_NEAR = (
  "gr4ad/test_copy_path.py::test_with_neighbours_the_untrained_model_ranks_as_the_counter",
)
_COPY = (_DECODERS + "test_copying_starts_by_own_counts_and_share",)

MUTANTS = (
  Mutant(
    "smoothing takes from the target what it gives to all codes", "gr4ad/supervised.py",
    "config.label_smoothing * (uniform_BC - sid_BC)", "config.label_smoothing * uniform_BC",
    ("gr4ad/test_supervised.py::test_smoothing_by_hand",),
  ),
  Mutant(
    "means over codes follow the target's prefix", "gr4ad/decoder.py",
    "copy = self.output.follow(source, copy, target_BCL[..., level], level)", "",
    (_DECODERS + "test_means_over_codes_are_those_of_all_targets[lazy, copy path]",),
  ),
  Mutant(
    "queries to the context are scaled by the root of a head's width", _LAYERS,
    "self.query(h_BCQD) * (h_BCQD.shape[-1] // self.config.num_heads) ** -0.5",
    "self.query(h_BCQD)", _LAYER,
  ),
  Mutant(
    "queries between positions are scaled by the root of a head's width", _LAYERS,
    "query_BCQHK *= head_width**-0.5", "query_BCQHK *= 1.0", _LAYER,
  ),
  Mutant(
    "a position attends to itself and to those before it", _LAYERS,
    "jnp.tril(", "jnp.triu(", _LAYER,
  ),
  Mutant(
    "one half of the feed-forward's hidden units gates the other by SiLU", _LAYERS,
    "jax.nn.silu(", "jax.nn.sigmoid(", _LAYER,
  ),
  Mutant(
    "a layer's parts read normalised states", _LAYERS,
    "self.cross(attend(h_BCQD), kv, mask)", "self.cross(h_BCQD, kv, mask)", _LAYER,
  ),
  Mutant(
    "what a part adds stands beside what was there", _LAYERS,
    "h_BCQD += self.drop(mixed_BCQD, deterministic)",
    "h_BCQD = self.drop(mixed_BCQD, deterministic)", _LAYER,
  ),
  Mutant(
    "layer normalisation takes the mean away", _LAYERS,
    "y = y - jnp.mean(y, axis=-1, keepdims=True)", "y = y - 0", _LAYER,
  ),
  Mutant(
    "padding of the context is not attended to", _LAYERS,
    "kv.value_BHSK, mask_BRS[:, None]", "kv.value_BHSK, mask_BRS[:, None] | True",
    (_DECODERS + "test_padding_changes_nothing[lazy]",),
  ),
  Mutant(
    "attention's gradient is that of its masked scores", "nn/attention.py",
    "weight_RS * (weight_bar_RS - along_R1)", "weight_RS * weight_bar_RS",
    ("nn/test_attention.py::test_values_and_gradients_are_those_of_jax",),
  ),
  Mutant(
    "a position of the trunk sees none after it", _LAZY,
    "      m_B1PD, _ = layer(m_B1PD, kv, mask_BS, deterministic=deterministic)\n",
    "      m_B1PD = layer(m_B1PD[:, :, ::-1], kv, mask_BS)[0][:, :, ::-1]\n",
    (_DECODERS + "test_a_position_of_the_trunk_sees_those_before_it_and_none_after",),
  ),
  Mutant(
    "L_MTP judges the pass that saw no token", _LAZY,
    "return h_BRPD[:, :-1], h_BRPD[:, -1:]", "return h_BRPD[:, :-1], h_BRPD[:, :1]",
    (_DECODERS + "test_unfused_pass_ignores_every_other_code[lazy]",),
  ),
  Mutant(
    "Fuse gates the trunk's state by the token", _LAZY,
    "jnp.concatenate([gated, token], axis=-1)", "jnp.concatenate([m, token], axis=-1)",
    (_DECODERS + "test_fuse_by_hand",),
  ),
  Mutant(
    "a step fuses the code of the level before", _LAZY,
    "token_BWD = self.tables.embed(code_BW, level - 1)",
    "token_BWD = 0 * self.tables.embed(code_BW, level - 1)", _STEPS,
  ),
  Mutant(
    "an input is a row times the root of the width", "nn/code_tables.py",
    "self.tables[level].astype(dtype) * self.width**0.5",
    "self.tables[level].astype(dtype)",
    ("nn/test_code_tables.py::test_an_input_token_is_the_square_root_of_the_width_times_a_row",),
  ),
  Mutant(
    "level l copies ads that share all levels before it", "gr4ad/copy_path.py",
    "match.append(match[-1] & ", "match.append(", _COPIES,
  ),
  Mutant(
    "the gate mixes what is copied with what is generated", "gr4ad/tokens.py",
    "terms.log_rest_BW[..., None] + log_prob_BCV,", "log_prob_BCV,", _COPIES,
  ),
  Mutant(
    "an ad that is not known is read by its codes alone", _ITEMS,
    "jnp.where(known_BH1, self.row_AD[row_BH], 0)", "self.row_AD[row_BH]",
    (_SCORED + "scores_every_ad_against_the_latest_of_the_history",),
  ),
  Mutant(
    "the encoder reads the latest ads, the newest last", _ITEMS,
    "x[:, :length][:, ::-1]", "x[:, -length:]",
    (_SCORED + "scores_every_ad_against_the_latest_of_the_history",),
  ),
  Mutant(
    "a range of ads ends within a block", _ITEMS,
    "(row_BRX < end_BR[..., None])", "(row_BRX <= end_BR[..., None])",
    (_SCORED + "sums_over_ranges_of_any_length",),
  ),
  Mutant(
    "a code that no ad has starts no range", _ITEMS,
    "found_BC &= ", "found_BC = ", (_SCORED + "ranges_hold_the_ads_that_start_alike",),
  ),
  Mutant(
    "without a shortlist all that is copied is of all ads", "gr4ad/copy_path.py",
    "jnp.where(some_B, jax.nn.log_sigmoid(logit_B), 0.0)", "jax.nn.log_sigmoid(logit_B)",
    (_SCORED + "without_a_shortlist_all_ads_are_copied_from",),
  ),
  Mutant(
    "the shortlist has what the item scorer leaves", "gr4ad/copy_path.py",
    "logp_BM += jax.nn.log_sigmoid(-logit_B)[:, None]", "",
    (_SCORED + "the_mixture_over_every_sid",),
  ),
  Mutant(
    "what may not be found leaves its share to the rest of the shortlist", "gr4ad/copy_path.py",
    "logp_BM - norm_B1, NEG_INF", "logp_BM, NEG_INF",
    ("search/test_search_properties.py::test_equals_enumeration",),
  ),
  Mutant(
    "what may not be found leaves its share to the rest of all ads", "gr4ad/copy_path.py",
    "norm_B1 = jnp.logaddexp(norm_B1, of_items_B1)", "",
    (_SCORED + "what_may_not_be_found_is_not_copied",),
  ),
  Mutant(
    "the item scorer starts almost closed", _ITEMS,
    "OPEN = -6.0", "OPEN = 2.0",
    ("gr4ad/test_copy_path.py::test_the_untrained_model_ranks_as_the_rule",),
  ),
  Mutant(
    "codes that the generator likes were less likely copied", "gr4ad/tokens.py",
    "logit_BW=copy.logit_BW - log_gen_BW", "logit_BW=copy.logit_BW", _COPIES,
  ),
  Mutant(
    "where nothing can be copied the generator has it all", "gr4ad/copy_path.py",
    "jnp.where(some_BW, logit_BW + share_BW, NEG_INF)", "logit_BW + share_BW",
    (_DECODERS + "test_an_empty_shortlist_leaves_all_to_the_generator",),
  ),
  Mutant(
    "an organic engagement counts less than a promoted one", "gr4ad/copy_path.py",
    "+ weight_2[0] * x_BMF[..., shortlist.ORGANIC]", "+ x_BMF[..., shortlist.ORGANIC]", _COPY,
  ),
  Mutant(
    "a trending ad is copied by its share", "gr4ad/copy_path.py",
    "x_BMF[..., shortlist.SHARE]", "x_BMF[..., shortlist.SHARE + 1]", _COPY,
  ),
  Mutant(
    "a set share is of the item scorer's ads", "gr4ad/copy_path.py",
    "np.log(y / (1 - y))", "np.log((1 - y) / y)",
    (_SCORED + "a_set_share_is_every_request_s",),
  ),
  Mutant(
    "with neighbours copying starts at the counter, too", "gr4ad/copy_path.py",
    "rule_BM += near_rule(number_BMF, weight_5)", "", _NEAR,
  ),
  Mutant(
    "an ad that nobody came to counts little, whatever it says of itself", "gr4ad/copy_path.py",
    "known_BM = lead_BM / (lead_BM + neighbours.SHRINKAGE)", "known_BM = lead_BM / lead_BM",
    (_DECODERS + "test_with_neighbours_copying_starts_by_their_rule",),
  ),
  Mutant(
    "a run fitted anew counts what validated the first", "gr4ad/run.py",
    'through = "validation" if run.refit else "train"', 'through = "train"',
    ("gr4ad/test_copy_path.py::test_a_refit_counts_validating_engagements",),
  ),
  Mutant(
    "copying starts at the rule", "gr4ad/copy_path.py",
    'self.param("last_kernel", nn.initializers.zeros', 'self.param("last_kernel", init', _COPY,
  ),
  Mutant(
    "a history tells how long ago an ad was met", _CONTEXT,
    '        + table(f"{group}_age", vocabulary.num_age_buckets, age)\n', "", _FIELDS,
  ),
  Mutant(
    "a trending ad tells of its share", _CONTEXT,
    'trend_BND += table("trend_share", vocabulary.num_trend_buckets, context.trend_share_BN)',
    "trend_BND += 0", _FIELDS,
  ),
  Mutant(
    "contents are told apart by their ids", _CONTEXT,
    'organic_BOD += table("organic_id", vocabulary.num_organic_buckets, context.organic_id_BO)',
    "organic_BOD += 0", _FIELDS,
  ),
  Mutant(
    "every feature has rows of its own", _CONTEXT,
    "index_BF = context.feature_BF + offsets_F[None]", "index_BF = context.feature_BF + 0",
    (_DECODERS + "test_the_same_number_of_two_features_is_not_the_same_value",),
  ),
  Mutant(
    "padding of the organic history is masked", _CONTEXT,
    "context.organic_count_BO >= 0,", "context.organic_count_BO >= -1,",
    (_DECODERS + "test_padding_changes_nothing[lazy]",),
  ),
  Mutant(
    "the ordinary decoder knows which position it is at", "gr4ad/autoregressive.py",
    "axis=2) + position_11PD", "axis=2) + 0 * position_11PD",
    (f"{_FORCED}[autoregressive, copy path-static level]",),
  ),
  Mutant(
    "a module of the multi-token decoder reads the state before it", "gr4ad/multi_token.py",
    "          states[-1], token_BCD,", "          states[0], token_BCD,",
    (f"{_FORCED}[multi-token-static level]",),
  ),
  Mutant(
    "a place of a history does not see what comes after it", _ENCODER,
    "np.tril(", "np.ones_like(", (f"{_ENCODED}a_place_sees_itself_and_those_before[attention]",),
  ),
  Mutant(
    "the filter of a history does not see what comes after", _ENCODER,
    "np.where(lag_QT >= 0,", "np.where(lag_QT < 99,",
    (f"{_ENCODED}a_place_sees_itself_and_those_before[and filter]",),
  ),
  Mutant(
    "the filter of a history lets pass what Fourier's would", _ENCODER,
    "np.arange(1, config.num_low)", "np.arange(config.num_low)",
    (f"{_ENCODED}one_block_by_hand_with_numpys_own_fourier_transform",),
  ),
  Mutant(
    "places of a history count from the newest", _ENCODER,
    "self.place_TD[self.config.max_length - length :]", "self.place_TD[:length]",
    (f"{_ENCODED}what_fills_the_places_before_a_history_changes_nothing[attention]",),
  ),
)
