"""LazyAR: K layers that see no token run once per request, L-K layers run per beam.

Source: paper 3.2, eq. 5-11 and Fig. 3c.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, EncodedContext
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.decoder import BeamState, DecoderParts, SharedByBeams
from gr4ad_jax.machine.sharding import ROWS, constrain
from gr4ad_jax.nn.layers import DecoderLayer, Linear
from gr4ad_jax.search.generator import MayGet


class Fuse(nn.Module):
  """Fuse(m, s) = W_f [m * (W_g s) ; s], no bias, no residual. Source: eq. 10."""

  config: ModelConfig

  @nn.compact
  def __call__(self, m: jax.Array, token: jax.Array) -> jax.Array:
    gated = m * constrain(Linear(self.config.width, name="gate")(token), ROWS)
    fused = Linear(self.config.width, name="out")(jnp.concatenate([gated, token], axis=-1))
    return constrain(fused, ROWS)


class LazyDecoder(DecoderParts):
  """The generator of GR4AD: context processor, LazyAR stack, per-level heads, eCPM head."""

  def setup(self):
    super().setup()
    config, vocabulary = self.config, self.vocabulary
    self.positions_PD = self.param(
      "positions", nn.initializers.normal(1.0), (vocabulary.num_levels + 1, config.width)
    )
    if config.fuse_bos:
      self.bos_D = self.param("bos", nn.initializers.normal(1.0), (config.width,))
    self.lazy_layers = [DecoderLayer(config.layers) for _ in range(config.num_lazy_layers)]
    num_layers = config.num_layers - config.num_lazy_layers
    self.layers = [DecoderLayer(config.layers) for _ in range(num_layers)]
    self.fuse = Fuse(config)

  def states(
    self, encoded: EncodedContext, target_BCL: jax.Array, deterministic: bool
  ) -> tuple[jax.Array, jax.Array]:
    """See `DecoderParts.states`."""
    trunk_B1PD = self._trunk(encoded.token_BSD, encoded.mask_BS, deterministic)
    trunk_BCPD = jnp.broadcast_to(
      trunk_B1PD, (*target_BCL.shape[:2], *trunk_B1PD.shape[2:])
    )
    fused_BCPD = jnp.concatenate(
      [
        self._first(trunk_BCPD[:, :, :1]),
        self.fuse(trunk_BCPD[:, :, 1:], self.target_tokens(target_BCL)),
      ],
      axis=2,
    )
    # The un-fused pass sees no token, so one row per request serves all its targets.
    h_BRPD = jnp.concatenate([fused_BCPD, trunk_B1PD], axis=1)
    for layer in self.layers:
      kv = layer.keys_values(encoded.token_BSD)
      h_BRPD, _ = layer(h_BRPD, kv, encoded.mask_BS, deterministic=deterministic)
    return h_BRPD[:, :-1], h_BRPD[:, -1:]

  def start(
    self, context: Context, may_get: MayGet
  ) -> tuple[SharedByBeams, BeamState, jax.Array]:
    """The lazy part of decoding and the first level.

    Args:
      context: of the requests.
      may_get: what of the shortlist, and of all ads, can be copied.

    Returns:
      What beams share, the state of one beam [B, 1, ...], and log p(s_1 | X) float32 [B, 1, V_1].
    """
    encoded, source = self.read_for_search(context, may_get)
    trunk_BPD = self._trunk(encoded.token_BSD, encoded.mask_BS, True)[:, 0]
    shared, state = self.begin_search(self.layers, trunk_BPD, encoded, source)
    first_B1D = self._first(trunk_BPD[:, :1])
    return shared, *self.decode_position(self.layers, shared, state, first_B1D, 0)

  def step(
    self, shared: SharedByBeams, state: BeamState, code_BW: jax.Array, level: int | jax.Array
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
    copy = self.output.follow(shared.copy_source, state.copy, code_BW, level - 1)
    state = state._replace(copy=copy)
    return self.decode_position(self.layers, shared, state, h_BWD, level)

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
