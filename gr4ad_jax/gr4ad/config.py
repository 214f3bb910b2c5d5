"""GR4AD's settings and presets."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Interval

from gr4ad_jax.config import (
  Bounded,
  ConfigError,
  Count,
  CountOrZero,
  NotNegative,
  Positive,
  Share,
  ShareBelowOne,
  nearest,
  require,
)
from gr4ad_jax.data import neighbours, shortlist
from gr4ad_jax.nn.config import HistoryConfig, KvMode, LayerConfig, NormKind, Remat
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig(Bounded, section="model"):
  """Context processor and decoder. Source: paper 3.2."""

  decoder: Literal["lazy", "autoregressive", "multi_token"] = "lazy"
  """LazyAR, or one of the two that it is compared with: the ordinary autoregressive decoder, and
  DeepSeek-style multi-token prediction."""
  width: Count = 128
  """d, the width of every hidden state."""
  num_heads: Count = 4
  """Attention heads; must divide the width."""
  num_layers: Count = 4
  """L, decoder layers in all."""
  num_lazy_layers: CountOrZero = 2
  """K, layers that run without the previous token, once per request (LazyAR). Multi-token
  prediction has L - K layers in the module of each later position."""
  mlp_width: CountOrZero = 0
  """SwiGLU inner width; 0 takes 8/3 of the width rounded to a multiple of 64."""
  kv_mode: KvMode = "lazy"
  """Cross-attention keys and values: the normalised context itself, or projections per layer."""
  norm: NormKind = "rms"
  """Normalisation before each sub-layer."""
  fuse_bos: bool = False
  """Also fuse a learned BOS token at position 1 (eq. 7 read literally; the figures bypass it)."""
  copy_path: bool = False
  """Mix in next codes copied from a shortlist of ads that the user met or that are trending, each
  weighed by its numbers (beyond the paper; off = paper)."""
  shortlist: Count = 512
  """Ads of that shortlist."""
  neighbours: CountOrZero = 0
  """Ads behind the shortlist that tend to follow the history's latest ads, by counts of transitions
  (beyond the paper; 0 = paper). Needs copy_path, and data that are split by leave-one-out."""
  item_scorer: bool = False
  """Also copy from all ads of the catalogue, each scored against an encoding of the ordered ad
  history (beyond the paper; off = paper). Needs copy_path."""
  item_share: ShareBelowOne = 0.0
  """What its ads have of all that is copied; 0 = a share that is learned, for each request."""
  item_width: Count = 64
  """Width of its ad vectors and of its encoder."""
  history_length: Count = 50
  """Latest ads that the encoder reads."""
  history_blocks: Count = 1
  """Its blocks."""
  history_filter: Share = 0.7
  """What its low-pass filter gives to a block's mix, beside attention; 0 = attention alone."""
  history_dropout: ShareBelowOne = 0.5
  """Its dropout rate during training."""
  copied_items: Count = 512
  """Ads that a search copies from by this score: the most probable ones."""
  id_rows: CountOrZero = 0
  """Rows of a table that ids of users and of ads in the history are hashed into (beyond the paper);
  0 = none, then an ad is known by its codes and a user by features alone."""
  id_width: Count = 16
  """Width of that table."""
  dropout: ShareBelowOne = 0.0
  """Dropout rate on sub-layer outputs during training."""
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of activations; parameters, softmax, log-probs and losses stay float32."""
  remat: Remat = "none"
  """What the backward pass computes again instead of keeping: nothing, all of a layer but its
  matrix products, or all of a layer."""

  def _check(self):
    require(self.width % self.num_heads == 0, "model.num_heads", self.num_heads,
            f"must divide model.width={self.width}")
    require(self.num_lazy_layers < self.num_layers, "model.num_lazy_layers", self.num_lazy_layers,
            f"must be less than model.num_layers={self.num_layers}")
    for name in ("item_scorer", "neighbours"):
      require(self.copy_path or not getattr(self, name), f"model.{name}", getattr(self, name),
              "needs model.copy_path=true")

  @property
  def copied_ads(self) -> int:
    """M, the shortlist's ads, neighbours among them; 0 without the copy path."""
    return self.copy_path * (self.shortlist + self.neighbours)

  @property
  def copied_numbers(self) -> int:
    """F, what is known of each in numbers."""
    return len(shortlist.NUMBERS) + bool(self.neighbours) * len(neighbours.NUMBERS)

  @property
  def feed_forward_width(self) -> int:
    """Inner width of the feed-forward block."""
    return self.mlp_width or max(64, 64 * round(self.width * 8 / 3 / 64))

  @property
  def history(self) -> HistoryConfig:
    """What the encoder of the item scorer needs to know."""
    return HistoryConfig(
      self.item_width, self.history_length, self.history_blocks, dropout=self.history_dropout,
      filter_share=self.history_filter,
    )

  @property
  def layers(self) -> LayerConfig:
    """What each decoder layer needs to know."""
    return LayerConfig(
      self.width, self.num_heads, self.feed_forward_width,
      kv_mode=self.kv_mode, norm=self.norm, dropout=self.dropout, remat=self.remat,
    )


@dataclasses.dataclass(frozen=True)
class LossConfig(Bounded, section="loss"):
  """Value-aware supervised learning. Source: paper 3.3, eq. 12-15."""

  ecpm_weight: NotNegative = 0.5
  """lambda_e, weight of the eCPM-bucket loss."""
  mtp_weight: NotNegative = 0.3
  """lambda_mtp, weight of the auxiliary loss on the un-fused trunk (LazyAR only)."""
  item_weight: NotNegative = 0.5
  """Weight of the item scorer's own loss (model.item_scorer alone; beyond the paper)."""
  request_size_power: NotNegative = 0.0
  """w_request = (targets of the request) ** -power (beyond the paper): 1 = all requests weigh the
  same, as in the mean of recall; 0 = all targets do."""
  label_smoothing: ShareBelowOne = 0.0
  """epsilon: share of L_SID's target probability that all codes of a level have in common, in
  training (beyond the paper; off = paper)."""
  num_ecpm_bins: Count = 32
  """Equiprobable buckets of the training samples' eCPM (fewer where quantiles coincide)."""
  click_weight: NotNegative = 1.0
  """w_behavior of a click; 0 leaves clicks out."""
  conversion_weight: NotNegative = 4.0
  """w_behavior of a conversion."""
  user_weight_range: tuple[NotNegative, NotNegative] = (0.5, 2.0)
  """Bounds of w_user = log1p(trailing revenue) / its training mean."""

  def _check(self):
    require(
      self.click_weight + self.conversion_weight > 0, "loss.conversion_weight",
      self.conversion_weight, "must be positive where loss.click_weight is 0",
    )
    low, high = self.user_weight_range
    require(low <= high, "loss.user_weight_range", (low, high), "needs low <= high")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(Bounded, section="preference"):
  """Learning from candidate lists. Source: paper 3.4."""

  method: Literal["none", "dpo", "s_dpo", "grpo", "rspo", "uvr"] = "uvr"
  """Loss on the lists, added to that of logged samples; none = logged samples alone, uvr = RSPO
  with the weights of the unified objective."""
  weight: NotNegative = 10.0
  """What the list loss weighs beside the loss of logged samples; uvr has max_rl_weight instead."""
  beta: Positive = 1.0
  """Inverse temperature of RSPO, DPO and S-DPO."""
  delta: Positive = 3.0
  """The reference of an anchor counts while its set has moved by less than this (nats, mean)."""
  base_weight: NotNegative = 1.0
  """w_0 of the unified weights."""
  max_rl_weight: NotNegative = 10.0
  """Z_max of the unified weights."""
  vsl_on: Literal["engaged", "all"] = "engaged"
  """List candidates that the supervised loss learns from in uvr: those that the user engaged with,
  or all of them (eq. 22 read literally)."""
  reward_range: Literal["all", "list"] = "all"
  """Rewards fill 0 to 5 between the 1% and 99% quantiles of log eCPM over all lists, or between the
  smallest and largest of each list."""
  lists_per_step: Count = 16
  """Lists in a step, beside train.batch_size logged requests."""


@dataclasses.dataclass(frozen=True)
class CandidateConfig(Bounded, section="candidates"):
  """How lists of candidates are made. Source: paper 4.1."""

  width_factor: Annotated[float, Interval(ge=1)] = 2.0
  """Beams of the search over those of serving."""
  top: CountOrZero = 12
  """Candidates that the model likes best."""
  rest: CountOrZero = 12
  """Drawn from the rest of the beam."""
  sampled: CountOrZero = 8
  """Drawn from the model with `temperature`: exploration."""
  temperature: Positive = 1.5
  """Temperature of the sampled ones; their logged log-probability is the untempered one."""
  shown: bool = False
  """Also keep what the logging system showed, as a list without references."""
  top_users_share: Share = 0.3
  """Share of the requests, those of the users with the largest past value, that lists are made
  for."""
  uniform_share: Share = 0.05
  """Share of the other requests that lists are made for."""
  max_lists: Count = 20_000
  """At most so many requests."""
  seed: int = 0
  """Seed of the choice of requests and candidates."""

  def _check(self):
    require(self.size >= 2, "candidates.top", self.top, "a list needs two candidates")

  @property
  def size(self) -> int:
    """Candidates of a list."""
    return self.top + self.rest + self.sampled


@dataclasses.dataclass(frozen=True)
class OnlineConfig(Bounded, section="online"):
  """How a run goes on learning. Source: paper 4.1; the numbers are ours."""

  publish_every: Count = 500
  """Steps between publications, counted over segments."""
  learning_rate_share: Positive = 0.1
  """Constant rate, as a share of the run's peak."""
  passes: Count = 1
  """How often each sample of a segment is learned from."""
  keep_days: Positive = 90.0
  """Events older than this no longer stand in histories."""
  seed: int = 0
  """Seed of shuffling, lists and dropout."""


@dataclasses.dataclass(frozen=True)
class DataShape(Bounded):
  """Sizes that the data will have, where there are none yet."""

  codebook_sizes: tuple[Count, ...] = (4096, 1024, 256)
  """Codes of each SID level."""
  context_tokens: int = 256
  """Tokens of a request's context: histories, features, trending ads."""
  num_ads: Count = 20_000
  """Ads with semantic IDs, for models that score every one (model.item_scorer)."""
  max_targets: Count = 4
  """Targets of a training example, padded ones included."""

  def _check(self):
    require(len(self.codebook_sizes) >= 2, "codebook_sizes", self.codebook_sizes,
            "needs two levels or more")


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run; saved in its folder's run.json."""

  model: ModelConfig = ModelConfig()
  loss: LossConfig = LossConfig()
  train: TrainConfig = TrainConfig()
  search: SearchConfig = SearchConfig()
  preference: PreferenceConfig = PreferenceConfig()


def _paper(width: int) -> Config:
  return Config(
    model=ModelConfig(
      width=width, num_heads=width // 64, num_layers=9, num_lazy_layers=6,
      compute_dtype="bfloat16",
    ),
    train=TrainConfig(num_steps=100_000, batch_size=1024, learning_rate=3e-4, eval_every=5000,
                      checkpoint_every=1000),
    search=SearchConfig(widths=(128, 256, 512)),
  )


def _sequences(num_steps: int) -> Config:
  return Config(
    model=ModelConfig(
      width=64, num_heads=2, num_layers=1, num_lazy_layers=0, dropout=0.2, copy_path=True,
      shortlist=32, neighbours=128, item_scorer=True, item_share=0.6, history_length=24,
      history_dropout=0.4,
    ),
    train=TrainConfig(
      num_steps=num_steps, batch_size=256, learning_rate=2e-3, weight_decay=0.0, log_every=100,
      eval_every=600, eval_batches=20, checkpoint_every=600, best_by="ndcg@50", rank_requests=2048,
    ),
    search=SearchConfig(widths=(64, 128, 200), exclude_seen=True),
  )


PRESETS: dict[str, Config] = {
  # Seconds on a laptop: tests and the notebook.
  "tiny": Config(
    model=ModelConfig(width=64, num_heads=2, num_layers=3, num_lazy_layers=2),
    train=TrainConfig(num_steps=200, batch_size=32, learning_rate=3e-3, log_every=20,
                      eval_every=100, eval_batches=8, checkpoint_every=100),
    search=SearchConfig(widths=(32, 48, 64), batch_size=32),
  ),
  # Minutes on two CPU cores: the main demonstration.
  "demo": Config(
    model=ModelConfig(width=128, num_heads=4, num_layers=4, num_lazy_layers=2, copy_path=True),
    # On validation weeks this finds more in small requests, whose recall counts as much.
    loss=LossConfig(request_size_power=1.0),
    train=TrainConfig(learning_rate=2e-3),
    search=SearchConfig(value_exponent=0.1),
  ),
  # Sequences of single ads that do not repeat, such as Amazon's reviews: what comes next is told by
  # their order and by what others did next. The generator is small; it has little to add.
  "amazon-beauty": _sequences(num_steps=4_800),
  "amazon-sports": _sequences(num_steps=7_200),
  # 4.7 million parameters beside four codebooks of 256; what bench_training measures.
  "mini": Config(
    model=ModelConfig(width=256, num_heads=4, num_layers=4, num_lazy_layers=2, mlp_width=768),
    train=TrainConfig(num_steps=5_000),
  ),
  # Hours on a CPU, minutes on an accelerator.
  "small": Config(
    model=ModelConfig(width=256, num_heads=4, num_layers=9, num_lazy_layers=6, dropout=0.1),
    train=TrainConfig(num_steps=20_000, batch_size=1024, eval_every=1000),
    search=SearchConfig(widths=(128, 256, 512)),
  ),
  "base": _paper(512),
  "0.03b": _paper(384),
  "0.08b": _paper(704),
  "0.16b": _paper(1024),
  "0.32b": _paper(1472),
}


def preset(name: str) -> Config:
  """The preset of this name.

  Raises:
    ConfigError: an unknown name; the message lists the nearest ones.
  """
  if name not in PRESETS:
    raise ConfigError(f"preset={name!r}: unknown; {nearest(name, PRESETS)}")
  return PRESETS[name]
