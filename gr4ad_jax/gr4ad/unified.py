"""UVR: one objective for supervised learning and RSPO, weighted by how well the model ranks.

Source: paper 3.4.2, eq. 19-22.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gr4ad_jax.learning.preference import ranks


class UnifiedWeights(NamedTuple):
  """Weights of each candidate, without gradient; 0 where it does not count."""

  misalignment_BC: jax.Array  # A: 0 = the model ranks it where its reward does, 1 = opposite ends
  vsl_BC: jax.Array  # w_VSL, multiplies w_user * w_behavior
  rl_BC: jax.Array  # w_RL


def unified_weights(
  logp_BC: jax.Array,
  reward_BC: jax.Array,
  where_BC: jax.Array,
  *,
  base_weight: float,
  max_rl_weight: float,
) -> UnifiedWeights:
  """The two weights of every candidate of a list.

      A     = |rank by p - rank by v| / (n - 1)                   (19)
      w_VSL = w_0 exp(A log(1 + v)) = w_0 (1 + v)^A               (20)
      w_RL  = w_0 Z_max (1 - A)                                   (21)

  Equal numbers share their mean rank. A list of one candidate has A = 0 and w_RL = 0.

  Args:
    logp_BC: float32, the model's log p(y | X).
    reward_BC: float32 >= 0; a candidate with another than a finite number does not count.
    where_BC: bool, False = padding.
    base_weight: w_0.
    max_rl_weight: Z_max.
  """
  where_BC = where_BC & jnp.isfinite(reward_BC)
  reward_BC = jnp.where(where_BC, reward_BC, 0.0)
  count_B1 = jnp.sum(where_BC, axis=-1, keepdims=True)
  apart_BC = jnp.abs(ranks(jax.lax.stop_gradient(logp_BC), where_BC) - ranks(reward_BC, where_BC))
  misaligned_BC = jnp.where(where_BC, apart_BC / jnp.maximum(count_B1 - 1, 1), 0.0)
  vsl_BC = base_weight * (1 + reward_BC) ** misaligned_BC
  rl_BC = jnp.where(count_B1 > 1, base_weight * max_rl_weight * (1 - misaligned_BC), 0.0)
  return UnifiedWeights(
    misaligned_BC, jnp.where(where_BC, vsl_BC, 0.0), jnp.where(where_BC, rl_BC, 0.0)
  )
