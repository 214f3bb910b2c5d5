"""GPR's settings and presets."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from gr4ad_jax.config import (
  Bounded,
  Count,
  CountOrZero,
  NotNegative,
  Positive,
  Share,
  ShareBelowOne,
  require,
)
from gr4ad_jax.nn.config import LayerConfig
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class StreamConfig(Bounded, section="stream"):
  """How much of a user's past one row reads, and how many labels it is asked for."""

  groups: Count = 64
  """Latest requests of a stream, four tokens each."""
  bundle: Count = 8
  """Latest ads of a request, and latest contents between two requests, that one token sums up."""
  thoughts: CountOrZero = 0
  """Newest thoughts on a user, older than a request, that it sees; 0 = 8 in a run with --thoughts,
  as many as in the run of --start, and none without either."""
  labels: Count = 16
  """Engaged ads that one row of training is asked for, each at its own request; at most as many as
  groups. A row is an example of `train.batch_size`."""

  def _check(self):
    require(self.labels <= self.groups, "stream.labels", self.labels,
            f"must not exceed stream.groups={self.groups}")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Bounded, section="model"):
  """Sequence decoder (HSD) and token decoder (PTD). Source: GPR 2.2."""

  width: Count = 128
  """d, the width of every hidden state."""
  num_heads: Count = 4
  """Attention heads of both decoders; must divide the width."""
  num_layers: Count = 4
  """Blocks of the sequence decoder."""
  recursions: Count = 2
  """N_r: a token goes up to so many times through all blocks (mixture of recursions); 1 = once."""
  num_token_layers: Count = 2
  """Layers of the token decoder."""
  attention: Literal["hybrid", "hstu", "bidirectional"] = "hybrid"
  """Of the sequence decoder. hybrid: gated softmax, causal and both ways inside one request; hstu:
  causal, SiLU instead of softmax; bidirectional: an encoder of what one request may see, which
  needs stream.labels 1."""
  token_norm: bool = True
  """Every token type has its own norms; off = one for all."""
  token_ffn: bool = True
  """Every token type has its own feed-forward networks; off = one for all."""
  thinking: CountOrZero = 4
  """K, thinking tokens that are made before the first code; 0 = none."""
  refining: CountOrZero = 10
  """T, steps of the diffusion that makes the refining token of the thinking tokens; 0 = none."""
  values: bool = True
  """The evaluator (HTE) tells what an ad is worth; off = the mean of training, whatever the ad."""
  predictions: Count = 4
  """N, heads of multi-token prediction: head j tells an ad of the j-th request from now on. A
  search asks the first one."""
  dropout: ShareBelowOne = 0.1
  """Dropout rate on sub-layer outputs during training."""
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of activations; parameters, softmax, log-probs and losses stay float32."""

  def _check(self):
    require(self.width % self.num_heads == 0, "model.num_heads", self.num_heads,
            f"must divide model.width={self.width}")
    require(self.thinking > 0 or not self.refining, "model.refining", self.refining,
            "must be 0 where model.thinking is: it is made of thinking tokens")

  @property
  def token_layers(self) -> LayerConfig:
    """What each layer of the token decoder needs to know."""
    return LayerConfig(
      self.width, self.num_heads, max(64, 64 * round(self.width * 8 / 3 / 64)),
      kv_mode="projected", norm="layer", dropout=self.dropout,
    )


@dataclasses.dataclass(frozen=True)
class LossConfig(Bounded, section="loss"):
  """Stage 1: multi-token prediction. Source: GPR 3.1, eq. 3."""

  head_weights: Literal["learned", "equal"] = "learned"
  """w^H: learned with an entropy term, beginning at 1/N, or 1/N all the time."""
  balance_weight: NotNegative = 0.01
  """Weight of the loss that keeps all depths of recursion in use."""
  refining_weight: NotNegative = 0.1
  """Weight of the denoiser's squared error."""
  value_weight: NotNegative = 0.5
  """Weight of the values' squared errors, from which the evaluator (HTE) alone learns."""


Stage = Literal["mtp", "vaft", "hepo", "dpo"]
_VAFT_RATE = 0.3  # of the learning rate


@dataclasses.dataclass(frozen=True)
class GuidedSearchConfig(SearchConfig):
  """Beam search whose beams may have more children the more they are worth. Source: GPR 2.3."""

  most_children: CountOrZero = 0
  """k_max, children of a beam whose value is among the highest; others keep ceil(k_max times the
  place of their value between the quantiles of 5% and 95%), the most probable ones. 0 = beams keep
  all, and values decide nothing."""
  least_children: Count = 2
  """k_min, children that the beam of the least value may keep."""

  def _check(self):
    super()._check()
    require(not self.most_children or self.least_children <= self.most_children,
            "search.least_children", self.least_children,
            f"must not exceed search.most_children={self.most_children}")


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Bounded, section="policy"):
  """Stage 3: learning from candidates of the run's own search. Source: GPR 3.3."""

  candidates: Count = 40
  """K, the most probable SIDs of a request that are priced; at most the search's last width."""
  push_every: Count = 200
  """Steps between two pushes: from then on candidates are those of the parameters of that step."""
  passes: Count = 2
  """Times that each list of a push is learned from; fewer lists are made for more passes."""
  lists_per_step: Count = 16
  """Lists in a step, beside train.batch_size logged rows."""
  rehearsal_share: ShareBelowOne = 0.0
  """Share of a push's requests that are made up, as they may come next (ARR); 0 = none. At most so
  many: a small log has fewer."""
  critic_warmup: CountOrZero = 200
  """hepo: first steps in which values alone learn, as lower levels hear of rewards through them."""
  anchor_weight: NotNegative = 0.1
  """Weight of the loss of vaft on logged labels; the paper has none."""
  level_alpha: NotNegative = 0.1
  """hepo: what it brings at levels but the last that a code is one of the user's successes."""
  rate_alpha: NotNegative = 0.1
  """What pCTR and pCVR, each at the mean of eCPM, weigh beside eCPM in the final value."""
  gamma: Share = 0.99
  """hepo: discount from level to level."""
  gae_lambda: Share = 0.95
  """hepo: lambda of the advantages below the last level."""
  clip: Positive = 0.2
  """hepo: how far the ratio of a code's probabilities counts."""
  beta: Positive = 1.0
  """dpo: inverse temperature."""
  delta: Positive = 3.0
  """dpo: references count while candidates have moved by less than this (nats, mean)."""


@dataclasses.dataclass(frozen=True)
class Config(Bounded):
  """All settings of a run; saved in its folder's run.json."""

  stage: Stage = "mtp"
  """mtp: multi-token prediction, from random parameters or those of --start. vaft: the same with
  labels weighed by value, at 0.3 times the learning rate. hepo, dpo: candidates of the run's own
  search are priced, and what is worth more gets more probable, at 0.03 times the learning rate but
  for values, which learn at all of it. Stages after the first begin with the run of an earlier one.
  Source: GPR 3."""
  stream: StreamConfig = StreamConfig()
  model: ModelConfig = ModelConfig()
  loss: LossConfig = LossConfig()
  policy: PolicyConfig = PolicyConfig()
  train: TrainConfig = TrainConfig()
  search: GuidedSearchConfig = GuidedSearchConfig()

  def _check(self):
    require(self.search.precision in ("trained", "bfloat16"), "search.precision",
            self.search.precision, "GPR searches in 'trained' or 'bfloat16'")
    require(self.model.attention != "bidirectional" or self.stream.labels == 1, "stream.labels",
            self.stream.labels, "must be 1 with model.attention bidirectional: a row is encoded "
            "for one request")
    require(self.model.values or self.search.value_exponent == 0, "search.value_exponent",
            self.search.value_exponent, "must be 0 without model.values: ads are worth the same")
    require(self.train.table_learning_rate == 0, "train.table_learning_rate",
            self.train.table_learning_rate, "must be 0: GPR has no table of ids")
    require(self.model.values or not self.search.most_children, "search.most_children",
            self.search.most_children, "must be 0 without model.values: they guide the beams")
    require(self.model.values or not self.learns_policy, "stage", self.stage,
            "needs model.values: they are its critic")
    require(self.policy.candidates <= self.search.widths[-1] or not self.learns_policy,
            "policy.candidates", self.policy.candidates,
            f"must not exceed the last of search.widths={self.search.widths}")

  @property
  def learns_policy(self) -> bool:
    """Whether the stage learns from candidates."""
    return self.stage in ("hepo", "dpo")

  @property
  def training(self) -> TrainConfig:
    """`train` with the learning rate of the stage."""
    rate = self.train.learning_rate * (_VAFT_RATE if self.stage == "vaft" else 1)
    return dataclasses.replace(self.train, learning_rate=rate)


System = Literal["gpr", "hstu", "onerec"]
"""What run.json may name: GPR, and the two baselines that are made of its parts."""
SYSTEMS: tuple[System, ...] = get_args(System)
WITHOUT_PARTS = {
  "token_norm": False, "token_ffn": False, "recursions": 1, "thinking": 0, "refining": 0,
  "values": False, "predictions": 1,
}
"""Settings of a model that leave out whatever GPR adds to its decoders."""
BASES: dict[System, dict[str, Any]] = {
  "hstu": {"attention": "hstu"} | WITHOUT_PARTS,
  "onerec": {"attention": "bidirectional"} | WITHOUT_PARTS,
}


def check_system(system: System, model: ModelConfig) -> None:
  """Raises ConfigError where a baseline has a part that is GPR's."""
  for name, value in BASES.get(system, {}).items():
    require(getattr(model, name) == value, f"model.{name}", getattr(model, name),
            f"is {value} in {system}; --system gpr takes any")


_GPR: dict[str, Config] = {
  # Seconds on a laptop: tests.
  "gpr-tiny": Config(
    stream=StreamConfig(groups=16, bundle=4, labels=8),
    model=ModelConfig(width=32, num_heads=2, num_layers=1, num_token_layers=1, refining=3,
                      dropout=0.0),
    train=TrainConfig(num_steps=100, batch_size=16, learning_rate=3e-3, log_every=20,
                      eval_every=50, eval_batches=4, checkpoint_every=50),
    policy=PolicyConfig(candidates=8, push_every=20, critic_warmup=20, lists_per_step=8),
    search=GuidedSearchConfig(widths=(16, 24, 32), batch_size=32),
  ),
  # Minutes on a CPU, on a market of some thousand users: `gr4ad demo --system gpr`.
  "gpr-demo": Config(
    stream=StreamConfig(groups=16, bundle=4, labels=8),
    model=ModelConfig(width=64, num_heads=2, num_layers=2, recursions=1, num_token_layers=1,
                      thinking=2, refining=4, predictions=2, dropout=0.0),
    policy=PolicyConfig(push_every=100, critic_warmup=100, lists_per_step=8),
    train=TrainConfig(num_steps=800, batch_size=16, learning_rate=3e-3, log_every=50,
                      eval_every=400, eval_batches=8, checkpoint_every=400),
    search=GuidedSearchConfig(widths=(16, 32, 64), batch_size=64),
  ),
  # Two CPU cores that are free: under an hour, by the CPU time of some steps.
  "gpr-small": Config(
    stream=StreamConfig(groups=32),
    train=TrainConfig(num_steps=1000, batch_size=16, learning_rate=1e-3, eval_every=250,
                      eval_batches=16, checkpoint_every=250, best_by="ndcg@50"),
  ),
}


def _base(system: System, size: str, **train: Any) -> Config:
  """A baseline of the width, depth and stream of GPR's preset of a size."""
  config = _GPR[f"gpr-{size}"]
  labels = 1 if system == "onerec" else config.stream.labels
  return dataclasses.replace(
    config, stream=dataclasses.replace(config.stream, labels=labels),
    model=dataclasses.replace(config.model, **BASES[system]),
    train=dataclasses.replace(config.train, **train),
  )


PRESETS: dict[str, Config] = _GPR | {
  "hstu-tiny": _base("hstu", "tiny"),
  "hstu-small": _base("hstu", "small"),
  # One label a row: as many labels a step as the others have in four rows.
  "onerec-tiny": _base("onerec", "tiny", batch_size=32),
  "onerec-small": _base("onerec", "small", batch_size=64),
}


def system_of(preset: str) -> System:
  """The system of a preset."""
  return preset.split("-")[0]  # type: ignore[return-value]


def presets_of(system: str) -> tuple[str, ...]:
  """Names of a system's presets."""
  return tuple(name for name in PRESETS if system_of(name) == system)
