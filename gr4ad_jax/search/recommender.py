"""Requests -> ranked ads: the compiled search, batched, with SIDs expanded to their ads."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gr4ad_jax.catalog.ad_index import AdIndex, expand
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.catalog.subsets import pack_subsets
from gr4ad_jax.data.pipeline import repeat_last
from gr4ad_jax.gr4ad.batch import Context
from gr4ad_jax.gr4ad.build import Decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.precision import with_precision
from gr4ad_jax.machine import sharding
from gr4ad_jax.search.artifact import HISTORY, score_beams
from gr4ad_jax.search.beam_search import NEG_INF, Beams, Sampling, compile_search
from gr4ad_jax.search.config import SearchConfig


class Recommendations(NamedTuple):
  """Ranked ads of R requests, best first; -1 (NEG_INF, NaN) where there are fewer."""

  ad_RK: np.ndarray  # int32 ad index
  code_RKL: np.ndarray  # int32, the SID generated for the ad
  logp_RK: np.ndarray  # float32, log p(SID | X)
  expected_value_RK: np.ndarray  # float32, currency (or eCPM); NaN where it was not asked for
  level_logp_RKL: np.ndarray  # float32, log p(s_l | s_<l, X) of the ad's SID


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
    member_TA: np.ndarray | None = None,
    mesh: Mesh | None = None,
  ):
    """Prepares the search.

    Args:
      decoder: with its vocabulary.
      params: its parameters.
      index: SIDs and their ads; ads of one SID come in the index's order.
      config: widths, batch size, precision, and gamma of the value re-ranking.
      bin_means: mean value of each bucket.
      with_value: compute expected values even where gamma is 0 (one more decoding step).
      member_TA: bool, which ads belong to each of T subsets that requests may name (targeting).
      mesh: devices of this host that share the parameters and the requests of a call; None = the
        default device alone.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    self._mesh = mesh
    if mesh is not None and config.batch_size % sharding.row_parts(mesh):
      raise ValueError(
        f"search.batch_size={config.batch_size}: must be a multiple of the "
        f"{sharding.row_parts(mesh)} devices along the batch"
      )
    tree = build_prefix_tree(index.sids_SL)
    self._member_TA, self._word_TU = member_TA, None
    if member_TA is not None:
      self._word_TU = self._everywhere(_pack_by_sid(member_TA, index, tree.capacity))
    self._index, self._config = index, config
    self._plain_decoder = decoder
    decoder, params = with_precision(decoder, params, config.precision)
    self._params = self._lay_out(params)
    self._prefixes = self._everywhere(tree.arrays)
    self._bin_means = None
    if with_value or config.value_exponent:
      self._bin_means = self._everywhere(np.asarray(bin_means, np.float32))

    @functools.cache
    def compiled(widths: tuple[int, ...]):
      search = compile_search(start_fn(decoder), step_fn(decoder), tree, widths)
      return search if mesh is None else sharding.MeshProgram(mesh, search)

    self._compile = compiled

  def with_params(self, params: Any) -> Recommender:
    """The same with other parameters; nothing is compiled again."""
    other = copy.copy(self)
    other._params = self._lay_out(
      with_precision(self._plain_decoder, params, self._config.precision)[1]
    )
    return other

  def _lay_out(self, params: Any) -> Any:
    if self._mesh is None:
      return jax.device_put(params)
    return jax.device_put(params, sharding.state_sharding(self._mesh, params))

  def _everywhere(self, arrays: Any) -> Any:
    return jax.device_put(arrays, None if self._mesh is None else sharding.replicated(self._mesh))

  def __call__(
    self, context: Context, k: int, *, subset_RN: np.ndarray | None = None
  ) -> Recommendations:
    """The k best ads of each request; any number of rows up to the batch size.

    Args:
      context: of R requests.
      k: ads wanted.
      subset_RN: int32, an ad has to be in all of these subsets, -1 = none; None = any ad.
    """
    beams = self.search(context, subset_RN=subset_RN)
    return self.rank(beams, context, k, config=self._config, subset_RN=subset_RN)

  def search(
    self,
    context: Context,
    *,
    subset_RN: np.ndarray | None = None,
    sampling: Sampling | None = None,
    widths: tuple[int, ...] | None = None,
  ) -> Beams:
    """The most probable SIDs of each request, best first; with `sampling`, drawn ones.

    Args:
      context: of R requests.
      subset_RN: as `__call__`.
      sampling: draws instead.
      widths: beams after each level of this call, None = those of the config. Every schedule is
        compiled when it is first used, and kept.

    Raises:
      ValueError: more requests than the batch size, or subsets where there are none.
    """
    num_rows, size = len(context.feature_BF), self._config.batch_size
    if num_rows > size:
      raise ValueError(f"{num_rows} requests in one call; search.batch_size={size} is the limit")
    padded = Context(**{
      name: repeat_last(np.asarray(x), size) for name, x in context.present().items()
    })
    if self._mesh is not None:
      padded = jax.device_put(padded, sharding.batch_sharding(self._mesh))
    subsets = None, None
    if subset_RN is not None:
      if self._word_TU is None:
        raise ValueError("subset_RN: this recommender was made without member_TA")
      subsets = self._word_TU, repeat_last(np.asarray(subset_RN, np.int32), size)
    search = self._compile(widths or self._config.widths)
    beams = search(
      self._params, padded, self._prefixes, self._bin_means, *subsets, sampling
    )
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], beams)

  def rank(
    self,
    beams: Beams,
    context: Context,
    k: int,
    *,
    config: SearchConfig,
    subset_RN: np.ndarray | None = None,
  ) -> Recommendations:
    """The k best ads among found SIDs.

    Ranked by log p(SID | X) + gamma log(expected value) (reference section 3), and a bonus for SIDs
    that are new to the user.

    Args:
      beams: from `search`.
      context: of the same requests.
      k: ads wanted.
      config: gamma and bonus (other fields are not read).
      subset_RN: as for the search; of the ads on an SID only those in all subsets are returned.
    """
    keep = None
    if subset_RN is not None:
      def keep(ad_RK: np.ndarray) -> np.ndarray:
        inside_RK = np.ones(ad_RK.shape, bool)
        for subset_R in np.asarray(subset_RN).T:
          inside_RK &= self._member_TA[subset_R[:, None], ad_RK] | (subset_R[:, None] < 0)
        return inside_RK
    return rank_ads(self._index, beams, context, k, config=config, keep=keep)


def rank_ads(
  index: AdIndex,
  beams: Beams,
  context: Context,
  k: int,
  *,
  config: SearchConfig,
  keep: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Recommendations:
  """The k best ads among found SIDs; see `Recommender.rank`.

  Args:
    index: of the search.
    beams: numpy arrays of R requests.
    context: of the same requests.
    k: ads wanted.
    config: gamma and bonus.
    keep: ad indices [R, K] -> bool [R, K], which of them the requests may get; None = all.
  """
  value_RW = np.full_like(beams.logp_BW, np.nan)
  if beams.expected_value_BW is not None:
    value_RW = beams.expected_value_BW
  score_RW = score_beams(
    beams._asdict(), np.concatenate([getattr(context, name) for name in HISTORY], axis=1),
    value_exponent=config.value_exponent, new_ad_bonus=config.new_ad_bonus,
  )
  order_RW = np.argsort(-score_RW, axis=1, kind="stable")

  def in_order(x: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, order_RW.reshape(order_RW.shape + (1,) * (x.ndim - 2)), axis=1)

  sid_RW = in_order(beams.sid_BW)
  ad_RK = expand(index, sid_RW, k) if keep is None else _expand_kept(index, sid_RW, k, keep)
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
  )


def _pack_by_sid(member_TA: np.ndarray, index: AdIndex, capacity: int) -> np.ndarray:
  """Bitmaps over SIDs: an SID belongs to a subset where one of its ads does."""
  num_ads = len(index.sid_of_ad_A)
  if member_TA.ndim != 2 or member_TA.shape[1] != num_ads or member_TA.dtype != bool:
    raise ValueError(
      f"member_TA: shape {member_TA.shape} of {member_TA.dtype}, needs [T, {num_ads}] bool"
    )
  member_TS = np.zeros((len(member_TA), len(index.sids_SL)), bool)
  for member_S, member_A in zip(member_TS, member_TA, strict=True):
    sid_A = index.sid_of_ad_A[member_A]
    member_S[sid_A[sid_A >= 0]] = True  # retired ads hold none
  return pack_subsets(member_TS, capacity)


def _expand_kept(
  index: AdIndex, sid_RW: np.ndarray, k: int, keep: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
  """As `expand`, of the ads that their request may get."""
  count_RW = np.where(sid_RW >= 0, np.diff(index.ads_start)[sid_RW], 0)
  every_RK = expand(index, sid_RW, max(1, int(count_RW.sum(axis=1).max())))
  keep_RK = (every_RK >= 0) & keep(every_RK)
  first_RK = np.argsort(~keep_RK, axis=1, kind="stable")[:, :k]
  ads_RK = np.where(
    np.take_along_axis(keep_RK, first_RK, 1), np.take_along_axis(every_RK, first_RK, 1), -1
  )
  return np.pad(ads_RK, ((0, 0), (0, k - ads_RK.shape[1])), constant_values=-1)


def concatenate(parts: Sequence[Recommendations]) -> Recommendations:
  """Recommendations of consecutive requests as one record."""
  return Recommendations(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
