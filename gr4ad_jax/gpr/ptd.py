"""PTD, the token decoder: thinks first, then writes a semantic ID code by code.

Positions of its causal self-attention: a start vector, K thinking tokens, BOS with what the
refining token adds to it, then the codes but the last. BOS emits the first code, each code the one
after it. Letters as in `nn/layers.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.batch import Vocabulary
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.code_tables import CodeTables
from gr4ad_jax.nn.layers import DecoderLayer, KeyValue, LayerCache, Norm

Caches = tuple[LayerCache, ...]
"""One of each layer."""


class Thought(NamedTuple):
  """What codes attend to: the intents that a request may see, and the thinking tokens of it.

  Thoughts of others on the user (`batch.SeenThoughts`) stand behind the intents, as more of them.
  """

  kv: tuple[KeyValue, ...]  # of each layer
  mask: jax.Array  # bool [B, S] or [B, C, S]
  caches: Caches  # of the positions before BOS, [B, C, ...] or [B, 1, ...]
  token_BCKD: jax.Array  # K thinking tokens


class TokenDecoder(nn.Module):
  """Layers of cross-attention to the intents, causal self-attention and feed-forward.

  Source: GPR 2.2 (Fig. 2c), an ordinary Transformer decoder.
  """

  config: ModelConfig
  vocabulary: Vocabulary
  tables: CodeTables

  def setup(self):
    config, levels = self.config, self.vocabulary.num_levels
    init = nn.initializers.normal(1.0)
    self.bos_D = self.param("bos", init, (config.width,))
    if config.thinking:
      self.start_D = self.param("start", init, (config.width,))
    self.positions_PD = self.param("positions", init, (self.first + levels, config.width))
    self.layers = [DecoderLayer(config.token_layers) for _ in range(config.num_token_layers)]
    self.final_norm = Norm("layer")
    self.head_ND = self.param(
      "head", nn.initializers.normal(0.02), (config.predictions, config.width)
    )
    self.project_NDO = self.param(
      "project", lambda key, shape: jnp.broadcast_to(jnp.eye(shape[-1]), shape),
      (config.predictions, config.width, config.width),
    )
    self.biases = [
      self.param(f"bias_{level}", nn.initializers.zeros, (config.predictions, size))
      for level, size in enumerate(self.vocabulary.codebook_sizes)
    ]

  @property
  def first(self) -> int:
    """Positions before BOS."""
    return self.config.thinking + bool(self.config.thinking)

  def think(
    self, intent_BSD: jax.Array, mask_BCS: jax.Array, *, deterministic: bool = True
  ) -> Thought:
    """K thinking tokens, one after another: what a position gives out is what the next takes in.

    Args:
      intent_BSD: from the sequence decoder, the same for all requests of a row.
      mask_BCS: bool, the intents that each of C requests may see.
      deterministic: False applies dropout (needs the "dropout" rng).
    """
    kv = tuple(layer.keys_values(intent_BSD) for layer in self.layers)
    num_rows, num_requests, _ = mask_BCS.shape
    thought = Thought(
      kv, mask_BCS, self.no_caches(num_rows, num_requests, self.first, intent_BSD.dtype),
      jnp.zeros((num_rows, num_requests, 0, self.config.width), intent_BSD.dtype),
    )
    if not self.config.thinking:
      return thought
    caches, tokens = thought.caches, []
    token_BCD = jnp.broadcast_to(
      self.start_D.astype(intent_BSD.dtype), (num_rows, num_requests, self.config.width)
    )
    for position in range(self.first):
      token_BCD, caches = self._position(token_BCD, thought, caches, position, deterministic)
      tokens.append(token_BCD)
    # The last thinking token goes in, too; what its position gives out is not asked for.
    return thought._replace(caches=caches, token_BCKD=jnp.stack(tokens[:-1], axis=2))

  def no_caches(self, num_rows: int, num_candidates: int, positions: int, dtype) -> Caches:
    """Caches of so many positions, each still to come."""
    heads = self.config.num_heads
    empty = jnp.zeros((num_rows, num_candidates, heads, self.config.width // heads), dtype)
    return (LayerCache((empty,) * positions, (empty,) * positions),) * len(self.layers)

  def bos(self, shape: tuple[int, ...], dtype) -> jax.Array:
    """What position `first` takes in for the heads, but for the refining token, [..., N, D]."""
    bos_ND = self.bos_D[None] + self.head_ND
    return jnp.broadcast_to(bos_ND.astype(dtype), (*shape, *bos_ND.shape))

  def emit(
    self, token_BCD: jax.Array, thought: Thought, caches: Caches, level: int | jax.Array, *,
    deterministic: bool = True,
  ) -> tuple[jax.Array, Caches]:
    """The state u_l that tells the code of a level, [B, C, D], and the caches with its position.

    Args:
      token_BCD: what BOS takes in at level 0, else the embedding of the code before; C candidates
        of each request of `thought`, or of its one.
      thought: from `think`, its arrays repeated for the candidates where it has several requests.
      caches: of the L positions of codes, from `no_caches` or the level before.
      level: 0-based; may be traced.
      deterministic: False applies dropout.
    """
    joined = tuple(
      LayerCache(before.keys_BCHK + own.keys_BCHK, before.values_BCHK + own.values_BCHK)
      for before, own in zip(thought.caches, caches, strict=True)
    )
    state_BCD, written = self._position(
      token_BCD, thought, joined, self.first + level, deterministic
    )
    own = tuple(LayerCache(*(x[self.first :] for x in cache)) for cache in written)
    return state_BCD, own

  def _position(
    self, token_BCD: jax.Array, thought: Thought, caches: Caches, position: int | jax.Array,
    deterministic: bool,
  ) -> tuple[jax.Array, Caches]:
    place_1D = jax.lax.dynamic_index_in_dim(self.positions_PD, position)
    h_BC1D = (token_BCD + place_1D[None].astype(token_BCD.dtype))[:, :, None]
    written = []
    for layer, kv, cache in zip(self.layers, thought.kv, caches, strict=True):
      h_BC1D, cache = layer(
        h_BC1D, kv, thought.mask, cache=cache, position=position, deterministic=deterministic
      )
      written.append(cache)
    return self.final_norm(h_BC1D[:, :, 0]), tuple(written)

  def logits(self, state: jax.Array, level: int) -> jax.Array:
    """Scores of the codes of a level by all heads: [..., N, D] -> float32 [..., N, V].

    (P_j u_l) E_l^T + b_{j,l}; P_j begins at the identity. Source: GPR 3.1.
    """
    projected = jnp.einsum("...ND,NDO->...NO", state, self.project_NDO.astype(state.dtype))
    bias_NV = self.biases[level]
    leading = (1,) * (state.ndim - 2)
    return self.tables.logits(projected, level) + bias_NV.reshape(leading + bias_NV.shape)

  def first_head(self, state_BWD: jax.Array, level: int | jax.Array) -> jax.Array:
    """log p of the codes of a level by the first head, float32 [B, W, V].

    A traced level gives rows padded to the largest codebook with NEG_INF.
    """
    sizes = self.vocabulary.codebook_sizes
    if not isinstance(level, int):

      def padded(level: int) -> jax.Array:
        width = ((0, 0), (0, 0), (0, max(sizes) - sizes[level]))
        return jnp.pad(self.first_head(state_BWD, level), width, constant_values=NEG_INF)

      return jax.lax.switch(level, [lambda i=i: padded(i) for i in range(len(sizes))])
    state_BWD = jnp.einsum("BWD,DO->BWO", state_BWD, self.project_NDO[0].astype(state_BWD.dtype))
    logit_BWV = self.tables.logits(state_BWD, level) + self.biases[level][0][None, None]
    return jax.nn.log_softmax(logit_BWV, axis=-1)
