"""The set of existing SIDs as a prefix tree of plain arrays, linear in the number of SIDs.

Nodes of one depth are numbered in lexicographic order, so the children of node n at depth l are
the consecutive nodes start[l, n] .. start[l, n + 1] - 1 of depth l + 1, and a node of depth L is
the row of its SID in the sorted table. A beam that carries its node can never leave the tree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class LegalPrefixes(NamedTuple):
  """Prefix tree; N = nodes of the largest depth. Arrays only: it enters jit as an argument.

  Depths are padded to one shape, so that a scan over levels can index them.
  """

  start_LN: np.ndarray  # int32 [L, N + 1], first child of each node, by depth 0..L-1
  code_LN: np.ndarray  # int32 [L, N], code that leads to each node of depth l + 1


class PrefixTree(NamedTuple):
  """The arrays and the static facts that shape a compiled search."""

  arrays: LegalPrefixes
  branching_L: tuple[int, ...]  # most children of any node, by depth
  num_sids: int


def build_prefix_tree(sids_SL: np.ndarray) -> PrefixTree:
  """Builds the tree in one vectorised pass per level.

  Args:
    sids_SL: int32, distinct SIDs in lexicographic order.

  Raises:
    ValueError: empty, unsorted or repeated SIDs, or negative codes.
  """
  sids_SL = np.asarray(sids_SL)
  if sids_SL.ndim != 2 or sids_SL.shape[0] == 0:
    raise ValueError(f"sids_SL: shape {sids_SL.shape}; needs at least one SID of rank 2")
  if sids_SL.min() < 0:
    raise ValueError("sids_SL: negative code; every code must be >= 0")
  num_sids, num_levels = sids_SL.shape
  changed_SL = sids_SL[1:] != sids_SL[:-1]
  first_SL = np.argmax(changed_SL, axis=1)[:, None]
  later_S1 = np.take_along_axis(sids_SL[1:], first_SL, 1) > np.take_along_axis(
    sids_SL[:-1], first_SL, 1
  )
  if not (changed_SL.any(axis=1) & later_S1[:, 0]).all():
    raise ValueError("sids_SL: rows must be distinct and in lexicographic order")
  # is_new[s, l]: SID s is the first one with its prefix of length l + 1.
  is_new_SL = np.ones((num_sids, num_levels), bool)
  is_new_SL[1:] = np.logical_or.accumulate(changed_SL, axis=1)

  start_LN = np.zeros((num_levels, num_sids + 1), np.int32)
  code_LN = np.zeros((num_levels, num_sids), np.int32)
  branching = []
  parent_rows = np.zeros(1, np.int64)  # the first SID below each node of this depth
  for level in range(num_levels):
    rows = np.flatnonzero(is_new_SL[:, level])
    starts = np.append(np.searchsorted(rows, parent_rows), len(rows))
    start_LN[level, : len(starts)] = starts
    start_LN[level, len(starts) :] = len(rows)
    code_LN[level, : len(rows)] = sids_SL[rows, level]
    branching.append(int(np.diff(starts).max()))
    parent_rows = rows
  return PrefixTree(LegalPrefixes(start_LN, code_LN), tuple(branching), num_sids)
