"""The ordinary autoregressive decoder that LazyAR is compared with.

Source: paper 3.2, eq. 3-4 and Fig. 3a; reference 2.2. Same config, tables, heads and search
interface as `lazy_decoder`; every one of its L layers runs for every beam.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.context import ContextProcessor
from gr4ad_jax.gr4ad.copy_path import follow_codes
from gr4ad_jax.gr4ad.lazy_decoder import (
  BeamState,
  SearchContext,
  TargetLogProbs,
  empty_beam_state,
  run_layers,
)
from gr4ad_jax.gr4ad.tokens import TokenOutput, TokenTables
from gr4ad_jax.nn.layers import DecoderLayer, Norm


class AutoregressiveDecoder(nn.Module):
  """h_t^(0) = s_{t-1} + p_t, then L layers. `num_lazy_layers` and the MTP loss do not apply."""

  config: ModelConfig
  vocabulary: Vocabulary

  def setup(self):
    config, vocabulary = self.config, self.vocabulary
    self.tables = TokenTables(config, vocabulary)
    self.context_processor = ContextProcessor(config, vocabulary, self.tables)
    init = nn.initializers.normal(1.0)
    self.positions_PD = self.param("positions", init, (vocabulary.num_levels + 1, config.width))
    self.bos_D = self.param("bos", init, (config.width,))
    self.layers = [DecoderLayer(config) for _ in range(config.num_layers)]
    self.final_norm = Norm(config.norm)
    self.output = TokenOutput(config, vocabulary, self.tables)

  def __call__(
    self, context: Context, target_BCL: jax.Array, *, deterministic: bool = True
  ) -> TargetLogProbs:
    """Teacher forcing, as `LazyDecoder.__call__`; `mtp_BCL` is None."""
    num_levels = self.vocabulary.num_levels
    encoded = self.context_processor(context)
    source = self.output.copy_source(encoded)
    dtype = encoded.token_BSD.dtype
    token_BCLD = jnp.stack(
      [self.tables.embed(target_BCL[..., level], level) for level in range(num_levels)], axis=2
    )
    bos_BC1D = jnp.broadcast_to(self.bos_D.astype(dtype), (*token_BCLD[:, :, :1].shape,))
    h_BCPD = jnp.concatenate([bos_BC1D, token_BCLD], axis=2) + self.positions_PD.astype(dtype)
    for layer in self.layers:
      kv = layer.keys_values(encoded.token_BSD)
      h_BCPD, _ = layer(h_BCPD, kv, encoded.mask_BS, deterministic=deterministic)
    h_BCPD = self.final_norm(h_BCPD)
    sid_BCL = self.output.target_log_probs(h_BCPD[:, :, :-1], target_BCL, source)
    return TargetLogProbs(sid_BCL, self.output.ecpm_log_probs(h_BCPD[:, :, -1]), None)

  def start(self, context: Context) -> tuple[SearchContext, BeamState, jax.Array]:
    """As `LazyDecoder.start`."""
    encoded = self.context_processor(context)
    dtype = encoded.token_BSD.dtype
    positions_PD = self.positions_PD.astype(dtype)
    shared = SearchContext(
      jnp.broadcast_to(positions_PD, (encoded.token_BSD.shape[0], *positions_PD.shape)),
      tuple(layer.keys_values(encoded.token_BSD) for layer in self.layers),
      encoded.mask_BS,
      self.output.copy_source(encoded),
    )
    state = empty_beam_state(self.config, shared, len(self.layers))
    first_B1D = shared.start_BPD[:, :1] + self.bos_D.astype(dtype)
    return shared, *self._decode(shared, state, first_B1D, 0)

  def step(
    self, shared: SearchContext, state: BeamState, code_BW: jax.Array, level: int | jax.Array
  ) -> tuple[BeamState, jax.Array]:
    """As `LazyDecoder.step`."""
    position_B1D = jax.lax.dynamic_index_in_dim(shared.start_BPD, level, axis=1)
    h_BWD = self.tables.embed(code_BW, level - 1) + position_B1D
    return self._decode(shared, follow_codes(shared, state, code_BW, level - 1), h_BWD, level)

  def _decode(
    self, shared: SearchContext, state: BeamState, h_BWD: jax.Array, level: int | jax.Array
  ) -> tuple[BeamState, jax.Array]:
    h_BWD, cache = run_layers(self.layers, shared, state.cache, h_BWD, level)
    h_BWD = self.final_norm(h_BWD)
    state = BeamState(cache, state.match_BWS)
    return state, self.output.log_probs(h_BWD, level, shared.copy_source, state.match_BWS)
