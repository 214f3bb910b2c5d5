"""The computation of fine-tuning: frozen layers once for each text, compiled steps of the rest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gr4ad_jax.config import Bounded, Count, CountOrZero, NotNegative, Positive, Share, require
from gr4ad_jax.embedding.text_encoder import (
  LENGTH_BUCKETS,
  BertConfig,
  BertEncoder,
  TokenStates,
  UpperLayers,
  length_batches,
  padded_tokens,
  sentence,
  token_ids,
)
from gr4ad_jax.embedding.uae_losses import attribute_loss, multi_positive_nce
from gr4ad_jax.training.task import Metrics

# Hidden states of the frozen layers kept in memory, bytes; where all would need more, each batch
# computes its own (slower by the share of the layers that are frozen).
STATE_BYTES = 2**30


@dataclass(frozen=True)
class UaeConfig(Bounded):
  """How the encoder is fine-tuned.

  Attributes:
    trainable_layers: layers that learn, counted from the top.
    attribute_steps: optimizer steps of instruction tuning; 0 = without.
    cooccurrence_steps: optimizer steps of co-occurrence learning; 0 = without.
    batch_size: ads a step, even.
    learning_rate: of AdamW for the layers at its highest: up in the first tenth of each stage,
      down a cosine to 0.
    head_learning_rate: the same for the heads of the attributes.
    weight_decay: of AdamW.
    temperature: tau of the contrastive loss.
    pair_share: of a batch of co-occurrence learning, anchors and one neighbour of each; the others
      are a sample of all ads, negatives from which the attributes are learned on.
    mask_share: of the texts have a field hidden that gives an attribute away.
    masked_variants: texts of an ad with a field hidden, each another field.
    attribute_weight: of the attribute loss during co-occurrence learning.
    min_class_count: ads that a class of an attribute needs.
    max_tokens: where texts are cut, in training and embedding.
  """

  trainable_layers: Count = 1
  attribute_steps: CountOrZero = 100
  cooccurrence_steps: CountOrZero = 100
  batch_size: Count = 64
  learning_rate: Positive = 5e-4
  head_learning_rate: Positive = 1e-2
  weight_decay: NotNegative = 0.01
  temperature: Positive = 0.07
  pair_share: Share = 0.5
  mask_share: Share = 0.5
  masked_variants: CountOrZero = 2
  attribute_weight: NotNegative = 4.0
  min_class_count: Count = 5
  max_tokens: Count = 64

  def _check(self):
    require(self.batch_size % 2 == 0, "batch_size", self.batch_size, "must be even")


def learning_rates(config: UaeConfig) -> np.ndarray:
  """Shares of the highest rate, one for each step: warm-up and cosine in each of both stages."""

  def stage(num_steps):
    step_S = np.arange(num_steps)
    warm_up = num_steps // 10
    cosine_S = 0.5 + 0.5 * np.cos(np.pi * (step_S - warm_up) / max(num_steps - warm_up, 1))
    return np.where(step_S < warm_up, (step_S + 1) / (warm_up + 1), cosine_S)

  stages = stage(config.attribute_steps), stage(config.cooccurrence_steps)
  return np.concatenate(stages).astype(np.float32)


class UaeState(NamedTuple):
  """What the training changes."""

  params: dict[str, Any]  # "layers": the trainable ones; "heads": of the attributes
  opt_state: Any


class UaeBatch(NamedTuple):
  """What a step learns from."""

  rates: dict[str, np.float32]  # learning rates of "layers" and "heads"
  state_BTD: np.ndarray  # float16, from `frozen_states`
  mask_BT: np.ndarray
  class_BN: np.ndarray  # int32, the class of each attribute, -1 = unknown
  masks: tuple[np.ndarray, np.ndarray] | None  # of `pair_masks`; None in the stage without pairs


class StepPrograms(NamedTuple):
  """The start of a training, and its step, which takes the state and gives it back."""

  init: Callable[[dict[str, Any]], UaeState]  # of the parameters
  step: Callable[[UaeState, UaeBatch], tuple[UaeState, Metrics]]


def compile_steps(bert: BertConfig, config: UaeConfig) -> StepPrograms:
  """The step of both stages, compiled once for each of them and each length of the batch.

  Args:
    bert: sizes of the whole encoder.
    config: of the training.
  """
  return _compile_steps(
    dataclasses.replace(bert, num_hidden_layers=config.trainable_layers),
    config.temperature, config.attribute_weight, config.weight_decay,
  )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _compile_steps(
  upper: BertConfig, temperature: float, attribute_weight: float, weight_decay: float
) -> StepPrograms:
  model = UpperLayers(upper)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
  )

  def embed(params, state_BTD, mask_BT):
    x_BTD = state_BTD.astype(jnp.float32)
    return sentence(model.apply({"params": {"layers": params["layers"]}}, x_BTD, mask_BT), mask_BT)

  def attribute_mean(params, z_BD, class_BN):
    known = (class_BN >= 0).any(-1).sum()
    return attribute_loss(z_BD, params["heads"], class_BN).sum() / jnp.maximum(known, 1)

  def objective(params, batch):
    z_BD = embed(params, batch.state_BTD, batch.mask_BT)
    if batch.masks is None:
      return attribute_mean(params, z_BD, batch.class_BN)
    loss_B, has_B = multi_positive_nce(z_BD, *batch.masks, temperature)
    contrast = loss_B.sum() / jnp.maximum(has_B.sum(), 1)
    if not attribute_weight:
      return contrast
    return contrast + attribute_weight * attribute_mean(params, z_BD, batch.class_BN)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    with jax.default_matmul_precision("float32"):
      gradient = jax.grad(objective)(state.params, batch)
    direction, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = {
      name: jax.tree.map(lambda p, d, name=name: p - batch.rates[name] * d, part, direction[name])
      for name, part in state.params.items()
    }
    return UaeState(params, opt_state), {}

  return StepPrograms(lambda params: UaeState(params, optimizer.init(params)), step)


def frozen_states(
  encoder: BertEncoder,
  params: Mapping[str, Any],
  texts: Sequence[str],
  *,
  max_tokens: int,
  state_bytes: int = STATE_BYTES,
  progress: Callable | None = None,
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """What the layers that do not learn make of the texts, computed once where memory allows.

  Args:
    encoder: its tokenizer and the sizes.
    params: of the embeddings and the frozen layers alone.
    texts: U strings.
    max_tokens: where texts are cut.
    state_bytes: most memory for the states of all texts, 2 bytes a number.
    progress: called as `progress(batches, description, total)`; None shows nothing.

  Returns:
    Numbers of B texts -> (state_BTD float16, mask_BT), T one of few lengths.
  """
  width = encoder.config.hidden_size
  num_layers = len(jax.tree.leaves(params["layers"])[0]) if "layers" in params else 0
  program = _compile_states(dataclasses.replace(encoder.config, num_hidden_layers=num_layers))
  params = jax.device_put(dict(params))
  token_lists = token_ids(encoder, texts, max_tokens=max_tokens)
  length_U = np.array([len(ids) for ids in token_lists])
  end_U = np.cumsum(length_U)

  def padded_length(longest):
    bucket = LENGTH_BUCKETS[np.searchsorted(LENGTH_BUCKETS, longest)]
    return min(bucket, encoder.config.max_position_embeddings)

  def compute(text_B, length, size):
    padded = padded_tokens([token_lists[u] for u in text_B], length, size)
    return np.asarray(program(params, *padded)), padded[1]

  if end_U[-1] * width * 2 > state_bytes:
    return lambda text_B: compute(text_B, padded_length(length_U[text_B].max()), len(text_B))

  held_KD = np.empty((end_U[-1], width), np.float16)  # K tokens of all texts
  batches = length_batches(length_U)
  if progress is not None:
    batches = progress(batches, description="frozen layers", total=len(batches))
  for text_B, length, size in batches:
    state_BTD, _ = compute(text_B, padded_length(length), size)
    for b, u in enumerate(text_B):
      held_KD[end_U[u] - length_U[u] : end_U[u]] = state_BTD[b, : length_U[u]]

  def look_up(text_B):
    length = padded_length(length_U[text_B].max())
    state_BTD = np.zeros((len(text_B), length, width), np.float16)
    mask_BT = np.arange(length) < length_U[text_B][:, None]
    for b, u in enumerate(text_B):
      state_BTD[b, : length_U[u]] = held_KD[end_U[u] - length_U[u] : end_U[u]]
    return state_BTD, mask_BT

  return look_up


@functools.lru_cache(maxsize=8)
def _compile_states(lower: BertConfig) -> Callable[..., jax.Array]:
  model = TokenStates(lower)

  @jax.jit
  def program(params, token_BT, mask_BT):
    with jax.default_matmul_precision("float32"):
      return model.apply({"params": params}, token_BT, mask_BT).astype(jnp.float16)

  return program
