"""The DeepSeek-style multi-token-prediction decoder that LazyAR is compared with.

Source: paper 3.2 (Fig. 3b) and DeepSeek-V3. All L layers run once per request, for
level 1; every later position owns a shallow module of L - K layers, fed with the state and the
code before it. Same config, tables, heads and search interface as `lazy_decoder`.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, EncodedContext
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.copy_path import CopySource, CopyState
from gr4ad_jax.gr4ad.decoder import DecoderParts
from gr4ad_jax.nn.layers import DecoderLayer, KeyValue, Linear, Norm
from gr4ad_jax.search.generator import MayGet


class SharedByMultiToken(NamedTuple):
  """What all beams of a request share; computed once per request."""

  kv: tuple[tuple[KeyValue, ...], ...]  # one per layer of each module
  mask_BS: jax.Array
  copy_source: CopySource | None


class MultiTokenState(NamedTuple):
  """What each beam carries; every leaf is [B, W, ...]."""

  hidden_BWD: jax.Array  # top state of the position before
  copy: CopyState | None


class PositionModule(nn.Module):
  """h_t = Dec^(1:L-K)(M_t [norm(h_{t-1}); norm(s_{t-1})], X), attention to its own position."""

  config: ModelConfig

  def setup(self):
    self.norms = [Norm(self.config.norm) for _ in range(2)]
    self.merge = Linear(self.config.width)
    depth = self.config.num_layers - self.config.num_lazy_layers
    self.layers = [DecoderLayer(self.config.layers) for _ in range(depth)]

  def keys_values(self, context_BSD: jax.Array) -> tuple[KeyValue, ...]:
    """What the layers attend to; computed once per request."""
    return tuple(layer.keys_values(context_BSD) for layer in self.layers)

  def __call__(
    self,
    hidden_BCD: jax.Array,
    token_BCD: jax.Array,
    kv: tuple[KeyValue, ...],
    mask_BS: jax.Array,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """The next top state, [B, C, D]."""
    hidden, token = self.norms
    h_BCD = self.merge(jnp.concatenate([hidden(hidden_BCD), token(token_BCD)], axis=-1))
    h_BC1D = h_BCD[:, :, None]
    for layer, layer_kv in zip(self.layers, kv, strict=True):
      h_BC1D, _ = layer(h_BC1D, layer_kv, mask_BS, deterministic=deterministic)
    return h_BC1D[:, :, 0]


class MultiTokenDecoder(DecoderParts):
  """Level 1 by the deep stack, each further level and the eCPM bucket by a module of its own."""

  def setup(self):
    super().setup()
    config, vocabulary = self.config, self.vocabulary
    self.bos_D = self.param("bos", nn.initializers.normal(1.0), (config.width,))
    self.layers = [DecoderLayer(config.layers) for _ in range(config.num_layers)]
    self.modules = [PositionModule(config) for _ in range(vocabulary.num_levels)]

  def states(
    self, encoded: EncodedContext, target_BCL: jax.Array, deterministic: bool
  ) -> tuple[jax.Array, None]:
    """See `DecoderParts.states`."""
    h_B1D = self._first(encoded.token_BSD, encoded.mask_BS, deterministic)
    states = [jnp.broadcast_to(h_B1D, (*target_BCL.shape[:2], h_B1D.shape[-1]))]
    for level in range(self.vocabulary.num_levels):
      token_BCD = self.tables.embed(target_BCL[..., level], level)
      module = self.modules[level]
      states.append(
        module(
          states[-1], token_BCD, module.keys_values(encoded.token_BSD), encoded.mask_BS,
          deterministic=deterministic,
        )
      )
    return jnp.stack(states, axis=2), None

  def start(
    self, context: Context, may_get: MayGet
  ) -> tuple[SharedByMultiToken, MultiTokenState, jax.Array]:
    """The first level; see `LazyDecoder.start`."""
    encoded, source = self.read_for_search(context, may_get)
    shared = SharedByMultiToken(
      tuple(module.keys_values(encoded.token_BSD) for module in self.modules),
      encoded.mask_BS, source,
    )
    h_B1D = self._first(encoded.token_BSD, encoded.mask_BS, True)
    state = MultiTokenState(h_B1D, self.output.begin_copy(source))
    return shared, *self._log_probs(shared, state, 0)

  def step(
    self,
    shared: SharedByMultiToken,
    state: MultiTokenState,
    code_BW: jax.Array,
    level: int | jax.Array,
  ) -> tuple[MultiTokenState, jax.Array]:
    """One level for all beams; see `LazyDecoder.step`."""
    token_BWD = self.tables.embed(code_BW, level - 1)

    def extend(decoder: MultiTokenDecoder, hidden_BWD, token_BWD, module: int) -> jax.Array:
      return decoder.modules[module](
        hidden_BWD, token_BWD, shared.kv[module], shared.mask_BS
      )

    if isinstance(level, int):
      h_BWD = extend(self, state.hidden_BWD, token_BWD, level - 1)
    else:
      branches = [
        lambda decoder, hidden, token, m=m: extend(decoder, hidden, token, m)
        for m in range(len(self.modules))
      ]
      h_BWD = nn.switch(level - 1, branches, self, state.hidden_BWD, token_BWD)
    copy = self.output.follow(shared.copy_source, state.copy, code_BW, level - 1)
    return self._log_probs(shared, MultiTokenState(h_BWD, copy), level)

  def _first(self, token_BSD: jax.Array, mask_BS: jax.Array, deterministic: bool) -> jax.Array:
    """The deep stack at position 1, which sees no token: [B, 1, D]."""
    shape = (token_BSD.shape[0], 1, 1, token_BSD.shape[-1])
    h_B11D = jnp.broadcast_to(self.bos_D.astype(token_BSD.dtype), shape)
    for layer in self.layers:
      kv = layer.keys_values(token_BSD)
      h_B11D, _ = layer(h_B11D, kv, mask_BS, deterministic=deterministic)
    return h_B11D[:, :, 0]

  def _log_probs(
    self, shared: SharedByMultiToken, state: MultiTokenState, level: int | jax.Array
  ) -> tuple[MultiTokenState, jax.Array]:
    h_BWD = self.final_norm(state.hidden_BWD)
    log_probs, copy = self.output.log_probs(h_BWD, level, shared.copy_source, state.copy)
    return state._replace(copy=copy), log_probs
