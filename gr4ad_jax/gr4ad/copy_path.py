"""The copy path: next codes copied from ads of the request's shortlist, or of the catalogue.

Beyond the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.data import neighbours, shortlist
from gr4ad_jax.gr4ad.batch import Context, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.item_scorer import ItemScorer, ItemShare, starting_alike, sums_over
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.search.generator import MayGet


class CopyScore(nn.Module):
  """How much each ad of the shortlist is copied from, whatever the decoder's state: its log weight.

      log (count + a organic + b share + near) + MLP(numbers, SID) + sum_l worth_l[s_l]

  The first term is the rule of `data.shortlist` on the numbers themselves: the user's own
  engagements at a half-life of 112 days, the organic ones weighing a, and the ad's current share of
  all engagements at 1.5 days, weighing b. The MLP sees every number and, as a sum of a row of each
  code, which ad it is: some are bought again sooner than others. It begins at zero, as what each
  code is worth does, so that the model starts at the rule's ranking and learns from there.

  Where the list has neighbours, near is the rule of `data.neighbours` on their numbers, its weights
  learned too. The MLP then knows no SID: counts of transitions tell which ads follow, and what it
  learned by heart of single ones would not hold for other users.
  """

  codebook_sizes: tuple[int, ...]  # of the codes that it knows; () = none

  HIDDEN = 32
  WIDTH, DROPOUT = 8, 0.5  # of the rows of codes
  STEP = 2.5  # Weights are parameters times this: AdamW moves each by about the learning rate.

  @nn.compact
  def __call__(
    self, number_BMF: jax.Array, code_BML: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """int32 numbers and codes, -1 = no ad -> float32 [B, M]; no ad gives any finite value."""
    log_BMF = jnp.maximum(number_BMF, 0).astype(jnp.float32) / shortlist.SCALE
    x_BMF = jnp.expm1(log_BMF[..., : len(shortlist.NUMBERS)]) / shortlist.UNIT_F[None, None]
    start = np.log((shortlist.ORGANIC_WEIGHT, shortlist.SHARE_WEIGHT)) / self.STEP
    weight_2 = jnp.exp(self.param("rule", lambda _: jnp.asarray(start, jnp.float32)) * self.STEP)
    rule_BM = (
      x_BMF[..., shortlist.COUNT] + weight_2[0] * x_BMF[..., shortlist.ORGANIC]
      + weight_2[1] * x_BMF[..., shortlist.SHARE]
    )
    mean_F, spread_F = shortlist.MEAN_F, shortlist.SPREAD_F
    if has_neighbours(number_BMF):
      mean_F, spread_F = (
        np.append(*x) for x in ((mean_F, neighbours.MEAN_K), (spread_F, neighbours.SPREAD_K))
      )
      start = np.log(neighbours.WEIGHTS) / self.STEP
      weight_5 = jnp.exp(self.param("near", lambda _: jnp.asarray(start, jnp.float32)) * self.STEP)
      rule_BM += near_rule(number_BMF, weight_5)
    score_BM = jnp.log(rule_BM + 1e-6)
    normal_BMF = (log_BMF - mean_F.astype(np.float32)[None, None])
    normal_BMF /= spread_F.astype(np.float32)[None, None]
    h = jnp.concatenate([normal_BMF, score_BM[..., None]], axis=-1)
    worth_BM = jnp.zeros_like(score_BM)  # of the codes themselves
    if self.codebook_sizes:
      rows_BME = jnp.zeros((*score_BM.shape, self.WIDTH))
      for level, size in enumerate(self.codebook_sizes):
        code_BM = jnp.maximum(code_BML[..., level], 0)
        table_VE = self.param(f"level_{level}", nn.initializers.normal(0.02), (size, self.WIDTH))
        rows_BME += self.STEP * table_VE[code_BM].astype(jnp.float32)
        worth_V = self.param(f"worth_{level}", nn.initializers.zeros, (size,))
        worth_BM += self.STEP * worth_V[code_BM].astype(jnp.float32)
      rows_BME = nn.Dropout(self.DROPOUT)(rows_BME, deterministic=deterministic)
      h = jnp.concatenate([h, rows_BME], axis=-1)
    init = nn.initializers.variance_scaling(self.STEP**-2, "fan_in", "truncated_normal")
    for layer in ("first", "second"):
      kernel = self.param(f"{layer}_kernel", init, (h.shape[-1], self.HIDDEN))
      bias = self.param(f"{layer}_bias", nn.initializers.zeros, (self.HIDDEN,))
      h = jax.nn.gelu(self.STEP * (h @ kernel.astype(jnp.float32) + bias[None, None]))
    last = self.param("last_kernel", nn.initializers.zeros, (self.HIDDEN, 1))
    return score_BM + worth_BM + self.STEP * (h @ last.astype(jnp.float32))[..., 0]


def has_neighbours(number_BMF: jax.Array) -> bool:
  """Whether a list's numbers are those of a list with neighbours."""
  return number_BMF.shape[-1] > len(shortlist.NUMBERS)


def near_rule(number_BMF: jax.Array, weight_5: jax.Array) -> jax.Array:
  """The rule of `data.neighbours` with any weights, float32 [B, M]."""
  log_BMK = jnp.maximum(number_BMF[..., len(shortlist.NUMBERS) :], 0) / shortlist.SCALE
  x_BMK = jnp.expm1(log_BMK) / neighbours.UNIT_K.astype(np.float32)[None, None]
  lead_BM, alike = x_BMK[..., neighbours.LEAD], neighbours.ALIKE
  known_BM = lead_BM / (lead_BM + neighbours.SHRINKAGE)
  rule_BM = x_BMK[..., :alike] @ weight_5[:alike]
  return rule_BM + (weight_5[alike] * x_BMK[..., alike] + neighbours.LEAST) * known_BM


class DenseItems(NamedTuple):
  """All ads that the model was made for, as something to copy from."""

  p_BA: jax.Array  # of the item scorer
  log_share_B: jax.Array  # log of their share of what is copied


class CopySource(NamedTuple):
  """The ads whose SIDs can be copied."""

  code_BML: jax.Array  # int32, -1 = no ad
  logp_BM: jax.Array  # float32, log of the share of each; NEG_INF = no ad
  items: DenseItems | None  # beside them; None where they are among them, or are not scored


class CopyState(NamedTuple):
  """What a beam remembers of copying; every leaf is [B, W, ...]."""

  match_BWM: jax.Array  # bool, ads that can be copied whose SID starts with the beam's codes
  logit_BW: jax.Array  # log odds of copying, before any code, less the generator's log p of them
  h_BWD: jax.Array  # the last decoder state, from which the generator chose the next code
  norm_BW: jax.Array  # of its softmax there


class TargetMass(NamedTuple):
  """Logs of shares of what is copied; about NEG_INF where there is none."""

  log_BCP: jax.Array  # of SIDs that start with the first 0 to L codes of each target
  item_BC: jax.Array | None  # of the target's SID by the item scorer, 0 if no ad of its has it


class CopyTerms(NamedTuple):
  """A distribution over the ads that match, and how likely copying is."""

  attention_BWM: jax.Array  # sums to 1 where any ad matches, else 0
  log_copy_BW: jax.Array  # log of the probability that the codes are copied
  log_rest_BW: jax.Array  # that they are generated


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

  With an item scorer a is a mixture, (1 - y) softmax(score) over the shortlist and y times the item
  scorer's softmax over all ads, with y from `ItemShare` or the settings; without any ad in the
  shortlist y = 1. Training has the sums over all ads. A search follows the shortlist and the most
  probable of all ads, as many as `copied_items`: its probabilities are those of SIDs given that no
  other is copied.
  """

  config: ModelConfig
  vocabulary: Vocabulary

  OPEN = 6.0  # the gate's first logit
  STEP = 8.0  # its bias is a parameter times this, and soon closes where it must

  def setup(self):
    self.score = CopyScore(() if self.config.neighbours else self.vocabulary.codebook_sizes)
    self.gate_kernel = self.param("gate_kernel", nn.initializers.zeros, (self.config.width,))
    self.gate_bias = self.param("gate_bias", nn.initializers.constant(self.OPEN / self.STEP), ())
    if self.config.item_scorer:
      self.items = ItemScorer(self.config, self.vocabulary)
      self.item_share = None if self.config.item_share else ItemShare()

  def source(self, context: Context, *, deterministic: bool = True) -> CopySource:
    """What can be copied; computed once per request."""
    real_BM = context.short_code_BML[..., 0] >= 0
    score_BM = self.score(
      context.short_number_BMF, context.short_code_BML, deterministic=deterministic
    )
    norm_B1 = jax.nn.logsumexp(
      jnp.where(real_BM, score_BM, NEG_INF), axis=-1, keepdims=True
    )
    logp_BM = score_BM - norm_B1
    items = None
    if self.config.item_scorer:
      if self.item_share:
        num_met_B = jnp.sum(context.ad_count_BT >= 0, axis=1)
        logit_B = self.item_share(score_BM, real_BM, num_met_B)
      else:
        y = self.config.item_share
        logit_B = jnp.full(score_BM.shape[:1], np.log(y / (1 - y)), jnp.float32)
      some_B = jnp.any(real_BM, axis=1)
      log_share_B = jnp.where(some_B, jax.nn.log_sigmoid(logit_B), 0.0)
      items = DenseItems(self.items(context, deterministic=deterministic), log_share_B)
      logp_BM += jax.nn.log_sigmoid(-logit_B)[:, None]
    return CopySource(context.short_code_BML, jnp.where(real_BM, logp_BM, NEG_INF), items)

  def for_search(self, source: CopySource, may_get: MayGet) -> CopySource:
    """The same, of the SIDs that requests may get, with the most probable of all ads beside.

    The shares are those given that one of these is copied: what cannot be found takes no beam.
    """
    code_BML, items = source.code_BML, source.items
    legal_BM = may_get(code_BML)
    logp_BM = jnp.where(legal_BM, source.logp_BM, NEG_INF)
    norm_B1 = jax.nn.logsumexp(logp_BM, axis=1, keepdims=True)
    if items is not None:
      code_AL = jnp.asarray(self.vocabulary.ads.code_AL)
      p_BA = jnp.where(may_get(code_AL[None]), items.p_BA, 0.0)
      p_BK, row_BK = jax.lax.top_k(p_BA, min(self.config.copied_items, len(code_AL)))
      code_BML = jnp.concatenate([code_BML, code_AL[row_BK]], axis=1)
      legal_BM = jnp.concatenate([legal_BM, p_BK > 0], axis=1)
      log_share_B1 = items.log_share_B[:, None]
      logp_BM = jnp.concatenate([logp_BM, safe_log(p_BK) + log_share_B1], axis=1)
      of_items_B1 = log_share_B1 + safe_log(jnp.sum(p_BA, axis=1, keepdims=True))
      norm_B1 = jnp.logaddexp(norm_B1, of_items_B1)
    return CopySource(
      jnp.where(legal_BM[..., None], code_BML, -1),
      jnp.where(legal_BM, logp_BM - norm_B1, NEG_INF),
      None,
    )

  def target_mass(self, source: CopySource, target_BCL: jax.Array) -> TargetMass:
    """How much of what is copied starts as the targets do."""
    code_B1ML = source.code_BML[:, None]
    match_BCM = jnp.broadcast_to(
      code_B1ML[..., 0] >= 0, (*target_BCL.shape[:2], code_B1ML.shape[2])
    )
    match = [match_BCM]
    for level in range(target_BCL.shape[-1]):
      match.append(match[-1] & (code_B1ML[..., level] == target_BCL[:, :, None, level]))
    match_BCPM = jnp.stack(match, axis=2)
    logp_B11M = source.logp_BM[:, None, None]
    log_BCP = jax.nn.logsumexp(jnp.where(match_BCPM, logp_B11M, NEG_INF), axis=-1)
    if source.items is None:
      return TargetMass(log_BCP, None)
    rows = starting_alike(self.vocabulary.ads, target_BCL)
    item_BCL = safe_log(sums_over(source.items.p_BA, rows))
    item_BCP = jnp.pad(item_BCL, ((0, 0), (0, 0), (1, 0)))
    log_BCP = jnp.logaddexp(log_BCP, source.items.log_share_B[:, None, None] + item_BCP)
    known_BC = rows.end[..., -1] > rows.start[..., -1]
    return TargetMass(log_BCP, jnp.where(known_BC, item_BCL[..., -1], 0.0))

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

  def __call__(self, source: CopySource, match_BWM: jax.Array, logit_BW: jax.Array) -> CopyTerms:
    """How much each ad is copied.

    Args:
      source: ads and their shares.
      match_BWM: bool, ads whose SID starts with the decoded prefix.
      logit_BW: log odds of copying, before any code, less the generator's log p of the prefix.
    """
    logp_BWM = jnp.where(match_BWM, source.logp_BM[:, None], NEG_INF)
    some_BW = jnp.any(match_BWM, axis=-1)
    share_BW = jax.nn.logsumexp(logp_BWM, axis=-1)
    logit_BW = jnp.where(some_BW, logit_BW + share_BW, NEG_INF)
    attention_BWM = jnp.where(some_BW[..., None], jax.nn.softmax(logp_BWM, axis=-1), 0.0)
    return CopyTerms(
      attention_BWM, jax.nn.log_sigmoid(logit_BW), jax.nn.log_sigmoid(-logit_BW)
    )


def safe_log(probability: jax.Array) -> jax.Array:
  """log, with NEG_INF and a zero gradient at 0."""
  positive = probability > 0
  return jnp.where(positive, jnp.log(jnp.where(positive, probability, 1.0)), NEG_INF)
