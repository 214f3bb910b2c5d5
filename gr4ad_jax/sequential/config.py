"""Settings of the trained baselines; the defaults take minutes on two CPU cores."""

from __future__ import annotations

import dataclasses

from gr4ad_jax.config import Bounded, Count, CountOrZero, Share, ShareBelowOne, require
from gr4ad_jax.ranker.config import RewardConfig
from gr4ad_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class SasrecModel(Bounded, section="model"):
  """Sizes of SASRec (sequential/sasrec.py)."""

  width: Count = 64
  """Of ad vectors and states."""
  num_blocks: Count = 1
  """Blocks of self-attention and feed-forward."""
  num_heads: Count = 8
  """Heads of attention; must divide the width."""
  max_history: Count = 64
  """Latest ads of the history that are read, organic ones among them."""
  dropout: ShareBelowOne = 0.4
  """On the history's ads and in every block."""
  filter_share: Share = 0.0
  """Share of a low-pass filter beside attention, as in BSARec; 0 = SASRec."""
  negatives: CountOrZero = 0
  """Ads drawn for the softmax of a step, beside the targets; 0 = all ads. A step over all costs as
  much as `width` x ads x batch: with more than some 100,000 ads draw 8,192."""

  def _check(self):
    require(self.width % self.num_heads == 0, "model.num_heads", self.num_heads,
            f"must divide model.width={self.width}")
    require(self.negatives % 2 == 0, "model.negatives", self.negatives, "must be even")


@dataclasses.dataclass(frozen=True)
class SasrecConfig:
  """All settings of a SASRec run."""

  model: SasrecModel = SasrecModel()
  train: TrainConfig = TrainConfig(
    num_steps=6000, batch_size=128, learning_rate=4e-3, eval_every=250, eval_batches=8,
    best_by="ndcg@50", rank_requests=1024, patience=6,
  )
  exclude_seen: bool = False
  """The ranking that names the best checkpoint leaves out what users had seen, and counts targets
  that are new to them alone."""


@dataclasses.dataclass(frozen=True)
class TwoTowerConfig:
  """All settings of a two-tower run."""

  model: RewardConfig = RewardConfig(width=32, max_history=96)
  train: TrainConfig = TrainConfig(
    num_steps=2000, batch_size=256, learning_rate=4e-3, weight_decay=2.0, eval_every=250,
    eval_batches=8, best_by="ndcg@50", rank_requests=1024, patience=6,
  )
  exclude_seen: bool = False
  """As of SASRec."""
