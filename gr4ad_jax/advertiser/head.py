"""A small softmax over advertisers on what a frozen model says of a history.

Dimension key beyond docs/architecture.md: `C` components of what was read, `H` latest conversions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.training.task import Metrics, Task


class HeadRow(NamedTuple):
  """One history, or B of them stacked."""

  x_C: np.ndarray  # float32, whitened
  own_H: np.ndarray  # int32, advertisers converted with, the newest in the last place; -1 = none
  target: np.ndarray  # int32, advertiser; -1 = none


def stacked(rows: list[HeadRow]) -> HeadRow:
  """Rows as one batch."""
  return HeadRow(*(np.stack(column) for column in zip(*rows, strict=True)))


def recency(own_BH: jax.Array, num_names: int) -> jax.Array:
  """1 / how many conversions ago an advertiser was the last time, 0 = never; float32 [B, A]."""
  B, H = own_BH.shape
  ago_H = 1.0 / jnp.arange(H, 0, -1)
  row_BH = jnp.broadcast_to(jnp.arange(B)[:, None], own_BH.shape)
  kept = jnp.where(own_BH >= 0, own_BH, num_names)
  weight_BH = jnp.broadcast_to(ago_H[None], own_BH.shape)
  return jnp.zeros((B, num_names + 1)).at[row_BH, kept].max(weight_BH)[:, :num_names]


def log_probs(params: Any, batch: HeadRow) -> jax.Array:
  """log p of every advertiser, float32 [B, A].

  softmax(x W + b + u r + v [r > 0]), r = recency: the frozen model's view of the history, how
  popular an advertiser is, and whether and when the user converted with it.
  """
  r_BA = recency(batch.own_H, params["bias"].shape[0])
  u, v = params["own"][0], params["own"][1]
  logit_BA = jnp.einsum("BC,CA->BA", batch.x_C, params["kernel"]) + params["bias"][None]
  return jax.nn.log_softmax(logit_BA + u * r_BA + v * (r_BA > 0), axis=-1)


def head_task(count_A: np.ndarray, components: int) -> Task:
  """Begins at popularity: W = 0, b = log (1 + labels of training), u = v = 0.

  Args:
    count_A: labels of training.
    components: C.
  """
  start_A = np.log1p(count_A).astype(np.float32)

  def init(key: jax.Array) -> dict[str, jax.Array]:
    del key
    return {
      "kernel": jnp.zeros((components, len(start_A))), "bias": jnp.asarray(start_A),
      "own": jnp.zeros(2),
    }

  def loss(params: Any, batch: HeadRow, key: jax.Array | None) -> Metrics:
    del key
    real_B = batch.target >= 0
    told_B = jnp.take_along_axis(
      log_probs(params, batch), jnp.maximum(batch.target, 0)[:, None], axis=1
    )[:, 0]
    return {"loss": (-jnp.where(real_B, told_B, 0).sum(), real_B.sum().astype(jnp.float32))}

  return Task(init, loss)
