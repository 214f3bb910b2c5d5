"""Stage 3: HEPO, and DPO beside it, on candidates of the run's own search. Source: GPR 3.3."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.batch import Batch, Context
from gr4ad_jax.gpr.candidates import CandidateBatch
from gr4ad_jax.gpr.config import LossConfig, PolicyConfig
from gr4ad_jax.gpr.legal_codes import unpack
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.mtp import mtp_task
from gr4ad_jax.learning import hepo
from gr4ad_jax.learning.preference import Lists, dpo_loss
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.training.task import Metrics, Task

_POLICY_RATE = 0.03  # of the learning rate; values learn at all of it
_EPS = 1e-6  # beside sigma
_MOST = 3.0  # deviations of R that values learn: bids have a long tail, and errors are squared


class PolicyBatch(NamedTuple):
  """One step's input."""

  logged: Batch
  lists: CandidateBatch


class CandidateScores(NamedTuple):
  """What the first head and the evaluator say of candidates, float32."""

  logp_BCL: jax.Array  # log pi(z_l) among the codes that lead on
  value_BCV: jax.Array  # V_0 to V_L


def score_candidates(
  module: Gpr, context: Context, code_BCL: jax.Array, legal_BCLU: jax.Array
) -> CandidateScores:
  """Scores candidates of each row's last request, as a search would, without dropout.

  The stream is read and the thinking done once for all of them.
  """
  thought, beam, _ = module.start(context, lambda code_BNL: code_BNL[..., 0] >= 0)
  num_rows, candidates, levels = code_BCL.shape
  beam = jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=1), beam)
  logps, values = [], [module.hte.before(beam.state_BWD)]
  for level in range(levels):
    logit_BCV = module.ptd.first_head(beam.state_BWD, level)
    leads_on_BCV = unpack(legal_BCLU[..., level, :], logit_BCV.shape[-1])
    logp_BCV = jax.nn.log_softmax(jnp.where(leads_on_BCV, logit_BCV, NEG_INF), axis=-1)
    code_BC = jnp.maximum(code_BCL[..., level], 0)
    logps.append(jnp.take_along_axis(logp_BCV, code_BC[..., None], axis=-1)[..., 0])
    token_BCD = module.tables.embed(code_BC, level)
    values.append(module.hte.after(beam.state_BWD, token_BCD, level + 1))
    if level + 1 < levels:
      beam, _ = module.step(thought, beam, code_BC, level + 1)
  return CandidateScores(jnp.stack(logps, axis=-1), jnp.stack(values, axis=-1))


@functools.lru_cache(maxsize=16)  # one task has one set of programs
def policy_task(model: Gpr, loss_config: LossConfig, config: PolicyConfig, method: str) -> Task:
  """Minimises the policy's loss, the critic's, and a little of the loss on logged labels.

      hepo:  -J of (9) + value_weight (10)
      dpo:   DPO by the final value, without (9), + value_weight (10)
      both:  + anchor_weight L_VAFT, with no values of logged labels: from here on V is of the final
             value of an impression, R less the mean of the first push and by its deviation

  V_L, which sees the whole SID, learns R itself. A plain `Batch`, as validation has it, is judged
  by L_VAFT alone.
  """
  anchor = mtp_task(model, dataclasses.replace(loss_config, value_weight=0.0))
  vocabulary = model.vocabulary

  def policy_loss(
    said: CandidateScores, lists: CandidateBatch, reward_BC: jax.Array, where_BC: jax.Array,
    key: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum and count of the policy's loss, and the sum of the critic's over all candidates."""
    step_BCL = hepo.process_rewards(
      lists.liked_BCL, lists.usual_BCL, reward_BC, alpha=config.level_alpha
    )
    return_BCL = hepo.returns(step_BCL, gamma=config.gamma)
    critic_BC = hepo.critic_losses(said.value_BCV[..., :-1], return_BCL, where_BC)
    error_BC = jnp.where(where_BC, said.value_BCV[..., -1] - reward_BC, 0.0)
    critic = jnp.sum(critic_BC + error_BC**2)
    if method == "dpo":
      pairs = Lists(lists.grade_BC, lists.old_logp_BCL, where_BC, where_BC)
      rows = dpo_loss(said.logp_BCL, pairs, key, beta=config.beta, delta=config.delta)
      return jnp.sum(jnp.where(rows.where, rows.loss, 0.0)), jnp.sum(rows.where), critic
    advantage_BCL = hepo.advantages(
      step_BCL, said.value_BCV[..., :-1], lists.reward_BC, where_BC, gamma=config.gamma,
      lam=config.gae_lambda, eps=_EPS,
    )
    policy_BC = hepo.policy_losses(
      said.logp_BCL, lists.old_logp_BCL, advantage_BCL, where_BC, clip=config.clip
    )
    return jnp.sum(policy_BC), jnp.sum(where_BC), critic

  def loss(params: Any, batch: PolicyBatch | Batch, key: jax.Array | None) -> Metrics:
    if isinstance(batch, Batch):
      return anchor.loss(params, batch, key)
    metrics, lists = anchor.loss(params, batch.logged, key), batch.lists
    said = model.apply(
      {"params": params}, lists.context, lists.code_BCL, lists.legal_BCLU, method=score_candidates
    )
    where_BC = lists.code_BCL[..., 0] >= 0
    count = jnp.sum(where_BC).astype(jnp.float32)
    scaled_BC = (lists.reward_BC - vocabulary.value_mean) / vocabulary.value_std
    reward_BC = jnp.clip(scaled_BC, -_MOST, _MOST)
    pairing_key = jax.random.fold_in(jax.random.key(0) if key is None else key, 2)
    policy, taught, critic = policy_loss(said, lists, reward_BC, where_BC, pairing_key)
    taught = taught.astype(jnp.float32)
    logged, labels = metrics["loss"]
    total = policy / jnp.maximum(taught, 1) + config.anchor_weight * logged / jnp.maximum(labels, 1)
    total += loss_config.value_weight * critic / jnp.maximum(count, 1)
    moved_BC = jnp.abs(jnp.sum(said.logp_BCL - lists.old_logp_BCL, axis=-1))
    metrics.pop("value_loss")
    return metrics | {
      # A step's loss is a ratio of sums; this one is the sum of three such ratios.
      "loss": (total * count, count), "logged_loss": (logged, labels),
      "policy_loss": (policy, jnp.maximum(taught, 1)), "critic_loss": (critic, count),
      "moved": (jnp.sum(jnp.where(where_BC, moved_BC, 0.0)), count),
      "final_value": (jnp.sum(jnp.where(where_BC, lists.reward_BC, 0.0)), count),
    }

  warmup = config.critic_warmup if method == "hepo" else 0

  def rate(path: str, step: jax.Array) -> jax.Array | float:
    """Values learn at once and fast; the policy waits for them, and learns slowly."""
    if path.startswith("hte/"):
      return 1.0
    return jnp.where(step < warmup, 0.0, _POLICY_RATE)

  return anchor._replace(loss=loss, rate=rate)
