"""Beam search, ranking, the index and the prefixes: search/ and catalog/."""

from tests.mutants.mutant import Mutant

_BEAM, _TESTS = "search/beam_search.py", "search/test_beam_search.py::"
_PROPERTIES = "search/test_search_properties.py::"
_PLAIN = (_TESTS + "test_equals_plain_beam_and_enumeration",)
_EVERY = (_PROPERTIES + "test_equals_enumeration[lazy]",)
_DRAWS = (_PROPERTIES + "test_sampling_draws_without_replacement_from_the_model",)
_RANKED = (_TESTS + "test_recommender_expands_and_reranks_by_value[lazy]",)
_SEEN = (_TESTS + "test_excluded_ads_never_come_and_take_no_place[lazy]",)
_INDEX = "catalog/test_ad_index.py::"
_LOAD = "search/test_beam_schedule.py::"

MUTANTS = (
  Mutant(
    "a beam is scored by its whole path", _BEAM,
    "score_BWM = jnp.where(legal_BWM, carry.score_BW[..., None] + logp_BWM, NEG_INF)",
    "score_BWM = jnp.where(legal_BWM, logp_BWM, NEG_INF)", _PLAIN,
  ),
  Mutant(
    "a beam's children end where the next beam's begin", _BEAM,
    "legal_BWM = child_BWM < last_BW[..., None]",
    "legal_BWM = child_BWM <= last_BW[..., None]", _PLAIN,
  ),
  Mutant(
    "a beam that could not be filled holds no SID", _BEAM,
    "filled_BW = carry.score_BW > NEG_INF / 2", "filled_BW = carry.node_BW >= 0", _PLAIN,
  ),
  Mutant(
    "a chosen extension takes its own parent's state along", _BEAM,
    "lambda row_W, parent_W: row_W[parent_W])(x, parent_BW)",
    "lambda row_W, parent_W: row_W[parent_W * 0])(x, parent_BW)", _PLAIN,
  ),
  Mutant(
    "a prefix is kept where a request may get an SID below it", _BEAM,
    "legal_BWM &= after_BWM > before_BWM", "legal_BWM &= after_BWM >= before_BWM", _EVERY,
  ),
  Mutant(
    "expected values follow the found SID's own distribution", _BEAM,
    "_, bin_logp_BWV = step(shared, carry.state, carry.code_BW, num_levels)",
    "_, bin_logp_BWV = step(shared, carry.state, 0 * carry.code_BW, num_levels)",
    (_TESTS + "test_search_finds_the_decoders_most_probable_sids[lazy]",),
  ),
  Mutant(
    "a high temperature flattens what is drawn from", _BEAM,
    "logp_BWM / sampling.temperature", "logp_BWM * sampling.temperature", _DRAWS,
  ),
  Mutant(
    "every level draws its own noise", _BEAM,
    "jax.random.fold_in(sampling.key, level)", "jax.random.fold_in(sampling.key, 0 * level)",
    _DRAWS,
  ),
  Mutant(
    "what is drawn below a beam is bound by the beam's own draw", _BEAM,
    "v_BWM = bound_BW1 - free_BWM +", "v_BWM = largest_BW1 - free_BWM +", _DRAWS,
  ),
  Mutant(
    "a reported log-probability is the model's, without temperature", _BEAM,
    "pick(score_BWM), jax.tree.map(pick, drawn_BWM)",
    "pick(drawn_BWM.logp_BW), jax.tree.map(pick, drawn_BWM)", _DRAWS,
  ),
  Mutant(
    "the pre-cut gives the places that one selection gives", _BEAM,
    "return score_BW, parent_BW * extensions + index_BW",
    "return score_BW, parent_BW * width + index_BW",
    (_PROPERTIES + "test_pre_cut_equals_the_global_selection",),
  ),
  Mutant(
    "value counts by gamma times its logarithm", "search/artifact.py",
    "score_RW + value_exponent * np.log(", "score_RW - value_exponent * np.log(", _RANKED,
  ),
  Mutant(
    "an SID with several ads goes with the last of them", "search/artifact.py",
    "gone_N = sid_N[left_N == 0]", "gone_N = sid_N", _SEEN,
  ),
  Mutant(
    "an excluded ad takes no place among the beams", "search/artifact.py",
    "gone_N = sid_N[left_N == 0]", "gone_N = sid_N[left_N < 0]", _SEEN,
  ),
  Mutant(
    "an excluded ad does not come by another ad of its SID", "search/artifact.py",
    "keep_A[ad_N] = False", "keep_A[ad_N[:0]] = False", _SEEN,
  ),
  Mutant(
    "an ad's numbers come from the beam that holds its SID", "search/recommender.py",
    "return np.take_along_axis(in_order(x), beam_RK", "return np.take_along_axis(x, beam_RK",
    _RANKED,
  ),
  Mutant(
    "ads that a request may not get are left out", "search/recommender.py",
    "keep_RK = np.stack([row.keep_A[ad_K] for row, ad_K in",
    "keep_RK = np.stack([row.keep_A[ad_K] | True for row, ad_K in",
    (_TESTS + "test_recommender_keeps_to_the_allowed_ads[lazy]",),
  ),
  Mutant(
    "of ads on one SID the one with the higher priority comes first", "catalog/ad_index.py",
    "np.lexsort((-priority_A, sid_of_ad_A))", "np.lexsort((priority_A, sid_of_ad_A))",
    (_INDEX + "test_by_hand",),
  ),
  Mutant(
    "the best beam's ads come first", "catalog/ad_index.py",
    "column_RW = np.cumsum(count_RW, axis=1) - count_RW",
    "column_RW = np.cumsum(count_RW[:, ::-1], axis=1)[:, ::-1] - count_RW",
    (_INDEX + "test_expand_equals_a_loop",),
  ),
  Mutant(
    "a new ad of equal priority comes after those there", "catalog/ad_index.py",
    "(priority_A[there_N] == priority_N) & (there_N < coming_N)",
    "(priority_A[there_N] == priority_N) & (there_N > coming_N)",
    ("catalog/test_live_index.py::test_any_writes_equal_an_index_from_scratch",),
  ),
  Mutant(
    "a category holds those below it, and none that only begins alike", "catalog/targeting.py",
    'below = f"{value} > "', "below = value",
    ("catalog/test_targeting.py::test_a_category_holds_those_below_it",),
  ),
  Mutant(
    "a request gets what is in all of its subsets", "catalog/subsets.py",
    "jnp.bitwise_and.reduce(", "jnp.bitwise_or.reduce(",
    (_PROPERTIES + "test_ranks_in_combined_bitmaps",),
  ),
  Mutant(
    "a rank counts the rows before, not the row itself", "catalog/subsets.py",
    "(row % _BITS).astype(jnp.uint32)) - 1", "(row % _BITS).astype(jnp.uint32)) * 2 - 1",
    (_PROPERTIES + "test_ranks_in_combined_bitmaps",),
  ),
  Mutant(
    "beams narrow at once and widen only after a rest", "search/beam_schedule.py",
    "(wider > self.factor and rested)", "wider > self.factor",
    (_LOAD + "test_narrows_at_once_and_widens_after_a_while",),
  ),
  Mutant(
    "beams are narrower than base in overload alone", "search/beam_schedule.py",
    "if queue_share > OVERLOAD_SHARE and narrower:", "if queue_share > 0 and narrower:",
    (_LOAD + "test_never_below_base_at_peak_unless_overloaded",),
  ),
)
