"""Rows of embeddings at the border of the tokenizer: checks, and which of them are distinct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

ROWS_PER_HASH = 512  # rows hashed together, few enough to stay in the cache
ROWS_PER_CHECK = 65_536  # rows looked at together, so that checks need no second copy of the table


def as_float32(embedding_ND: np.ndarray) -> np.ndarray:
  """A table of any real numbers as float32, row after row in memory.

  Numbers too large for float32 become infinite, which `check_embeddings` refuses.

  Raises:
    ValueError: other than real numbers.
  """
  if embedding_ND.dtype == np.dtype("V2"):  # NumPy has no name for bfloat16, and stores its bytes
    embedding_ND = embedding_ND.view(jnp.bfloat16)
  elif embedding_ND.dtype.kind not in "fiub" and embedding_ND.dtype != jnp.bfloat16:
    raise ValueError(f"embedding_ND: dtype {embedding_ND.dtype}, expected real numbers")
  with np.errstate(over="ignore"):
    return np.ascontiguousarray(embedding_ND, np.float32)


def unit_rows(embedding_ND: np.ndarray) -> np.ndarray:
  """float32 rows, none of them 0, over their norms."""
  with np.errstate(over="ignore", under="ignore"):
    norm_N1 = np.linalg.norm(embedding_ND, axis=-1, keepdims=True)
  # The squares of numbers so large or small leave float32; the others keep the bits they had.
  far_N = ~((norm_N1 > 1e-15) & (norm_N1 < 1e18))[:, 0]
  largest_N1 = np.abs(embedding_ND[far_N]).max(axis=-1, keepdims=True)
  near_N1 = (embedding_ND[far_N] / largest_N1.astype(np.float64)).astype(np.float32)
  norm_N1[far_N] = 1
  unit_ND = embedding_ND / norm_N1
  unit_ND[far_N] = near_N1 / np.linalg.norm(near_N1, axis=-1, keepdims=True)
  return unit_ND


def check_embeddings(
  embedding_ND: np.ndarray,
  codebook_sizes: Sequence[int] = (),
  *,
  width: int | None = None,
) -> None:
  """Refuses embeddings that no quantizer can work with.

  Args:
    embedding_ND: [N, D] float.
    codebook_sizes: codes of each level that is to be fitted on these rows.
    width: D that is expected (of a fitted quantizer); None takes any.

  Raises:
    ValueError: not a table of numbers, a value that is not finite (with its row), another width,
      a size below 1, or fewer rows than codes (with the remedy).
  """
  if embedding_ND.ndim != 2 or not embedding_ND.size:
    raise ValueError(f"embedding_ND: shape {embedding_ND.shape}, expected [N > 0, D > 0]")
  if not np.issubdtype(embedding_ND.dtype, np.floating):
    raise ValueError(f"embedding_ND: dtype {embedding_ND.dtype}, expected floating-point numbers")
  if width is not None and embedding_ND.shape[1] != width:
    raise ValueError(
      f"embedding_ND: {embedding_ND.shape[1]} columns, but the codebooks have {width}; embed with"
      " the encoder that they were fitted on"
    )
  bad_row = first_bad_row(embedding_ND)
  if bad_row is not None:
    raise ValueError(f"embedding_ND: row {bad_row} holds a value that is not finite")
  for level, size in enumerate(codebook_sizes, start=1):
    if size < 1:
      raise ValueError(f"codebook_sizes: {tuple(codebook_sizes)}, each must be >= 1")
    if size > len(embedding_ND):
      raise ValueError(
        f"codebook_sizes: level {level} has {size} codes for {len(embedding_ND)} rows; give at most"
        f" {len(embedding_ND)} codes a level, or more rows"
      )


def first_bad_row(embedding_ND: np.ndarray, *, nonzero: bool = False) -> int | None:
  """The first row with a value that is not finite; with `nonzero` also one without direction."""
  for start in range(0, len(embedding_ND), ROWS_PER_CHECK):
    chunk_ND = embedding_ND[start : start + ROWS_PER_CHECK]
    bad_N = ~np.isfinite(chunk_ND).all(-1)
    if nonzero:
      bad_N |= ~chunk_ND.any(-1)
    if bad_N.any():
      return start + int(np.argmax(bad_N))
  return None


class DistinctRows(NamedTuple):
  """Which rows of a table are the same; the order of the U distinct ones is by content alone."""

  first_U: np.ndarray  # int64, a row of the table for each distinct one
  of_N: np.ndarray  # int64, number of the distinct row that each row equals


def distinct_rows(x_ND: np.ndarray) -> DistinctRows:
  """Finds equal rows (bit by bit, but -0 equals 0) without a sorted copy of the table.

  Args:
    x_ND: [N, D] float32.
  """
  _, first_U, of_N = np.unique(_row_hash(x_ND), return_index=True, return_inverse=True)
  of_N = of_N.reshape(-1)
  if len(first_U) == len(x_ND):
    return DistinctRows(first_U, of_N)
  for start in range(0, len(x_ND), ROWS_PER_CHECK):
    rows = slice(start, start + ROWS_PER_CHECK)
    if not np.array_equal(x_ND[rows], x_ND[first_U[of_N[rows]]]):
      # Two different rows with one 64-bit hash: not to be expected, and still not to be merged.
      _, first_U, of_N = np.unique(x_ND, axis=0, return_index=True, return_inverse=True)
      return DistinctRows(first_U, of_N.reshape(-1))
  return DistinctRows(first_U, of_N)


def _row_hash(x_ND: np.ndarray) -> np.ndarray:
  """uint64 [N]: pairs of numbers, as bits, times fixed odd numbers, mixed; sums wrap around."""
  width = x_ND.shape[1] + x_ND.shape[1] % 2
  factor_C = np.random.default_rng(0).integers(1, 2**63, width // 2, np.uint64) * 2 + 1
  hash_N = np.empty(len(x_ND), np.uint64)
  for start in range(0, len(x_ND), ROWS_PER_HASH):
    chunk_ND = x_ND[start : start + ROWS_PER_HASH]
    bits_ND = np.zeros((len(chunk_ND), width), np.float32)
    np.add(chunk_ND, np.float32(0), out=bits_ND[:, : x_ND.shape[1]])  # -0 becomes 0
    value_NC = bits_ND.view(np.uint64)
    value_NC *= factor_C
    value_NC ^= value_NC >> np.uint64(29)
    value_NC *= np.uint64(0xBF58476D1CE4E5B9)
    hash_N[start : start + len(chunk_ND)] = (value_NC ^ (value_NC >> np.uint64(32))).sum(1)
  return hash_N
