"""Index between semantic IDs and ads: an SID may hold several ads, an ad has one SID."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class AdIndex:
  """Which ads hold which semantic ID.

  Attributes:
    sids_SL: [S, L] int32, the distinct SIDs in lexicographic order; a row number names an SID.
    ads_start: [S + 1] int64; the ads of SID s are ads_A[ads_start[s] : ads_start[s + 1]].
    ads_A: [A] int32, ad indices grouped by SID, inside one SID by descending priority, then index.
    sid_of_ad_A: [A] int32, row number of each ad's SID.
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
