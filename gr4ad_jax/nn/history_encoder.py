"""An ordered history as one vector: causal self-attention, with a low-pass filter beside it.

Source: SASRec (Kang and McAuley, arXiv 1808.09781); the filter of BSARec (Shin et al., AAAI 2024,
arXiv 2312.10325).

Dimension key: `T` places of a history, the newest last; `Q` the newest of them, that a call gives.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.machine.sharding import ROWS, constrain
from gr4ad_jax.nn.attention import attend
from gr4ad_jax.nn.config import HistoryConfig
from gr4ad_jax.nn.layers import Linear, Norm


class HistoryEncoder(nn.Module):
  """Blocks over the items of a history, whose places count back from the newest one.

  Causal also with the filter: a place gets what it would get as the newest one. Norms stand after
  each part, as in the sources.
  """

  config: HistoryConfig

  def setup(self):
    config = self.config
    self.place_TD = self.param(
      "places", nn.initializers.normal(0.02), (config.max_length, config.width)
    )
    self.norm = Norm("layer")
    self.drop = nn.Dropout(config.dropout)
    self.blocks = [HistoryBlock(config) for _ in range(config.num_blocks)]

  def __call__(
    self, item_BTD: jax.Array, mask_BT: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """What the whole history says, [B, D]: the state of the newest place.

    Args:
      item_BTD: vectors of the items, the newest in the last place; T <= max_length.
      mask_BT: bool, False = padding, which stands before the oldest item. A history without items
        gives zeros.
      deterministic: False applies dropout (needs the "dropout" rng).

    Raises:
      ValueError: T is larger than max_length.
    """
    return self._encode(item_BTD, mask_BT, 1, deterministic)[:, 0]

  def places(
    self, item_BTD: jax.Array, mask_BT: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """What the history up to each place says, [B, T, D]; zeros at padding. See `__call__`."""
    return self._encode(item_BTD, mask_BT, item_BTD.shape[1], deterministic)

  def _encode(self, item_BTD, mask_BT, num_places: int, deterministic: bool) -> jax.Array:
    length = item_BTD.shape[1]
    if length > self.config.max_length:
      raise ValueError(f"item_BTD has {length} places; max_length={self.config.max_length}")
    place_TD = self.place_TD[self.config.max_length - length :].astype(item_BTD.dtype)
    h_BTD = self.drop(self.norm(item_BTD + place_TD[None]), deterministic)
    for block in self.blocks[:-1]:
      h_BTD = block(h_BTD, mask_BT, length, deterministic)
    h_BQD = self.blocks[-1](h_BTD, mask_BT, num_places, deterministic)
    return jnp.where(mask_BT[:, length - num_places :, None], h_BQD, 0)


class HistoryBlock(nn.Module):
  """A mix of attention and filter, then a feed-forward part; each with a residual and a norm."""

  config: HistoryConfig

  @nn.compact
  def __call__(
    self, h_BTD: jax.Array, mask_BT: jax.Array, num_places: int, deterministic: bool
  ) -> jax.Array:
    """States of all places -> those of the `num_places` newest, [B, Q, D]."""
    config, drop = self.config, nn.Dropout(self.config.dropout)
    h_BTD = jnp.where(mask_BT[..., None], h_BTD, 0)
    h_BQD = h_BTD[:, h_BTD.shape[1] - num_places :]
    mixed_BQD = _Attention(config, name="self_attention")(h_BTD, h_BQD, mask_BT)
    mixed_BQD = Norm("layer", name="attention_norm")(h_BQD + drop(mixed_BQD, deterministic))
    if config.filter_share:
      beta_D = self.param("beta", nn.initializers.normal(0.02), (config.width,))
      low_BQD = _low_pass(config, h_BTD, num_places)
      high_BQD = (beta_D**2).astype(h_BTD.dtype)[None, None] * (h_BQD - low_BQD)
      filtered_BQD = drop(low_BQD + high_BQD, deterministic)
      filtered_BQD = Norm("layer", name="filter_norm")(h_BQD + filtered_BQD)
      mixed_BQD = config.filter_share * filtered_BQD + (1 - config.filter_share) * mixed_BQD
    hidden = jax.nn.gelu(Linear(4 * config.width, name="feed_forward_in")(mixed_BQD))
    out_BQD = drop(Linear(config.width, name="feed_forward_out")(hidden), deterministic)
    return constrain(Norm("layer", name="feed_forward_norm")(mixed_BQD + out_BQD), ROWS)


class _Attention(nn.Module):
  """The newest places attend to themselves and to what stands before them."""

  config: HistoryConfig

  @nn.compact
  def __call__(self, h_BTD: jax.Array, h_BQD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    heads = (self.config.num_heads, self.config.width // self.config.num_heads)
    query_BQHK = Linear(heads, name="query")(h_BQD) * heads[1] ** -0.5
    key_BTHK, value_BTHK = (Linear(heads, name=name)(h_BTD) for name in ("key", "value"))
    length, places = h_BTD.shape[1], h_BQD.shape[1]
    causal_QT = np.tril(np.ones((length, length), bool))[length - places :]
    mixed_BHQK = attend(
      query_BQHK.transpose(0, 2, 1, 3), key_BTHK.transpose(0, 2, 3, 1),
      value_BTHK.transpose(0, 2, 1, 3), causal_QT[None, None] & mask_BT[:, None, None, :],
    )
    mixed_BQD = mixed_BHQK.transpose(0, 2, 1, 3).reshape(h_BQD.shape)
    return Linear(self.config.width, name="out")(mixed_BQD)


def _low_pass(config: HistoryConfig, h_BTD: jax.Array, num_places: int) -> jax.Array:
  """The low frequencies of the history up to each of the newest places, [B, Q, D].

  As in a period of max_length places that ends there and has zeros before the history: what a
  Fourier transform, cut after `num_low` frequencies and turned back, gives its last place.
  """
  lag_T = np.arange(config.max_length)
  angle_NT = 2 * np.pi * np.arange(1, config.num_low)[:, None] * lag_T / config.max_length
  weight_T = (1 + 2 * np.cos(angle_NT).sum(axis=0)) / config.max_length
  length = h_BTD.shape[1]
  lag_QT = np.arange(length)[:, None][length - num_places :] - np.arange(length)
  weight_QT = np.where(lag_QT >= 0, weight_T[np.maximum(lag_QT, 0)], 0)
  return jnp.einsum("QT,BTD->BQD", jnp.asarray(weight_QT, h_BTD.dtype), h_BTD)
