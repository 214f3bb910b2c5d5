"""Requests -> ranked ads: the compiled search, batched, with SIDs expanded to their ads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax.config import SearchConfig
from gr4ad_jax.data.batch import Context
from gr4ad_jax.model.build import Decoder, start_fn, step_fn
from gr4ad_jax.search.beam_search import NEG_INF, Beams, compile_search
from gr4ad_jax.search.legal_prefixes import build_prefix_tree
from gr4ad_jax.tokenizer.ad_index import AdIndex, expand


class Recommendations(NamedTuple):
  """Ranked ads of R requests, best first; -1 (NEG_INF, NaN) where there are fewer."""

  ad_RK: np.ndarray  # int32 ad index
  code_RKL: np.ndarray  # int32, the SID generated for the ad
  logp_RK: np.ndarray  # float32, log p(SID | X)
  expected_value_RK: np.ndarray  # float32, currency (or eCPM); NaN where it was not asked for


class Recommender:
  """A decoder, its parameters and the ads that can be recommended, compiled for one batch size."""

  def __init__(
    self,
    decoder: Decoder,
    params: Any,
    *,
    index: AdIndex,
    config: SearchConfig,
    bin_means: Sequence[float],
    with_value: bool = False,
  ):
    """Prepares the search.

    Args:
      decoder: with its vocabulary.
      params: its parameters.
      index: SIDs and their ads; ads of one SID come in the index's order.
      config: widths, batch size, and gamma of the value re-ranking.
      bin_means: mean value of each bucket.
      with_value: compute expected values even where gamma is 0 (one more decoding step).
    """
    tree = build_prefix_tree(index.sids_SL)
    self._index, self._config = index, config
    self._params = jax.device_put(params)
    self._prefixes = jax.device_put(tree.arrays)
    self._bin_means = None
    if with_value or config.value_exponent:
      self._bin_means = jax.device_put(np.asarray(bin_means, np.float32))
    self._search = compile_search(start_fn(decoder), step_fn(decoder), tree, config.widths)

  def __call__(self, context: Context, k: int) -> Recommendations:
    """The k best ads of each request; any number of rows up to the batch size."""
    return self.rank(self.search(context), context, k, config=self._config)

  def search(self, context: Context) -> Beams:
    """The most probable SIDs of each request, best first."""
    num_rows, size = len(context.feature_BF), self._config.batch_size
    if num_rows > size:
      raise ValueError(f"{num_rows} requests in one call; search.batch_size={size} is the limit")
    padded = Context(*(_repeat_last(np.asarray(x), size) for x in context))
    beams = self._search(self._params, padded, self._prefixes, self._bin_means)
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], beams)

  def rank(
    self, beams: Beams, context: Context, k: int, *, config: SearchConfig
  ) -> Recommendations:
    """The k best ads among found SIDs.

    Ranked by log p(SID | X) + gamma log(expected value) (reference section 3), and a bonus for SIDs
    that are new to the user.

    Args:
      beams: from `search`.
      context: of the same requests.
      k: ads wanted.
      config: gamma and bonus (other fields are not read).
    """
    value_RW = np.full_like(beams.logp_BW, np.nan)
    if beams.expected_value_BW is not None:
      value_RW = beams.expected_value_BW
    score_RW = beams.logp_BW
    if config.value_exponent:
      score_RW = score_RW + config.value_exponent * np.log(np.maximum(value_RW, 1e-6))
    if config.new_ad_bonus:
      score_RW = score_RW + config.new_ad_bonus * ~_in_history(beams.code_BWL, context)
    score_RW = np.where(beams.sid_BW >= 0, score_RW, NEG_INF)
    order_RW = np.argsort(-score_RW, axis=1, kind="stable")

    def in_order(x: np.ndarray) -> np.ndarray:
      return np.take_along_axis(x, order_RW.reshape(order_RW.shape + (1,) * (x.ndim - 2)), axis=1)

    sid_RW = in_order(beams.sid_BW)
    ad_RK = expand(self._index, sid_RW, k)
    # The beam that each ad came from: the one that holds its SID.
    same_RKW = self._index.sid_of_ad_A[ad_RK][..., None] == sid_RW[:, None, :]
    beam_RK = np.argmax(same_RKW, axis=-1)
    empty_RK = ad_RK < 0
    code_RKL = np.take_along_axis(in_order(beams.code_BWL), beam_RK[..., None], axis=1)
    return Recommendations(
      ad_RK,
      np.where(empty_RK[..., None], -1, code_RKL),
      np.where(empty_RK, NEG_INF, np.take_along_axis(in_order(beams.logp_BW), beam_RK, axis=1)),
      np.where(empty_RK, np.nan, np.take_along_axis(in_order(value_RW), beam_RK, axis=1)),
    )


def _in_history(code_RWL: np.ndarray, context: Context) -> np.ndarray:
  """bool [R, W]: the SID is one of an ad or content in the request's history."""
  met_RTL = np.concatenate([context.ad_code_BTL, context.organic_code_BOL], axis=1)
  sizes = 1 + np.maximum(code_RWL.max(axis=(0, 1)), met_RTL.max(axis=(0, 1))).astype(np.int64)
  weight_L = np.append(np.cumprod(sizes[:0:-1])[::-1], 1)
  flat_RW, flat_RT = code_RWL @ weight_L, met_RTL @ weight_L
  return (flat_RW[:, :, None] == flat_RT[:, None, :]).any(axis=-1)


def _repeat_last(x: np.ndarray, rows: int) -> np.ndarray:
  """Fills a batch up to `rows` by repeating its last row."""
  return x if len(x) == rows else np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])


def concatenate(parts: Sequence[Recommendations]) -> Recommendations:
  """Recommendations of consecutive requests as one record."""
  return Recommendations(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
