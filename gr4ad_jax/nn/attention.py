"""Softmax attention of rows to keys, with a gradient whose products suit every backend.

The gradient is written whole: product by product, a training step would keep a twentieth more.

Dimension key: `R` rows that attend, `S` what they attend to, `K` numbers of a head; `...` whatever
leads both, such as requests and heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gr4ad_jax.nn import NEG_INF


@jax.custom_vjp
def attend(
  query_RK: jax.Array, key_KS: jax.Array, value_SK: jax.Array, mask_RS: jax.Array
) -> jax.Array:
  """sum_s softmax_s(q k_s) v_s; softmax in float32.

  JAX's own gradient sums over R with R first in both factors. XLA's CPU compiler has no fast
  product of that form for small matrices: it calls another library once for each of B x H matrices,
  and that library allocates at each call. Here one factor of each is transposed before.

  Leading axes are the same in all but the mask.

  Args:
    query_RK: [..., R, K], scaled.
    key_KS: [..., K, S].
    value_SK: [..., S, K].
    mask_RS: bool, broadcast to [..., R, S]; a row of False alone gives the mean of all values.

  Returns:
    [..., R, K] in the type of `query_RK`.
  """
  return _forward(query_RK, key_KS, value_SK, mask_RS)[0]


def _forward(query_RK, key_KS, value_SK, mask_RS):
  score_RS = _float32_product("...RK,...KS->...RS", query_RK, key_KS)
  score_RS = jnp.where(mask_RS, score_RS, NEG_INF)
  weight_RS = jnp.exp(score_RS - score_RS.max(axis=-1, keepdims=True))
  sum_R1 = weight_RS.sum(axis=-1, keepdims=True)
  mixed_RK = _float32_product("...RS,...SK->...RK", weight_RS.astype(value_SK.dtype), value_SK)
  mixed_RK = (mixed_RK / sum_R1).astype(query_RK.dtype)  # fewer numbers than the weights
  return mixed_RK, (query_RK, key_KS, value_SK, mask_RS, weight_RS, sum_R1, mixed_RK)


def _backward(kept, mixed_bar_RK):
  query_RK, key_KS, value_SK, mask_RS, weight_RS, sum_R1, mixed_RK = kept
  dtype = query_RK.dtype
  bar_RK = mixed_bar_RK / sum_R1  # of the mix before it is divided; float32
  along_R1 = (bar_RK * mixed_RK).sum(axis=-1, keepdims=True)
  weight_bar_RS = _float32_product("...RK,...SK->...RS", bar_RK.astype(dtype), value_SK)
  score_bar_RS = jnp.where(mask_RS, weight_RS * (weight_bar_RS - along_R1), 0).astype(dtype)
  weight_SR, query_KR = _transposed(weight_RS.astype(dtype), query_RK)
  return (
    jnp.einsum("...RS,...KS->...RK", score_bar_RS, key_KS),
    jnp.einsum("...KR,...RS->...KS", query_KR, score_bar_RS),
    jnp.einsum("...SR,...RK->...SK", weight_SR, bar_RK.astype(dtype)),
    None,
  )


attend.defvjp(_forward, _backward)


def _float32_product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _transposed(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The last two axes swapped; on CPU kept from being folded into the product that follows."""

  def swap(*arrays):
    return tuple(x.swapaxes(-1, -2) for x in arrays)

  def copy(*arrays):
    return jax.lax.optimization_barrier(swap(*arrays))

  return jax.lax.platform_dependent(*arrays, cpu=copy, default=swap)
