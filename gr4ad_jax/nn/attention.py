"""Softmax attention of rows to keys.

Dimension key: `R` rows that attend, `S` what they attend to, `K` numbers of a head; `...` whatever
leads both, such as requests and heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.cpu_products import matmul


def attend(
  query_RK: jax.Array, key_KS: jax.Array, value_SK: jax.Array, mask_RS: jax.Array
) -> jax.Array:
  """sum_s softmax_s(q k_s) v_s; softmax in float32.

  Leading axes are the same in all but the mask.

  Args:
    query_RK: [..., R, K], scaled.
    key_KS: [..., K, S].
    value_SK: [..., S, K].
    mask_RS: bool, broadcast to [..., R, S]; a row of False alone gives the mean of all values.

  Returns:
    [..., R, K] in the type of `query_RK`.
  """
  score_RS = jnp.where(mask_RS, matmul(query_RK, key_KS), NEG_INF)
  largest_R1 = jax.lax.stop_gradient(score_RS.max(axis=-1, keepdims=True))
  weight_RS = jnp.exp(score_RS - largest_R1)
  # Divided after the sum: its result has fewer numbers than the weights.
  mixed_RK = matmul(weight_RS, value_SK) / weight_RS.sum(axis=-1, keepdims=True)
  return mixed_RK.astype(query_RK.dtype)
