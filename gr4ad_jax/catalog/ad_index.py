"""Index between semantic IDs and ads: an SID may hold several ads, an ad has one SID."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class AdIndex:
  """Which ads hold which semantic ID.

  Attributes:
    sids_SL: [S, L] int32, the distinct SIDs in lexicographic order; a row number names an SID.
    ads_start: [S + 1] int64; the ads of SID s are ads_A[ads_start[s] : ads_start[s + 1]].
    ads_A: [A] int32, ad indices grouped by SID, inside one SID by descending priority, then index;
      shorter where ads are retired.
    sid_of_ad_A: [A] int32, row number of each ad's SID; -1 = a retired ad, which holds none.
  """

  sids_SL: np.ndarray
  ads_start: np.ndarray
  ads_A: np.ndarray
  sid_of_ad_A: np.ndarray


def build_ad_index(codes_AL: np.ndarray, priority_A: np.ndarray) -> AdIndex:
  """Groups ads by SID.

  Args:
    codes_AL: [A, L] int, row = ad index.
    priority_A: [A] float; where an SID holds several ads, higher comes first (for example expected
      value or training frequency).

  Raises:
    ValueError: no ads, a negative code, a priority that is not finite, or lengths that differ.
  """
  codes_AL, priority_A = np.asarray(codes_AL), np.asarray(priority_A)
  if codes_AL.ndim != 2 or not codes_AL.size:
    raise ValueError(f"codes_AL: shape {codes_AL.shape}, expected [A > 0, L > 0]")
  if priority_A.shape != codes_AL.shape[:1]:
    raise ValueError(f"priority_A: shape {priority_A.shape}, expected {codes_AL.shape[:1]}")
  if (codes_AL < 0).any():
    raise ValueError(f"codes_AL: ad {np.flatnonzero((codes_AL < 0).any(1))[0]} has a negative code")
  if not np.isfinite(priority_A).all():
    ad = np.flatnonzero(~np.isfinite(priority_A))[0]
    raise ValueError(f"priority_A: {priority_A[ad]} of ad {ad} is not finite")
  sids_SL, sid_of_ad_A = np.unique(codes_AL.astype(np.int32), axis=0, return_inverse=True)
  sid_of_ad_A = sid_of_ad_A.reshape(-1).astype(np.int32)
  count_S = np.bincount(sid_of_ad_A, minlength=len(sids_SL))
  return AdIndex(
    sids_SL=sids_SL,
    ads_start=np.concatenate([[0], np.cumsum(count_S)]),
    ads_A=np.lexsort((-priority_A, sid_of_ad_A)).astype(np.int32),
    sid_of_ad_A=sid_of_ad_A,
  )


def expand(index: AdIndex, sid_RW: np.ndarray, k: int) -> np.ndarray:
  """The first k ads of each request's beams, by beam rank, inside one SID by priority.

  Args:
    index: SIDs and their ads.
    sid_RW: [R, W] int, row numbers of `index.sids_SL`, best beam first, -1 = empty. An SID that
      stands twice in a row gives its ads twice.
    k: ads to return for each request.

  Returns:
    [R, k] int32 ad indices, filled from the left, -1 = nothing.

  Raises:
    ValueError: k < 1 or a row number outside [-1, S).
  """
  num_sids = len(index.sids_SL)
  if k < 1:
    raise ValueError(f"k: {k}, must be >= 1")
  if sid_RW.size and not -1 <= sid_RW.min() <= sid_RW.max() < num_sids:
    raise ValueError(
      f"sid_RW: values {sid_RW.min()} to {sid_RW.max()}, allowed -1 to {num_sids - 1}"
    )
  R, W = sid_RW.shape
  start_RW = index.ads_start[sid_RW]  # -1 reads the end of the table and is masked below
  count_RW = np.where(sid_RW >= 0, index.ads_start[sid_RW + 1] - start_RW, 0)
  column_RW = np.cumsum(count_RW, axis=1) - count_RW  # output column of a beam's first ad
  take_N = np.clip(k - column_RW, 0, count_RW).reshape(-1)
  beam_E = np.repeat(np.arange(R * W), take_N)  # one entry for each ad returned
  within_E = np.arange(len(beam_E)) - np.repeat(np.cumsum(take_N) - take_N, take_N)
  ads_RK = np.full((R, k), -1, np.int32)
  ads_RK[beam_E // max(W, 1), column_RW.reshape(-1)[beam_E] + within_E] = index.ads_A[
    start_RW.reshape(-1)[beam_E] + within_E
  ]
  return ads_RK


def pack_codes(codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> np.ndarray:
  """SIDs as single numbers, in the SIDs' lexicographic order.

  Args:
    codes_NL: [..., L] int.
    codebook_sizes: L sizes; their product is below 2^63.

  Returns:
    [...] int64.

  Raises:
    ValueError: a code outside its codebook.
  """
  return np.ravel_multi_index(tuple(np.moveaxis(codes_NL, -1, 0)), tuple(codebook_sizes))


def find_keys(keys_S: np.ndarray, keys_N: np.ndarray) -> np.ndarray:
  """[...] int32 places of keys [...] in the ascending `keys_S`, -1 = not there."""
  if not len(keys_S):
    return np.full(np.shape(keys_N), -1, np.int32)
  at_N = np.minimum(np.searchsorted(keys_S, keys_N), len(keys_S) - 1)
  return np.where(keys_S[at_N] == keys_N, at_N, -1).astype(np.int32)


def move_ads(
  index: AdIndex,
  *,
  keys_S: np.ndarray,
  codebook_sizes: Sequence[int],
  priority_A: np.ndarray,
  leaving_M: np.ndarray,
  coming_N: np.ndarray,
  keys_N: np.ndarray,
) -> AdIndex:
  """A new index in which some ads have left their SIDs, and then some have entered others.

  It equals `build_ad_index` of the resulting ads, but costs copies of the arrays and no sort of
  them: O(A + N log A).

  Args:
    index: of the ads before; it is left as it is.
    keys_S: [S] int64, `pack_codes` of `index.sids_SL`.
    codebook_sizes: L sizes.
    priority_A: [A'] float of all ads after the move, new ones at the end. It may differ from that
      of before for the `coming_N` only.
    leaving_M: [M] int, distinct ads that hold an SID.
    coming_N: [N] int, distinct ads that hold none, or that are leaving theirs.
    keys_N: [N] int64, the SIDs that they enter.
  """
  leaves_A = np.zeros(len(index.sid_of_ad_A), bool)
  leaves_A[leaving_M] = True
  kept_E = index.ads_A[~leaves_A[index.ads_A]]
  count_S = np.diff(index.ads_start)
  count_S -= np.bincount(index.sid_of_ad_A[leaving_M], minlength=len(count_S))

  # From here on S counts the SIDs of before and after, those without ads included.
  fresh_U = np.unique(keys_N)
  fresh_U = fresh_U[find_keys(keys_S, fresh_U) < 0]
  at_U = np.searchsorted(keys_S, fresh_U)
  keys_S, count_S = np.insert(keys_S, at_U, fresh_U), np.insert(count_S, at_U, 0)
  sid_N = np.searchsorted(keys_S, keys_N)
  order_N = np.lexsort((coming_N, -priority_A[coming_N], sid_N))
  coming_N, sid_N = coming_N[order_N], sid_N[order_N]
  end_S = np.cumsum(count_S)
  place_N = _places(kept_E, priority_A, coming_N, (end_S - count_S)[sid_N], end_S[sid_N])
  ads_A = np.insert(kept_E, place_N, coming_N)

  count_S += np.bincount(sid_N, minlength=len(count_S))
  used_S = count_S > 0
  keys_S, count_S = keys_S[used_S], count_S[used_S]
  codes = np.unravel_index(keys_S, tuple(codebook_sizes))
  sids_SL = np.stack(codes, axis=-1, dtype=np.int32, casting="unsafe")
  sid_of_ad_A = np.full(len(priority_A), -1, np.int32)
  sid_of_ad_A[ads_A] = np.repeat(np.arange(len(keys_S), dtype=np.int32), count_S)
  return AdIndex(sids_SL, np.concatenate([[0], np.cumsum(count_S)]), ads_A, sid_of_ad_A)


def _places(ads_E, priority_A, coming_N, low_N, high_N):
  """Where ads enter ads_E[low : high], by descending priority, then index: N binary searches."""
  priority_N = priority_A[coming_N]
  while (open_N := low_N < high_N).any():
    middle_N = np.where(open_N, (low_N + high_N) // 2, 0)
    there_N = ads_E[middle_N]
    after_N = (priority_A[there_N] > priority_N) | (
      (priority_A[there_N] == priority_N) & (there_N < coming_N)
    )
    low_N = np.where(open_N & after_N, middle_N + 1, low_N)
    high_N = np.where(open_N & ~after_N, middle_N, high_N)
  return low_N
