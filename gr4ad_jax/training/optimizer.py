"""AdamW with warm-up and cosine decay. Source: reference section 10."""

from __future__ import annotations

import jax
import optax

from gr4ad_jax.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
  """Linear warm-up to the peak, cosine to `final_learning_rate_share` of it."""
  warmup = max(1, round(config.warmup_share * config.num_steps))
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(config.num_steps, warmup + 1),
    end_value=config.learning_rate * config.final_learning_rate_share,
  )


def build_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW (0.9, 0.95) with decay on matrices only."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate(config), b1=0.9, b2=0.95, eps=1e-8, weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    ),
  )
