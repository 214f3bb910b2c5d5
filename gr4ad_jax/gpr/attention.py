"""Attention of the sequence decoder: who sees whom, how far apart, and three ways to mix.

Dimension key of the room's modules: `G` groups, `Y` = 4 token types (U, O, E, I) of each, `S` =
G x Y tokens in the order of the stream, `D` width, `H` heads, `K` width of a head, `M` inner width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.machine.sharding import ROWS, TENSOR, constrain
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.layers import Linear, Norm

USER, ORGANIC, REQUEST, AD = range(4)
NUM_TYPES = 4
NUM_DISTANCES = 32
NUM_GAPS = 32


def allow(there_BGY: jax.Array, age_BGY: jax.Array) -> jax.Array:
  """Who sees whom: bool [B, S, S], row i may look at column j.

  Causal, and both ways between U, O and E of one request. What the paper prints, both ways between
  all U, O and E of the stream, would show each request its own ad from the second layer on: O of
  the next request has seen it. A token of an earlier request is also to be older, in seconds, than
  the one that looks: an ad that was clicked after a later request had begun is none of its past.

  Args:
    there_BGY: bool, False = padding.
    age_BGY: int32, seconds to the row's last request.

  Source: GPR 2.2, eq. 2, as corrected above.
  """
  known_S = np.arange(there_BGY[0].size) % NUM_TYPES != AD  # before an ad is chosen
  return _seen(there_BGY, age_BGY, known_S[:, None] & known_S[None])


def allow_causal(there_BGY: jax.Array, age_BGY: jax.Array) -> jax.Array:
  """As `allow`, without anything that stands later in the stream."""
  return _seen(there_BGY, age_BGY, False)


def allow_encoder(there_BGY: jax.Array, age_BGY: jax.Array) -> jax.Array:
  """All that E of the row's last request may see sees each other, and nothing else is seen.

  So that neither the last request's ads nor what came after it began stands anywhere in what an
  encoder says of it. Other arguments as of `allow`.
  """
  past_BS = allow_causal(there_BGY, age_BGY)[:, REQUEST - NUM_TYPES]
  return past_BS[:, None, :] & past_BS[:, :, None]


def _seen(there_BGY: jax.Array, age_BGY: jax.Array, both_ways_SS: np.ndarray | bool) -> jax.Array:
  """Causal, and both ways between some tokens of one request; bool [B, S, S]."""
  num_rows, num_groups, _ = there_BGY.shape
  place_S = np.arange(num_groups * NUM_TYPES)
  group_S = place_S // NUM_TYPES
  same_SS = group_S[:, None] == group_S[None]
  own_SS = same_SS & ((place_S[:, None] >= place_S[None]) | both_ways_SS)
  before_SS = group_S[:, None] > group_S[None]
  age_BS = age_BGY.reshape(num_rows, -1)
  older_BSS = age_BS[:, None, :] > age_BS[:, :, None]
  seen_BSS = own_SS[None] | (before_SS[None] & older_BSS)
  there_BS = there_BGY.reshape(num_rows, -1)
  return seen_BSS & there_BS[:, None, :] & there_BS[:, :, None]


def distance_bucket(num_tokens: int) -> np.ndarray:
  """int32 [S, S] in 0..31: half octaves of 1 + the tokens between, whatever their order."""
  place_S = np.arange(num_tokens)
  distance_SS = np.abs(place_S[:, None] - place_S[None])
  # The logarithm of a power of two may come out a hair too small.
  bucket_SS = np.floor(2 * np.log2(1 + distance_SS) + 1e-6)
  return np.minimum(bucket_SS, NUM_DISTANCES - 1).astype(np.int32)


def gap_bucket(age_BS: jax.Array) -> jax.Array:
  """int32 [B, S, S] in 0..31: octaves of 1 + the seconds by which column j is older than row i."""
  gap_BSS = jnp.maximum(age_BS[:, None, :] - age_BS[:, :, None], 0)
  most = np.iinfo(np.int32).max - 1
  return NUM_GAPS - 1 - jax.lax.clz(1 + jnp.minimum(gap_BSS, most))  # place of the highest bit


class DistanceBias(nn.Module):
  """What distance in tokens and in time adds to the scores of each head, float32 [B, H, S, S].

  One pair of tables for all layers, beginning at zero.
  """

  num_heads: int

  @nn.compact
  def __call__(self, age_BGY: jax.Array) -> jax.Array:
    distance_NH, gap_NH = (
      self.param(name, nn.initializers.zeros, (size, self.num_heads))
      for name, size in (("distance", NUM_DISTANCES), ("gap", NUM_GAPS))
    )
    age_BS = age_BGY.reshape(age_BGY.shape[0], -1)
    by_distance_SSH = distance_NH[distance_bucket(age_BS.shape[1])]
    return (gap_NH[gap_bucket(age_BS)] + by_distance_SSH[None]).transpose(0, 3, 1, 2)


class HybridAttention(nn.Module):
  """W_o [ Softmax(Q K^T / sqrt(K) + bias + M) V * U ], U through SiLU. Source: GPR eq. 1."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, bias_BHSS: jax.Array, allowed_BSS: jax.Array) -> jax.Array:
    """Gated attention of every token; the gate is its own.

    Args:
      x_BSD: normalised states.
      bias_BHSS: float32, from `DistanceBias`.
      allowed_BSS: from `allow`. A row that may look at nothing gets the mean of all values.
    """
    parts = _parts(self.config, 4)
    qkvu = Linear(parts, name="qkvu")(x_BSD)
    query_BSHK, key_BSHK, value_BSHK, gate_BSHK = (qkvu[..., part, :, :] for part in range(4))
    weight_BHSS = _softmax(query_BSHK * parts[2] ** -0.5, key_BSHK, bias_BHSS, allowed_BSS)
    mixed_BSHK = jnp.einsum("BHST,BTHK->BSHK", weight_BHSS, value_BSHK)
    gated_BSHK = mixed_BSHK * jax.nn.silu(gate_BSHK)
    return Linear(self.config.width, name="out")(gated_BSHK.reshape(x_BSD.shape))


class EncoderAttention(nn.Module):
  """W_o [ Softmax(Q K^T / sqrt(K) + bias + M) V ], as everywhere. Source: OneRec's encoder."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, bias_BHSS: jax.Array, allowed_BSS: jax.Array) -> jax.Array:
    """Arguments as of `HybridAttention`, with `allowed_BSS` from `allow_encoder`."""
    parts = _parts(self.config, 3)
    qkv = Linear(parts, name="qkv")(x_BSD)
    query_BSHK, key_BSHK, value_BSHK = (qkv[..., part, :, :] for part in range(3))
    weight_BHSS = _softmax(query_BSHK * parts[2] ** -0.5, key_BSHK, bias_BHSS, allowed_BSS)
    mixed_BSHK = jnp.einsum("BHST,BTHK->BSHK", weight_BHSS, value_BSHK)
    return Linear(self.config.width, name="out")(mixed_BSHK.reshape(x_BSD.shape))


class HstuAttention(nn.Module):
  """W_o ( LN( SiLU(Q K^T + bias) V / n ) * U ), all of Q, K, V, U through SiLU.

  n is the number of tokens that a token may look at, so that it says nothing of later ones.

  Source: Zhai et al. 2024 (HSTU), arXiv 2402.17152, eq. 1 to 3.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, bias_BHSS: jax.Array, allowed_BSS: jax.Array) -> jax.Array:
    """Arguments as of `HybridAttention`, with `allowed_BSS` from `allow_causal`."""
    qkvu = jax.nn.silu(Linear(_parts(self.config, 4), name="qkvu")(x_BSD))
    query_BSHK, key_BSHK, value_BSHK, gate_BSHK = (qkvu[..., part, :, :] for part in range(4))
    score_BHSS = _score(query_BSHK, key_BSHK) + bias_BHSS
    count_BS = jnp.maximum(jnp.sum(allowed_BSS, axis=-1), 1)
    weight_BHSS = jnp.where(allowed_BSS[:, None], jax.nn.silu(score_BHSS), 0)
    weight_BHSS /= count_BS[:, None, :, None].astype(jnp.float32)
    weight_BHSS = constrain(weight_BHSS, ROWS, TENSOR, None, None).astype(x_BSD.dtype)
    mixed_BSHK = jnp.einsum("BHST,BTHK->BSHK", weight_BHSS, value_BSHK)
    normal_BSD = Norm("layer", name="norm")(mixed_BSHK.reshape(x_BSD.shape))
    return Linear(self.config.width, name="out")(normal_BSD * gate_BSHK.reshape(x_BSD.shape))


def _parts(config: ModelConfig, number: int) -> tuple[int, int, int]:
  """So many projections, heads, width of a head."""
  return number, config.num_heads, config.width // config.num_heads


def _score(query_BSHK: jax.Array, key_BSHK: jax.Array) -> jax.Array:
  return jnp.einsum("BSHK,BTHK->BHST", query_BSHK, key_BSHK, preferred_element_type=jnp.float32)


def _softmax(
  query_BSHK: jax.Array, key_BSHK: jax.Array, bias_BHSS: jax.Array, allowed_BSS: jax.Array
) -> jax.Array:
  score_BHSS = _score(query_BSHK, key_BSHK)
  score_BHSS = jnp.where(allowed_BSS[:, None], score_BHSS + bias_BHSS, NEG_INF)
  score_BHSS = constrain(score_BHSS, ROWS, TENSOR, None, None)
  return jax.nn.softmax(score_BHSS, axis=-1).astype(query_BSHK.dtype)
