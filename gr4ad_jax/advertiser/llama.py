"""A decoder of the llama family: grouped queries, rotary positions, RMSNorm, SwiGLU, adapters.

Dimension key beyond docs/architecture.md: `T` tokens of a call, `S` what they may look at, those of
the past before them, `N` layers, `K` heads of keys and values, `G` query heads that share one, `H`
width of a head, `M` hidden units, `R` rank of an adapter.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.advertiser.config import LoraConfig
from gr4ad_jax.config import Bounded, Count, Positive, require
from gr4ad_jax.machine.sharding import FSDP, TENSOR, Layouts
from gr4ad_jax.nn.attention import attend

# How the weights lie on a mesh; the first axis of a layer's weights counts the layers.
LAYOUTS: Layouts = (
  (r"embedding", (TENSOR, FSDP)),
  (r"(query|key|value|gate|up)/kernel", (None, FSDP, TENSOR)),
  (r"(out|down)/kernel", (None, TENSOR, FSDP)),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Bounded, section="llama"):
  """Sizes and kinds of a published decoder."""

  vocab_size: Count
  """V, tokens."""
  width: Count
  """D, of every hidden state."""
  num_layers: Count
  """N, blocks."""
  num_heads: Count
  """Query heads; a multiple of the heads of keys and values."""
  num_kv_heads: Count
  """K, heads of keys and values; key head k serves query heads k G .. (k + 1) G - 1."""
  head_width: Count
  """H; even, as rotary positions turn pairs."""
  hidden: Count
  """M, units of the gated network."""
  rope_base: Positive = 10_000.0
  """Base of the rotary frequencies."""
  rope_layout: Literal["interleaved", "halves"] = "halves"
  """Which numbers of a head turn together: 2k and 2k + 1 (GGUF files of llamas), or k and k + H/2
  (Hugging Face's)."""
  norm_eps: Positive = 1e-5
  """Epsilon of RMSNorm."""
  tied: bool = True
  """The rows that read tokens also tell them."""
  qkv_bias: bool = False
  """Biases on queries, keys and values (Qwen 2)."""
  qk_norm: bool = False
  """RMSNorm of each head's queries and keys (Qwen 3)."""

  def _check(self):
    require(self.num_heads % self.num_kv_heads == 0, "llama.num_heads", self.num_heads,
            f"must be a multiple of num_kv_heads={self.num_kv_heads}")
    require(self.head_width % 2 == 0, "llama.head_width", self.head_width, "must be even")


class Past(NamedTuple):
  """Keys and values of S tokens in every layer, keys turned to their positions."""

  key_NBSKH: jax.Array
  value_NBSKH: jax.Array


class Read(NamedTuple):
  """What a decoder makes of T tokens."""

  state_BTD: jax.Array
  """After the last norm; float32."""
  past: Past
  """Keys and values of these T tokens alone."""


def rotate(
  x_BTAH: jax.Array, position_BT: jax.Array, *, base: float,
  layout: Literal["interleaved", "halves"],
) -> jax.Array:
  """Turns pairs of numbers of each head by angles that grow with the position.

  Pair k of H/2 turns by position / base^(2k/H), so that the product of a turned query and a turned
  key depends on the difference of their positions alone.

  Args:
    x_BTAH: A heads of queries or keys.
    position_BT: int32.
    base: of the frequencies.
    layout: which two numbers are a pair, see `LlamaConfig.rope_layout`.

  Source: RoFormer, arXiv 2104.09864, eq. 15 (interleaved).
  """
  half = x_BTAH.shape[-1] // 2
  frequency_F = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1F = position_BT[:, :, None, None].astype(jnp.float32) * frequency_F[None, None, None]
  cos_BT1F, sin_BT1F = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
  x = x_BTAH.astype(jnp.float32)
  if layout == "halves":
    first, second = x[..., :half], x[..., half:]
  else:
    first, second = x[..., 0::2], x[..., 1::2]
  turned = (first * cos_BT1F - second * sin_BT1F, second * cos_BT1F + first * sin_BT1F)
  if layout == "halves":
    return jnp.concatenate(turned, axis=-1).astype(x_BTAH.dtype)
  return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x_BTAH.dtype)


class RmsNorm(nn.Module):
  """x / sqrt(mean x^2 + eps) times a learned scale, in float32."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class Linear(nn.Module):
  """y = x W, with a bias or an adapter where there is one; W is cast to the type of x."""

  features: int
  bias: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x_BTD):
    D, M = x_BTD.shape[-1], self.features
    kernel_DM = self.param("kernel", nn.initializers.normal(D**-0.5), (D, M))
    y_BTM = jnp.einsum("BTD,DM->BTM", x_BTD, kernel_DM.astype(x_BTD.dtype))
    if self.bias:
      y_BTM += self.param("bias", nn.initializers.zeros, (M,))[None, None].astype(x_BTD.dtype)
    if self.lora is None:
      return y_BTM
    rank, scale = self.lora.rank, self.lora.alpha / self.lora.rank

    def draw() -> jax.Array:
      return D**-0.5 * jax.random.normal(self.make_rng("params"), (D, rank))

    a_DR = self.variable("lora", "a", draw).value
    b_RM = self.variable("lora", "b", lambda: jnp.zeros((rank, M))).value
    low_BTR = jnp.einsum("BTD,DR->BTR", x_BTD, a_DR.astype(x_BTD.dtype))
    return y_BTM + scale * jnp.einsum("BTR,RM->BTM", low_BTR, b_RM.astype(x_BTD.dtype))


class Block(nn.Module):
  """Attention, then the gated network, each behind a norm and added to what came in."""

  config: LlamaConfig
  lora: LoraConfig | None

  def _linear(self, name: str, features: int, *, bias: bool = False) -> Linear:
    adapted = self.lora and (self.lora.targets == "all" or name in ("query", "value"))
    return Linear(features, bias, self.lora if adapted else None, name=name)

  @nn.compact
  def __call__(self, x_BTD, past, position_BT, allow_BTS):
    c = self.config
    y_BTD = RmsNorm(c.norm_eps, name="attention_norm")(x_BTD)
    mixed_BTD, own = self._attention(y_BTD, past, position_BT, allow_BTS)
    x_BTD = x_BTD + mixed_BTD
    y_BTD = RmsNorm(c.norm_eps, name="feed_forward_norm")(x_BTD)
    gate_BTM = self._linear("gate", c.hidden)(y_BTD)
    up_BTM = self._linear("up", c.hidden)(y_BTD)
    return x_BTD + self._linear("down", c.width)(jax.nn.silu(gate_BTM) * up_BTM), own

  def _attention(self, y_BTD, past, position_BT, allow_BTS):
    """Attention to the past and among the T tokens; their keys and values."""
    c, (B, T, _) = self.config, y_BTD.shape
    K, G, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_width

    def heads(name: str, number: int) -> jax.Array:
      return self._linear(name, number * H, bias=c.qkv_bias)(y_BTD).reshape(B, T, number, H)

    query, key, value = heads("query", K * G), heads("key", K), heads("value", K)
    if c.qk_norm:
      query, key = (RmsNorm(c.norm_eps, name=f"{name}_norm")(x)
                    for name, x in (("query", query), ("key", key)))
    query, key = (
      rotate(x, position_BT, base=c.rope_base, layout=c.rope_layout) for x in (query, key)
    )
    own = Past(key, value)
    if past is not None:
      key, value = (jnp.concatenate(x, axis=1) for x in zip(past, own, strict=True))
    # The query heads of one key head stand below each other as rows, so that no key is repeated.
    query_BKRH = query.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    allow_B1RS = jnp.tile(allow_BTS, (1, G, 1))[:, None]
    mixed_BKRH = attend(
      query_BKRH * H**-0.5, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), allow_B1RS
    )
    mixed = mixed_BKRH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * G * H)
    return self._linear("out", c.width)(mixed), own


class Llama(nn.Module):
  """Tokens -> states; `logits` tells the next token from a state.

  Attributes:
    config: sizes.
    lora: adapters, in a collection of their own, "lora"; None = none.
    compute_dtype: of activations; norms, softmax, states and log-probs stay float32.
    remat: blocks are computed again in the backward pass: less memory, a third more time.
  """

  config: LlamaConfig
  lora: LoraConfig | None = None
  compute_dtype: Any = jnp.float32
  remat: bool = False

  def setup(self):
    c = self.config
    init = nn.initializers.normal(0.02)
    self.embedding = self.param("embedding", init, (c.vocab_size, c.width))
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    self.layers = nn.scan(
      block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast), length=c.num_layers,
    )(c, self.lora)
    self.final_norm = RmsNorm(c.norm_eps)
    if not c.tied:
      self.head = self.param("head", init, (c.vocab_size, c.width))

  def __call__(
    self, token_BT: jax.Array, *, position_BT: jax.Array, allow_BTS: jax.Array,
    past: Past | None = None,
  ) -> Read:
    """Reads T tokens behind those of the past.

    Args:
      token_BT: int32.
      position_BT: int32, of these tokens.
      allow_BTS: bool, which tokens each may look at: those of the past, then these T.
      past: keys and values of earlier tokens; None = none.
    """
    x_BTD = self.embedding[token_BT].astype(self.compute_dtype)
    if past is not None:
      past = jax.tree.map(lambda x: x.astype(self.compute_dtype), past)
    x_BTD, own = self.layers(x_BTD, past, position_BT, allow_BTS)
    return Read(self.final_norm(x_BTD.astype(jnp.float32)), own)

  def logits(self, state_ND: jax.Array, token_V: jax.Array | None = None) -> jax.Array:
    """float32 [N, V] from states [N, D]; of some tokens alone where `token_V` names them."""
    table_VD = self.embedding if self.config.tied else self.head
    table_VD = table_VD if token_V is None else table_VD[token_V]
    state_ND = state_ND.astype(self.compute_dtype)
    return jnp.einsum("ND,VD->NV", state_ND, table_VD.astype(self.compute_dtype),
                      preferred_element_type=jnp.float32)

  def layer_states(
    self, token_BT: jax.Array, *, position_BT: jax.Array, allow_BTS: jax.Array
  ) -> jax.Array:
    """What leaves the last block, before the last norm, float32 [B, T, D]."""
    x_BTD = self.embedding[token_BT].astype(self.compute_dtype)
    return self.layers(x_BTD, None, position_BT, allow_BTS)[0].astype(jnp.float32)

  def both(self, token_BT: jax.Array, **how: jax.Array) -> jax.Array:
    """States and logits of all positions [B, T, V]: what makes parameters, and what tests read."""
    state_BTD = self(token_BT, **how).state_BTD
    B, T, D = state_BTD.shape
    return self.logits(state_BTD.reshape(B * T, D)).reshape(B, T, -1)


def causal(segment_BT: jax.Array) -> jax.Array:
  """allow_BTT of rows in which several sequences stand one after another.

  Args:
    segment_BT: int32, which sequence a token is of; -1 = padding, which looks at itself alone.
  """
  T = segment_BT.shape[1]
  same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
  real_BT1 = (segment_BT >= 0)[:, :, None]
  return (same_BTT & real_BT1 & jnp.tri(T, dtype=bool)[None]) | jnp.eye(T, dtype=bool)[None]


def lower_layers(config: LlamaConfig, params: Any, num_layers: int) -> tuple[LlamaConfig, Any]:
  """The first blocks of a decoder, as a decoder.

  Raises:
    ConfigError: it has fewer.
  """
  require(1 <= num_layers <= config.num_layers, "layer", num_layers,
          f"the model has {config.num_layers} layers")
  lower = params | {"layers": jax.tree.map(lambda x: x[:num_layers], params["layers"])}
  return dataclasses.replace(config, num_layers=num_layers), lower
