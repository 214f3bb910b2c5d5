"""Semantic IDs and what embeddings learn from: tokenizer/ and embedding/."""

from tests.mutants.mutant import Mutant

_KMEANS = "tokenizer/test_residual_kmeans.py::"
_NCE = "embedding/test_uae.py::"

MUTANTS = (
  Mutant(
    "a level codes what the levels before left over", "tokenizer/kmeans_programs.py",
    "residual_RD = residual_RD - centroid_VD[codes[-1]]", "residual_RD = residual_RD",
    (_KMEANS + "test_codes_equal_brute_force_and_decode_sums_centroids",),
  ),
  Mutant(
    "a centroid is the mean of its vectors", "tokenizer/kmeans_programs.py",
    "step_VD = sum_VD - new_V[:, None] * centroid_VD", "step_VD = sum_VD - centroid_VD",
    (_KMEANS + "test_plain_kmeans_ends_where_lloyds_iteration_stands_still",),
  ),
  Mutant(
    "large codes are halved", "tokenizer/kmeans_programs.py",
    "moves_V = (large_V > (1 + epsilon) * even)", "moves_V = (large_V > (9 + epsilon) * even)",
    (_KMEANS + "test_balance_halves_large_codes",),
  ),
  Mutant(
    "the order of hashed columns matters", "tokenizer/feature_hash.py",
    "np.uint64(i * GOLDEN & _MASK)", "np.uint64(GOLDEN & _MASK)",
    ("tokenizer/test_feature_hash.py::test_columns_are_mixed_as_written",),
  ),
  Mutant(
    "an ad collides that shares its SID", "tokenizer/health.py",
    '"sid_collision_rate": (prefixes[-1].held_A > 1).mean()',
    '"sid_collision_rate": (count_S > 1).mean()',
    ("tokenizer/test_health.py::test_codes_by_hand",),
  ),
  Mutant(
    "an anchor is no negative of its own", "embedding/uae_losses.py",
    "valid_BB = valid_BB & ~jnp.eye(len(z_BD), dtype=bool)", "valid_BB = valid_BB & True",
    (_NCE + "test_nce_of_three_rows_by_hand",),
  ),
  Mutant(
    "an unknown attribute costs nothing", "embedding/uae_losses.py",
    "total_B += jnp.where(class_B >= 0, loss_B, 0)", "total_B += loss_B",
    (_NCE + "test_attribute_loss_is_the_mean_over_known_attributes",),
  ),
  Mutant(
    "two users who share much say little of a pair", "embedding/cooccurrence.py",
    "np.repeat(2 / (alpha + count_Q), count_Q)", "np.repeat(2 + 0 * count_Q, count_Q)",
    ("embedding/test_cooccurrence.py::test_scores_by_hand",),
  ),
)
