"""The advertiser model: advertiser/."""

from tests.mutants.mutant import Mutant

_LLAMA, _WEIGHTS, _PREPARE, _TEXTS, _SEARCH, _RIVALS, _READING, _GRPO = (
  f"advertiser/test_{name}.py::test_" for name in
  ("llama", "weights", "prepare", "texts", "name_search", "rivals", "reading", "grpo")
)

MUTANTS = (
  Mutant(
    "a pair turns by its own frequency", "advertiser/llama.py",
    "base ** (-jnp.arange(half, dtype=jnp.float32) / half)",
    "base ** (-jnp.arange(half, dtype=jnp.float32) / (2 * half))",
    (_LLAMA + "logits_are_those_of_the_equations",),
  ),
  Mutant(
    "GGUF's llamas turn neighbouring numbers", "advertiser/weights.py",
    'rope_layout="interleaved", norm_eps', 'rope_layout="halves", norm_eps',
    (_WEIGHTS + "a_gguf_file_gives_back_the_model_it_was_written_from",),
  ),
  Mutant(
    "texts that share a row do not see each other", "advertiser/llama.py",
    "same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]",
    "same_BTT = segment_BT[:, :, None] >= segment_BT[:, None, :]",
    (_LLAMA + "who_may_look_at_whom_by_hand",),
  ),
  Mutant(
    "an adapter counts alpha / rank times", "advertiser/llama.py",
    "self.lora.alpha / self.lora.rank", "self.lora.alpha",
    (_LLAMA + "an_adapter_is_the_product_of_its_factors_beside_the_kernel",),
  ),
  Mutant(
    "what is known lies strictly before the cut", "advertiser/histories.py",
    "at = begin + np.searchsorted(moves.time_s_E[begin:end], cut)",
    'at = begin + np.searchsorted(moves.time_s_E[begin:end], cut, side="right")',
    (_PREPARE + "cuts_histories_and_labels_by_hand",),
  ),
  Mutant(
    "popularity is counted before the cut", "advertiser/histories.py",
    "recent = (moves.time_s_E < cut) & (", "recent = (",
    (_PREPARE + "no_byte_depends_on_what_happens_behind_the_last_cut",),
  ),
  Mutant(
    "the token that ends a name is told, too", "advertiser/texts.py",
    "range(len(tokens) - 1, len(tokens) + name)", "range(len(tokens) - 1, len(tokens) + name - 1)",
    (_TEXTS + "a_stream_tells_every_name_but_the_first",),
  ),
  Mutant(
    "a label is the token behind its place", "advertiser/tuning.py",
    "jnp.minimum(at_BP + 1,", "jnp.minimum(at_BP,",
    (_TEXTS + "the_loss_of_names_is_the_same_alone_and_packed",),
  ),
  Mutant(
    "a search ends when no open branch is as probable as the last name",
    "advertiser/name_search.py", "-cost < self._found[0][0]", "-cost < self._found[-1][0]",
    (_SEARCH + "the_search_finds_the_most_probable_names_and_their_probability",),
  ),
  Mutant(
    "tokens are renormalised over those that lead on", "advertiser/name_search.py",
    "- most - np.log(np.exp(logit_C - most).sum())", "- most",
    (_SEARCH + "the_search_finds_the_most_probable_names_and_their_probability",),
  ),
  Mutant(
    "training rows are seen with the counts of other users", "advertiser/rival_features.py",
    "count(data, fold_U != fold)", "count(data)",
    (_RIVALS + "a_training_row_does_not_see_its_own_user_in_the_counts",),
  ),
  Mutant(
    "company is divided by the root of both counts", "advertiser/rival_features.py",
    "1 / np.sqrt(np.maximum(count_A, 1))", "1 / np.maximum(count_A, 1)",
    (_RIVALS + "company_counts_users_once",),
  ),
  Mutant(
    "the first token is left out of a mean", "advertiser/reading.py",
    "(state * jax.lax.rsqrt(mean_BT1 + 1e-6)).at[:, 0].set(0)",
    "state * jax.lax.rsqrt(mean_BT1 + 1e-6)", (_READING + "pooled_states_by_hand",),
  ),
  Mutant(
    "recency is that of the last time", "advertiser/head.py",
    ".at[row_BH, kept].max(weight_BH)", ".at[row_BH, kept].min(weight_BH)",
    (_READING + "recency_and_the_head_by_hand",),
  ),
  Mutant(
    "the bonus is for the first fifth", "advertiser/grpo.py",
    "rank <= max(1, names // 5)", "rank <= max(1, names // 4)",
    (_GRPO + "rewards_of_a_list_are_those_of_the_paper",),
  ),
  Mutant(
    "a short list is rewarded up to the same height", "advertiser/grpo.py",
    "base = 0.1 * (names - rank) * 20 / names", "base = 0.1 * (names - rank)",
    (_GRPO + "rewards_of_a_short_list_are_stretched_to_the_same_height",),
  ),
  Mutant(
    "a name is drawn among those that are not before it", "advertiser/grpo.py",
    "axis=2, reverse=True", "axis=2, reverse=False",
    (_GRPO + "log_probs_of_lists_by_hand_and_over_all_lists",),
  ),
  Mutant(
    "lists are drawn with noise", "advertiser/grpo.py",
    "logp_BA[:, None] + noise_BGA", "logp_BA[:, None] + 0 * noise_BGA",
    (_GRPO + "lists_are_drawn_as_often_as_they_are_probable",),
  ),
  Mutant(
    "the divergence grows as 1 - q / p", "advertiser/grpo.py",
    "jnp.exp(behind_BGT) - behind_BGT - 1", "jnp.exp(behind_BGT) - 1",
    (_GRPO + "losses_of_a_group_by_hand",),
  ),
  Mutant(
    "what is better than its group becomes more probable", "advertiser/grpo.py",
    "- rho_BGT * advantage_BG1", "+ rho_BGT * advantage_BG1",
    (_GRPO + "losses_of_a_group_by_hand",),
  ),
  Mutant(
    "the best step is that of the highest reward", "advertiser/grpo.py",
    '{"loss": (-reward_B1.sum()', '{"loss": (reward_B1.sum()',
    (_GRPO + "validation_rewards_the_list_that_is_served",),
  ),
  Mutant(
    "the latest conversion weighs most", "advertiser/two_tower.py",
    "jnp.arange(H - 1, -1, -1)", "jnp.arange(H)",
    (_RIVALS + "scores_of_two_towers_by_hand",),
  ),
)
