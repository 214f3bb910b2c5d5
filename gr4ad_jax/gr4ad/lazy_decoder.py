"""LazyAR: K layers that see no token run once per request, L-K layers run per beam.

Source: paper 3.2, eq. 5-11 and Fig. 3c; reference 2.3-2.5.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.context import ContextProcessor
from gr4ad_jax.gr4ad.copy_path import CopySource, first_match, follow_codes
from gr4ad_jax.gr4ad.tokens import TokenOutput, TokenTables
from gr4ad_jax.machine.sharding import ROWS, constrain
from gr4ad_jax.nn.layers import DecoderLayer, KeyValue, LayerCache, Linear, Norm


class TargetLogProbs(NamedTuple):
  """Teacher-forced log-probabilities, float32; rows of padding hold any finite value."""

  sid_BCL: jax.Array  # log p(s_t | s_<t, X)
  ecpm_BCV: jax.Array  # log p(bucket | SID, X) over all buckets
  mtp_BCL: jax.Array | None  # the generator on the un-fused pass (paper: L_MTP)


class SearchContext(NamedTuple):
  """What all beams of a request share; computed once per request."""

  start_BPD: jax.Array  # states that enter the autoregressive layers, before any token
  kv: tuple[KeyValue, ...]  # one per autoregressive layer
  mask_BS: jax.Array
  copy_source: CopySource | None


class BeamState(NamedTuple):
  """What each beam carries; every leaf is [B, W, ...], so that selection is one gather."""

  cache: tuple[LayerCache, ...]  # one per autoregressive layer
  match_BWS: jax.Array | None  # context tokens whose SID starts with the beam's codes


class Fuse(nn.Module):
  """Fuse(m, s) = W_f [m * (W_g s) ; s], no bias, no residual. Source: eq. 10."""

  config: ModelConfig

  @nn.compact
  def __call__(self, m: jax.Array, token: jax.Array) -> jax.Array:
    gated = m * constrain(Linear(self.config.width, name="gate")(token), ROWS)
    fused = Linear(self.config.width, name="out")(jnp.concatenate([gated, token], axis=-1))
    return constrain(fused, ROWS)


class LazyDecoder(nn.Module):
  """The generator of GR4AD: context processor, LazyAR stack, per-level heads, eCPM head."""

  config: ModelConfig
  vocabulary: Vocabulary

  def setup(self):
    config, vocabulary = self.config, self.vocabulary
    self.tables = TokenTables(config, vocabulary)
    self.context_processor = ContextProcessor(config, vocabulary, self.tables)
    self.positions_PD = self.param(
      "positions", nn.initializers.normal(1.0), (vocabulary.num_levels + 1, config.width)
    )
    if config.fuse_bos:
      self.bos_D = self.param("bos", nn.initializers.normal(1.0), (config.width,))
    self.lazy_layers = [DecoderLayer(config) for _ in range(config.num_lazy_layers)]
    self.layers = [DecoderLayer(config) for _ in range(config.num_layers - config.num_lazy_layers)]
    self.fuse = Fuse(config)
    self.final_norm = Norm(config.norm)
    self.output = TokenOutput(config, vocabulary, self.tables)

  def __call__(
    self, context: Context, target_BCL: jax.Array, *, deterministic: bool = True
  ) -> TargetLogProbs:
    """Teacher forcing: log-probabilities of C target SIDs per request.

    Args:
      context: the request.
      target_BCL: int32 SID codes, -1 = padding.
      deterministic: False applies dropout (needs the "dropout" rng).
    """
    num_levels = self.vocabulary.num_levels
    encoded = self.context_processor(context)
    source = self.output.copy_source(encoded)
    trunk_B1PD = self._trunk(encoded.token_BSD, encoded.mask_BS, deterministic)
    token_BCLD = jnp.stack(
      [self.tables.embed(target_BCL[..., level], level) for level in range(num_levels)], axis=2
    )
    trunk_BCPD = jnp.broadcast_to(
      trunk_B1PD, (*target_BCL.shape[:2], *trunk_B1PD.shape[2:])
    )
    fused_BCPD = jnp.concatenate(
      [self._first(trunk_BCPD[:, :, :1]), self.fuse(trunk_BCPD[:, :, 1:], token_BCLD)], axis=2
    )
    # The un-fused pass sees no token, so one row per request serves all its targets.
    h_BRPD = jnp.concatenate([fused_BCPD, trunk_B1PD], axis=1)
    for layer in self.layers:
      kv = layer.keys_values(encoded.token_BSD)
      h_BRPD, _ = layer(h_BRPD, kv, encoded.mask_BS, deterministic=deterministic)
    h_BRPD = self.final_norm(h_BRPD)
    h_BCPD = h_BRPD[:, :-1]
    return TargetLogProbs(
      self.output.target_log_probs(h_BCPD[:, :, :-1], target_BCL, source),
      self.output.ecpm_log_probs(h_BCPD[:, :, -1]),
      self.output.target_log_probs(h_BRPD[:, -1:, :-1], target_BCL, None),
    )

  def start(self, context: Context) -> tuple[SearchContext, BeamState, jax.Array]:
    """The lazy part of decoding and the first level.

    Returns:
      What beams share, the state of one beam [B, 1, ...], and log p(s_1 | X) float32 [B, 1, V_1].
    """
    encoded = self.context_processor(context)
    trunk_BPD = self._trunk(encoded.token_BSD, encoded.mask_BS, True)[:, 0]
    shared = SearchContext(
      trunk_BPD,
      tuple(layer.keys_values(encoded.token_BSD) for layer in self.layers),
      encoded.mask_BS,
      self.output.copy_source(encoded),
    )
    state = empty_beam_state(self.config, shared, len(self.layers))
    return shared, *self._decode(shared, state, self._first(trunk_BPD[:, :1]), 0)

  def step(
    self, shared: SearchContext, state: BeamState, code_BW: jax.Array, level: int | jax.Array
  ) -> tuple[BeamState, jax.Array]:
    """One level for all beams.

    Args:
      shared: from `start`.
      state: of the beams, already gathered by parent.
      code_BW: int32, the codes just chosen (level - 1).
      level: the level to predict, 1..L; L asks for the eCPM bucket (only as a Python int).

    Returns:
      The new state, and float32 log-probabilities [B, W, V] (padded for a traced level).
    """
    position_B1D = jax.lax.dynamic_index_in_dim(shared.start_BPD, level, axis=1)
    token_BWD = self.tables.embed(code_BW, level - 1)
    h_BWD = self.fuse(jnp.broadcast_to(position_B1D, token_BWD.shape), token_BWD)
    return self._decode(shared, follow_codes(shared, state, code_BW, level - 1), h_BWD, level)

  def _trunk(self, token_BSD: jax.Array, mask_BS: jax.Array, deterministic: bool) -> jax.Array:
    """m^(K) for all positions in one causal pass (eq. 5, 6, 11): [B, 1, P, D]."""
    positions_PD = self.positions_PD.astype(token_BSD.dtype)
    m_B1PD = jnp.broadcast_to(positions_PD, (token_BSD.shape[0], 1, *positions_PD.shape))
    for layer in self.lazy_layers:
      kv = layer.keys_values(token_BSD)
      m_B1PD, _ = layer(m_B1PD, kv, mask_BS, deterministic=deterministic)
    return m_B1PD

  def _first(self, m: jax.Array) -> jax.Array:
    """Position 1 skips Fuse, as the paper's figures draw it, unless `fuse_bos` is set."""
    if not self.config.fuse_bos:
      return m
    return self.fuse(m, jnp.broadcast_to(self.bos_D.astype(m.dtype), m.shape))

  def _decode(
    self, shared: SearchContext, state: BeamState, h_BWD: jax.Array, level: int | jax.Array
  ) -> tuple[BeamState, jax.Array]:
    h_BWD, cache = run_layers(self.layers, shared, state.cache, h_BWD, level)
    h_BWD = self.final_norm(h_BWD)
    state = BeamState(cache, state.match_BWS)
    return state, self.output.log_probs(h_BWD, level, shared.copy_source, state.match_BWS)


def empty_beam_state(config: ModelConfig, shared: SearchContext, num_layers: int) -> BeamState:
  """The state of one beam per request before the first position."""
  num_rows, num_positions, _ = shared.start_BPD.shape
  shape = (num_rows, 1, config.num_heads, config.width // config.num_heads)
  empty_BWHK = (jnp.zeros(shape, shared.start_BPD.dtype),) * num_positions
  cache = (LayerCache(empty_BWHK, empty_BWHK),) * num_layers
  return BeamState(cache, first_match(shared.copy_source))


def run_layers(
  layers: list[DecoderLayer],
  shared: SearchContext,
  caches: tuple[LayerCache, ...],
  h_BWD: jax.Array,
  position: int | jax.Array,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
  """One position through the autoregressive layers, beams along the candidate axis."""
  h_BW1D, written = h_BWD[:, :, None], []
  for layer, kv, cache in zip(layers, shared.kv, caches, strict=True):
    h_BW1D, cache = layer(h_BW1D, kv, shared.mask_BS, cache=cache, position=position)
    written.append(cache)
  return h_BW1D[:, :, 0], tuple(written)
