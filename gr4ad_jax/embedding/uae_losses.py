"""What unified ad embeddings are trained on: attributes of an ad, and ads that go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.nn import NEG_INF


def multi_positive_nce(
  z_BD: jax.Array, positive_BB: jax.Array, valid_BB: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """L(i) = -log [ sum_{j in P_i} exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) ].

  One logarithm for each anchor i, however many positives it has; the lower sum holds them too.

  Args:
    z_BD: [B, D] float, rows of L2 norm 1.
    positive_BB: [B, B] bool, row i: P_i. Counts where valid_BB is true too.
    valid_BB: [B, B] bool, row i: the k of the lower sum. The diagonal never counts.
    temperature: tau > 0.

  Returns:
    loss_B float32, and has_positive_B bool; without a positive the loss is 0 with gradient 0.

  Source: GR4AD (arXiv 2602.22732) eq. 1; that anchors without positives are skipped is our choice.
  """
  valid_BB = valid_BB & ~jnp.eye(len(z_BD), dtype=bool)
  positive_BB = positive_BB & valid_BB
  z_BD = z_BD.astype(jnp.float32)
  logits_BB = jnp.einsum("BD,CD->BC", z_BD, z_BD) / temperature
  all_B = jax.nn.logsumexp(jnp.where(valid_BB, logits_BB, NEG_INF), axis=-1)
  positive_B = jax.nn.logsumexp(jnp.where(positive_BB, logits_BB, NEG_INF), axis=-1)
  has_positive_B = positive_BB.any(-1)
  return jnp.where(has_positive_B, all_B - positive_B, 0), has_positive_B


def init_heads(class_AN: np.ndarray, width: int) -> list[dict[str, np.ndarray]]:
  """A linear head of zeros for each attribute.

  Args:
    class_AN: [A, N] int, -1 = unknown; attribute n has as many classes as its column.
    width: D.
  """
  return [
    {"kernel": np.zeros((width, size), np.float32), "bias": np.zeros(size, np.float32)}
    for size in class_AN.max(0, initial=0) + 1
  ]


def attribute_loss(
  z_BD: jax.Array, heads: list[Mapping[str, Any]], class_BN: jax.Array
) -> jax.Array:
  """Cross-entropy of each ad's known attributes, their mean.

  Args:
    z_BD: [B, D] float, rows of L2 norm 1; the heads see it times sqrt(D), entries of size 1.
    heads: of `init_heads`, one for each attribute.
    class_BN: [B, N] int; negative = unknown, which costs nothing.

  Returns:
    [B] float32; an ad without known attributes costs 0 with gradient 0.
  """
  x_BD = z_BD.astype(jnp.float32) * np.sqrt(z_BD.shape[1])
  total_B = jnp.zeros(len(z_BD))
  for n, head in enumerate(heads):
    class_B = class_BN[:, n]
    logp_BC = jax.nn.log_softmax(x_BD @ head["kernel"] + head["bias"][None])
    loss_B = -jnp.take_along_axis(logp_BC, jnp.maximum(class_B, 0)[:, None], axis=1)[:, 0]
    total_B += jnp.where(class_B >= 0, loss_B, 0)
  return total_B / jnp.maximum((class_BN >= 0).sum(-1), 1)
