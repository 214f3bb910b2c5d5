"""The copy path: next codes copied from ads and contents of the context (beyond the paper)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gr4ad.batch import Context, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.layers import Linear


class CopyBias(nn.Module):
  """How much each context token is copied from before the decoder's state has a say.

  A sum of one learned number per bucket, so that copying can weigh ads by frequency x recency x
  current share, as simple rules do; it starts at such a rule: proportional to the count, halved
  every HALF_LIFE_DAYS, and a trending ad with a share of EQUAL_SHARE like one met once just now.
  """

  vocabulary: Vocabulary
  num_features: int

  HALF_LIFE_DAYS = 112.0
  EQUAL_SHARE = 0.01
  # Parameters are the biases divided by this: AdamW moves each by about the learning rate a step.
  STEP = 8.0

  @nn.compact
  def __call__(self, context: Context) -> jax.Array:
    vocabulary = self.vocabulary

    def bias(name: str, start: np.ndarray, index: jax.Array) -> jax.Array:
      table_V = self.param(name, lambda _: jnp.asarray(start / self.STEP, jnp.float32)) * self.STEP
      return jnp.where(index >= 0, table_V[jnp.maximum(index, 0)], 0.0)

    counts = np.log(2) / 2 * np.arange(vocabulary.num_count_buckets)
    hours = 2 ** (np.arange(vocabulary.num_age_buckets) / 2) - 1
    ages = -np.log(2) * np.minimum(hours / 24, 730) / self.HALF_LIFE_DAYS
    shares = np.log(2) * (np.arange(vocabulary.num_trend_buckets) / 2 - 16)
    shares -= np.log(self.EQUAL_SHARE)
    none = np.zeros(vocabulary.num_trend_buckets)
    groups = [
      jnp.zeros((context.feature_BF.shape[0], self.num_features)),
      bias("ad_count", counts, context.ad_count_BT)
      + bias("ad_age", ages, context.ad_age_BT)
      + bias("ad_trend", none, context.ad_trend_BT),
      bias("organic_count", counts, context.organic_count_BO)
      + bias("organic_age", ages, context.organic_age_BO)
      + bias("organic_trend", none, context.organic_trend_BO),
      bias("trend_share", shares, context.trend_share_BN),
    ]
    return jnp.concatenate(groups, axis=1)


def first_match(source: CopySource | None) -> jax.Array | None:
  """Context tokens that a beam without codes may copy from, bool [B, 1, S]."""
  return None if source is None else source.code_BSL[:, None, :, 0] >= 0


def follow_codes(shared: Any, state: Any, code_BW: jax.Array, level: int | jax.Array) -> Any:
  """Narrows the context tokens that a beam may copy from to those with `code_BW` at `level`."""
  if shared.copy_source is None:
    return state
  code_BS = jax.lax.dynamic_index_in_dim(
    shared.copy_source.code_BSL, level, axis=2, keepdims=False
  )
  same_BWS = code_BS[:, None, :] == code_BW[..., None]
  return state._replace(match_BWS=state.match_BWS & same_BWS)


class CopySource(NamedTuple):
  """Context tokens whose codes can be copied."""

  key_BSD: jax.Array
  code_BSL: jax.Array  # int32, -1 = the token has no SID
  bias_BS: jax.Array  # float32, how much is copied from a token whatever the decoder's state


class CopyTerms(NamedTuple):
  """A distribution over context tokens and the gate between copying and generating.

  `...` stands for [C] in search and [C, L] in teacher forcing.
  """

  attention: jax.Array  # [B, ..., S], sums to 1 where any token matches, else 0
  log_gate: jax.Array  # [B, ...], log of the copy probability; NEG_INF where no token matches
  log_rest: jax.Array  # [B, ...], log of the generator's share


class CopyPath(nn.Module):
  """Attention from the decoder's last state over context tokens that share the decoded prefix.

      p(s_t | s_<t, X) = (1 - g) softmax(W_t h_t) + g sum_i a_i 1[s_t(i) = s_t]

  over the tokens i whose SID starts with s_<t, with a = softmax(q(h_t) k(x_i) + bias_i) over them
  and a gate g = sigmoid(w_t h_t + b_t) that closes where there are none. The query starts at zero,
  so that at first ads are copied by frequency, recency and current share (`context.CopyBias`).
  Beyond the paper: a pointer mixture as in See et al. 2017.
  """

  config: ModelConfig
  num_levels: int

  def setup(self):
    self.query = Linear(self.config.width, scale=0.0)
    self.key = Linear(self.config.width)
    self.gate = self.param(
      "gate", nn.initializers.zeros, (self.num_levels, self.config.width + 1)
    )

  def keys(self, context_BSD: jax.Array) -> jax.Array:
    """Keys of the context tokens, computed once per request."""
    return self.key(context_BSD)

  def __call__(
    self, h: jax.Array, source: CopySource, match: jax.Array, gate: jax.Array
  ) -> CopyTerms:
    """How much each context token is copied from.

    Args:
      h: [B, ..., D] last decoder states.
      source: keys and biases of the context tokens.
      match: bool [B, ..., S], tokens whose SID starts with the decoded prefix.
      gate: float32 [..., D + 1], gate weights and bias (a row of `self.gate`, or all rows).
    """
    score = jnp.einsum(
      "B...D,BSD->B...S", self.query(h) * self.config.width**-0.5, source.key_BSD,
      preferred_element_type=jnp.float32,
    )
    score += jnp.expand_dims(source.bias_BS, tuple(range(1, score.ndim - 1)))
    some = jnp.any(match, axis=-1)
    attention = jax.nn.softmax(jnp.where(match, score, NEG_INF), axis=-1)
    gate = jnp.expand_dims(gate, tuple(range(h.ndim - gate.ndim)))
    logit = jnp.sum(h.astype(jnp.float32) * gate[..., :-1], axis=-1) + gate[..., -1]
    return CopyTerms(
      jnp.where(some[..., None], attention, 0.0),
      jnp.where(some, jax.nn.log_sigmoid(logit), NEG_INF),
      jnp.where(some, jax.nn.log_sigmoid(-logit), 0.0),
    )
