"""Unified ad embeddings: a sentence encoder fine-tuned on the business.

Stage (a), instruction tuning: heads on the embedding tell the ad's attributes, some of which are
hidden from its text. Stage (b), co-occurrence learning: ads that the same users engage with come
closer than others. Either is off with 0 steps. Only the upper layers learn; what is below them is
computed once for each text.

Source: GR4AD (arXiv 2602.22732) 3.1; losses and templates of stage (a) are not given there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gr4ad_jax.data.records import AdTable
from gr4ad_jax.embedding.cache import cached_encode, encoder_identity
from gr4ad_jax.embedding.cooccurrence import ItemPairs
from gr4ad_jax.embedding.text_encoder import BertEncoder, encode_with
from gr4ad_jax.embedding.uae_batches import (
  BatchPlan,
  TrainingAds,
  pair_masks,
  plan_batches,
  training_ads,
)
from gr4ad_jax.embedding.uae_losses import init_heads
from gr4ad_jax.embedding.uae_steps import (
  STATE_BYTES,
  UaeBatch,
  UaeConfig,
  UaeState,
  compile_steps,
  frozen_states,
  learning_rates,
)
from gr4ad_jax.training.resume import ResumeFile, Upkeep, fingerprint, run_fit

Params = Mapping[str, Any]


# Ten parameters: six are what the result depends on, four how the caller follows a fit of minutes.
def fine_tune(
  ads: AdTable,
  pairs: ItemPairs | None,
  *,
  encoder: BertEncoder,
  config: UaeConfig,
  seed: int = 0,
  train_A: np.ndarray | None = None,
  resume: ResumeFile | None = None,
  state_bytes: int = STATE_BYTES,
  after_attributes: Callable[[dict[str, Any]], None] | None = None,
  progress: Callable | None = None,
) -> dict[str, Any]:
  """Fine-tunes a sentence encoder on a catalogue; the same arguments give the same numbers.

  Args:
    ads: the catalogue.
    pairs: ads that go together, of `swing_pairs`; None = none known.
    encoder: where it starts.
    config: of the training.
    seed: of the batches and of what they hide.
    train_A: bool [A], ads that may be learned from; the others are not seen in any way. None = all.
    resume: where the state is saved and from where it goes on, with the fingerprint of all other
      arguments as its key; None saves nothing.
    state_bytes: most memory for the hidden states of frozen layers.
    after_attributes: called with the parameters that stage (a) ends with; not when a resumed run
      starts after it.
    progress: called as `progress(iterable, description, total)`; None shows nothing.

  Returns:
    All parameters of the encoder, numpy; those below the trainable layers are its own.

  Raises:
    ValueError: config and encoder do not go together, a stage has nothing to learn from, or the
      training diverges.
  """
  num_frozen = encoder.config.num_hidden_layers - config.trainable_layers
  if num_frozen < 0:
    raise ValueError(
      f"trainable_layers: {config.trainable_layers}, the encoder has"
      f" {encoder.config.num_hidden_layers}"
    )
  train = _ads_to_learn_from(ads, pairs, train_A, config, seed)
  if not config.attribute_steps + config.cooccurrence_steps:
    return dict(encoder.params)
  lower, upper = _split_layers(encoder.params, num_frozen)
  heads = init_heads(train.class_AN, encoder.config.hidden_size)
  plan = plan_batches(
    train, seed=seed, batch_size=config.batch_size,
    pair_share=config.pair_share, mask_share=config.mask_share,
    attribute_steps=config.attribute_steps, cooccurrence_steps=config.cooccurrence_steps,
  )  # fmt: skip
  states_of = frozen_states(
    encoder, lower, plan.texts,
    max_tokens=config.max_tokens, state_bytes=state_bytes, progress=progress,
  )  # fmt: skip

  def whole(state: UaeState) -> dict[str, Any]:
    layers = jax.tree.map(
      lambda own, new: np.concatenate([own[:num_frozen], new]), encoder.params["layers"],
      state.params["layers"],
    )
    return {**encoder.params, "layers": layers}

  def after_step(step: int, state: UaeState) -> None:
    if step == config.attribute_steps and after_attributes is not None:
      after_attributes(whole(state))

  programs = compile_steps(encoder.config, config)
  state = run_fit(
    programs.step, programs.init({"layers": upper, "heads": heads}),
    _batches(train, plan, states_of, config),
    config.attribute_steps + config.cooccurrence_steps,
    Upkeep(resume, progress, "fine-tune", "uae"), after_step=after_step,
  )
  params = whole(state)
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params["layers"])):
    raise ValueError(
      f"learning_rate: {config.learning_rate}, the training diverged; try a smaller one"
    )
  return params


def _ads_to_learn_from(
  ads: AdTable, pairs: ItemPairs | None, train_A: np.ndarray | None, config: UaeConfig, seed: int
) -> TrainingAds:
  """Raises ValueError where there is nothing for a stage to learn."""
  if train_A is not None and (train_A.shape != (len(ads.ad_id),) or train_A.dtype != bool):
    raise ValueError(
      f"train_A: {train_A.dtype} {train_A.shape}, must be bool ({len(ads.ad_id)},), one for each ad"
    )
  if not len(ads.ad_id) or (train_A is not None and not train_A.any()):
    raise ValueError("train_A: no ad to learn from, at least one is needed")
  train = training_ads(
    ads, pairs, train_A, seed=seed,
    min_class_count=config.min_class_count, masked_variants=config.masked_variants,
  )  # fmt: skip
  if config.attribute_steps and not train.class_AN.shape[1]:
    raise ValueError(
      f"attribute_steps: {config.attribute_steps}, but no attribute of the ads has two values with"
      f" {config.min_class_count} ads each; set it to 0"
    )
  if config.cooccurrence_steps and not train.score_AA.nnz:
    raise ValueError(
      f"cooccurrence_steps: {config.cooccurrence_steps}, but no two ads of different text go"
      " together; set it to 0"
    )
  return train


def _split_layers(params: Params, num_frozen: int) -> tuple[dict[str, Any], Any]:
  """(parameters up to the frozen layers, parameters of the layers above them)."""
  frozen = jax.tree.map(lambda x: x[:num_frozen], params["layers"])
  lower = {**params, "layers": frozen} if num_frozen else {**params}
  if not num_frozen:
    del lower["layers"]
  return lower, jax.tree.map(lambda x: x[num_frozen:], params["layers"])


def _batches(
  train: TrainingAds, plan: BatchPlan, states_of: Callable, config: UaeConfig
) -> Callable[[int], UaeBatch]:
  """The batch of each step of both stages."""
  rate_S = learning_rates(config)

  def batch_of(step: int) -> UaeBatch:
    rates = {
      "layers": rate_S[step] * np.float32(config.learning_rate),
      "heads": rate_S[step] * np.float32(config.head_learning_rate),
    }
    masks = None if step < config.attribute_steps else pair_masks(train, plan, step)
    return UaeBatch(
      rates, *states_of(plan.text_SB[step]), train.class_AN[plan.ad_SB[step]], masks
    )

  return batch_of


def save_params(file: Path, params: Params, *, encoder: BertEncoder) -> None:
  """Writes what fine-tuning changed, whole or not at all.

  Args:
    file: of the .npz.
    params: of `fine_tune`.
    encoder: the one that was fine-tuned.
  """
  flat, own = _flat(params["layers"]), _flat(encoder.params["layers"])
  num_layers = encoder.config.num_hidden_layers
  changed = [n for n in range(num_layers) if any((flat[k][n] != own[k][n]).any() for k in flat)]
  num_frozen = min(changed, default=num_layers)
  state = ResumeFile(Path(file), fingerprint(*_leaves(encoder.params)))
  state.save({"num_frozen": np.array(num_frozen)} | {k: v[num_frozen:] for k, v in flat.items()})


def load_params(file: Path, *, encoder: BertEncoder) -> dict[str, Any]:
  """Reads what `save_params` wrote.

  Args:
    file: of the .npz.
    encoder: the one that was fine-tuned.

  Returns:
    All parameters of the encoder.

  Raises:
    ValueError: the file is missing, damaged, or of another encoder.
  """
  saved = ResumeFile(Path(file), fingerprint(*_leaves(encoder.params))).load()
  if saved is None:
    raise ValueError(f"{file}: not readable, or not fine-tuned from the encoder {encoder.name!r}")
  own, frozen = _flat(encoder.params["layers"]), slice(0, int(saved["num_frozen"]))
  flat = {name: np.concatenate([own[name][frozen], saved[name]]) for name in own}
  structure = jax.tree.structure(encoder.params["layers"])
  return {**encoder.params, "layers": jax.tree.unflatten(structure, flat.values())}


def _leaves(params: Params) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def _flat(tree: Any) -> dict[str, np.ndarray]:
  """Arrays by their path, in the order of the tree."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def embed_inputs(
  inputs: Sequence[str],
  encoder: BertEncoder,
  *,
  params: Params | None = None,
  max_tokens: int = UaeConfig.max_tokens,
  cache: Path | None = None,
  progress: Callable | None = None,
) -> np.ndarray:
  """Embeds inputs of the encoder; those that the cache holds are not computed again.

  Args:
    inputs: N strings, of `ad_inputs` or `content_inputs`.
    encoder: sizes, parameters, tokenizer.
    params: of `fine_tune`; None = the encoder's own.
    max_tokens: as in the training.
    cache: folder for embeddings of all encoders, by content; None = no cache.
    progress: called as `progress(iterable, description, total)`; None shows nothing.

  Returns:
    [N, D] float32, rows of L2 norm 1; equal inputs have equal rows.
  """
  params = encoder.params if params is None else params
  return cached_encode(
    inputs,
    lambda texts: encode_with(encoder, texts, params=params, max_tokens=max_tokens),
    folder=cache,
    identity=encoder_identity(encoder.name, params, max_tokens=max_tokens),
    progress=progress,
  )
