"""Settings of optimisation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gr4ad_jax.config import (
  Bounded,
  Count,
  CountOrZero,
  NotNegative,
  Positive,
  Seed,
  ShareBelowOne,
  require,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Bounded, section="train"):
  """Optimisation and its bookkeeping. The paper leaves it open."""

  num_steps: Count = 2000
  """Optimizer steps in all."""
  batch_size: Count = 64
  """Requests per step over all devices and hosts."""
  learning_rate: Positive = 1e-3
  """Peak, reached after the warm-up."""
  warmup_share: ShareBelowOne = 0.02
  """Share of the steps spent warming up linearly."""
  schedule: Literal["cosine", "wsd"] = "cosine"
  """Course of the learning rate after the warm-up: half a cosine over all steps, or constant and at
  last falling in a line (warm-up, stable, decay), so that up to there it knows no end."""
  decay_share: Positive = 0.2
  """wsd: share of the steps, the last ones, in which the rate falls."""
  final_learning_rate_share: float = 0.1
  """Either ends at this share of the peak."""
  weight_decay: NotNegative = 0.1
  """AdamW decay, on matrices only."""
  clip_norm: Positive = 1.0
  """Global gradient norm is clipped to this."""
  table_learning_rate: NotNegative = 0.0
  """Constant rate of row-wise Adagrad for the table of ids (model.id_rows), which keeps one number
  a row instead of AdamW's two a weight; 0 = AdamW like all else."""
  ema: ShareBelowOne = 0.0
  """Decay of a moving average of the parameters over the steps, which then is what is validated and
  what the run gives; (1 + t) / (10 + t) after t steps where that is less. 0 = none."""
  seed: Seed = 0
  """Seed of parameters, shuffling and dropout."""
  log_every: Count = 50
  """Steps between log lines."""
  eval_every: Count = 1000
  """Steps between validation losses (also the moments a 'best' checkpoint can be kept)."""
  eval_batches: Count = 40
  """Validation batches per validation loss."""
  best_by: Literal["loss", "recall@50", "ndcg@50", "value_recall@50"] = "loss"
  """What names the best checkpoint: the least validation loss, or the most of what a search like
  that of the run finds for a sample of validation requests."""
  rank_requests: Count = 512
  """Requests of that sample."""
  patience: CountOrZero = 0
  """Training ends after so many validations in a row that were no better by `best_by` than one
  before them; 0 = never."""
  checkpoint_every: Count = 500
  """Steps between checkpoints."""
  data_parallel: int = 0
  """Devices along the batch; 0 takes all that fsdp leaves."""
  fsdp: Count = 1
  """Devices over which the weights of layers and their optimizer state are split, and the batch."""
  tensor: Count = 1
  """Devices over which heads, hidden units and embedding tables (rows) are split."""
  accumulate: Count = 1
  """Parts of a batch that a step works through one after another: memory for time."""

  def _check(self):
    require(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate,
            f"must divide train.batch_size={self.batch_size}")
    most = 1 - self.warmup_share if self.schedule == "wsd" else 1.0
    require(self.decay_share <= most, "train.decay_share", self.decay_share,
            f"needs (0, {most}]; wsd warms up before")
