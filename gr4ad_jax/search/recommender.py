"""Requests -> ranked ads: the compiled search, batched, with SIDs expanded to their ads."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from gr4ad_jax.catalog.ad_index import AdIndex, expand
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.catalog.targeting import Allowed, allow
from gr4ad_jax.machine import sharding
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.search.artifact import score_beams, without_ads
from gr4ad_jax.search.beam_search import Beams, Sampling
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.generator import Generator, num_requests
from gr4ad_jax.search.searcher import Searcher


class Recommendations(NamedTuple):
  """Ranked ads of R requests, best first; -1 (NEG_INF, NaN, False) where there are fewer."""

  ad_RK: np.ndarray  # int32 ad index
  code_RKL: np.ndarray  # int32, the SID generated for the ad
  logp_RK: np.ndarray  # float32, log p(SID | X)
  expected_value_RK: np.ndarray  # float32, currency; NaN where it was not asked for
  level_logp_RKL: np.ndarray  # float32, log p(s_l | s_<l, X) of the ad's SID
  score_RK: np.ndarray  # float32, what ads are ranked by
  new_RK: np.ndarray  # bool, the SID is not in the history that the model reads


class Recommender:
  """A model, its parameters and the ads that can be recommended, compiled for one batch size."""

  def __init__(
    self,
    generator: Generator,
    params: Any,
    *,
    index: AdIndex,
    config: SearchConfig,
    bin_means: Sequence[float],
    with_value: bool = False,
    mesh: Mesh | None = None,
  ):
    """Prepares the search.

    Args:
      generator: the model.
      params: its parameters.
      index: SIDs and their ads; ads of one SID come in the index's order.
      config: widths, batch size, precision, and gamma of the value re-ranking.
      bin_means: mean value of each bucket, currency.
      with_value: compute expected values even where gamma is 0 (one more decoding step).
      mesh: devices of this host that share the parameters and the requests of a call; None = the
        default device alone.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    if mesh is not None and config.batch_size % sharding.row_parts(mesh):
      raise ValueError(
        f"search.batch_size={config.batch_size}: must be a multiple of the "
        f"{sharding.row_parts(mesh)} devices along the batch"
      )
    self._index, self._config = index, config
    self._searcher = Searcher(
      generator, build_prefix_tree(index.sids_SL), precision=config.precision, mesh=mesh,
      bin_means=bin_means if with_value or config.value_exponent else None,
    )
    self._prefixes = self._searcher.everywhere(self._searcher.tree.arrays)
    self._params = self._searcher.lay_out(params)

  def with_params(self, params: Any) -> Recommender:
    """The same with other parameters; nothing is compiled again."""
    other = copy.copy(self)
    other._params = self._searcher.lay_out(params)
    return other

  def allow(self, keep_A: np.ndarray) -> Allowed:
    """Some of the ads, bool [A], as `allowed` of a request."""
    return allow(self._index, keep_A, self._searcher.tree.capacity)

  @functools.cached_property
  def _every_ad(self) -> Allowed:
    return self.allow(self._index.sid_of_ad_A >= 0)

  def without(self, ad_N: np.ndarray, allowed: Allowed | None = None) -> Allowed:
    """All ads but some, or those of `allowed` but some, as `allowed` of a request."""
    return without(self._index, allowed or self._every_ad, ad_N)

  def __call__(
    self, context: Any, k: int, *, allowed: Sequence[Allowed] | None = None
  ) -> Recommendations:
    """The k best ads of each request of a context; arguments as `search`."""
    beams = self.search(context, allowed=allowed)
    return self.rank(beams, context, k, config=self._config, allowed=allowed)

  def search(
    self,
    context: Any,
    *,
    allowed: Sequence[Allowed] | None = None,
    sampling: Sampling | None = None,
    widths: tuple[int, ...] | None = None,
  ) -> Beams:
    """The most probable SIDs of each request, best first; with `sampling`, drawn ones.

    Args:
      context: of R requests.
      allowed: what each request may get, from `allow`; None = any ad.
      sampling: draws instead.
      widths: beams after each level of this call, None = those of the config. Every schedule is
        compiled when it is first used, and kept.

    Raises:
      ValueError: more requests than the batch size.
    """
    num_rows, size = num_requests(context), self._config.batch_size
    if num_rows > size:
      raise ValueError(f"{num_rows} requests in one call; search.batch_size={size} is the limit")
    return self._searcher(
      self._params, self._prefixes, context, size=size, widths=widths or self._config.widths,
      allowed=allowed, sampling=sampling,
    )

  def rank(
    self,
    beams: Beams,
    context: Any,
    k: int,
    *,
    config: SearchConfig,
    allowed: Sequence[Allowed] | None = None,
  ) -> Recommendations:
    """The k best ads among SIDs that `search` found for the same requests; see `rank_ads`."""
    met_RTL = self._searcher.generator.met_codes(context)
    return rank_ads(self._index, beams, met_RTL, k, config=config, allowed=allowed)


def rank_ads(
  index: AdIndex,
  beams: Beams,
  met_RTL: np.ndarray,
  k: int,
  *,
  config: SearchConfig,
  allowed: Sequence[Allowed] | None = None,
) -> Recommendations:
  """The k best ads among found SIDs.

  They are ranked by log p(SID | X) + gamma log(expected value) (paper 3.3).

  Args:
    index: of the search.
    beams: numpy arrays of R requests.
    met_RTL: int32 SIDs of the requests' histories, from `Generator.met_codes`.
    k: ads wanted.
    config: gamma.
    allowed: what each request may get; None = all ads.
  """
  value_RW = np.full_like(beams.logp_BW, np.nan)
  if beams.expected_value_BW is not None:
    value_RW = beams.expected_value_BW
  score_RW = score_beams(beams._asdict(), value_exponent=config.value_exponent)
  order_RW = np.argsort(-score_RW, axis=1, kind="stable")

  def in_order(x: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, order_RW.reshape(order_RW.shape + (1,) * (x.ndim - 2)), axis=1)

  sid_RW = in_order(beams.sid_BW)
  if allowed is None:
    ad_RK = expand(index, sid_RW, k)
  else:
    ad_RK = _expand_allowed(index, sid_RW, k, allowed)
  # The beam that each ad came from: the one that holds its SID.
  same_RKW = index.sid_of_ad_A[ad_RK][..., None] == sid_RW[:, None, :]
  beam_RK = np.argmax(same_RKW, axis=-1)
  empty_RK = ad_RK < 0

  def of_beam(x: np.ndarray) -> np.ndarray:
    return np.take_along_axis(in_order(x), beam_RK.reshape(beam_RK.shape + (1,) * (x.ndim - 2)), 1)

  return Recommendations(
    ad_RK,
    np.where(empty_RK[..., None], -1, of_beam(beams.code_BWL)),
    np.where(empty_RK, NEG_INF, of_beam(beams.logp_BW)),
    np.where(empty_RK, np.nan, of_beam(value_RW)),
    np.where(empty_RK[..., None], NEG_INF, of_beam(beams.level_logp_BWL)),
    np.where(empty_RK, NEG_INF, of_beam(score_RW)).astype(np.float32),
    ~empty_RK & of_beam(~_in_history(beams.code_BWL, met_RTL)),
  )


def without(index: AdIndex, allowed: Allowed, ad_N: np.ndarray) -> Allowed:
  """What a request may get, less some ads; an SID is lost with the last of its ads.

  Costs a copy of the record, and no look at the ads that stay.
  """
  return Allowed(*without_ads(
    *allowed, ad_N, sid_of_ad_A=index.sid_of_ad_A, ads_start=index.ads_start, ads_A=index.ads_A
  ))


def _in_history(code_RWL: np.ndarray, met_RTL: np.ndarray) -> np.ndarray:
  """bool [R, W]: the SID is one of the request's history."""
  sizes = 1 + np.maximum(code_RWL.max(axis=(0, 1)), met_RTL.max(axis=(0, 1))).astype(np.int64)
  weight_L = np.append(np.cumprod(sizes[:0:-1])[::-1], 1)
  flat_RW, flat_RT = code_RWL @ weight_L, met_RTL @ weight_L
  return (flat_RW[:, :, None] == flat_RT[:, None, :]).any(axis=-1)


def _expand_allowed(
  index: AdIndex, sid_RW: np.ndarray, k: int, allowed: Sequence[Allowed]
) -> np.ndarray:
  """Expands as `expand` does, keeping the ads that their request may get."""
  count_RW = np.where(sid_RW >= 0, np.diff(index.ads_start)[sid_RW], 0)
  every_RK = expand(index, sid_RW, max(1, int(count_RW.sum(axis=1).max())))
  keep_RK = np.stack([row.keep_A[ad_K] for row, ad_K in zip(allowed, every_RK, strict=True)])
  keep_RK &= every_RK >= 0
  first_RK = np.argsort(~keep_RK, axis=1, kind="stable")[:, :k]
  ads_RK = np.where(
    np.take_along_axis(keep_RK, first_RK, 1), np.take_along_axis(every_RK, first_RK, 1), -1
  )
  return np.pad(ads_RK, ((0, 0), (0, k - ads_RK.shape[1])), constant_values=-1)


def concatenate(parts: Sequence[Recommendations]) -> Recommendations:
  """Recommendations of consecutive requests as one record."""
  return Recommendations(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
