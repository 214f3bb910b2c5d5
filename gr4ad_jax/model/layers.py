"""Norm, attention and feed-forward: the parts of one decoder layer.

Dimension key beyond docs/architecture.md: `P` positions (SID levels + the eCPM position), `Q` the
positions present in a call, `C` candidates (training) or beams (search) of one request.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.config import ModelConfig

NEG_INF = -1e30  # finite, so that a fully masked row has finite gradients


class KeyValue(NamedTuple):
  """Keys and values of the context, shared by all candidates of a request."""

  key_BSHK: jax.Array
  value_BSHK: jax.Array


class LayerCache(NamedTuple):
  """Self-attention keys and values of the positions decoded so far, per beam."""

  key_BCPHK: jax.Array
  value_BCPHK: jax.Array


class Linear(nn.Module):
  """y = x W over the last axis, without bias; W ~ N(0, scale^2/fan_in), float32, cast at use."""

  features: int | tuple[int, ...]
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    out = self.features if isinstance(self.features, tuple) else (self.features,)
    fan_in = x.shape[-1]
    init = nn.initializers.normal(self.scale * fan_in**-0.5)
    kernel = self.param("kernel", init, (fan_in, *out))
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=1)


class Norm(nn.Module):
  """RMS or layer normalisation of the last axis, computed in float32 (eps 1e-6)."""

  kind: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    if self.kind == "layer":
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return (y * scale_D).astype(x.dtype)


class CrossAttention(nn.Module):
  """Queries from decoder states, keys and values from the context.

  `kv_mode="lazy"` has no key or value projection: both are the normalised context, split into
  heads and shared by all layers. Source: OneRec-V2's lazy cross-attention; reference 2.1.
  """

  config: ModelConfig

  def setup(self):
    config = self.config
    heads = (config.num_heads, config.width // config.num_heads)
    self.query = Linear(heads)
    self.out = Linear(config.width)
    if config.kv_mode == "projected":
      self.key, self.value = Linear(heads), Linear(heads)

  def keys_values(self, context_BSD: jax.Array) -> KeyValue:
    """What this layer attends to; computed once per request."""
    if self.config.kv_mode == "projected":
      return KeyValue(self.key(context_BSD), self.value(context_BSD))
    heads_BSHK = context_BSD.reshape(*context_BSD.shape[:2], self.config.num_heads, -1)
    return KeyValue(heads_BSHK, heads_BSHK)

  def __call__(self, h_BCQD: jax.Array, kv: KeyValue, mask_BS: jax.Array) -> jax.Array:
    query_BCQHK = self.query(h_BCQD) * (h_BCQD.shape[-1] // self.config.num_heads) ** -0.5
    score_BHCQS = jnp.einsum(
      "BCQHK,BSHK->BHCQS", query_BCQHK, kv.key_BSHK, preferred_element_type=jnp.float32
    )
    score_BHCQS = jnp.where(mask_BS[:, None, None, None, :], score_BHCQS, NEG_INF)
    weight_BHCQS = jax.nn.softmax(score_BHCQS, axis=-1).astype(h_BCQD.dtype)
    mixed_BCQHK = jnp.einsum("BHCQS,BSHK->BCQHK", weight_BHCQS, kv.value_BSHK)
    return self.out(mixed_BCQHK.reshape(h_BCQD.shape))


class SelfAttention(nn.Module):
  """Causal attention over the positions of one candidate; one position at a time with a cache."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, h_BCQD: jax.Array, cache: LayerCache | None = None, position: jax.Array | int = 0
  ) -> tuple[jax.Array, LayerCache | None]:
    config = self.config
    head_width = config.width // config.num_heads
    qkv = Linear((3, config.num_heads, head_width), name="qkv")(h_BCQD)
    query_BCQHK, key_BCPHK, value_BCPHK = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
    num_queries = h_BCQD.shape[2]
    if cache is None:
      mask_QP = jnp.tril(jnp.ones((num_queries, num_queries), bool))
    else:
      key_BCPHK = _write(cache.key_BCPHK, key_BCPHK, position)
      value_BCPHK = _write(cache.value_BCPHK, value_BCPHK, position)
      cache = LayerCache(key_BCPHK, value_BCPHK)
      mask_QP = (jnp.arange(key_BCPHK.shape[2]) <= position)[None, :]
    score_BCHQP = jnp.einsum(
      "BCQHK,BCPHK->BCHQP", query_BCQHK * head_width**-0.5, key_BCPHK,
      preferred_element_type=jnp.float32,
    )
    weight_BCHQP = jax.nn.softmax(jnp.where(mask_QP, score_BCHQP, NEG_INF), axis=-1)
    mixed_BCQHK = jnp.einsum("BCHQP,BCPHK->BCQHK", weight_BCHQP.astype(h_BCQD.dtype), value_BCPHK)
    return Linear(config.width, name="out")(mixed_BCQHK.reshape(h_BCQD.shape)), cache


def _write(cache_BCPHK: jax.Array, new_BC1HK: jax.Array, position: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(
    cache_BCPHK, new_BC1HK.astype(cache_BCPHK.dtype), position, axis=2
  )


class FeedForward(nn.Module):
  """SwiGLU."""

  config: ModelConfig

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    gate_and_value = Linear((2, self.config.feed_forward_width), name="in")(h)
    hidden = jax.nn.silu(gate_and_value[..., 0, :]) * gate_and_value[..., 1, :]
    return Linear(self.config.width, name="out")(hidden)


class DecoderLayer(nn.Module):
  """Dec^(l): cross-attention to the context, causal self-attention, feed-forward.

  Each is pre-normalised with a residual around it. Source: paper 3.2 (Fig. 3); reference 2.1.
  """

  config: ModelConfig

  def setup(self):
    self.cross = CrossAttention(self.config)
    self.self_attention = SelfAttention(self.config)
    self.feed_forward = FeedForward(self.config)
    self.norms = [Norm(self.config.norm) for _ in range(3)]
    self.drop = nn.Dropout(self.config.dropout)

  def keys_values(self, context_BSD: jax.Array) -> KeyValue:
    """This layer's view of the context."""
    return self.cross.keys_values(context_BSD)

  def __call__(
    self,
    h_BCQD: jax.Array,
    kv: KeyValue,
    mask_BS: jax.Array,
    *,
    cache: LayerCache | None = None,
    position: jax.Array | int = 0,
    deterministic: bool = True,
  ) -> tuple[jax.Array, LayerCache | None]:
    """One layer.

    Args:
      h_BCQD: states; Q = 1 where a cache is given.
      kv: from `keys_values`.
      mask_BS: bool, True = a real context token.
      cache: keys and values of earlier positions, or None for a whole causal pass.
      position: where the one query stands; may be traced.
      deterministic: False applies dropout (needs the "dropout" rng).

    Returns:
      The new states and the cache with this position written.
    """
    attend, mix, feed = self.norms
    h_BCQD += self.drop(self.cross(attend(h_BCQD), kv, mask_BS), deterministic)
    mixed_BCQD, cache = self.self_attention(mix(h_BCQD), cache, position)
    h_BCQD += self.drop(mixed_BCQD, deterministic)
    h_BCQD += self.drop(self.feed_forward(feed(h_BCQD)), deterministic)
    return h_BCQD, cache
