"""GR4AD under value-aware supervised learning, as a training task."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.build import Decoder, init_params
from gr4ad_jax.gr4ad.config import LossConfig
from gr4ad_jax.gr4ad.layouts import LAYOUTS, SPARSE_TABLES
from gr4ad_jax.gr4ad.supervised import vsl_loss
from gr4ad_jax.training.task import Metrics, Task


def teaching(config: LossConfig, key: jax.Array | None) -> dict[str, Any]:
  """How a decoder is asked for the targets: with dropout and smoothing, or without a key neither.
  """
  if key is None:
    return {"deterministic": True}
  return {
    "deterministic": False, "rngs": {"dropout": key}, "code_means": config.label_smoothing > 0,
  }


@functools.lru_cache(maxsize=16)  # one task has one set of programs
def vsl_task(decoder: Decoder, config: LossConfig) -> Task:
  """Minimises the mean of w L over the targets of a batch (eq. 15); w has training mean 1."""

  def loss(params: Any, batch: Batch, key: jax.Array | None) -> Metrics:
    log_probs = decoder.apply(
      {"params": params}, batch.context, batch.target_BCL, **teaching(config, key)
    )
    where_BC = batch.weight_BC > 0
    terms = vsl_loss(
      *log_probs, ecpm_bin_BC=batch.ecpm_bin_BC, where_BC=where_BC, config=config
    )
    targets = jnp.sum(where_BC).astype(jnp.float32)
    with_ecpm = jnp.sum(where_BC & (batch.ecpm_bin_BC >= 0)).astype(jnp.float32)
    items = {} if log_probs.item_BC is None else {"item_loss": (jnp.sum(terms.item_BC), targets)}
    return items | {
      "loss": (jnp.sum(terms.total_BC * batch.weight_BC), targets),
      "sid_loss": (jnp.sum(terms.sid_BC), targets),
      "ecpm_loss": (jnp.sum(terms.ecpm_BC), with_ecpm),
      "mtp_loss": (jnp.sum(terms.mtp_BC), targets),
    }

  return Task(lambda key: init_params(decoder, key), loss, LAYOUTS, SPARSE_TABLES)
