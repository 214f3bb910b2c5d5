"""Settings of the reward model."""

from __future__ import annotations

import dataclasses

from gr4ad_jax.config import Bounded, Count
from gr4ad_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class RewardConfig(Bounded, section="model"):
  """Sizes of the reward model (ranker/reward_model.py)."""

  width: Count = 16
  """Width of every embedding."""
  mlp_widths: tuple[Count, ...] = (128, 64)
  """Hidden layers."""
  max_history: Count = 32
  """Ads, and contents, of the history that are read, most recent first."""
  num_price_bins: Count = 16
  """Equally filled buckets of the price."""


REWARD_TRAINING = TrainConfig(
  num_steps=1200, batch_size=256, learning_rate=3e-3, weight_decay=1e-3, log_every=100,
  eval_every=300, checkpoint_every=300,
)
