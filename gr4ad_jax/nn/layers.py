"""Norm, attention and feed-forward: the parts of one decoder layer.

Dimension key beyond docs/architecture.md: `P` positions (SID levels + the eCPM position), `Q` the
positions present in a call, `C` candidates (training) or beams (search) of one request.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.machine.sharding import FSDP, ROWS, TENSOR, Layouts, constrain
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.attention import attend
from gr4ad_jax.nn.config import LayerConfig
from gr4ad_jax.nn.cpu_products import project

# How the weights of a `DecoderLayer` lie on a mesh: by head and by hidden unit over `tensor`.
LAYER_LAYOUTS: Layouts = (
  (r"cross/(query|key|value)/kernel", (FSDP, TENSOR, None)),  # width, heads, head width
  (r"qkv/kernel", (FSDP, None, TENSOR, None)),  # width, 3, heads, head width
  (r"(cross|self_attention)/out/kernel", (TENSOR, FSDP)),  # heads x head width, width
  (r"feed_forward/in/kernel", (FSDP, None, TENSOR)),  # width, 2, hidden units
  (r"feed_forward/out/kernel", (TENSOR, FSDP)),  # hidden units, width
)


class KeyValue(NamedTuple):
  """Keys and values of the context, shared by all candidates of a request.

  Heads lead, so that attention is one matrix product per head without moving the context again.
  """

  key_BHKS: jax.Array
  value_BHSK: jax.Array


class LayerCache(NamedTuple):
  """Self-attention keys and values of each position, per beam; those not decoded yet are zeros.

  An array a position: with a position known at compile time nothing is read, moved or gathered of
  those to come.
  """

  keys_BCHK: tuple[jax.Array, ...]
  values_BCHK: tuple[jax.Array, ...]


class Linear(nn.Module):
  """y = x W over the last axis, without bias; W ~ N(0, scale^2/fan_in), float32, cast at use."""

  features: int | tuple[int, ...]
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    out = self.features if isinstance(self.features, tuple) else (self.features,)
    init = nn.initializers.normal(self.scale * x.shape[-1] ** -0.5)
    kernel = self.param("kernel", init, (x.shape[-1], *out))
    if kernel.dtype != x.dtype:  # a quantised one has the type of x, and cannot be cast
      kernel = kernel.astype(x.dtype)
    return project(x, kernel)


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
    # Not broadcast to all rows, which the backward pass would keep.
    scale_1D = scale_D.reshape((1,) * (y.ndim - 1) + scale_D.shape)
    return (y * scale_1D).astype(x.dtype)


class CrossAttention(nn.Module):
  """Queries from decoder states, keys and values from the context.

  `kv_mode="lazy"` has no key or value projection: both are the normalised context, split into
  heads and shared by all layers. Source: paper 3.2, after OneRec-V2's lazy cross-attention.
  """

  config: LayerConfig

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
      key_BSHK, value_BSHK = self.key(context_BSD), self.value(context_BSD)
    else:
      key_BSHK = context_BSD.reshape(*context_BSD.shape[:2], self.config.num_heads, -1)
      value_BSHK = key_BSHK
    return KeyValue(key_BSHK.transpose(0, 2, 3, 1), value_BSHK.transpose(0, 2, 1, 3))

  def __call__(self, h_BCQD: jax.Array, kv: KeyValue, mask: jax.Array) -> jax.Array:
    query_BCQHK = self.query(h_BCQD) * (h_BCQD.shape[-1] // self.config.num_heads) ** -0.5
    # All positions of all candidates are rows of one matrix.
    query_BRHK = query_BCQHK.reshape(h_BCQD.shape[0], -1, *query_BCQHK.shape[3:])
    mask_BRS = mask[:, None] if mask.ndim == 2 else jnp.repeat(mask, h_BCQD.shape[2], axis=1)
    mixed_BHRK = attend(
      query_BRHK.swapaxes(1, 2), kv.key_BHKS, kv.value_BHSK, mask_BRS[:, None]
    )
    return self.out(mixed_BHRK.swapaxes(1, 2).reshape(h_BCQD.shape))


class SelfAttention(nn.Module):
  """Causal attention over the positions of one candidate; one position at a time with a cache."""

  config: LayerConfig

  @nn.compact
  def __call__(
    self, h_BCQD: jax.Array, cache: LayerCache | None = None, position: jax.Array | int = 0
  ) -> tuple[jax.Array, LayerCache | None]:
    config = self.config
    head_width = config.width // config.num_heads
    qkv = Linear((3, config.num_heads, head_width), name="qkv")(h_BCQD)
    query_BCQHK, key_BCQHK, value_BCQHK = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
    query_BCQHK *= head_width**-0.5
    if cache is None:
      mixed_BCQHK = _attend_causally(query_BCQHK, key_BCQHK, value_BCQHK)
    else:
      cache = LayerCache(
        _write(cache.keys_BCHK, key_BCQHK[:, :, 0], position),
        _write(cache.values_BCHK, value_BCQHK[:, :, 0], position),
      )
      mixed_BCQHK = _attend_to_cache(query_BCQHK[:, :, 0], cache, position)[:, :, None]
    return Linear(config.width, name="out")(mixed_BCQHK.reshape(h_BCQD.shape)), cache


def _attend_causally(
  query_BCQHK: jax.Array, key_BCPHK: jax.Array, value_BCPHK: jax.Array
) -> jax.Array:
  """Every position attends to itself and to those before it."""
  num_positions = query_BCQHK.shape[2]
  mixed_BCHQK = attend(
    query_BCQHK.swapaxes(2, 3), key_BCPHK.transpose(0, 1, 3, 4, 2), value_BCPHK.swapaxes(2, 3),
    jnp.tril(jnp.ones((num_positions, num_positions), bool)),
  )
  return mixed_BCHQK.swapaxes(2, 3)


def _attend_to_cache(
  query_BCHK: jax.Array, cache: LayerCache, position: jax.Array | int
) -> jax.Array:
  """One position attends to itself and to those before it; products too small for a matmul."""
  filled = position + 1 if isinstance(position, int) else len(cache.keys_BCHK)
  score_BCHP = jnp.stack(
    [
      (query_BCHK * key_BCHK).sum(axis=-1, dtype=jnp.float32)
      for key_BCHK in cache.keys_BCHK[:filled]
    ],
    axis=-1,
  )
  score_BCHP = jnp.where(jnp.arange(filled) <= position, score_BCHP, NEG_INF)
  weight_BCHP = jax.nn.softmax(score_BCHP, axis=-1).astype(query_BCHK.dtype)
  return sum(
    weight_BCHP[..., p, None] * value_BCHK
    for p, value_BCHK in enumerate(cache.values_BCHK[:filled])
  )


def _write(
  old_BCHK: tuple[jax.Array, ...], new_BCHK: jax.Array, position: jax.Array | int
) -> tuple[jax.Array, ...]:
  if isinstance(position, int):
    return (*old_BCHK[:position], new_BCHK, *old_BCHK[position + 1 :])
  return tuple(jnp.where(position == p, new_BCHK, old) for p, old in enumerate(old_BCHK))


class FeedForward(nn.Module):
  """SwiGLU."""

  config: LayerConfig

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    gate_and_value = Linear((2, self.config.feed_forward_width), name="in")(h)
    hidden = jax.nn.silu(gate_and_value[..., 0, :]) * gate_and_value[..., 1, :]
    hidden = constrain(hidden, ROWS, *(None,) * (hidden.ndim - 2), TENSOR)
    return Linear(self.config.width, name="out")(hidden)


class DecoderLayer(nn.Module):
  """Dec^(l): cross-attention to the context, causal self-attention, feed-forward.

  Each is pre-normalised with a residual around it. Source: paper 3.2 (Fig. 3).
  """

  config: LayerConfig

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
    mask: jax.Array,
    *,
    cache: LayerCache | None = None,
    position: jax.Array | int = 0,
    deterministic: bool = True,
  ) -> tuple[jax.Array, LayerCache | None]:
    """One layer.

    Args:
      h_BCQD: states; Q = 1 where a cache is given.
      kv: from `keys_values`.
      mask: bool [B, S], True = a real context token; or [B, C, S], one for each candidate.
      cache: keys and values of earlier positions, or None for a whole causal pass.
      position: where the one query stands; may be traced.
      deterministic: False applies dropout (needs the "dropout" rng).

    Returns:
      The new states and the cache with this position written.
    """
    if cache is not None or self.config.remat == "none":
      return self._apply(h_BCQD, kv, mask, cache, position, deterministic)
    policy = jax.checkpoint_policies.nothing_saveable
    if self.config.remat == "products":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def apply(layer: DecoderLayer, h_BCQD: jax.Array, kv: KeyValue, mask: jax.Array):
      return layer._apply(h_BCQD, kv, mask, None, position, deterministic)[0]

    return nn.remat(apply, policy=policy)(self, h_BCQD, kv, mask), None

  def _apply(
    self, h_BCQD, kv, mask, cache, position, deterministic
  ) -> tuple[jax.Array, LayerCache | None]:
    attend, mix, feed = self.norms
    h_BCQD += self.drop(self.cross(attend(h_BCQD), kv, mask), deterministic)
    mixed_BCQD, cache = self.self_attention(mix(h_BCQD), cache, position)
    h_BCQD += self.drop(mixed_BCQD, deterministic)
    h_BCQD += self.drop(self.feed_forward(feed(h_BCQD)), deterministic)
    return constrain(h_BCQD, ROWS), cache
