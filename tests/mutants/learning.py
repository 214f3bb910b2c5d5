"""Losses and their weights: learning/, and VSL and UVR of gr4ad/."""

from tests.mutants.mutant import Mutant

_PREFERENCE, _UNIFIED = "learning/preference.py", "gr4ad/unified_task.py"
_LISTS = "learning/test_preference.py::"
_STEP = "gr4ad/test_unified_task.py::"

MUTANTS = (
  Mutant(
    "RSPO's ranks are those of the model's score less the reference", _PREFERENCE,
    "ranks(fixed_BC - ref_BC, where_BC)[:, None, :],",
    "ranks(fixed_BC, where_BC)[:, None, :],",
    (_LISTS + "test_a_reference_that_counts_decides_over_ranks_and_scores_by_hand",),
  ),
  Mutant(
    "the gate closes however the candidates have moved, up or down", _PREFERENCE,
    "jnp.abs(ratio_BC), 0.0)", "ratio_BC, 0.0)",
    (_LISTS + "test_a_close_reference_is_subtracted_and_a_far_or_missing_one_is_not",),
  ),
  Mutant(
    "an anchor's set needs a reference for every member", _PREFERENCE,
    "return (mean_BC < delta) & complete_BC", "return mean_BC < delta",
    (_LISTS + "test_a_close_reference_is_subtracted_and_a_far_or_missing_one_is_not",),
  ),
  Mutant(
    "an anchor is a member of its own set", _PREFERENCE,
    "members_BCC = worse_BCC | (itself_1CC & lists.where_BC[:, None, :])",
    "members_BCC = worse_BCC",
    (_LISTS + "test_the_gate_of_the_best_candidate_counts_for_all_it_is_compared_with",
     _LISTS + "test_each_anchor_has_a_gate_of_its_own"),
  ),
  Mutant(
    "an anchor looks at ranks by its own gate", _PREFERENCE,
    "    gate_BC[..., None],\n    ranks(", "    gate_BC[:, None, :],\n    ranks(",
    (_LISTS + "test_an_anchor_sees_ranks_and_scores_by_its_own_gate_alone",),
  ),
  Mutant(
    "an anchor compares scores by its own gate", _PREFERENCE,
    "gate_BC[..., None] * ref_BC[:, None, :]", "gate_BC[:, None, :] * ref_BC[:, None, :]",
    (_LISTS + "test_an_anchor_sees_ranks_and_scores_by_its_own_gate_alone",),
  ),
  Mutant(
    "RSPO's weight is the difference of gains", _PREFERENCE,
    "jnp.abs(gain_BC[:, :, None] - gain_BC[:, None, :])",
    "jnp.abs(gain_BC[:, :, None] + gain_BC[:, None, :])",
    (_LISTS + "test_rspo_on_three_candidates_by_hand",),
  ),
  Mutant(
    "gains are divided by the ideal DCG, best first", _PREFERENCE,
    "-jnp.sort(-gain_BC)", "jnp.sort(gain_BC)",
    (_LISTS + "test_rspo_on_three_candidates_by_hand",),
  ),
  Mutant(
    "the winner's gate decides over both terms of a margin", _PREFERENCE,
    "score_BC = logp_BC - of_best(gate_BC) * ref_BC", "score_BC = logp_BC - gate_BC * ref_BC",
    (_LISTS + "test_the_gate_of_the_best_candidate_counts_for_all_it_is_compared_with",),
  ),
  Mutant(
    "of equally good candidates the least liked one is the winner", _PREFERENCE,
    "-jax.lax.stop_gradient(logp_BC), -jnp.inf)", "jax.lax.stop_gradient(logp_BC), -jnp.inf)",
    (_LISTS + "test_of_equally_good_candidates_the_one_that_the_model_likes_least_wins",),
  ),
  Mutant(
    "DPO is a mean over losers, whatever their number", _PREFERENCE,
    "total_B / jnp.maximum(jnp.sum(drawn_BC, axis=-1), 1)", "total_B",
    (_LISTS + "test_dpo_is_the_mean_over_the_losers_drawn",),
  ),
  Mutant(
    "GRPO takes the smaller of the two gains", _PREFERENCE,
    "gain_BCL = jnp.minimum(", "gain_BCL = jnp.maximum(",
    (_LISTS + "test_grpo_by_hand",),
  ),
  Mutant(
    "GRPO's divergence is left out where the reference is far away", _PREFERENCE,
    "kl_BCL = jnp.where(gate_BC[..., None],", "kl_BCL = jnp.where(has_ref_BC1,",
    (_LISTS + "test_grpo_without_a_close_reference_has_no_divergence_term",),
  ),
  Mutant(
    "a candidate without a finite reward does not count", _PREFERENCE,
    "where_BC = lists.where_BC & jnp.isfinite(lists.reward_BC)\n  return",
    "where_BC = lists.where_BC\n  return",
    (_LISTS + "test_a_reward_that_is_not_a_number_takes_its_candidate_out",),
  ),
  Mutant(
    "misalignment is a share of the largest possible one", "gr4ad/unified.py",
    "apart_BC / jnp.maximum(count_B1 - 1, 1)", "apart_BC / jnp.maximum(count_B1, 1)",
    (_LISTS + "test_unified_weights_by_hand",),
  ),
  Mutant(
    "RSPO weighs more where the model agrees with the rewards", "gr4ad/unified.py",
    "base_weight * max_rl_weight * (1 - misaligned_BC)",
    "base_weight * max_rl_weight * misaligned_BC",
    (_LISTS + "test_unified_weights_by_hand",),
  ),
  Mutant(
    "L_VSL weighs its samples", "gr4ad/vsl_task.py",
    "jnp.sum(terms.total_BC * batch.weight_BC)", "jnp.sum(terms.total_BC)",
    (_STEP + "test_the_loss_of_logged_samples_is_their_weighted_sum_over_their_number",),
  ),
  Mutant(
    "weights have mean 1 over training, and do not divide a batch", "gr4ad/vsl_task.py",
    "targets = jnp.sum(where_BC).astype(jnp.float32)", "targets = jnp.sum(batch.weight_BC)",
    (_STEP + "test_the_loss_of_logged_samples_is_their_weighted_sum_over_their_number",),
  ),
  Mutant(
    "level 1 is left out of L_MTP", "gr4ad/supervised.py",
    "mtp_log_prob_BCL[..., 1:]", "mtp_log_prob_BCL", ("gr4ad/test_supervised.py::test_by_hand",),
  ),
  Mutant(
    "a sample without eCPM has no eCPM term", "gr4ad/supervised.py",
    "ecpm_BC = jnp.where(ecpm_bin_BC >= 0, -picked_BC, 0.0)", "ecpm_BC = -picked_BC",
    ("gr4ad/test_supervised.py::test_missing_ecpm_drops_only_that_term",),
  ),
  Mutant(
    "UVR weighs logged samples by w_0", _UNIFIED,
    "total = config.base_weight * total + ", "total = total + ",
    (_STEP + "test_uvr_by_its_equation",),
  ),
  Mutant(
    "UVR weighs what it learns from list candidates by w_VSL", _UNIFIED,
    "terms.total_BC * weights.vsl_BC * own_BC", "terms.total_BC * own_BC",
    (_STEP + "test_uvr_by_its_equation",),
  ),
  Mutant(
    "list candidates are learned from, not only counted", _UNIFIED,
    "jnp.sum(terms.total_BC * weights.vsl_BC * own_BC)",
    "jnp.sum(jax.lax.stop_gradient(terms.total_BC) * weights.vsl_BC * own_BC)",
    (_STEP + "test_uvr_follows_the_gradient_of_its_losses_with_the_weights_held",),
  ),
  Mutant(
    "UVR weighs RSPO by w_RL", _UNIFIED,
    "_sum_lists(list_loss, weights.rl_BC)", "_sum_lists(list_loss, config.base_weight)",
    (_STEP + "test_uvr_by_its_equation",),
  ),
  Mutant(
    "a short list counts as much as a long one", _UNIFIED,
    "loss = jnp.sum(loss, axis=-1) / jnp.maximum(jnp.sum(where, axis=-1), 1)",
    "loss = jnp.sum(loss, axis=-1)", (_STEP + "test_list_losses_join_with_one_weight",),
  ),
  Mutant(
    "the settings' delta reaches RSPO's gate", _UNIFIED,
    "return preference.rspo_loss(token_logp_BCL, lists, beta=config.beta, delta=config.delta)",
    "return preference.rspo_loss(token_logp_BCL, lists, beta=config.beta, delta=1.0)",
    (_STEP + "test_references_and_their_gate_reach_the_loss",),
  ),
  Mutant(
    "how far candidates have moved does not cancel between up and down", _UNIFIED,
    "moved_BC = jnp.abs(logp_BC - jnp.sum(lists.ref_logp_BCL, axis=-1))",
    "moved_BC = logp_BC - jnp.sum(lists.ref_logp_BCL, axis=-1)",
    (_STEP + "test_references_and_their_gate_reach_the_loss",),
  ),
)
