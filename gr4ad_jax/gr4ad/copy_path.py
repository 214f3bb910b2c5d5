"""The copy path: next codes copied from the ads of the request's shortlist (beyond the paper)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.data import shortlist
from gr4ad_jax.gr4ad.batch import Context
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.nn import NEG_INF


class CopyScore(nn.Module):
  """How much each ad of the shortlist is copied from, whatever the decoder's state: its log weight.

      log (count + a organic + b share) + MLP(numbers)

  The first term is the rule of `data.shortlist` on the numbers themselves: the user's own
  engagements at a half-life of 112 days, the organic ones weighing a, and the ad's current share of
  all engagements at 1.5 days, weighing b. The MLP sees every number and begins at zero, so that the
  model starts at the rule's ranking and learns from there.
  """

  HIDDEN = 32
  STEP = 2.5  # Weights are parameters times this: AdamW moves each by about the learning rate.

  @nn.compact
  def __call__(self, number_BMF: jax.Array) -> jax.Array:
    """int32 numbers, -1 = no ad -> float32 [B, M]; no ad gives any finite value."""
    log_BMF = jnp.maximum(number_BMF, 0).astype(jnp.float32) / shortlist.SCALE
    x_BMF = jnp.expm1(log_BMF) / shortlist.UNIT_F[None, None]
    start = np.log((shortlist.ORGANIC_WEIGHT, shortlist.SHARE_WEIGHT)) / self.STEP
    weight_2 = jnp.exp(self.param("rule", lambda _: jnp.asarray(start, jnp.float32)) * self.STEP)
    rule_BM = (
      x_BMF[..., shortlist.COUNT] + weight_2[0] * x_BMF[..., shortlist.ORGANIC]
      + weight_2[1] * x_BMF[..., shortlist.SHARE]
    )
    score_BM = jnp.log(rule_BM + 1e-6)
    mean_F, spread_F = (x.astype(np.float32) for x in (shortlist.MEAN_F, shortlist.SPREAD_F))
    normal_BMF = (log_BMF - mean_F[None, None]) / spread_F[None, None]
    h = jnp.concatenate([normal_BMF, score_BM[..., None]], axis=-1)
    start = nn.initializers.variance_scaling(self.STEP**-2, "fan_in", "truncated_normal")
    for layer in ("first", "second"):
      kernel = self.param(f"{layer}_kernel", start, (h.shape[-1], self.HIDDEN))
      bias = self.param(f"{layer}_bias", nn.initializers.zeros, (self.HIDDEN,))
      h = jax.nn.gelu(self.STEP * (h @ kernel.astype(jnp.float32) + bias[None, None]))
    last = self.param("last_kernel", nn.initializers.zeros, (self.HIDDEN, 1))
    return score_BM + self.STEP * (h @ last.astype(jnp.float32))[..., 0]


def first_match(source: CopySource | None) -> jax.Array | None:
  """Ads of the shortlist that a beam without codes may copy, bool [B, 1, M]."""
  return None if source is None else source.code_BML[:, None, :, 0] >= 0


def follow_codes(shared: Any, state: Any, code_BW: jax.Array, level: int | jax.Array) -> Any:
  """Narrows the ads that a beam may copy to those with `code_BW` at `level`."""
  if shared.copy_source is None:
    return state
  code_BM = jax.lax.dynamic_index_in_dim(
    shared.copy_source.code_BML, level, axis=2, keepdims=False
  )
  same_BWM = code_BM[:, None, :] == code_BW[..., None]
  return state._replace(match_BWM=state.match_BWM & same_BWM)


class CopySource(NamedTuple):
  """The ads whose codes can be copied."""

  code_BML: jax.Array  # int32, -1 = no ad
  score_BM: jax.Array  # float32, log weight of each


class CopyTerms(NamedTuple):
  """A distribution over the shortlist and the gate between copying and generating.

  `...` stands for [C] in search and [C, L] in teacher forcing.
  """

  attention: jax.Array  # [B, ..., M], sums to 1 where any ad matches, else 0
  log_gate: jax.Array  # [B, ...], log of the copy probability; NEG_INF where no ad matches
  log_rest: jax.Array  # [B, ...], log of the generator's share


class CopyPath(nn.Module):
  """A pointer into the request's shortlist, followed code by code, beside the generator.

      p(s_t | s_<t, X) = (1 - g) softmax(W_t h_t) + g sum_i a_i 1[s_t(i) = s_t]

  over the ads i of the shortlist whose SID starts with s_<t, with a = softmax(score_i) over them
  (`CopyScore`) and a gate g = sigmoid(w_t h_t + b_t) that closes where there are none. Along a
  whole SID the a_i multiply to the share of its ads in the whole shortlist: what is copied is
  ranked by score. The gate starts open, so that the model first ranks as the rule does.
  Beyond the paper: a pointer mixture as in See et al. 2017.
  """

  config: ModelConfig
  num_levels: int

  OPEN = 6.0  # the gate's first logit
  STEP = 8.0  # its bias is a parameter times this, and soon closes where it must

  def setup(self):
    self.score = CopyScore()

    self.gate_kernel = self.param(
      "gate_kernel", nn.initializers.zeros, (self.num_levels, self.config.width)
    )
    self.gate_bias = self.param(
      "gate_bias", nn.initializers.constant(self.OPEN / self.STEP), (self.num_levels,)
    )

  def source(self, context: Context) -> CopySource:
    """What can be copied; computed once per request."""
    return CopySource(context.short_code_BML, self.score(context.short_number_BMF))

  def __call__(
    self, h: jax.Array, source: CopySource, match: jax.Array, level: int | None = None
  ) -> CopyTerms:
    """How much each ad is copied.

    Args:
      h: [B, ..., D] last decoder states.
      source: ads and their weights.
      match: bool [B, ..., M], ads whose SID starts with the decoded prefix.
      level: of all states; None = the last axis before D counts levels.
    """
    score = jnp.expand_dims(source.score_BM, tuple(range(1, match.ndim - 1)))
    some = jnp.any(match, axis=-1)
    attention = jax.nn.softmax(jnp.where(match, score, NEG_INF), axis=-1)
    chosen = slice(None) if level is None else level
    kernel, bias = self.gate_kernel[chosen], self.gate_bias[chosen] * self.STEP
    kernel = jnp.expand_dims(kernel, tuple(range(h.ndim - kernel.ndim)))
    bias = jnp.expand_dims(bias, tuple(range(h.ndim - 1 - bias.ndim)))
    logit = jnp.sum(h.astype(jnp.float32) * kernel, axis=-1) + bias
    return CopyTerms(
      jnp.where(some[..., None], attention, 0.0),
      jnp.where(some, jax.nn.log_sigmoid(logit), NEG_INF),
      jnp.where(some, jax.nn.log_sigmoid(-logit), 0.0),
    )
