"""Every ad of the catalogue, scored against an encoding of the ordered history (beyond the paper).

Dimension key beyond docs/architecture.md: `A` the ads that the model was made for (`KnownAds`), `H`
the ads of a history that the encoder reads, `D` the width of the item scorer.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gr4ad.batch import Context, KnownAds, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.machine.sharding import ROWS, TENSOR, constrain
from gr4ad_jax.nn.history_encoder import HistoryEncoder


class ItemScorer(nn.Module):
  """p(ad | history) = softmax over all ads of <h, e_ad>.

  The vector of an ad is a row of its own and, for what its SID says, a row of each code; an ad that
  the model was not made for has the second part alone, and is read in histories but not scored.
  h is the newest place of a `HistoryEncoder` over the latest ads of the history.
  """

  config: ModelConfig
  vocabulary: Vocabulary

  def setup(self):
    ads, width = self.vocabulary.ads, self.config.item_width
    if ads is None:
      raise ValueError("vocabulary.ads=None: an item scorer needs the ads that it scores")
    init = nn.initializers.normal(0.02)
    self.row_AD = self.param("ad", init, (len(ads), width))
    self.code_VD = [
      self.param(f"level_{level}", init, (size, width))
      for level, size in enumerate(self.vocabulary.codebook_sizes)
    ]
    self.nobody_D = self.param("nobody", init, (width,))  # h without a history
    self.encoder = HistoryEncoder(self.config.history)

  def __call__(self, context: Context, *, deterministic: bool = True) -> jax.Array:
    """float32 [B, A], probabilities; dropout where not deterministic."""
    dtype = jnp.dtype(self.config.compute_dtype)
    ads = self.vocabulary.ads
    # Newest last, as the encoder has them.
    length = min(self.config.history_length, context.ad_id_BT.shape[1])
    hash_BH, code_BHL = (
      x[:, :length][:, ::-1] for x in (context.ad_id_BT, context.ad_code_BTL)
    )
    by_hash_A = np.argsort(ads.hash_A, kind="stable")
    place_BH = jnp.searchsorted(ads.hash_A[by_hash_A], hash_BH)
    row_BH = jnp.asarray(by_hash_A)[jnp.minimum(place_BH, len(ads) - 1)]
    known_BH1 = (jnp.asarray(ads.hash_A)[row_BH] == hash_BH)[..., None]
    item_BHD = jnp.where(known_BH1, self.row_AD[row_BH], 0) + self._content(code_BHL)
    real_BH = hash_BH >= 0
    h_BD = self.encoder(
      constrain(item_BHD, ROWS).astype(dtype), real_BH, deterministic=deterministic
    )
    nobody_1D = self.nobody_D.astype(dtype)[None]
    h_BD = jnp.where(jnp.any(real_BH, axis=1)[:, None], h_BD, nobody_1D)
    item_AD = (self.row_AD + self._content(ads.code_AL)).astype(dtype)
    logit_BA = jnp.einsum("BD,AD->BA", h_BD, item_AD, preferred_element_type=jnp.float32)
    return jax.nn.softmax(constrain(logit_BA, ROWS, TENSOR), axis=-1)

  def _content(self, code_L: jax.Array | np.ndarray) -> jax.Array:
    """What SIDs say: int32 [..., L], -1 = padding (zeros) -> [..., D]."""
    def rows(level: int) -> jax.Array:
      code = code_L[..., level]
      return jnp.where((code >= 0)[..., None], self.code_VD[level][jnp.maximum(code, 0)], 0)

    return sum(rows(level) for level in range(len(self.code_VD)))


class RowRange(NamedTuple):
  """Consecutive ads of `KnownAds`; int32, as many ranges as their shape has places."""

  start: jax.Array
  end: jax.Array  # behind the last


def starting_alike(ads: KnownAds, target_BCL: jax.Array) -> RowRange:
  """The ads whose SIDs start with the first 1 to L codes of each target, [B, C, L]."""
  parent_A, parent_BC = np.zeros(len(ads), np.int64), jnp.zeros(target_BCL.shape[:2], jnp.int32)
  found_BC, starts, ends = jnp.ones(target_BCL.shape[:2], bool), [], []
  for level in range(target_BCL.shape[-1]):
    size = int(ads.code_AL[:, level].max()) + 1
    # One number for each prefix, rising with its first ad.
    key_N, start_N, parent_A = np.unique(
      parent_A * size + ads.code_AL[:, level], return_index=True, return_inverse=True
    )
    if key_N[-1] >= 2**31:
      raise ValueError(f"{len(ads)} ads with {size} codes at level {level + 1}: too many to score")
    code_BC = target_BCL[..., level]
    key_BC = parent_BC * size + code_BC
    key_N = jnp.asarray(key_N, jnp.int32)
    place_BC = jnp.minimum(jnp.searchsorted(key_N, key_BC), len(key_N) - 1)
    found_BC &= (key_N[place_BC] == key_BC) & (code_BC >= 0) & (code_BC < size)
    starts.append(jnp.where(found_BC, jnp.asarray(start_N, jnp.int32)[place_BC], 0))
    end_N = jnp.asarray(np.append(start_N[1:], len(ads)), jnp.int32)
    ends.append(jnp.where(found_BC, end_N[place_BC], 0))
    parent_BC = place_BC
  return RowRange(jnp.stack(starts, axis=-1), jnp.stack(ends, axis=-1))


def sums_over(p_BA: jax.Array, rows: RowRange, block: int = 128) -> jax.Array:
  """Sums of numbers over ranges of their last axis: [B, A] and ranges [B, ...] -> [B, ...].

  Of whole blocks and of what the first and the last block of a range hold of it, so that one pass
  over the numbers serves any number of ranges. A difference of running sums would lose small ones.
  """
  num_rows, shape = p_BA.shape[0], rows.start.shape
  p_BNX = jnp.pad(p_BA, ((0, 0), (0, -p_BA.shape[1] % block + block)))
  p_BNX = p_BNX.reshape(num_rows, -1, block)
  start_BR, end_BR = (x.reshape(num_rows, -1) for x in rows)
  first_BR, last_BR = start_BR // block, end_BR // block
  number_11N = jnp.arange(p_BNX.shape[1])[None, None]
  whole_BRN = (number_11N > first_BR[..., None]) & (number_11N < last_BR[..., None])
  sum_BR = jnp.sum(jnp.where(whole_BRN, p_BNX.sum(axis=-1)[:, None], 0.0), axis=-1)
  for block_BR, counts_BR in (first_BR, True), (last_BR, last_BR > first_BR):
    row_BRX = block_BR[..., None] * block + jnp.arange(block)[None, None]
    inside_BRX = (row_BRX >= start_BR[..., None]) & (row_BRX < end_BR[..., None])
    p_BRX = jnp.take_along_axis(p_BNX, block_BR[..., None], axis=1)
    edge_BR = jnp.sum(jnp.where(inside_BRX, p_BRX, 0.0), axis=-1)
    sum_BR += jnp.where(counts_BR, edge_BR, 0.0)
  return sum_BR.reshape(shape)


class ItemShare(nn.Module):
  """Log odds that what is copied is of all ads, and not of the shortlist.

  They read how much the shortlist's ads are worth, by rank and together, and how long the history
  is, and begin almost closed: the model starts at the order of the shortlist.
  """

  OPEN = -6.0  # the first log odds
  STEP = 8.0  # weights are parameters times this: AdamW moves each by about the learning rate
  RANKS = (1, 4, 12, 32)
  LEAST = float(np.log(1e-6))  # of the score of an ad, and where there is none

  @nn.compact
  def __call__(self, score_BM: jax.Array, real_BM: jax.Array, num_met_B: jax.Array) -> jax.Array:
    """float32 [B].

    Args:
      score_BM: log weights of the shortlist's ads.
      real_BM: bool, False = no ad.
      num_met_B: ads of the history.
    """
    # What the shortlist is worth decides over the share, and not the other way round.
    score_BM = jax.lax.stop_gradient(jnp.where(real_BM, score_BM, self.LEAST))
    room = max(self.RANKS[-1] - score_BM.shape[1], 0)
    padded_BM = jnp.pad(score_BM, ((0, 0), (0, room)), constant_values=self.LEAST)
    best_BK, _ = jax.lax.top_k(padded_BM, self.RANKS[-1])
    met_B = jnp.log1p(num_met_B.astype(jnp.float32))
    feature_BN = jnp.stack(
      [*(best_BK[:, rank - 1] for rank in self.RANKS), jax.nn.logsumexp(score_BM, axis=-1), met_B],
      axis=-1,
    ) / 4  # about one
    kernel_N = self.param("kernel", nn.initializers.zeros, (feature_BN.shape[-1],))
    bias = self.param("bias", nn.initializers.constant(self.OPEN / self.STEP), ())
    return self.STEP * (feature_BN @ kernel_N.astype(jnp.float32) + bias.astype(jnp.float32))
