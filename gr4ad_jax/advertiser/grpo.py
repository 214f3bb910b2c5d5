"""GRPO: answers in groups, each of them a list of names, rewarded by where the label stands.

Dimension key beyond docs/architecture.md: `B` rows, `G` answers of a group, `K` names of an answer,
`T` choices of an answer, `A` advertisers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.advertiser.config import GrpoConfig
from gr4ad_jax.advertiser.head import HeadRow, head_task, log_probs
from gr4ad_jax.learning.preference import RowLoss
from gr4ad_jax.learning.spread import spread
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.training.task import Metrics, Task


def names_of(config: GrpoConfig, num_names: int) -> int:
  """n, how many names an answer has: a third of all there are, where that is less than asked."""
  return min(config.names, max(1, num_names // 3))


def match_reward(rank: jax.Array, names: int) -> jax.Array:
  """R_match of answers with the label at rank i, float32; 0 where it is absent.

      0.1 (n - i) 20 / n + 2 [i <= max(1, n // 5)]

  n = 20 gives the paper's. Its two penalties are of answers with too few or too many names or
  interests: here an answer has n names, all of which exist, none twice, and interests are not asked
  for, so that both are 0 always.

  Args:
    rank: int, from 1; 0 = absent.
    names: n.

  Source: the paper, eq. 1 to 5.
  """
  base = 0.1 * (names - rank) * 20 / names
  bonus = jnp.where(rank <= max(1, names // 5), 2.0, 0.0)
  return jnp.where(rank > 0, base + bonus, 0.0)


def rank_of(target_B: jax.Array, name_BGK: jax.Array) -> jax.Array:
  """int32 [B, G], the place of the label in each answer, from 1; 0 = it is not there."""
  here_BGK = name_BGK == target_B[:, None, None]
  place_K = jnp.arange(1, name_BGK.shape[2] + 1)
  return jnp.sum(jnp.where(here_BGK, place_K[None, None], 0), axis=-1)


def draw_lists(key: jax.Array, logp_BA: jax.Array, config: GrpoConfig) -> jax.Array:
  """int32 [B, G, K]: answers drawn name by name without putting back, all at once.

  The order of log p plus Gumbel noise is that of such draws (Plackett-Luce).
  """
  B, A = logp_BA.shape
  noise_BGA = jax.random.gumbel(key, (B, config.group, A))
  return jax.lax.top_k(logp_BA[:, None] + noise_BGA, names_of(config, A))[1]


def list_log_probs(logp_BA: jax.Array, name_BGK: jax.Array) -> jax.Array:
  """log p of each name of a list among those that are not before it, float32 [B, G, K].

      log p(a_k | a_1 .. a_{k-1}) = s_{a_k} - log sum of exp s over all but a_1 .. a_{k-1}

  Args:
    logp_BA: s, scores or log-probabilities.
    name_BGK: lists of distinct names.

  Source: Plackett-Luce.
  """
  B, G, K = name_BGK.shape
  shape = (B, G, logp_BA.shape[1])
  every_BGA = jnp.broadcast_to(logp_BA[:, None], shape)
  told_BGK = jnp.take_along_axis(every_BGA, name_BGK, axis=2)
  row_B11, answer_1G1 = jnp.arange(B)[:, None, None], jnp.arange(G)[None, :, None]
  rest_BGA = every_BGA.at[row_B11, answer_1G1, name_BGK].set(NEG_INF)
  rest_BG1 = jax.nn.logsumexp(rest_BGA, axis=-1, keepdims=True)
  # From behind, so that no probability is ever taken from a sum that it nearly is.
  left = jax.lax.cumlogsumexp(jnp.concatenate([told_BGK, rest_BG1], -1), axis=2, reverse=True)
  return told_BGK - left[..., :K]


def group_losses(
  logp_BGT: jax.Array, ref_logp_BGT: jax.Array, where_BGT: jax.Array, reward_BG: jax.Array, *,
  kl_weight: float,
) -> RowLoss:
  """What GRPO minimises, one number an answer [B, G], a mean over its choices.

      A = (R - mean R) / (std R + 1e-6)                                  over the group
      loss = - mean_t rho_t A + kl_weight mean_t (q_t / p_t - log (q_t / p_t) - 1)

  Answers are drawn by the parameters that learn from them, and once, so that rho = p / p_old is 1
  and its gradient that of log p: there is nothing to clip. Groups of equal rewards do not count.

  Args:
    logp_BGT: log p of each choice.
    ref_logp_BGT: log q, of the supervised model.
    where_BGT: which choices there are.
    reward_BG: R.
    kl_weight: beta.

  Source: the paper, "standard GRPO"; DeepSeekMath, arXiv 2402.03300.
  """
  centred_BG, _, std_B1 = spread(reward_BG, jnp.ones(reward_BG.shape, bool))
  advantage_BG1 = (centred_BG / (std_B1 + 1e-6))[..., None]
  rho_BGT = jnp.exp(logp_BGT - jax.lax.stop_gradient(logp_BGT))
  behind_BGT = jnp.clip(ref_logp_BGT - logp_BGT, -20, 20)
  cost_BGT = kl_weight * (jnp.exp(behind_BGT) - behind_BGT - 1) - rho_BGT * advantage_BG1
  count_BG = jnp.maximum(jnp.sum(where_BGT, axis=-1), 1)
  loss_BG = jnp.sum(jnp.where(where_BGT, cost_BGT, 0.0), axis=-1) / count_BG
  counts_BG = (std_B1 > 1e-6) & jnp.any(where_BGT, axis=-1)
  return RowLoss(jnp.where(counts_BG, loss_BG, 0.0), counts_BG)


def group_metrics(losses: RowLoss, reward_BG: jax.Array) -> Metrics:
  """What a step minimises and tells: mean reward, and the share of groups that teach nothing."""
  idle_B = ~jnp.any(losses.where, axis=1)
  count = jnp.float32(reward_BG.size)
  return {
    "loss": (losses.loss.sum(), losses.where.sum().astype(jnp.float32)),
    "reward": (reward_BG.sum(), count),
    "equal_groups": (idle_B.sum().astype(jnp.float32), jnp.float32(len(idle_B))),
  }


def head_grpo_task(
  count_A: np.ndarray, components: int, *, config: GrpoConfig, supervised: Any
) -> Task:
  """GRPO of a head: lists of its softmax.

  Without a key, as in validation, the loss is what the most probable list is rewarded, negated.

  Args:
    count_A, components: as of `head_task`.
    config: settings.
    supervised: parameters of the head that it begins with and is held to.
  """

  def loss(params: Any, batch: HeadRow, key: jax.Array | None, reference: Any) -> Metrics:
    logp_BA = log_probs(params, batch)
    names = names_of(config, logp_BA.shape[1])
    if key is None:
      best_B1K = jax.lax.top_k(logp_BA, names)[1][:, None]
      reward_B1 = match_reward(rank_of(batch.target, best_B1K), names)
      return {"loss": (-reward_B1.sum(), jnp.float32(len(reward_B1)))}
    name_BGK = draw_lists(key, jax.lax.stop_gradient(logp_BA), config)
    reward_BG = match_reward(rank_of(batch.target, name_BGK), names)
    losses = group_losses(
      list_log_probs(logp_BA, name_BGK), list_log_probs(log_probs(reference, batch), name_BGK),
      jnp.ones(name_BGK.shape, bool), reward_BG, kl_weight=config.kl_weight,
    )
    return group_metrics(losses, reward_BG)

  return Task(head_task(count_A, components).init, loss, frozen=lambda: supervised)
