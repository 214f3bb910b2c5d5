"""The tree of all names in tokens: where names part, and which token leads to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Branch(NamedTuple):
  """A place where names part.

  Attributes:
    path: tokens from the root to here.
    token_C: int64, the tokens that lead on, sorted.
    leads_C: int64, what each leads to, behind all tokens that are forced: a name n >= 0, or the
      branch number b as -1 - b.
  """

  path: tuple[int, ...]
  token_C: np.ndarray
  leads_C: np.ndarray


class NameTree(NamedTuple):
  """Branch 0 is the root.

  Attributes:
    branches: all of them; a name that is decided early has none behind that.
    token_V: int64, the tokens that lead on anywhere, sorted.
    num_names: leaves.
  """

  branches: tuple[Branch, ...]
  token_V: np.ndarray
  num_names: int


def build_tree(names: Sequence[Sequence[int]], end: int) -> NameTree:
  """The tree of names, each closed by the end token, so that a name may begin another one.

  Args:
    names: token numbers of each; none of them twice, none with the end token inside.
    end: the token that closes a name.

  Raises:
    ValueError: two names have the same tokens, or one holds the end.
  """
  closed = [(*name, end) for name in names]
  if len(set(closed)) < len(closed) or any(end in name for name in names):
    raise ValueError("two names have the same tokens, or one holds the token that ends names")
  order = sorted(range(len(closed)), key=closed.__getitem__)
  branches: list[Branch | None] = []

  def grow(first: int, last: int, depth: int, root: bool) -> int:
    """Names order[first:last] have their first `depth` tokens in common -> what is there."""
    low, high = closed[order[first]], closed[order[last - 1]]
    if last - first == 1 and not root:
      return order[first]
    while not root and low[depth] == high[depth]:
      depth += 1
    number = len(branches)
    branches.append(None)
    tokens, leads, at = [], [], first
    while at < last:
      token, begin = closed[order[at]][depth], at
      while at < last and closed[order[at]][depth] == token:
        at += 1
      tokens.append(token)
      leads.append(grow(begin, at, depth + 1, False))
    branches[number] = Branch(low[:depth], np.array(tokens), np.array(leads))
    return -1 - number

  grow(0, len(order), 0, True)
  grown = tuple(branch for branch in branches if branch is not None)
  return NameTree(grown, np.unique(np.concatenate([b.token_C for b in grown])), len(names))
