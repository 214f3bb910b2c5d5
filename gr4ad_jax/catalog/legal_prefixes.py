"""The set of existing SIDs as a prefix tree of plain arrays, linear in the number of SIDs.

Nodes of one depth are numbered in lexicographic order, so the children of node n at depth l are
the consecutive nodes start[l, n] .. start[l, n + 1] - 1 of depth l + 1, and a node of depth L is
the row of its SID in the sorted table. A beam that carries its node can never leave the tree. The
SIDs below a node are consecutive rows too, which is what subsets (`subsets.py`) rest on.

One form serves all depths: a dense table for the first level would hold the same codes, as every
code of it leads somewhere, and costs what its gather costs (0.1 of 200 ms at batch 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LegalPrefixes(NamedTuple):
  """Prefix tree; N = most SIDs it can hold. Arrays only: it enters jit as an argument.

  Depths are padded to one shape, so that a scan over levels can index them.
  """

  start_LN: np.ndarray  # int32 [L, N + 1], first child of each node, by depth 0..L-1
  code_LN: np.ndarray  # int32 [L, N], code that leads to each node of depth l + 1
  first_sid_LN: np.ndarray  # int32 [L, N + 1], first SID row below each node of depth l + 1


class PrefixTree(NamedTuple):
  """The arrays and the static facts that shape a compiled search."""

  arrays: LegalPrefixes
  branching_L: tuple[int, ...]  # a node of depth l has at most so many children
  capacity: int  # N
  num_sids: int  # how many there are now; not a fact that a compiled search may use


def build_prefix_tree(
  sids_SL: np.ndarray, *, spare: float = 0.0, codebook_sizes: Sequence[int] | None = None
) -> PrefixTree:
  """Builds the tree in one vectorised pass per level.

  Args:
    sids_SL: int32, distinct SIDs in lexicographic order.
    spare: room for `refill`: so many more SIDs, and children of a node, as a share of those there.
    codebook_sizes: codes of each level: no node has more children, and above the last level, where
      it costs little, every node has room for so many; None = not known.

  Raises:
    ValueError: empty, unsorted or repeated SIDs, negative codes, or a negative `spare`.
  """
  if spare < 0:
    raise ValueError(f"spare={spare}: must be >= 0")
  sids_SL = _checked(sids_SL)
  capacity = math.ceil(len(sids_SL) * (1 + spare))
  arrays, most_L = _arrays(sids_SL, capacity)
  branching_L = tuple(math.ceil(most * (1 + spare)) for most in most_L)
  if codebook_sizes is not None:
    branching_L = (*codebook_sizes[:-1], min(branching_L[-1], codebook_sizes[-1]))
  return PrefixTree(arrays, branching_L, capacity, len(sids_SL))


def refill(tree: PrefixTree, sids_SL: np.ndarray) -> PrefixTree:
  """Another set of SIDs in the shapes of `tree`: searches compiled for it go on without a pause.

  Raises:
    ValueError: as `build_prefix_tree`; another number of levels; or no room, which names what is
      short, so that a tree with more `spare` can be built.
  """
  sids_SL = _checked(sids_SL)
  if sids_SL.shape[1] != len(tree.branching_L):
    raise ValueError(f"sids_SL: {sids_SL.shape[1]} levels, the tree has {len(tree.branching_L)}")
  if len(sids_SL) > tree.capacity:
    raise ValueError(f"sids_SL: {len(sids_SL)} SIDs, the tree has room for {tree.capacity}")
  arrays, most_L = _arrays(sids_SL, tree.capacity)
  for level, (most, branching) in enumerate(zip(most_L, tree.branching_L, strict=True)):
    if most > branching:
      raise ValueError(
        f"sids_SL: {most} codes follow one prefix at level {level + 1}, the tree has room for"
        f" {branching}"
      )
  return tree._replace(arrays=arrays, num_sids=len(sids_SL))


def find_sids(tree: PrefixTree, code_NL: jax.Array) -> jax.Array:
  """int32 [..., N], the row of each SID in the sorted table, -1 where there is none.

  Args:
    tree: its arrays may be traced, its static facts may not.
    code_NL: int32 [..., N, L], any numbers.
  """
  node_N = jnp.zeros(code_NL.shape[:-1], jnp.int32)
  there_N = jnp.ones(node_N.shape, bool)
  for level, branching in enumerate(tree.branching_L):
    start_M, code_M = tree.arrays.start_LN[level], tree.arrays.code_LN[level]
    code_N, low_N, end_N = code_NL[..., level], start_M[node_N], start_M[node_N + 1]
    # Children lie in the order of their codes; halves of what is left, until one child is.
    high_N = end_N
    for _ in range(branching.bit_length()):
      middle_N = (low_N + high_N) // 2
      before_N = (low_N < high_N) & (code_M[jnp.minimum(middle_N, len(code_M) - 1)] < code_N)
      low_N = jnp.where(before_N, middle_N + 1, low_N)
      high_N = jnp.where(before_N, high_N, middle_N)
    child_N = jnp.minimum(low_N, len(code_M) - 1)
    there_N &= (low_N < end_N) & (code_M[child_N] == code_N)
    node_N = jnp.where(there_N, child_N, 0)
  return jnp.where(there_N, node_N, -1)


def _checked(sids_SL: np.ndarray) -> np.ndarray:
  sids_SL = np.asarray(sids_SL)
  if sids_SL.ndim != 2 or sids_SL.shape[0] == 0:
    raise ValueError(f"sids_SL: shape {sids_SL.shape}; needs at least one SID of rank 2")
  if sids_SL.min() < 0:
    raise ValueError("sids_SL: negative code; every code must be >= 0")
  first_S1 = np.argmax(sids_SL[1:] != sids_SL[:-1], axis=1)[:, None]
  before, after = (np.take_along_axis(x, first_S1, 1) for x in (sids_SL[:-1], sids_SL[1:]))
  if not (after > before).all():
    raise ValueError("sids_SL: rows must be distinct and in lexicographic order")
  return sids_SL


def _arrays(sids_SL: np.ndarray, capacity: int) -> tuple[LegalPrefixes, list[int]]:
  """The tree, and the most children that a node of each depth has."""
  num_sids, num_levels = sids_SL.shape
  # is_new[s, l]: SID s is the first one with its prefix of length l + 1.
  is_new_SL = np.ones((num_sids, num_levels), bool)
  np.logical_or.accumulate(sids_SL[1:] != sids_SL[:-1], axis=1, out=is_new_SL[1:])
  start_LN = np.zeros((num_levels, capacity + 1), np.int32)
  code_LN = np.zeros((num_levels, capacity), np.int32)
  first_sid_LN = np.full((num_levels, capacity + 1), num_sids, np.int32)
  most_L = []
  parent_rows = np.zeros(1, np.int64)  # the first SID below each node of this depth
  for level in range(num_levels):
    rows = np.flatnonzero(is_new_SL[:, level])
    starts = np.append(np.searchsorted(rows, parent_rows), len(rows))
    start_LN[level, : len(starts)] = starts
    start_LN[level, len(starts) :] = len(rows)
    code_LN[level, : len(rows)] = sids_SL[rows, level]
    first_sid_LN[level, : len(rows)] = rows
    most_L.append(int(np.diff(starts).max()))
    parent_rows = rows
  return LegalPrefixes(start_LN, code_LN, first_sid_LN), most_L
