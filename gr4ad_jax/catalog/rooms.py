"""Where new SIDs find room in the shapes that searches are compiled for.

There is room for so many more SIDs in all, and at the last level for so many more below one prefix;
every prefix that fits a codebook may come. Where a prefix is full, or no SID is left, a new ad
shares one: the last level only tells apart ads that the model has never seen, and ads on one SID
are found together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.catalog.legal_prefixes import PrefixTree
from gr4ad_jax.catalog.live_index import Snapshot
from gr4ad_jax.config import ConfigError


class NoRoom(ConfigError):
  """The compiled programs have no room for so many SIDs."""


class Rooms:
  """What is left of a tree; each ad that is placed takes its part of it."""

  def __init__(self, snapshot: Snapshot, tree: PrefixTree):
    """`snapshot` holds the SIDs that are in the tree now."""
    self._index, self._keys_S = snapshot.index, snapshot.keys_S
    self._sizes, self._branching_L = snapshot.codebook_sizes, tree.branching_L
    self._left, self._capacity = tree.capacity - len(snapshot.keys_S), tree.capacity
    # Prefix -> code after it -> ads below (at the last level) or any number.
    self._children: dict[tuple[int, ...], dict[int, int]] = {}

  def place(self, code_L: Sequence[int], held_L: Sequence[int] | None = None) -> list[int]:
    """The SID that an ad gets: its own, or one of another ad with the same first codes.

    Args:
      code_L: its own, whose last code may be outside the codebook: then it is any free one.
      held_L: the SID of an ad that is there already, which it keeps rather than share another.

    Raises:
      NoRoom: no ad has its first codes, and no SID is left.
    """
    path = [int(code) for code in code_L]
    last = len(path) - 1
    for level in range(last):
      if path[level] not in self._after(tuple(path[:level])):
        if self._left < 1:
          raise NoRoom(
            f"no room for another SID beside {self._capacity:,}; start the server with a larger "
            "serving.spare"
          )
        break
    prefix = tuple(path[:last])
    children = self._after(prefix)
    if path[last] >= self._sizes[last]:
      free = (code for code in range(self._sizes[last]) if code not in children)
      path[last] = next(free, path[last])
    if path[last] not in children:
      if self._left >= 1 and len(children) < self._branching_L[last] and (
        path[last] < self._sizes[last]
      ):
        self._left -= 1
        for level in range(last):
          self._after(prefix[:level]).setdefault(path[level], 0)
      elif held_L is not None and tuple(held_L[:last]) == prefix and int(held_L[last]) in children:
        path[last] = int(held_L[last])
      else:
        path[last] = min(children, key=children.__getitem__)
    children[path[last]] = children.get(path[last], 0) + 1
    return path

  def _after(self, prefix: tuple[int, ...]) -> dict[int, int]:
    """The codes that follow a prefix."""
    if prefix not in self._children:
      level = len(prefix)
      below = np.prod(self._sizes[level:], dtype=np.int64)
      first = np.int64(0)
      for code, size in zip(prefix, self._sizes, strict=False):
        first = first * size + code
      start, end = np.searchsorted(self._keys_S, [first * below, (first + 1) * below])
      codes = self._index.sids_SL[start:end, level]
      counts = np.diff(self._index.ads_start)[start:end]
      if level < len(self._sizes) - 1:
        codes, counts = np.unique(codes), np.zeros(len(np.unique(codes)), np.int64)
      self._children[prefix] = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    return self._children[prefix]
