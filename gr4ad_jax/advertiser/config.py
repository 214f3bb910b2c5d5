"""Settings of the advertiser model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Interval

from gr4ad_jax.config import Bounded, Count, NotNegative, Positive, require
from gr4ad_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Bounded, section="prepare"):
  """How a log becomes histories, labels and texts."""

  form: Literal["stream", "prompt"] = "stream"
  """stream: a history is a sequence of `brand: title` lines, and every later brand is a label;
  prompt: a summary of each history with one label, as in the paper."""
  max_history: Count = 20
  """Latest conversions of a user that a text tells."""
  title_chars: Count = 80
  """Characters of a title, cut between words."""
  prompt_chars: Count = 1600
  """Characters of a prompt; what is dropped first, see `prompts.write_prompt`."""
  label_days: Positive = 7.0
  """The label is the first advertiser converted with within so many days behind the cut (logs that
  are cut by time)."""
  popular_days: Positive = 28.0
  """Days before a cut over which popularity is counted (logs that are cut by time)."""
  cuts: Count = 8
  """Cuts of training, `label_days` apart, the last one that far before validation (logs that are
  cut by time)."""


@dataclasses.dataclass(frozen=True)
class LoraConfig(Bounded, section="lora"):
  """Adapters of low rank beside frozen kernels: y = x W + (alpha / R) x A B."""

  rank: Count = 8
  """R."""
  alpha: Positive = 16.0
  """What an adapter adds counts alpha / rank times."""
  targets: Literal["qv", "all"] = "qv"
  """Queries and values, or every linear map of the blocks."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(Bounded, section="model"):
  """How a language model is read and tuned."""

  max_tokens: Count = 256
  """Tokens of a text with the name behind it, and of a packed row."""
  layer: Count = 8
  """head: the layer whose states are read; those above it are not computed."""
  components: Count = 128
  """head: whitened principal components of what is read."""
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of activations (lora, full); weights, norms, softmax and losses stay float32."""
  remat: bool = False
  """lora, full: layers are computed again in the backward pass: less memory, more time."""
  batch_rows: Count = 16
  """Rows that are asked at once when names are told."""


@dataclasses.dataclass(frozen=True)
class Config(Bounded):
  """All settings of a run; saved in its folder's run.json."""

  tuning: Literal["head", "lora", "full"] = "lora"
  """head: a small softmax over advertisers on a frozen lower layer; lora: adapters on all layers;
  full: every weight."""
  model: ModelConfig = ModelConfig()
  lora: LoraConfig = LoraConfig()
  train: TrainConfig = TrainConfig(
    num_steps=400, batch_size=8, learning_rate=2e-4, warmup_share=0.03, weight_decay=0.0,
    log_every=20, eval_every=100, eval_batches=8, checkpoint_every=100,
  )

  def _check(self):
    require(self.train.best_by == "loss", "train.best_by", self.train.best_by,
            "must be 'loss': nothing is searched during a training")
    require(self.train.table_learning_rate == 0, "train.table_learning_rate",
            self.train.table_learning_rate, "must be 0: there is no table of ids")


TUNINGS: dict[str, Config] = {
  "lora": Config(),
  "full": Config(tuning="full", train=dataclasses.replace(Config().train, learning_rate=2e-5)),
  "head": Config(tuning="head", train=TrainConfig(
    num_steps=2000, batch_size=256, learning_rate=2e-3, weight_decay=0.1, log_every=100,
    eval_every=100, eval_batches=20, checkpoint_every=500, patience=4,
  )),
}
"""The defaults of each kind of tuning."""


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Bounded, section="grpo"):
  """Groups of answers that a supervised run learns from by reward."""

  names: Count = 20
  """Names of an answer; a third of all advertisers, where that is less."""
  group: Annotated[int, Interval(ge=2)] = 8
  """Answers of a row, which are compared to each other."""
  kl_weight: NotNegative = 0.02
  """Weight of the divergence from the supervised run."""


@dataclasses.dataclass(frozen=True)
class GrpoSettings:
  """What a training by GRPO has of its own; all else is the supervised run's."""

  grpo: GrpoConfig = GrpoConfig()
  train: TrainConfig = TrainConfig(
    num_steps=400, batch_size=64, learning_rate=1e-3, weight_decay=0.0, log_every=20,
    eval_every=40, eval_batches=80, checkpoint_every=200, patience=4,
  )
