"""AdamW with warm-up and decay of its rate; row-wise Adagrad for large tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gr4ad_jax.training.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
  """Linear warm-up to the peak, then a cosine to `final_learning_rate_share` of it; or the peak,
  and a line to that in the last `decay_share` of the steps (wsd; MiniCPM, arXiv 2404.06395)."""
  warmup = max(1, round(config.warmup_share * config.num_steps))
  if config.schedule == "wsd":
    peak, decay = config.learning_rate, max(1, round(config.decay_share * config.num_steps))
    return optax.join_schedules(
      [
        optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak),
        optax.linear_schedule(peak, peak * config.final_learning_rate_share, decay),
      ],
      [warmup, max(warmup, config.num_steps - decay)],
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(config.num_steps, warmup + 1),
    end_value=config.learning_rate * config.final_learning_rate_share,
  )


def build_optimizer(
  config: TrainConfig, sparse_tables: Sequence[str] = ()
) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW (0.9, 0.95) with decay on matrices only.

  With `table_learning_rate` the parameters whose paths end like one of `sparse_tables` learn by
  row-wise Adagrad instead.
  """
  adamw = optax.adamw(
    learning_rate(config), b1=0.9, b2=0.95, eps=1e-8, weight_decay=config.weight_decay,
    mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
  )
  clip = optax.clip_by_global_norm(config.clip_norm)
  if not config.table_learning_rate:
    return optax.chain(clip, adamw)

  def label(path, _) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return "tables" if name.endswith(tuple(sparse_tables)) else "all else"

  def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(label, params)

  tables = optax.chain(
    scale_by_row_adagrad(), optax.scale_by_learning_rate(config.table_learning_rate)
  )
  return optax.chain(clip, optax.partition({"tables": tables, "all else": adamw}, labels))


class RowAdagradState(NamedTuple):
  """Sums of squared gradients, one number a row."""

  sum_of_squares: Any


def scale_by_row_adagrad(*, eps: float = 1e-10) -> optax.GradientTransformation:
  """Divides each row by the root of the sum, over steps, of its mean squared gradient.

  A row that no example of a batch touches has gradient 0 and stays as it is: no decay, no
  momentum. Source: Adagrad (Duchi et al. 2011), a row sharing its statistics as in DLRM.
  """

  def init(params: Any) -> RowAdagradState:
    return RowAdagradState(jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1)), params))

  def update(grads: Any, state: RowAdagradState, params: Any = None):
    del params
    sums = jax.tree.map(
      lambda g, s: s + jnp.mean(g * g, axis=-1, keepdims=True), grads, state.sum_of_squares
    )
    scaled = jax.tree.map(lambda g, s: g * jax.lax.rsqrt(s + eps), grads, sums)
    return scaled, RowAdagradState(sums)

  return optax.GradientTransformation(init, update)
