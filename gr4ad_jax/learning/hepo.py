"""Hierarchy-enhanced policy optimisation (HEPO): rewards of every level, advantages, the loss.

An episode is one request: its action is a path of L codes, and a candidate is a path that the old
policy found. Level l = 1..L stands at index l - 1 of the axis L. Source: GPR 3.3, eqs. 6 to 10;
the paper says that J is minimised, which would make good ads less probable.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gr4ad_jax.learning.spread import spread


def process_rewards(
  liked_BCL: jax.Array, usual_BCL: jax.Array, reward_BC: jax.Array, *, alpha: float
) -> jax.Array:
  """r_l = alpha max(0, P_l(z_l) - mean over S_l of P_l) for l < L, r_L = R; float32 [B, C, L].

  Args:
    liked_BCL: P_l(z_l), how often the user's successes have the candidate's code, in [0, 1].
    usual_BCL: the mean of P_l over the codes that lead on.
    reward_BC: R.
    alpha: of all levels.

  Source: eqs. 6 and 7.
  """
  early_BCL = alpha * jnp.maximum(liked_BCL - usual_BCL, 0.0)
  return jnp.concatenate([early_BCL[..., :-1], reward_BC[..., None]], axis=-1)


def returns(reward_BCL: jax.Array, *, gamma: float) -> jax.Array:
  """G_l = sum_k gamma^k r_{l+k}, float32 [B, C, L]."""
  total, found = jnp.zeros_like(reward_BCL[..., 0]), []
  for level in reversed(range(reward_BCL.shape[-1])):
    total = reward_BCL[..., level] + gamma * total
    found.append(total)
  return jnp.stack(found[::-1], axis=-1)


def group_advantage(reward_BC: jax.Array, where_BC: jax.Array, *, eps: float) -> jax.Array:
  """(R - mu_K) / (sigma_K + eps) among the candidates of a request, float32 [B, C].

  0 for a candidate alone, where all are alike, and where `where_BC` is not set. sigma is that of
  the population.
  """
  apart_BC, mean_B1, sigma_B1 = spread(reward_BC, where_BC)
  # Rounding leaves a little of a mean of equal numbers, which a sigma of it would blow up.
  alike_B1 = sigma_B1 <= 1e-6 * jnp.abs(mean_B1)
  return jnp.where(alike_B1, 0.0, apart_BC / (sigma_B1 + eps))


# Seven parameters: they are those of (8).
def advantages(
  step_reward_BCL: jax.Array,
  value_BCL: jax.Array,
  reward_BC: jax.Array,
  where_BC: jax.Array,
  *,
  gamma: float,
  lam: float,
  eps: float,
) -> jax.Array:
  """A_l, float32 [B, C, L]: GAE below the last level, the group's standing at it; no gradient.

      delta_l = r_l + gamma V_l - V_{l-1}
      A_l = sum_{m=0..L-l-1} (gamma lam)^m delta_{l+m},  l < L
      A_L = (R - mu_K) / (sigma_K + eps)

  delta_L never comes in: R reaches the levels below through V alone.

  Args:
    step_reward_BCL: r, from `process_rewards`.
    value_BCL: V(s, z_{1:l-1}) of l = 1..L, that is V_0 to V_{L-1}.
    reward_BC: R as it is compared within a request.
    where_BC: bool, False = padding.
    gamma, lam: of the discount and of GAE.
    eps: beside sigma.

  Source: eq. 8.
  """
  delta_BCL = step_reward_BCL[..., :-1] + gamma * value_BCL[..., 1:] - value_BCL[..., :-1]
  early_BCL = returns(delta_BCL, gamma=gamma * lam)
  last_BC = group_advantage(reward_BC, where_BC, eps=eps)
  advantage_BCL = jnp.concatenate([early_BCL, last_BC[..., None]], axis=-1)
  return jax.lax.stop_gradient(jnp.where(where_BC[..., None], advantage_BCL, 0.0))


def policy_losses(
  logp_BCL: jax.Array,
  old_logp_BCL: jax.Array,
  advantage_BCL: jax.Array,
  where_BC: jax.Array,
  *,
  clip: float,
) -> jax.Array:
  """-sum_l c_l min(rho_l A_l, clip(rho_l) A_l) with c_l = l / L, float32 [B, C]: -J of (9).

  Args:
    logp_BCL: log pi(z_l), which learns.
    old_logp_BCL: log pi_old(z_l), recorded when the candidate was found.
    advantage_BCL: A.
    where_BC: bool; elsewhere the loss is 0 with gradient 0.
    clip: eps_c, how far rho may lie from 1.
  """
  levels = logp_BCL.shape[-1]
  weight_11L = (jnp.arange(levels, dtype=jnp.float32) + 1)[None, None] / levels
  ratio_BCL = jnp.where(where_BC[..., None], logp_BCL - jax.lax.stop_gradient(old_logp_BCL), 0.0)
  ratio_BCL = jnp.exp(jnp.clip(ratio_BCL, -20, 20))
  clipped_BCL = jnp.clip(ratio_BCL, 1 - clip, 1 + clip)
  gain_BCL = jnp.minimum(ratio_BCL * advantage_BCL, clipped_BCL * advantage_BCL)
  return jnp.where(where_BC, -jnp.sum(weight_11L * gain_BCL, axis=-1), 0.0)


def critic_losses(value_BCL: jax.Array, return_BCL: jax.Array, where_BC: jax.Array) -> jax.Array:
  """sum_l (V(s, z_{1:l-1}) - G_l)^2, float32 [B, C]; 0 with gradient 0 where masked.

  Args:
    value_BCL: V_0 to V_{L-1}.
    return_BCL: G, which gets no gradient.
    where_BC: bool, False = padding.

  Source: eq. 10.
  """
  error_BCL = value_BCL - jax.lax.stop_gradient(return_BCL)
  return jnp.sum(jnp.where(where_BC[..., None], error_BCL, 0.0) ** 2, axis=-1)
