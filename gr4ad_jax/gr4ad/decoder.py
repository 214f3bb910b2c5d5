"""What the three decoders share: tables, context, heads, and what a search keeps."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, EncodedContext, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.context import ContextProcessor
from gr4ad_jax.gr4ad.copy_path import CopySource, CopyState
from gr4ad_jax.gr4ad.tokens import TokenOutput
from gr4ad_jax.nn.code_tables import CodeTables
from gr4ad_jax.nn.layers import DecoderLayer, KeyValue, LayerCache, Norm
from gr4ad_jax.search.generator import MayGet, whatever


class TargetLogProbs(NamedTuple):
  """Teacher-forced log-probabilities, float32; rows of padding hold any finite value."""

  sid_BCL: jax.Array  # log p(s_t | s_<t, X)
  ecpm_BCV: jax.Array  # log p(bucket | SID, X) over all buckets
  mtp_BCL: jax.Array | None  # the generator on the un-fused pass (paper: L_MTP); LazyAR alone
  code_mean_BCL: jax.Array | None = None  # mean of log p(. | s_<t, X) over the codes of the level
  item_BC: jax.Array | None = None  # log p(SID | history) by the item scorer alone


class SharedByBeams(NamedTuple):
  """What all beams of a request share; computed once per request."""

  start_BPD: jax.Array  # states that enter the autoregressive layers, before any token
  kv: tuple[KeyValue, ...]  # one per autoregressive layer
  mask_BS: jax.Array
  copy_source: CopySource | None


class BeamState(NamedTuple):
  """What each beam carries; every leaf is [B, W, ...], so that selection is one gather."""

  cache: tuple[LayerCache, ...]  # one per autoregressive layer
  copy: CopyState | None


class DecoderParts(nn.Module):
  """Code tables, context processor, final norm and heads; a decoder adds its layers between.

  A decoder brings `states` for training, and for the search `start` and `step`.
  """

  config: ModelConfig
  vocabulary: Vocabulary

  def setup(self):
    config, vocabulary = self.config, self.vocabulary
    self.tables = CodeTables(config.width, vocabulary.codebook_sizes, config.compute_dtype)
    self.context_processor = ContextProcessor(config, vocabulary, self.tables)
    self.final_norm = Norm(config.norm)
    self.output = TokenOutput(config, vocabulary, self.tables)

  def __call__(
    self,
    context: Context,
    target_BCL: jax.Array,
    *,
    deterministic: bool = True,
    code_means: bool = False,
  ) -> TargetLogProbs:
    """Teacher forcing: log-probabilities of C target SIDs per request.

    Args:
      context: the request.
      target_BCL: int32 SID codes, -1 = padding.
      deterministic: False applies dropout (needs the "dropout" rng).
      code_means: also give means over all codes of each level.
    """
    encoded, source = self.read(context, deterministic)
    h_BCPD, unfused_B1PD = self.states(encoded, target_BCL, deterministic)
    log_probs = self.target_log_probs(
      self.final_norm(h_BCPD), target_BCL, source, code_means=code_means
    )
    if unfused_B1PD is None:
      return log_probs
    h_B1LD = self.final_norm(unfused_B1PD)[:, :, :-1]
    mtp_BCL, _ = self.output.target_log_probs(h_B1LD, target_BCL, None)
    return log_probs._replace(mtp_BCL=mtp_BCL)

  def states(
    self, encoded: EncodedContext, target_BCL: jax.Array, deterministic: bool
  ) -> tuple[jax.Array, jax.Array | None]:
    """What the layers make of the targets, before the final norm.

    Returns:
      The states of all positions [B, C, P, D]; and those of the un-fused pass [B, 1, P, D], which
      sees no token (LazyAR), or None.
    """
    raise NotImplementedError

  def read(
    self, context: Context, deterministic: bool = True
  ) -> tuple[EncodedContext, CopySource | None]:
    """The context as tokens, and what may be copied from it."""
    source = self.output.copy_source(context, deterministic=deterministic)
    return self.context_processor(context), source

  def read_for_search(
    self, context: Context, may_get: MayGet
  ) -> tuple[EncodedContext, CopySource | None]:
    """The same as a search takes it."""
    encoded, source = self.read(context)
    return encoded, self.output.for_search(source, may_get)

  def target_tokens(self, target_BCL: jax.Array) -> jax.Array:
    """Token inputs of all codes of the targets, [B, C, L, D]."""
    return jnp.stack(
      [self.tables.embed(target_BCL[..., level], level) for level in range(target_BCL.shape[-1])],
      axis=2,
    )

  def target_log_probs(
    self,
    h_BCPD: jax.Array,
    target_BCL: jax.Array,
    source: CopySource | None,
    *,
    code_means: bool,
  ) -> TargetLogProbs:
    """What normalised states of all positions say of the targets, and of all codes if asked to."""
    sid_BCL, item_BC = self.output.target_log_probs(h_BCPD[:, :, :-1], target_BCL, source)
    return TargetLogProbs(
      sid_BCL,
      self.output.ecpm_log_probs(h_BCPD[:, :, -1]),
      None,
      self._code_means(h_BCPD, target_BCL, source) if code_means else None,
      item_BC,
    )

  def _code_means(
    self, h_BCPD: jax.Array, target_BCL: jax.Array, source: CopySource | None
  ) -> jax.Array:
    """Mean log-probability over all codes of each level after the target's codes, [B, C, L]."""
    source = self.output.for_search(source, whatever)
    means, copy = [], self.output.begin_copy(source)
    for level in range(target_BCL.shape[-1]):
      log_prob_BCV, copy = self.output.log_probs(h_BCPD[:, :, level], level, source, copy)
      means.append(jnp.mean(log_prob_BCV, axis=-1))
      copy = self.output.follow(source, copy, target_BCL[..., level], level)
    return jnp.stack(means, axis=-1)

  def begin_search(
    self,
    layers: list[DecoderLayer],
    start_BPD: jax.Array,
    encoded: EncodedContext,
    source: CopySource | None,
  ) -> tuple[SharedByBeams, BeamState]:
    """What all beams share, and the state of one beam before the first position.

    Args:
      layers: that run per beam.
      start_BPD: what enters them, before any token.
      encoded, source: from `read_for_search`.
    """
    kv = tuple(layer.keys_values(encoded.token_BSD) for layer in layers)
    shared = SharedByBeams(start_BPD, kv, encoded.mask_BS, source)
    num_rows, num_positions, _ = start_BPD.shape
    shape = (num_rows, 1, self.config.num_heads, self.config.width // self.config.num_heads)
    empty_BWHK = (jnp.zeros(shape, start_BPD.dtype),) * num_positions
    cache = (LayerCache(empty_BWHK, empty_BWHK),) * len(layers)
    return shared, BeamState(cache, self.output.begin_copy(source))

  def decode_position(
    self,
    layers: list[DecoderLayer],
    shared: SharedByBeams,
    state: BeamState,
    h_BWD: jax.Array,
    position: int | jax.Array,
  ) -> tuple[BeamState, jax.Array]:
    """One position of every beam through the layers and the heads.

    Returns:
      The state with the position in its caches, and log-probs [B, W, V].
    """
    h_BW1D, written = h_BWD[:, :, None], []  # beams lie along the candidate axis
    for layer, kv, cache in zip(layers, shared.kv, state.cache, strict=True):
      h_BW1D, cache = layer(h_BW1D, kv, shared.mask_BS, cache=cache, position=position)
      written.append(cache)
    h_BWD = self.final_norm(h_BW1D[:, :, 0])
    log_probs, copy = self.output.log_probs(h_BWD, position, shared.copy_source, state.copy)
    return BeamState(tuple(written), copy), log_probs
