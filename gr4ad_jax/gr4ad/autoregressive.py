"""The ordinary autoregressive decoder that LazyAR is compared with.

Source: paper 3.2, eq. 3-4 and Fig. 3a. Same config, tables, heads and search
interface as `lazy_decoder`; every one of its L layers runs for every beam.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, EncodedContext
from gr4ad_jax.gr4ad.decoder import BeamState, DecoderParts, SharedByBeams
from gr4ad_jax.nn.layers import DecoderLayer
from gr4ad_jax.search.generator import MayGet


class AutoregressiveDecoder(DecoderParts):
  """h_t^(0) = s_{t-1} + p_t, then L layers. `num_lazy_layers` and the MTP loss do not apply."""

  def setup(self):
    super().setup()
    config, vocabulary = self.config, self.vocabulary
    init = nn.initializers.normal(1.0)
    self.positions_PD = self.param("positions", init, (vocabulary.num_levels + 1, config.width))
    self.bos_D = self.param("bos", init, (config.width,))
    self.layers = [DecoderLayer(config.layers) for _ in range(config.num_layers)]

  def states(
    self, encoded: EncodedContext, target_BCL: jax.Array, deterministic: bool
  ) -> tuple[jax.Array, None]:
    """See `DecoderParts.states`."""
    dtype, token_BCLD = encoded.token_BSD.dtype, self.target_tokens(target_BCL)
    bos_BC1D = jnp.broadcast_to(self.bos_D.astype(dtype), (*token_BCLD[:, :, :1].shape,))
    position_11PD = self.positions_PD.astype(dtype)[None, None]
    h_BCPD = jnp.concatenate([bos_BC1D, token_BCLD], axis=2) + position_11PD
    for layer in self.layers:
      kv = layer.keys_values(encoded.token_BSD)
      h_BCPD, _ = layer(h_BCPD, kv, encoded.mask_BS, deterministic=deterministic)
    return h_BCPD, None

  def start(
    self, context: Context, may_get: MayGet
  ) -> tuple[SharedByBeams, BeamState, jax.Array]:
    """The first level; see `LazyDecoder.start`."""
    encoded, source = self.read_for_search(context, may_get)
    dtype, num_rows = encoded.token_BSD.dtype, encoded.token_BSD.shape[0]
    positions_PD = self.positions_PD.astype(dtype)
    start_BPD = jnp.broadcast_to(positions_PD, (num_rows, *positions_PD.shape))
    shared, state = self.begin_search(self.layers, start_BPD, encoded, source)
    first_B1D = start_BPD[:, :1] + self.bos_D.astype(dtype)[None, None]
    return shared, *self.decode_position(self.layers, shared, state, first_B1D, 0)

  def step(
    self, shared: SharedByBeams, state: BeamState, code_BW: jax.Array, level: int | jax.Array
  ) -> tuple[BeamState, jax.Array]:
    """One level for all beams; see `LazyDecoder.step`."""
    position_B1D = jax.lax.dynamic_index_in_dim(shared.start_BPD, level, axis=1)
    h_BWD = self.tables.embed(code_BW, level - 1) + position_B1D
    copy = self.output.follow(shared.copy_source, state.copy, code_BW, level - 1)
    state = state._replace(copy=copy)
    return self.decode_position(self.layers, shared, state, h_BWD, level)
