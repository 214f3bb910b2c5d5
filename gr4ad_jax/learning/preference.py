"""Preference optimisation over lists of candidates: RSPO, and DPO, S-DPO and GRPO beside it.

All take log-probabilities of the same candidate lists, so that a comparison changes one name. Every
loss gives one number per row and a mask of the rows that count; a masked row costs 0 with gradient
0. A candidate counts where `where_BC` is set and its reward is finite. Source: paper 3.4.1 and A.1.

What happens at the edges, in all four: a list of one, or of equal rewards, gives no pair and costs
nothing; a candidate without a reference, or one that has moved by `delta` or more, closes the gate
of (18) for the anchors it takes part in.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.learning.spread import spread
from gr4ad_jax.nn import NEG_INF

_LN2 = float(np.log(2.0))


class RowLoss(NamedTuple):
  """One number per row, and which rows count."""

  loss: jax.Array  # float32, 0 where the row does not count
  where: jax.Array  # bool, same shape


class Lists(NamedTuple):
  """What is known of the candidates of B requests before the model has its say."""

  reward_BC: jax.Array  # float32, small graded numbers; see `RewardScale`
  ref_logp_BCL: jax.Array  # float32, per level, logged when the candidate was generated
  has_ref_BC: jax.Array  # bool, False where another pipeline made the candidate
  where_BC: jax.Array  # bool, False = padding


class RewardScale(NamedTuple):
  """eCPM -> reward: 5 * clip((log1p(eCPM) - low) / (high - low), 0, 1), low and high quantiles."""

  low: float  # 1% quantile of log1p(eCPM)
  high: float  # 99% quantile

  def __call__(self, ecpm: np.ndarray) -> np.ndarray:
    """float32 in [0, 5], NaN where the eCPM is; so that 2 ** reward stays within [1, 32]."""
    place = (np.log1p(ecpm) - self.low) / max(self.high - self.low, 1e-9)
    return (5 * np.clip(place, 0, 1)).astype(np.float32)


def fit_reward_scale(ecpm_N: np.ndarray) -> RewardScale:
  """Quantiles of the finite ones.

  Raises:
    ValueError: no finite eCPM, or a negative one.
  """
  ecpm_N = ecpm_N[np.isfinite(ecpm_N)]
  if not ecpm_N.size:
    raise ValueError("eCPM of the candidates: needs at least one finite number")
  if ecpm_N.min() < 0:
    raise ValueError(f"eCPM of the candidates: {ecpm_N.min()} is negative")
  low, high = np.quantile(np.log1p(ecpm_N), (0.01, 0.99))
  return RewardScale(float(low), float(high))


def ranks(score_BC: jax.Array, where_BC: jax.Array) -> jax.Array:
  """float32 ranks among the rows that count, 1 = highest; equal scores share their mean rank."""
  above_BCC = (score_BC[:, None, :] > score_BC[:, :, None]) & where_BC[:, None, :]
  equal_BCC = (score_BC[:, None, :] == score_BC[:, :, None]) & where_BC[:, None, :]
  return 0.5 + jnp.sum(above_BCC, axis=-1) + 0.5 * jnp.sum(equal_BCC, axis=-1)


def reference_gate(
  logp_BC: jax.Array, lists: Lists, worse_BCC: jax.Array, *, delta: float
) -> jax.Array:
  """C of (18), bool [B, C]: the anchor's set is all referenced and close to its references.

  Args:
    logp_BC: of the model.
    lists: with the references.
    worse_BCC: bool [B, i, j], j is in E_i.
    delta: nats, on the log-ratio of whole sequences.
  """
  ratio_BC = jax.lax.stop_gradient(logp_BC) - jnp.sum(lists.ref_logp_BCL, axis=-1)
  away_BC = jnp.where(lists.has_ref_BC, jnp.abs(ratio_BC), 0.0)
  itself_1CC = jnp.eye(logp_BC.shape[1], dtype=bool)[None]
  members_BCC = worse_BCC | (itself_1CC & lists.where_BC[:, None, :])
  count_BC = jnp.maximum(jnp.sum(members_BCC, axis=-1), 1)
  mean_BC = jnp.sum(jnp.where(members_BCC, away_BC[:, None, :], 0.0), axis=-1) / count_BC
  complete_BC = jnp.all(~members_BCC | lists.has_ref_BC[:, None, :], axis=-1)
  return (mean_BC < delta) & complete_BC


def rspo_loss(token_logp_BCL: jax.Array, lists: Lists, *, beta: float, delta: float) -> RowLoss:
  """Ranking-guided softmax preference optimisation, one number per anchor [B, C].

      loss_i = log2(1 + sum_{j in E_i} M_ij exp(a_ij)),   E_i = {j: v_j < v_i}
      a_ij   = beta [(lp_j - C_i ref_j) - (lp_i - C_i ref_i)]                              (16)
      M_ij   = |1/D(d) - 1/D(d + 1)| |G_i - G_j|,  d = |rank_i - rank_j|,  D(d) = log2(1 + d)

  Ranks are those of the model's own score lp - C ref; M carries no gradient. Equal scores count
  as neighbours (d = 1). Rows without a worse candidate do not count.

  Args:
    token_logp_BCL: float32, log p(s_l | s_<l, X) of every candidate.
    lists: rewards and references.
    beta: inverse temperature.
    delta: see `reference_gate`.
  """
  where_BC, reward_BC = _valid(lists)
  logp_BC = jnp.sum(token_logp_BCL, axis=-1)
  ref_BC = jnp.where(lists.has_ref_BC, jnp.sum(lists.ref_logp_BCL, axis=-1), 0.0)
  worse_BCC = _worse(reward_BC, where_BC)
  gate_BC = reference_gate(logp_BC, lists._replace(where_BC=where_BC), worse_BCC, delta=delta)
  fixed_BC = jax.lax.stop_gradient(logp_BC)
  rank_BCC = jnp.where(
    gate_BC[..., None],
    ranks(fixed_BC - ref_BC, where_BC)[:, None, :],
    ranks(fixed_BC, where_BC)[:, None, :],
  )
  weight_BCC = ndcg_weights(rank_BCC, reward_BC, where_BC)
  score_BCC = logp_BC[:, None, :] - gate_BC[..., None] * ref_BC[:, None, :]
  own_BC1 = (logp_BC - gate_BC * ref_BC)[..., None]
  inner_BCC = jnp.log(jnp.maximum(weight_BCC, 1e-12)) + beta * (score_BCC - own_BC1)
  z_BC = jax.nn.logsumexp(jnp.where(worse_BCC, inner_BCC, NEG_INF), axis=-1)
  counts_BC = jnp.any(worse_BCC, axis=-1)
  return RowLoss(jnp.where(counts_BC, jax.nn.softplus(z_BC) / _LN2, 0.0), counts_BC)


def ndcg_weights(rank_BCC: jax.Array, reward_BC: jax.Array, where_BC: jax.Array) -> jax.Array:
  """M_ij: what NDCG loses when i and j change places, float32 [B, i, j].

  Args:
    rank_BCC: rank of j in the order that anchor i looks at.
    reward_BC: v.
    where_BC: the candidates that count.
  """
  own_BC1 = jnp.diagonal(rank_BCC, axis1=1, axis2=2)[..., None]
  apart_BCC = jnp.maximum(jnp.abs(rank_BCC - own_BC1), 1.0)
  discount_BCC = 1 / jnp.log2(1 + apart_BCC) - 1 / jnp.log2(2 + apart_BCC)
  gain_BC = jnp.where(where_BC, jnp.exp2(reward_BC) - 1, 0.0)
  place_1C = jnp.arange(gain_BC.shape[1], dtype=jnp.float32)[None]
  ideal_B1 = jnp.sum(-jnp.sort(-gain_BC) / jnp.log2(2 + place_1C), axis=-1, keepdims=True)
  gain_BC = gain_BC / jnp.maximum(ideal_B1, 1e-9)
  return discount_BCC * jnp.abs(gain_BC[:, :, None] - gain_BC[:, None, :])


def dpo_loss(
  token_logp_BCL: jax.Array,
  lists: Lists,
  key: jax.Array,
  *,
  beta: float,
  delta: float,
  num_losers: int = 4,
) -> RowLoss:
  """DPO, one number per list [B]: the best candidate against random worse ones, mean over them.

      loss = - log sigma(beta [(lp_w - C ref_w) - (lp_l - C ref_l)])

  Args:
    token_logp_BCL: float32.
    lists: rewards and references.
    key: draws the losers.
    beta, delta: as `rspo_loss`.
    num_losers: losers drawn per list, without replacement.
  """
  margin_BC, loser_BC = _margins(token_logp_BCL, lists, beta=beta, delta=delta)
  order_BC = jnp.where(loser_BC, jax.random.uniform(key, loser_BC.shape), 2.0)
  last_B1 = jnp.sort(order_BC)[:, min(num_losers, order_BC.shape[1]) - 1][:, None]
  drawn_BC = loser_BC & (order_BC <= last_B1)
  total_B = jnp.sum(jnp.where(drawn_BC, jax.nn.softplus(-margin_BC), 0.0), axis=-1)
  counts_B = jnp.any(drawn_BC, axis=-1)
  return RowLoss(total_B / jnp.maximum(jnp.sum(drawn_BC, axis=-1), 1), counts_B)


def softmax_dpo_loss(
  token_logp_BCL: jax.Array, lists: Lists, *, beta: float, delta: float
) -> RowLoss:
  """S-DPO, one number per list [B]: the best candidate against all worse ones in one softmax.

      loss = - log sigma(- log sum_l exp(- margin_l))
  """
  margin_BC, loser_BC = _margins(token_logp_BCL, lists, beta=beta, delta=delta)
  z_B = jax.nn.logsumexp(jnp.where(loser_BC, -margin_BC, NEG_INF), axis=-1)
  counts_B = jnp.any(loser_BC, axis=-1)
  return RowLoss(jnp.where(counts_B, jax.nn.softplus(z_B), 0.0), counts_B)


def grpo_loss(
  token_logp_BCL: jax.Array,
  lists: Lists,
  *,
  delta: float,
  clip: float = 0.2,
  kl_weight: float = 0.01,
) -> RowLoss:
  """GRPO with the list as the group, one number per candidate [B, C].

      adv_i  = (v_i - mean v) / (std v + 1e-6)
      loss_i = - mean_l min(rho adv, clip(rho) adv) + kl_weight * KL_3(p || p_ref)
      rho    = p(s_l) / p_old(s_l)

  The logged reference is p_old; where there is none p_old is the model itself, and the KL term is
  left out wherever the gate is closed. Lists of equal rewards do not count.
  """
  where_BC, reward_BC = _valid(lists)
  centred_BC, _, std_B1 = spread(reward_BC, where_BC)
  advantage_BC1 = (centred_BC / (std_B1 + 1e-6))[..., None]
  has_ref_BC1 = lists.has_ref_BC[..., None]
  old_BCL = jnp.where(has_ref_BC1, lists.ref_logp_BCL, jax.lax.stop_gradient(token_logp_BCL))
  ratio_BCL = jnp.exp(jnp.clip(token_logp_BCL - old_BCL, -20, 20))
  clipped_BCL = jnp.clip(ratio_BCL, 1 - clip, 1 + clip)
  gain_BCL = jnp.minimum(ratio_BCL * advantage_BC1, clipped_BCL * advantage_BC1)
  logp_BC = jnp.sum(token_logp_BCL, axis=-1)
  every_BCC = where_BC[:, :, None] & where_BC[:, None, :]
  gate_BC = reference_gate(logp_BC, lists._replace(where_BC=where_BC), every_BCC, delta=delta)
  behind_BCL = jnp.clip(old_BCL - token_logp_BCL, -20, 20)
  kl_BCL = jnp.where(gate_BC[..., None], jnp.exp(behind_BCL) - behind_BCL - 1, 0.0)
  loss_BC = jnp.mean(kl_weight * kl_BCL - gain_BCL, axis=-1)
  counts_BC = where_BC & (std_B1 > 1e-6)
  return RowLoss(jnp.where(counts_BC, loss_BC, 0.0), counts_BC)


def _margins(
  token_logp_BCL: jax.Array, lists: Lists, *, beta: float, delta: float
) -> tuple[jax.Array, jax.Array]:
  """beta times the best candidate's lead over every other one, and which others are worse.

  Of equally good ones the best is that which the model likes least.
  """
  where_BC, reward_BC = _valid(lists)
  logp_BC = jnp.sum(token_logp_BCL, axis=-1)
  ref_BC = jnp.where(lists.has_ref_BC, jnp.sum(lists.ref_logp_BCL, axis=-1), 0.0)
  worse_BCC = _worse(reward_BC, where_BC)
  gate_BC = reference_gate(logp_BC, lists._replace(where_BC=where_BC), worse_BCC, delta=delta)
  most_B1 = jnp.max(jnp.where(where_BC, reward_BC, -jnp.inf), axis=-1, keepdims=True)
  among_best_BC = where_BC & (reward_BC == most_B1)
  least_liked_BC = jnp.where(among_best_BC, -jax.lax.stop_gradient(logp_BC), -jnp.inf)
  best_B1 = jnp.argmax(least_liked_BC, axis=-1, keepdims=True)

  def of_best(x_BC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BC, best_B1, axis=1)

  score_BC = logp_BC - of_best(gate_BC) * ref_BC
  loser_BC = jnp.take_along_axis(worse_BCC, best_B1[..., None], axis=1)[:, 0]
  return beta * (of_best(score_BC) - score_BC), loser_BC


def _valid(lists: Lists) -> tuple[jax.Array, jax.Array]:
  """The candidates that count, and their rewards with 0 elsewhere."""
  where_BC = lists.where_BC & jnp.isfinite(lists.reward_BC)
  return where_BC, jnp.where(where_BC, lists.reward_BC, 0.0)


def _worse(reward_BC: jax.Array, where_BC: jax.Array) -> jax.Array:
  """bool [B, i, j]: j is in E_i."""
  lower_BCC = reward_BC[:, None, :] < reward_BC[:, :, None]
  return lower_BCC & where_BC[:, None, :] & where_BC[:, :, None]
