"""Logged samples and candidate lists in one step: VSL with any list loss, and UVR."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gr4ad.batch import Batch, Context
from gr4ad_jax.gr4ad.build import Decoder
from gr4ad_jax.gr4ad.config import LossConfig, PreferenceConfig
from gr4ad_jax.gr4ad.supervised import vsl_loss
from gr4ad_jax.gr4ad.unified import unified_weights
from gr4ad_jax.gr4ad.vsl_task import teaching, vsl_task
from gr4ad_jax.learning import preference
from gr4ad_jax.learning.preference import Lists, RowLoss
from gr4ad_jax.training.task import Metrics, Task


class ListBatch(NamedTuple):
  """Candidate lists of B requests, C candidates each."""

  context: Context
  code_BCL: np.ndarray  # int32 SID codes, -1 = padding
  lists: Lists
  ecpm_bin_BC: np.ndarray  # int32 bucket of the reward's eCPM, -1 = none
  weight_BC: np.ndarray  # float32 w_user * w_behavior where the user engaged, else 0


class UnifiedBatch(NamedTuple):
  """One step's input."""

  logged: Batch
  lists: ListBatch


@functools.lru_cache(maxsize=16)  # one task has one set of programs
def unified_task(decoder: Decoder, loss_config: LossConfig, config: PreferenceConfig) -> Task:
  """Minimises the mean of w L_VSL over logged samples plus what the lists add.

      dpo, s_dpo, grpo, rspo:  + weight * mean over lists of the mean list loss over its rows
      uvr:  the logged samples have weight w_0 w; engaged list candidates join them with
            w_VSL w;  + mean over lists of the mean of w_RL L_RSPO over its anchors       (22)

  A short list counts as much as a long one: what was shown (4 ads) as much as what the model would
  have shown (32). The trunk and the context of a list run once; its candidates lie along the target
  axis. A plain `Batch`, as validation has it, is judged as logged samples. `logged_loss` is the
  loss of these alone, in training as in validation.
  """
  logged_task = vsl_task(decoder, loss_config)

  def list_rows(token_logp_BCL: jax.Array, lists: Lists, key: jax.Array) -> RowLoss:
    match config.method:
      case "dpo":
        return preference.dpo_loss(
          token_logp_BCL, lists, key, beta=config.beta, delta=config.delta
        )
      case "s_dpo":
        return preference.softmax_dpo_loss(
          token_logp_BCL, lists, beta=config.beta, delta=config.delta
        )
      case "grpo":
        return preference.grpo_loss(token_logp_BCL, lists, delta=config.delta)
      case _:
        return preference.rspo_loss(token_logp_BCL, lists, beta=config.beta, delta=config.delta)

  def loss(params: Any, batch: UnifiedBatch | Batch, key: jax.Array | None) -> Metrics:
    metrics = logged_task.loss(params, batch if isinstance(batch, Batch) else batch.logged, key)
    metrics["logged_loss"] = metrics["loss"]
    if isinstance(batch, Batch):
      return metrics
    if config.method == "none":
      return metrics
    rows = batch.lists
    log_probs = decoder.apply(
      {"params": params}, rows.context, rows.code_BCL,
      **teaching(loss_config, None if key is None else jax.random.fold_in(key, 1)),
    )
    pairing_key = jax.random.fold_in(jax.random.key(0) if key is None else key, 2)
    list_loss = list_rows(log_probs.sid_BCL, rows.lists, pairing_key)
    total, samples = metrics["loss"]
    logp_BC = jnp.sum(log_probs.sid_BCL, axis=-1)
    if config.method == "uvr":
      weights = unified_weights(
        logp_BC, rows.lists.reward_BC, rows.lists.where_BC, base_weight=config.base_weight,
        max_rl_weight=config.max_rl_weight,
      )
      learned_BC = rows.lists.where_BC
      own_BC = jnp.ones_like(rows.weight_BC)
      if config.vsl_on == "engaged":
        learned_BC, own_BC = learned_BC & (rows.weight_BC > 0), rows.weight_BC
      terms = vsl_loss(
        *log_probs, ecpm_bin_BC=rows.ecpm_bin_BC, where_BC=learned_BC, config=loss_config
      )
      total = config.base_weight * total + jnp.sum(terms.total_BC * weights.vsl_BC * own_BC)
      samples = samples + jnp.sum(learned_BC)
      preferred, num_lists = _sum_lists(list_loss, weights.rl_BC)
      metrics["misalignment"] = (
        jnp.sum(weights.misalignment_BC), jnp.sum(rows.lists.where_BC).astype(jnp.float32)
      )
    else:
      preferred, num_lists = _sum_lists(list_loss, config.weight)
    mean = total / jnp.maximum(samples, 1.0) + preferred / jnp.maximum(num_lists, 1.0)
    # A step's loss is a ratio of sums; this one is the sum of two such ratios.
    metrics["loss"] = (mean * samples, samples)
    taught, num_lists = _sum_lists(list_loss, 1.0)
    # A step whose lists teach nothing has a list loss of 0, not none.
    metrics["list_loss"] = (taught, jnp.maximum(num_lists, 1.0))
    return metrics | _watch(logp_BC, rows.lists)

  return logged_task._replace(loss=loss)


def _sum_lists(rows: RowLoss, weight: jax.Array | float) -> tuple[jax.Array, jax.Array]:
  """Sum over lists of the weighted mean over each list's rows, and how many lists have any."""
  loss, where = jnp.where(rows.where, weight * rows.loss, 0.0), rows.where
  if loss.ndim == 2:
    loss = jnp.sum(loss, axis=-1) / jnp.maximum(jnp.sum(where, axis=-1), 1)
    where = jnp.any(where, axis=-1)
  return jnp.sum(loss), jnp.sum(where).astype(jnp.float32)


def _watch(logp_BC: jax.Array, lists: Lists) -> Metrics:
  """What tells that list learning goes wrong: the best ad gets less probable, or all ads move."""
  valid_BC = lists.where_BC & jnp.isfinite(lists.reward_BC)
  best_B = jnp.argmax(jnp.where(valid_BC, lists.reward_BC, -jnp.inf), axis=-1)
  any_B = jnp.any(valid_BC, axis=-1)
  best_logp_B = jnp.take_along_axis(logp_BC, best_B[:, None], axis=1)[:, 0]
  referenced_BC = valid_BC & lists.has_ref_BC
  moved_BC = jnp.abs(logp_BC - jnp.sum(lists.ref_logp_BCL, axis=-1))
  return {
    "best_logp": (jnp.sum(jnp.where(any_B, best_logp_B, 0.0)), jnp.sum(any_B).astype(jnp.float32)),
    "moved": (
      jnp.sum(jnp.where(referenced_BC, moved_BC, 0.0)),
      jnp.sum(referenced_BC).astype(jnp.float32),
    ),
  }
