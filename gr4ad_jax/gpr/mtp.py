"""Stages 1 and 2: multi-token prediction with weighted heads, and values.

Source: GPR 3.1 (eq. 3) and 3.2 (eq. 4).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.batch import Batch
from gr4ad_jax.gpr.config import LossConfig
from gr4ad_jax.gpr.hte import range_losses, value_losses
from gr4ad_jax.gpr.model import LAYOUTS, Gpr, init_params
from gr4ad_jax.training.task import Metrics, Task

_RANGE_WEIGHT = 1e-3  # so little that the gradient's norm does not notice; AdamW moves as far
_FREE = 0.8  # of the weights; the rest is shared evenly, so that no head is forgotten


def head_weights(head_logit_N: jax.Array) -> jax.Array:
  """w^H = 0.2 / N + 0.8 softmax(a), float32 [N], of sum 1; with four heads 0.05 + 0.8 softmax."""
  return (1 - _FREE) / head_logit_N.shape[0] + _FREE * jax.nn.softmax(head_logit_N)


def entropy_gap(head_logit_N: jax.Array) -> jax.Array:
  """log N - H(softmax a) >= 0: what keeps a least loss from giving all weight to one head."""
  logp_N = jax.nn.log_softmax(head_logit_N)
  return jnp.log(float(head_logit_N.shape[0])) + jnp.sum(jnp.exp(logp_N) * logp_N)


def head_losses(logp_BPNL: jax.Array, target_BPNL: jax.Array) -> jax.Array:
  """-sum_l log P_j of each label and head, float32 [B, P, N]; 0 with gradient 0 without a target.
  """
  there_BPN = target_BPNL[..., 0] >= 0
  return jnp.where(there_BPN, -jnp.sum(logp_BPNL, axis=-1), 0.0)


def weighted_means(ce_BPN: jax.Array, weight_BPN: jax.Array) -> jax.Array:
  """sum w^V CE / sum w^V of each head, float32 [N]; 0 where nothing weighs anything."""
  total_N = jnp.sum(weight_BPN, axis=(0, 1))
  return jnp.sum(weight_BPN * ce_BPN, axis=(0, 1)) / jnp.maximum(total_N, 1e-9)


@functools.lru_cache(maxsize=16)  # one task has one set of programs
def mtp_task(model: Gpr, config: LossConfig) -> Task:
  """Minimises sum_j w_j CE_j, CE_j being the mean of head j over those labels that it has.

  A label is an ad at the request that it was engaged with; a head whose request lies past the end
  of what is learned from has none there. Where a batch weighs its labels (stage 2), CE_j is the
  mean by these weights: dividing them by their own mean in the batch changes nothing. To it come
  the entropy term of the heads' weights, where they are learned, `balance_weight` times the balance
  of recursions, `refining_weight` times the denoiser's error, and `value_weight` times that of the
  evaluator's values, which alone learns from it, and a little of what their quantiles cost.
  """

  def loss(params: Any, batch: Batch, key: jax.Array | None) -> Metrics:
    drop = {"deterministic": True} if key is None else {
      "deterministic": False, "rngs": {"dropout": key}
    }
    found = model.apply({"params": params}, *batch[:4], **drop)
    head_logit_N = found.head_logit_N
    if config.head_weights == "equal":
      head_logit_N = jnp.zeros_like(head_logit_N)
    weight_N = head_weights(head_logit_N)
    ce_BPN = head_losses(found.logp_BPNL, batch.target_BPNL)
    ce_N = jnp.sum(ce_BPN, axis=(0, 1))
    count_N = jnp.sum(batch.target_BPNL[..., 0] >= 0, axis=(0, 1)).astype(jnp.float32)
    where_BP = batch.group_BP >= 0
    labels_B = jnp.sum(where_BP, axis=1).astype(jnp.float32)
    labels, balance = jnp.sum(labels_B), jnp.sum(labels_B * found.balance_B)
    mean_N = ce_N / jnp.maximum(count_N, 1)
    if batch.weight_BPN is not None:
      mean_N = weighted_means(ce_BPN, batch.weight_BPN)
    mean = jnp.sum(weight_N * mean_N) + entropy_gap(head_logit_N)
    value = jnp.sum(value_losses(found.value_BPV, batch.worth_BP, where_BP, model.vocabulary))
    refining = jnp.sum(jnp.where(where_BP, found.refining_BP, 0.0))
    spread = jnp.sum(range_losses(found.value_BPV, *found.value_range, where_BP))
    total = labels * mean + config.balance_weight * balance + config.value_weight * value
    total += _RANGE_WEIGHT * spread
    metrics = {
      "loss": (total + config.refining_weight * refining, labels), "value_loss": (value, labels),
      "balance_loss": (balance, labels), "refining_loss": (refining, labels),
    }
    for head in range(weight_N.shape[0]):
      metrics[f"head_{head + 1}_loss"] = (ce_N[head], count_N[head])
      metrics[f"head_{head + 1}_weight"] = (weight_N[head] * labels, labels)
    return metrics

  return Task(functools.partial(init_params, model), loss, LAYOUTS)
