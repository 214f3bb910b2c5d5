"""Subsets of the SIDs that a request may get: bitmaps that stay on the device, combined by AND.

A bit per SID and subset; a request names its subsets (its country, its age group, its placement).
The SIDs below a prefix are consecutive rows, so a prefix is legal for a request where the number of
allowed SIDs before its last row is larger than before its first: two ranks in a bitmap.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 32


class AllowedSids(NamedTuple):
  """The SIDs that each request may get; U = words of 32 SIDs, one more than needed."""

  word_BU: jax.Array  # uint32, bit s % 32 of word s // 32 is SID row s
  before_BU: jax.Array  # int32, allowed SIDs in the words before


def num_words(capacity: int) -> int:
  """U, the words of a bitmap over the SIDs of a prefix tree."""
  return capacity // _BITS + 1


def pack_subsets(member_TS: np.ndarray, capacity: int) -> np.ndarray:
  """Bitmaps of T subsets.

  Args:
    member_TS: bool, SID row s belongs to subset t.
    capacity: of the prefix tree that will be searched.

  Returns:
    uint32 [T, U]; rows past S belong to no subset.

  Raises:
    ValueError: not [T, S] of bool, or more SIDs than the tree has room for.
  """
  member_TS = np.asarray(member_TS)
  if member_TS.ndim != 2 or member_TS.dtype != bool:
    raise ValueError(f"member_TS: shape {member_TS.shape} of {member_TS.dtype}, needs [T, S] bool")
  if member_TS.shape[1] > capacity:
    raise ValueError(f"member_TS: {member_TS.shape[1]} SIDs, the tree has room for {capacity}")
  padded_TS = np.zeros((len(member_TS), num_words(capacity) * _BITS), bool)
  padded_TS[:, : member_TS.shape[1]] = member_TS
  return np.packbits(padded_TS, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def combine(word_TU: jax.Array, subset_BN: jax.Array) -> AllowedSids:
  """What is in all of a request's subsets.

  Args:
    word_TU: from `pack_subsets`.
    subset_BN: int32 subsets of each request, -1 = none; a request without any may get all SIDs.
  """
  word_BNU = word_TU[jnp.maximum(subset_BN, 0)]
  word_BNU = jnp.where((subset_BN >= 0)[..., None], word_BNU, jnp.uint32(0xFFFFFFFF))
  word_BU = jnp.bitwise_and.reduce(word_BNU, axis=1)
  count_BU = jax.lax.population_count(word_BU).astype(jnp.int32)
  return AllowedSids(word_BU, jnp.cumsum(count_BU, axis=1) - count_BU)


def holds(allowed: AllowedSids, row: jax.Array) -> jax.Array:
  """bool, whether each SID may be had.

  Args:
    allowed: from `combine`.
    row: int32 [B, ...] SID rows.
  """
  flat_BX = (row // _BITS).reshape(row.shape[0], -1)
  bits = jnp.take_along_axis(allowed.word_BU, flat_BX, axis=1).reshape(row.shape)
  return (bits >> (row % _BITS).astype(jnp.uint32)) & 1 == 1


def count_before(allowed: AllowedSids, row: jax.Array) -> jax.Array:
  """How many allowed SIDs come before each row.

  Args:
    allowed: from `combine`.
    row: int32 [B, ...] SID rows, up to the number of SIDs.
  """
  word = row // _BITS
  flat_BX = word.reshape(word.shape[0], -1)
  bits, before = (
    jnp.take_along_axis(x_BU, flat_BX, axis=1).reshape(row.shape) for x_BU in allowed
  )
  below = (jnp.uint32(1) << (row % _BITS).astype(jnp.uint32)) - 1
  return before + jax.lax.population_count(bits & below).astype(jnp.int32)
