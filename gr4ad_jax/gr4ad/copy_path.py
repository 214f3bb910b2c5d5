"""The copy path: next codes copied from the ads of the request's shortlist (beyond the paper)."""

from __future__ import annotations

from typing import NamedTuple

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
    init = nn.initializers.variance_scaling(self.STEP**-2, "fan_in", "truncated_normal")
    for layer in ("first", "second"):
      kernel = self.param(f"{layer}_kernel", init, (h.shape[-1], self.HIDDEN))
      bias = self.param(f"{layer}_bias", nn.initializers.zeros, (self.HIDDEN,))
      h = jax.nn.gelu(self.STEP * (h @ kernel.astype(jnp.float32) + bias[None, None]))
    last = self.param("last_kernel", nn.initializers.zeros, (self.HIDDEN, 1))
    return score_BM + self.STEP * (h @ last.astype(jnp.float32))[..., 0]


class CopySource(NamedTuple):
  """The ads whose SIDs can be copied."""

  code_BML: jax.Array  # int32, -1 = no ad
  score_BM: jax.Array  # float32, log weight of each


class CopyState(NamedTuple):
  """What a beam remembers of copying; every leaf is [B, W, ...]."""

  match_BWM: jax.Array  # bool, ads of the shortlist whose SID starts with the beam's codes
  logit_BW: jax.Array  # log odds of copying, before any code, less the generator's log p of them
  h_BWD: jax.Array  # the last decoder state, from which the generator chose the next code
  norm_BW: jax.Array  # of its softmax there


class CopyTerms(NamedTuple):
  """A distribution over the shortlist and how likely copying is; `...` is [C], or [C, L]."""

  attention: jax.Array  # [B, ..., M], sums to 1 where any ad matches, else 0
  log_copy: jax.Array  # [B, ...], log of the probability that the codes are copied
  log_rest: jax.Array  # [B, ...], that they are generated


class CopyPath(nn.Module):
  """A pointer into the request's shortlist beside the generator; a whole SID is of one of them.

      p(SID | X) = (1 - g) prod_t softmax(W_t h_t)[s_t] + g sum_i a_i 1[SID(i) = SID]

  over the ads i of the shortlist, with a = softmax(score) (`CopyScore`) and a gate
  g = sigmoid(w h_1 + b) of the state before any code. Written code by code, as beam search goes,
  the next code is copied with the probability that the codes so far were,

      g_t = g A_t / (g A_t + (1 - g) G_t)

  where A_t sums a_i over the ads whose SID starts with them, and G_t is what the generator gives
  them. So the order of the shortlist by score is kept, but for what the generator adds. The gate
  starts open: the model first ranks as the rule does. Beyond the paper: See et al. 2017 mix word by
  word; a gate a level spoilt the order of the shortlist (docs/results.md).
  """

  config: ModelConfig

  OPEN = 6.0  # the gate's first logit
  STEP = 8.0  # its bias is a parameter times this, and soon closes where it must

  def setup(self):
    self.score = CopyScore()
    self.gate_kernel = self.param("gate_kernel", nn.initializers.zeros, (self.config.width,))
    self.gate_bias = self.param("gate_bias", nn.initializers.constant(self.OPEN / self.STEP), ())

  def source(self, context: Context) -> CopySource:
    """What can be copied; computed once per request."""
    return CopySource(context.short_code_BML, self.score(context.short_number_BMF))

  def begin(self, source: CopySource) -> CopyState:
    """The state of a beam without codes."""
    match_B1M = source.code_BML[:, None, :, 0] >= 0
    nothing_B1 = jnp.zeros(match_B1M.shape[:2])
    dtype = jnp.dtype(self.config.compute_dtype)
    h_B1D = jnp.zeros((*nothing_B1.shape, self.config.width), dtype)
    return CopyState(match_B1M, nothing_B1, h_B1D, nothing_B1)

  def logit(self, h: jax.Array) -> jax.Array:
    """Log odds of copying, [B, ...], of the states [B, ..., D] before any code."""
    h = h.astype(jnp.float32)
    return h @ self.gate_kernel.astype(jnp.float32) + self.gate_bias * self.STEP

  def __call__(self, source: CopySource, match: jax.Array, logit: jax.Array) -> CopyTerms:
    """How much each ad is copied.

    Args:
      source: ads and their weights.
      match: bool [B, ..., M], ads whose SID starts with the decoded prefix.
      logit: [B, ...], log odds of copying, before any code, less the generator's log p of the
        prefix.
    """
    score = jnp.expand_dims(source.score_BM, tuple(range(1, match.ndim - 1)))
    score = jnp.where(match, score, NEG_INF)
    some, real_BM = jnp.any(match, axis=-1), source.code_BML[..., 0] >= 0
    all_B = jax.nn.logsumexp(jnp.where(real_BM, source.score_BM, NEG_INF), axis=-1)
    share = jax.nn.logsumexp(score, axis=-1) - jnp.expand_dims(all_B, tuple(range(1, some.ndim)))
    logit = jnp.where(some, logit + share, NEG_INF)
    attention = jnp.where(some[..., None], jax.nn.softmax(score, axis=-1), 0.0)
    return CopyTerms(attention, jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit))
