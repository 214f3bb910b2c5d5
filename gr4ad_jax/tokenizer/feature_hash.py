"""A stable 64-bit hash of feature columns: the last level of a semantic ID."""

import hashlib
from collections.abc import Sequence

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def splitmix64(x_N: np.ndarray) -> np.ndarray:
  """One output of the splitmix64 generator for each state.

  Args:
    x_N: [N] uint64.

  Returns:
    [N] uint64.

  Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
  """
  z_N = x_N + np.uint64(GOLDEN)
  z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z_N ^ (z_N >> np.uint64(31))


def column_values(column_N: np.ndarray) -> np.ndarray:
  """A column as 64-bit values that are the same on every machine and in every run.

  Args:
    column_N: [N] strings (first 8 bytes of blake2b), integers (themselves) or floats (bits of the
      float32; every NaN is one value, and so is every zero).

  Returns:
    [N] uint64.
  """
  column_N = np.asarray(column_N)
  if np.issubdtype(column_N.dtype, np.integer):
    return column_N.astype(np.uint64)
  if np.issubdtype(column_N.dtype, np.floating):
    value_N = column_N.astype(np.float32) + np.float32(0)  # -0 becomes 0
    value_N = np.where(np.isnan(value_N), np.float32(np.nan), value_N)
    return value_N.view(np.uint32).astype(np.uint64)
  text_U, row_N = np.unique(column_N.astype(str), return_inverse=True)
  digests = [hashlib.blake2b(t.encode(), digest_size=8).digest() for t in text_U]
  return np.array([int.from_bytes(d, "little") for d in digests], np.uint64)[row_N]


def hash_codes(columns: Sequence[np.ndarray], *, size: int, seed: int = 0) -> np.ndarray:
  """h = seed; for column i (from 0): h = mix(h XOR mix(value_i + i * golden)); code = h mod size.

  Args:
    columns: one or more columns of N values, see `column_values`.
    size: number of codes.
    seed: start of the hash; keep it with the codes.

  Returns:
    [N] int32 in [0, size).

  Source: GR4AD (arXiv 2602.22732) 3.1, hash level; this hash is our choice.
  """
  hash_N = np.full(len(columns[0]), seed & _MASK, np.uint64)
  for i, column_N in enumerate(columns):
    hash_N = splitmix64(
      hash_N ^ splitmix64(column_values(column_N) + np.uint64(i * GOLDEN & _MASK))
    )
  return (hash_N % np.uint64(size)).astype(np.int32)
