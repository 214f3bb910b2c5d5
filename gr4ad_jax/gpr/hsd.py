"""HSD, the sequence decoder: blocks that treat each token type by its own weights, run recursively.

Letters as in `attention.py`; `R` recursions.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.attention import (
  NUM_TYPES,
  DistanceBias,
  EncoderAttention,
  HstuAttention,
  HybridAttention,
)
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.machine.sharding import FSDP, ROWS, TENSOR, Layouts, constrain
from gr4ad_jax.nn.layers import Linear

HSD_LAYOUTS: Layouts = (
  (r"qkvu/kernel", (FSDP, None, TENSOR, None)),  # width, 4, heads, head width
  (r"attention/out/kernel", (TENSOR, FSDP)),  # heads x head width, width
  (r"feed_forward/in", (None, FSDP, TENSOR)),  # types, width, hidden units
  (r"feed_forward/out", (None, TENSOR, FSDP)),  # types, hidden units, width
)


class TokenNorm(nn.Module):
  """Layer normalisation in float32 (eps 1e-6) with a scale for each token type, or one for all."""

  num_types: int = NUM_TYPES

  @nn.compact
  def __call__(self, x_BGYD: jax.Array) -> jax.Array:
    scale_YD = self.param("scale", nn.initializers.ones, (self.num_types, x_BGYD.shape[-1]))
    y_BGYD = x_BGYD.astype(jnp.float32)
    y_BGYD = y_BGYD - jnp.mean(y_BGYD, axis=-1, keepdims=True)
    y_BGYD = y_BGYD * jax.lax.rsqrt(jnp.mean(y_BGYD * y_BGYD, axis=-1, keepdims=True) + 1e-6)
    return (y_BGYD * scale_YD[None, None]).astype(x_BGYD.dtype)


class TokenFeedForward(nn.Module):
  """FFN_tau: two matrices and GELU, four times the width between, for each token type or for all.
  """

  num_types: int = NUM_TYPES

  @nn.compact
  def __call__(self, x_BGYD: jax.Array) -> jax.Array:
    shape, width = x_BGYD.shape, x_BGYD.shape[-1]
    inner = 4 * width
    in_YDM, out_YMD = (
      self.param(name, nn.initializers.normal(size[0] ** -0.5), (self.num_types, *size)).astype(
        x_BGYD.dtype
      )
      for name, size in (("in", (width, inner)), ("out", (inner, width)))
    )
    x_BGYD = x_BGYD.reshape(shape[0], -1, self.num_types, width)  # one type: all in one place of Y
    hidden_BGYM = jax.nn.gelu(jnp.einsum("BGYD,YDM->BGYM", x_BGYD, in_YDM))
    hidden_BGYM = constrain(hidden_BGYM, ROWS, None, None, TENSOR)
    return jnp.einsum("BGYM,YMD->BGYD", hidden_BGYM, out_YMD).reshape(shape)


def _types(own: bool) -> int:
  """Of how many token types there are weights."""
  return NUM_TYPES if own else 1


_ATTENTION = {
  "hybrid": HybridAttention, "hstu": HstuAttention, "bidirectional": EncoderAttention
}


class HsdBlock(nn.Module):
  """A = X + Attn(LN1_tau(X)); Y = A + FFN_tau(LN2_tau(A)); Attn as `attention` says."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.attention = _ATTENTION[config.attention](config)
    self.feed_forward = TokenFeedForward(_types(config.token_ffn))
    self.attention_norm, self.feed_forward_norm = (
      TokenNorm(_types(config.token_norm)) for _ in range(2)
    )
    self.drop = nn.Dropout(config.dropout)

  def __call__(
    self, x_BGYD: jax.Array, bias_BHSS: jax.Array, allowed_BSS: jax.Array, deterministic: bool
  ) -> jax.Array:
    """One block; see `HybridAttention`, whose arguments all kinds take."""
    num_rows, *_, width = x_BGYD.shape
    normal_BSD = self.attention_norm(x_BGYD).reshape(num_rows, -1, width)
    mixed_BSD = self.attention(normal_BSD, bias_BHSS, allowed_BSS)
    x_BGYD += self.drop(mixed_BSD.reshape(x_BGYD.shape), deterministic)
    x_BGYD += self.drop(self.feed_forward(self.feed_forward_norm(x_BGYD)), deterministic)
    return constrain(x_BGYD, ROWS)


class Depths(NamedTuple):
  """How often each token goes through the blocks, chosen by the token itself."""

  share_BGYR: jax.Array  # float32, the router's probability of 1 to R times
  chosen_BGY: jax.Array  # int32, 1 to R


class Intents(NamedTuple):
  """What the sequence decoder says of a stream."""

  intent_BGYD: jax.Array  # normalised
  depths: Depths | None  # None where every token goes through once


class Hsd(nn.Module):
  """The stack of blocks, each token up to R times through it (mixture of recursions, token choice).

  x^r = x^(r-1) + [r <= D] g (F(x^(r-1)) - x^(r-1)) with D = argmax p, p = softmax(W LN(x^0)) and
  g = p[D] / stop_gradient(p[D]): of value 1, so that the router learns. A token that has stopped
  stays what it is, for itself and for those that look at it. Experts choosing tokens would rank a
  token against later ones; here each looks at itself alone.

  Source: GPR 2.2; Bae et al. 2025 (Mixture-of-Recursions).
  """

  config: ModelConfig

  def setup(self):
    config = self.config
    self.blocks = [HsdBlock(config) for _ in range(config.num_layers)]
    self.bias = DistanceBias(config.num_heads)
    self.final_norm = TokenNorm(_types(config.token_norm))
    if config.recursions > 1:
      self.router_norm = TokenNorm(_types(config.token_norm))
      self.router = Linear(config.recursions)

  def __call__(
    self, x_BGYD: jax.Array, age_BGY: jax.Array, allowed_BSS: jax.Array, *,
    deterministic: bool = True,
  ) -> Intents:
    """Intent embeddings of all tokens.

    Args:
      x_BGYD: tokens, from `UnifiedInput`.
      age_BGY: int32, seconds to the row's last request.
      allowed_BSS: from `allow`.
      deterministic: False applies dropout (needs the "dropout" rng).
    """
    bias_BHSS = self.bias(age_BGY)
    if self.config.recursions == 1:
      x_BGYD = self.through(x_BGYD, bias_BHSS, allowed_BSS, deterministic)
      return Intents(self.final_norm(x_BGYD), None)
    depths = self.depths(x_BGYD)
    chosen_BGY1 = depths.chosen_BGY[..., None]
    share_BGY1 = jnp.take_along_axis(depths.share_BGYR, chosen_BGY1 - 1, axis=-1)
    gate_BGY1 = (share_BGY1 / jax.lax.stop_gradient(share_BGY1)).astype(x_BGYD.dtype)
    for recursion in range(1, self.config.recursions + 1):
      change_BGYD = self.through(x_BGYD, bias_BHSS, allowed_BSS, deterministic) - x_BGYD
      x_BGYD += jnp.where(chosen_BGY1 >= recursion, gate_BGY1 * change_BGYD, 0)
    return Intents(self.final_norm(x_BGYD), depths)

  def through(
    self, x_BGYD: jax.Array, bias_BHSS: jax.Array, allowed_BSS: jax.Array, deterministic: bool
  ) -> jax.Array:
    """F: once through all blocks; see `HybridAttention`."""
    for block in self.blocks:
      x_BGYD = block(x_BGYD, bias_BHSS, allowed_BSS, deterministic)
    return x_BGYD

  def depths(self, x_BGYD: jax.Array) -> Depths:
    """The router: what each token chooses."""
    logit_BGYR = self.router(self.router_norm(x_BGYD)).astype(jnp.float32)
    share_BGYR = jax.nn.softmax(logit_BGYR, axis=-1)
    return Depths(share_BGYR, 1 + jnp.argmax(share_BGYR, axis=-1))


def balance_loss(depths: Depths, there_BGY: jax.Array) -> jax.Array:
  """L_bal of each row, float32 [B]: R sum_r (share of tokens with D = r) (mean of p[r]).

  1 where all depths are used alike, R where one is used alone.

  Args:
    depths: of all tokens.
    there_BGY: bool, False = padding.
  """
  recursions = depths.share_BGYR.shape[-1]
  there_BGY1 = there_BGY[..., None]
  count_B1 = jnp.maximum(jnp.sum(there_BGY1, axis=(1, 2)), 1)
  used_BGYR = jax.nn.one_hot(depths.chosen_BGY - 1, recursions)
  used_BR, share_BR = (
    jnp.sum(jnp.where(there_BGY1, x, 0), axis=(1, 2)) / count_B1
    for x in (used_BGYR, depths.share_BGYR)
  )
  return recursions * jnp.sum(used_BR * share_BR, axis=-1)
