"""Every setting of a run as frozen dataclasses, named presets, checks, and a JSON round trip."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
  """A setting that cannot work; the message names the field, the value and the rule."""


def require(ok: bool, field: str, value: Any, rule: str) -> None:
  """Raises ConfigError naming the field, its value and the rule, unless `ok`."""
  if not ok:
    raise ConfigError(f"{field}={value!r}: {rule}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Context processor and decoder. Source: paper 3.2; reference sections 2 and 10."""

  decoder: Literal["lazy", "autoregressive", "multi_token"] = "lazy"
  """LazyAR, or one of the two that it is compared with: the ordinary autoregressive decoder, and
  DeepSeek-style multi-token prediction."""
  width: int = 128
  """d, the width of every hidden state."""
  num_heads: int = 4
  """Attention heads; must divide the width."""
  num_layers: int = 4
  """L, decoder layers in all."""
  num_lazy_layers: int = 2
  """K, layers that run without the previous token, once per request (LazyAR). Multi-token
  prediction has L - K layers in the module of each later position."""
  mlp_width: int = 0
  """SwiGLU inner width; 0 takes 8/3 of the width rounded to a multiple of 64."""
  kv_mode: Literal["lazy", "projected"] = "lazy"
  """Cross-attention keys and values: the normalised context itself, or projections per layer."""
  norm: Literal["rms", "layer"] = "rms"
  """Normalisation before each sub-layer."""
  fuse_bos: bool = False
  """Also fuse a learned BOS token at position 1 (eq. 7 read literally; the figures bypass it)."""
  copy_path: bool = False
  """Mix in next codes copied from ads in the context: the user's history and what is trending
  (beyond the paper; off = paper)."""
  id_rows: int = 0
  """Rows of a table that ids of users and of ads in the history are hashed into (beyond the paper);
  0 = none, then an ad is known by its codes and a user by features alone."""
  id_width: int = 16
  """Width of that table."""
  dropout: float = 0.0
  """Dropout rate on sub-layer outputs during training."""
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of activations; parameters, softmax, log-probs and losses stay float32."""
  remat: Literal["none", "products", "all"] = "none"
  """What the backward pass computes again instead of keeping: nothing, all of a layer but its
  matrix products, or all of a layer."""

  def __post_init__(self):
    require(self.width > 0 and self.num_heads > 0, "model.width", self.width, "must be positive")
    require(
      self.width % self.num_heads == 0, "model.num_heads", self.num_heads,
      f"must divide model.width={self.width}",
    )
    require(self.num_layers >= 1, "model.num_layers", self.num_layers, "must be at least 1")
    require(
      0 <= self.num_lazy_layers < self.num_layers, "model.num_lazy_layers", self.num_lazy_layers,
      f"must lie in [0, model.num_layers={self.num_layers})",
    )
    require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "must lie in [0, 1)")
    for name in ("mlp_width", "id_rows"):
      require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name),
              "must not be negative")
    require(self.id_width >= 1, "model.id_width", self.id_width, "must be at least 1")

  @property
  def feed_forward_width(self) -> int:
    """Inner width of the feed-forward block."""
    return self.mlp_width or max(64, 64 * round(self.width * 8 / 3 / 64))


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Value-aware supervised learning. Source: paper 3.3, eq. 12-15; reference sections 3 and 10."""

  ecpm_weight: float = 0.5
  """lambda_e, weight of the eCPM-bucket loss."""
  mtp_weight: float = 0.3
  """lambda_mtp, weight of the auxiliary loss on the un-fused trunk (LazyAR only)."""
  num_ecpm_bins: int = 32
  """Equiprobable buckets of the training samples' eCPM (fewer where quantiles coincide)."""
  click_weight: float = 1.0
  """w_behavior of a click; 0 leaves clicks out."""
  conversion_weight: float = 4.0
  """w_behavior of a conversion."""
  user_weight_range: tuple[float, float] = (0.5, 2.0)
  """Bounds of w_user = log1p(trailing revenue) / its training mean."""

  def __post_init__(self):
    for name in ("ecpm_weight", "mtp_weight", "click_weight", "conversion_weight"):
      require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "must be >= 0")
    require(
      self.click_weight + self.conversion_weight > 0, "loss.conversion_weight",
      self.conversion_weight, "must be positive where loss.click_weight is 0",
    )
    require(self.num_ecpm_bins >= 1, "loss.num_ecpm_bins", self.num_ecpm_bins, "must be >= 1")
    low, high = self.user_weight_range
    require(0 <= low <= high, "loss.user_weight_range", (low, high), "needs 0 <= low <= high")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation and its bookkeeping. Source: reference section 10."""

  num_steps: int = 2000
  """Optimizer steps in all."""
  batch_size: int = 64
  """Requests per step over all devices and hosts."""
  learning_rate: float = 1e-3
  """Peak, reached after the warm-up."""
  warmup_share: float = 0.02
  """Share of the steps spent warming up linearly."""
  final_learning_rate_share: float = 0.1
  """The cosine ends at this share of the peak."""
  weight_decay: float = 0.1
  """AdamW decay, on matrices only."""
  clip_norm: float = 1.0
  """Global gradient norm is clipped to this."""
  table_learning_rate: float = 0.0
  """Constant rate of row-wise Adagrad for the table of ids (model.id_rows), which keeps one number
  a row instead of AdamW's two a weight; 0 = AdamW like all else."""
  seed: int = 0
  """Seed of parameters, shuffling and dropout."""
  log_every: int = 50
  """Steps between log lines."""
  eval_every: int = 1000
  """Steps between validation losses (also the moments a 'best' checkpoint can be kept)."""
  eval_batches: int = 40
  """Validation batches per validation loss."""
  checkpoint_every: int = 500
  """Steps between checkpoints."""
  data_parallel: int = 0
  """Devices along the batch; 0 takes all that fsdp leaves."""
  fsdp: int = 1
  """Devices over which the weights of layers and their optimizer state are split, and the batch."""
  tensor: int = 1
  """Devices over which heads, hidden units and embedding tables (rows) are split."""
  accumulate: int = 1
  """Parts of a batch that a step works through one after another: memory for time."""

  def __post_init__(self):
    for name in ("num_steps", "batch_size", "log_every", "eval_every", "eval_batches",
                 "checkpoint_every", "fsdp", "tensor", "accumulate"):
      require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
    for name in ("learning_rate", "clip_norm"):
      require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be positive")
    require(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate,
            f"must divide train.batch_size={self.batch_size}")
    require(self.table_learning_rate >= 0, "train.table_learning_rate", self.table_learning_rate,
            "must not be negative")
    require(0 <= self.warmup_share < 1, "train.warmup_share", self.warmup_share, "needs [0, 1)")
    require(0 <= self.seed < 2**31, "train.seed", self.seed, "needs 0 <= seed < 2**31")


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """Beam search over SID levels. Source: paper 4.2 (progressive widths)."""

  widths: tuple[int, ...] = (64, 96, 128)
  """Beams kept after each SID level."""
  batch_size: int = 64
  """Requests decoded per call."""
  value_exponent: float = 0.0
  """gamma: rank by log p(SID) + gamma * log(expected value); 0 = by probability alone."""
  new_ad_bonus: float = 0.0
  """Added to the score (nats) of SIDs that the user's shown history does not hold: prospecting at
  the expense of repetition; 0 = by probability alone."""
  precision: Literal["trained", "bfloat16", "int8", "fp8"] = "trained"
  """Number type of the decoder in search: as it was trained, bfloat16, int8 weights, or fp8 weights
  and activations (int8 and fp8 need qwix)."""

  def __post_init__(self):
    require(
      len(self.widths) > 0 and min(self.widths) >= 1, "search.widths", self.widths,
      "needs one positive width per SID level",
    )
    require(self.batch_size >= 1, "search.batch_size", self.batch_size, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Sizes of the reward model (learning/reward_model.py)."""

  width: int = 16
  """Width of every embedding."""
  mlp_widths: tuple[int, ...] = (128, 64)
  """Hidden layers."""
  max_history: int = 32
  """Ads, and contents, of the history that are read, most recent first."""
  num_price_bins: int = 16
  """Equally filled buckets of the price."""

  def __post_init__(self):
    for name in ("width", "max_history", "num_price_bins"):
      require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """Learning from candidate lists. Source: paper 3.4; reference sections 4 to 7 and 10."""

  method: Literal["none", "dpo", "s_dpo", "grpo", "rspo", "uvr"] = "uvr"
  """Loss on the lists, added to that of logged samples; none = logged samples alone, uvr = RSPO
  with the weights of the unified objective."""
  weight: float = 10.0
  """Of the list loss beside the loss of logged samples (not uvr, which has max_rl_weight)."""
  beta: float = 1.0
  """Inverse temperature of RSPO, DPO and S-DPO."""
  delta: float = 3.0
  """The reference of an anchor counts while its set has moved by less than this (nats, mean)."""
  base_weight: float = 1.0
  """w_0 of the unified weights."""
  max_rl_weight: float = 10.0
  """Z_max of the unified weights."""
  vsl_on: Literal["engaged", "all"] = "engaged"
  """List candidates that the supervised loss learns from in uvr: those that the user engaged with,
  or all of them (eq. 22 read literally)."""
  reward_range: Literal["all", "list"] = "all"
  """Rewards fill 0 to 5 between the 1% and 99% quantiles of log eCPM over all lists, or between the
  smallest and largest of each list."""
  lists_per_step: int = 16
  """Lists in a step, beside train.batch_size logged requests."""

  def __post_init__(self):
    for name in ("weight", "base_weight", "max_rl_weight"):
      require(getattr(self, name) >= 0, f"preference.{name}", getattr(self, name), "must be >= 0")
    for name in ("beta", "delta"):
      require(getattr(self, name) > 0, f"preference.{name}", getattr(self, name),
               "must be positive")
    require(self.lists_per_step >= 1, "preference.lists_per_step", self.lists_per_step,
             "must be at least 1")


@dataclasses.dataclass(frozen=True)
class CandidateConfig:
  """How lists of candidates are made. Source: paper 4.1; reference section 7."""

  width_factor: float = 2.0
  """Beams of the search over those of serving."""
  top: int = 12
  """Candidates that the model likes best."""
  rest: int = 12
  """Drawn from the rest of the beam."""
  sampled: int = 8
  """Drawn from the model with `temperature`: exploration."""
  temperature: float = 1.5
  """Of the sampled ones; their logged log-probability is the untempered one."""
  shown: bool = False
  """Also keep what the logging system showed, as a list without references."""
  top_users_share: float = 0.3
  """Share of the requests, those of the users with the largest past value, that lists are made
  for."""
  uniform_share: float = 0.05
  """Share of the other requests that lists are made for."""
  max_lists: int = 20_000
  """At most so many requests."""
  seed: int = 0
  """Of the choice of requests and candidates."""

  def __post_init__(self):
    for name in ("top", "rest", "sampled"):
      require(getattr(self, name) >= 0, f"candidates.{name}", getattr(self, name), "must be >= 0")
    require(self.size >= 2, "candidates.top", self.top, "a list needs two candidates")
    require(self.width_factor >= 1, "candidates.width_factor", self.width_factor, "must be >= 1")
    require(self.temperature > 0, "candidates.temperature", self.temperature, "must be positive")
    for name in ("top_users_share", "uniform_share"):
      require(0 <= getattr(self, name) <= 1, f"candidates.{name}", getattr(self, name),
               "needs [0, 1]")

  @property
  def size(self) -> int:
    """Candidates of a list."""
    return self.top + self.rest + self.sampled


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """How a run goes on learning (online.py). Source: reference section 10."""

  publish_every: int = 500
  """Steps between publications, counted over segments."""
  learning_rate_share: float = 0.1
  """Constant rate, as a share of the run's peak."""
  passes: int = 1
  """How often each sample of a segment is learned from."""
  keep_days: float = 90.0
  """Events older than this no longer stand in histories."""
  seed: int = 0
  """Of shuffling, lists and dropout."""

  def __post_init__(self):
    for name in ("publish_every", "passes"):
      require(getattr(self, name) >= 1, f"online.{name}", getattr(self, name), "must be >= 1")
    for name in ("learning_rate_share", "keep_days"):
      require(getattr(self, name) > 0, f"online.{name}", getattr(self, name), "must be positive")


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """How a server answers. Source: paper 4.2; reference section 8."""

  widths: tuple[int, ...] = ()
  """Beams after each SID level at peak; () = those of the run."""
  batch_sizes: tuple[int, ...] = (1, 4, 16)
  """Requests of one compiled call; as many as wait, filled up to the next of these."""
  beam_factors: tuple[float, ...] = (0.5, 1.0, 1.6)
  """Beam schedules, as multiples of the run's widths: 1 at peak, larger ones while traffic leaves
  room, smaller ones in overload only."""
  widen_last: bool = False
  """Whether larger ones widen the last level, too. It holds the SIDs that are answered with: the
  levels before it make them better, more of them only serve answers of more ads."""
  calls_at_once: int = 2
  """Calls that may run side by side: who comes during another's call need not wait for its end."""
  max_wait_ms: float = 2.0
  """How long a request may wait for others to share its call while another call could begin."""
  target_ms: float = 80.0
  """Beams are only wider than at peak where the search still ends within this time."""
  deadline_ms: float = 500.0
  """A request that has waited so long is given up (503)."""
  max_queue: int = 64
  """Requests that may wait; more are refused (429)."""
  cache_ttl_s: float = 60.0
  """How long an answer may be given again to the same user with the same context; 0 = never."""
  cache_size: int = 100_000
  """Answers kept, where the cache is in this process."""
  max_k: int = 100
  """Ads that a request may ask for."""
  max_history: int = 512
  """Events of a user that are read, or that a request may bring."""
  max_body_bytes: int = 1 << 20
  """Larger request bodies are refused (413)."""
  body_timeout_s: float = 10.0
  """Slower request bodies are refused (408)."""
  segment_s: float = 60.0
  """Seconds between log segments written for `gr4ad online`."""
  keep_days: float = 90.0
  """Older events that are in a segment are removed from the store."""
  spare: float = 0.25
  """Room for new SIDs without recompilation, as a share of those at the start (at least 1,000)."""

  def __post_init__(self):
    sizes, factors = self.batch_sizes, self.beam_factors
    require(all(width >= 1 for width in self.widths), "serving.widths", self.widths,
            "needs one positive width per SID level")
    require(len(sizes) > 0 and min(sizes) >= 1 and list(sizes) == sorted(set(sizes)),
            "serving.batch_sizes", sizes, "needs ascending sizes of at least 1")
    require(len(factors) > 0 and min(factors) > 0 and list(factors) == sorted(set(factors)),
            "serving.beam_factors", factors, "needs ascending positive factors")
    require(1.0 in factors, "serving.beam_factors", factors, "needs 1.0, the widths at peak")
    require(self.calls_at_once >= 1, "serving.calls_at_once", self.calls_at_once,
            "must be at least 1")
    for name in ("max_wait_ms", "cache_ttl_s", "spare"):
      require(getattr(self, name) >= 0, f"serving.{name}", getattr(self, name), "must be >= 0")
    for name in ("target_ms", "deadline_ms", "max_queue", "cache_size", "max_k", "max_history",
                 "max_body_bytes", "body_timeout_s", "segment_s", "keep_days"):
      require(getattr(self, name) > 0, f"serving.{name}", getattr(self, name), "must be positive")

  def call_size(self, requests: int) -> int:
    """The batch size that so many requests are filled up to; at most the largest one."""
    return next(size for size in self.batch_sizes if size >= requests)


@dataclasses.dataclass(frozen=True)
class LoadConfig:
  """A day of traffic, squeezed into minutes: open-loop arrivals at a rate that rises and falls."""

  peak_qps: float = 20.0
  """Requests a second at peak."""
  day_s: float = 120.0
  """Seconds that the day takes: off-peak, rise, peak, burst, peak, fall, off-peak."""
  off_peak_share: float = 0.1
  """Of the peak's rate, at night; a third of Complete Journey's hours lies below a tenth."""
  burst_share: float = 1.0
  """Of the peak's rate, for a twentieth of the day; 1 = no burst."""
  users: int = 2_000
  """Distinct users, who ask again in proportion to 1 / rank ** skew."""
  skew: float = 0.6
  """0 = all users alike."""
  k: int = 10
  """Ads asked for."""
  event_share: float = 0.1
  """Of the answers that are followed by a click on one of the ads."""
  timeout_s: float = 5.0
  """A request without an answer by then is an error."""
  seed: int = 0
  """Of arrivals and users."""

  def __post_init__(self):
    for name in ("peak_qps", "day_s", "off_peak_share", "burst_share", "users", "k", "timeout_s"):
      require(getattr(self, name) > 0, f"load.{name}", getattr(self, name), "must be positive")
    require(self.skew >= 0, "load.skew", self.skew, "must be >= 0")
    require(0 <= self.event_share <= 1, "load.event_share", self.event_share, "needs [0, 1]")


@dataclasses.dataclass(frozen=True)
class DataShape:
  """Sizes that the data will have, where there are none yet."""

  codebook_sizes: tuple[int, ...] = (4096, 1024, 256)
  """Codes of each SID level."""
  context_tokens: int = 256
  """Tokens of a request's context: histories, features, trending ads."""
  max_targets: int = 4
  """Targets of a training example, padded ones included."""

  def __post_init__(self):
    require(len(self.codebook_sizes) >= 2 and min(self.codebook_sizes) >= 1, "codebook_sizes",
            self.codebook_sizes, "needs two levels or more of at least one code")
    require(self.max_targets >= 1, "max_targets", self.max_targets, "must be at least 1")


REWARD_TRAINING = TrainConfig(
  num_steps=1200, batch_size=256, learning_rate=3e-3, weight_decay=1e-3, log_every=100,
  eval_every=300, checkpoint_every=300,
)


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
    train=TrainConfig(learning_rate=2e-3),
    # On validation weeks this spends a tenth of recall on ads that are new to the user, and
    # half again as many of those are found.
    search=SearchConfig(value_exponent=0.25, new_ad_bonus=1.0),
  ),
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
    raise ConfigError(f"preset={name!r}: unknown; {_nearest(name, PRESETS)}")
  return PRESETS[name]


def _nearest(name: str, options: typing.Iterable[str]) -> str:
  options = list(options)
  close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
  return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(options)}"


def override(config: ConfigT, path: str, value: Any) -> ConfigT:
  """A copy of `config` with the field at a dotted `path` replaced.

  Args:
    config: any nested frozen dataclass.
    path: for example "model.width".
    value: a value, or its text as typed on a command line.

  Raises:
    ConfigError: no such path (the nearest valid one is named), or a value of the wrong type.
  """
  return override_all(config, {path: value})


def override_all(config: ConfigT, overrides: Mapping[str, Any]) -> ConfigT:
  """A copy of `config` with every path of `overrides` replaced at once; as `override`."""
  valid = [path for path, _ in _leaves(config)]
  changes: dict[str, Any] = {}
  for path, value in overrides.items():
    if path not in valid:
      raise ConfigError(f"unknown setting {path!r}; {_nearest(path, valid)}")
    *parts, name = path.split(".")
    inner = changes
    for part in parts:
      inner = inner.setdefault(part, {})
    inner[name] = value
  return _replaced(config, changes, "")


def _replaced(config: ConfigT, changes: dict[str, Any], prefix: str) -> ConfigT:
  hints = typing.get_type_hints(type(config))
  return dataclasses.replace(config, **{
    name: _replaced(getattr(config, name), value, f"{prefix}{name}.")
    if isinstance(value, dict)
    else _parse(hints[name], value, prefix + name)
    for name, value in changes.items()
  })


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
  leaves = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      leaves += _leaves(value, f"{prefix}{field.name}.")
    else:
      leaves.append((prefix + field.name, value))
  return leaves


def _parse(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint`; text is read the way a command line writes it."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  try:
    if origin is Literal:
      if value not in args:
        raise ValueError
      return value
    if origin in (typing.Union, types.UnionType):
      if value is None or value == "None":
        return None
      return _parse(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
      parts = value.strip("()").split(",") if isinstance(value, str) else value
      parts = [p for p in parts if p != ""]
      kinds = [args[0]] * len(parts) if len(args) == 2 and args[1] is Ellipsis else args
      if len(kinds) != len(parts):
        raise ValueError
      return tuple(_parse(k, p, path) for k, p in zip(kinds, parts, strict=True))
    if hint is bool:
      return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    if hint is int and isinstance(value, float):
      raise ValueError
    return hint(value)
  except (ValueError, KeyError, TypeError):
    kind = getattr(hint, "__name__", str(hint)).replace("typing.", "")
    raise ConfigError(f"{path}={value!r}: must be {kind if not args else hint}") from None


def to_json(config: Any) -> str:
  """The config as indented JSON text."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(kind: type[ConfigT], values: dict[str, Any], prefix: str = "") -> ConfigT:
  """A dataclass of type `kind` from plain JSON values; missing fields take their defaults.

  Raises:
    ConfigError: an unknown field, or a value of the wrong type.
  """
  hints = typing.get_type_hints(kind)
  fields = {}
  for name, value in values.items():
    if name not in hints:
      raise ConfigError(f"unknown setting {prefix + name!r}; {_nearest(name, hints)}")
    if dataclasses.is_dataclass(hints[name]):
      fields[name] = from_dict(hints[name], value, f"{prefix}{name}.")
    else:
      fields[name] = _parse(hints[name], value, prefix + name)
  return kind(**fields)


def read_json(kind: type[ConfigT], path: Path) -> ConfigT:
  """The config stored at `path`.

  Raises:
    ConfigError: no such file, or its content is not a valid config.
  """
  try:
    values = json.loads(path.read_text())
  except FileNotFoundError:
    raise ConfigError(f"{path}: no such file") from None
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path}: not JSON ({error})") from None
  return from_dict(kind, values)
