"""Rows in a fixed number of groups, so that results do not depend on the number of devices.

A device works on its groups one after the other, each as a program of its own with fixed shapes;
what is summed over rows is summed inside a group first and then over the groups in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gr4ad_jax.machine.sharding import DATA, build_mesh

NUM_GROUPS = 8  # the `data` axis of a mesh has to divide it


def check_mesh(mesh: Mesh | None) -> Mesh:
  """The mesh to work on; None is one device.

  Raises:
    ValueError: the mesh has no axis `data`, or one that does not divide the groups of a batch.
  """
  if mesh is None:
    return build_mesh(data_parallel=1, devices=jax.local_devices()[:1])
  if DATA not in mesh.shape or NUM_GROUPS % mesh.shape[DATA]:
    raise ValueError(
      f"mesh: axes {dict(mesh.shape)}, need an axis {DATA!r} of a size that divides {NUM_GROUPS}"
    )
  return mesh


def map_groups(f: Callable, shared: Any, grouped: Any, mesh: Mesh) -> Any:
  """`f(shared, group)` for each group of `grouped` (axis 0), spread over `data`; results stacked.

  Every call of `f` is kept apart from what is around it, so that the compiler treats it alike on
  every mesh.
  """
  barrier = jax.lax.optimization_barrier

  def local(shared, grouped):
    return jax.lax.map(lambda group: barrier(f(shared, barrier(group))), grouped)

  rows = PartitionSpec(DATA)
  # Without the check, gradients inside are those of the device's own rows, not summed by JAX.
  return jax.shard_map(
    local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
  )(shared, grouped)


def map_rows(
  f: Callable,
  x_ND: np.ndarray,
  row_M: np.ndarray,
  mesh: Mesh,
  *,
  rows_per_block: int,
  max_blocks: int,
  min_blocks: int = 1,
) -> np.ndarray:
  """Applies a compiled function to some rows of a table; only a part of them is copied at a time.

  Args:
    f: `[K, rows_per_block, D] -> [K, rows_per_block, W]`, K a power of two from `min_blocks` (or
      the devices, where these are more) to `max_blocks`, so that there are few compilations.
    x_ND: [N, D].
    row_M: numbers of the rows.
    mesh: of `check_mesh`; the K blocks are spread over its axis `data`.
    rows_per_block: rows that are computed together.
    max_blocks: of one call, a power of two; a multiple of the devices.
    min_blocks: of one call, a power of two.

  Returns:
    [M, W].
  """
  by_block, results = NamedSharding(mesh, PartitionSpec(DATA)), []
  per_call = rows_per_block * max_blocks
  for start in range(0, max(len(row_M), 1), per_call):
    rows = row_M[start : start + per_call]
    blocks = 1 << (-(-len(rows) // rows_per_block) - 1).bit_length() if len(rows) else 1
    blocks = max(blocks, min_blocks, mesh.shape[DATA])
    padded = np.zeros((blocks * rows_per_block, x_ND.shape[1]), x_ND.dtype)
    np.take(x_ND, rows, axis=0, out=padded[: len(rows)])
    block_KBD = jax.device_put(padded.reshape(blocks, rows_per_block, -1), by_block)
    y_KBW = np.asarray(f(block_KBD))
    results.append(y_KBW.reshape(len(padded), -1)[: len(rows)])
  return np.concatenate(results)


def add_in_order(x_G: jax.Array) -> jax.Array:
  """The sum over groups, always in the same order."""
  return functools.reduce(jnp.add, [x_G[g] for g in range(NUM_GROUPS)])


def check_codes(code_NL: np.ndarray, codebook_sizes: Sequence[int]) -> None:
  """Refuses codes that no item has.

  Raises:
    ValueError: not [N, 1 to L] integers, or a code out of its level's range (with its row).
  """
  levels = code_NL.shape[1] if code_NL.ndim == 2 else 0
  if not 1 <= levels <= len(codebook_sizes) or not np.issubdtype(code_NL.dtype, np.integer):
    raise ValueError(
      f"code_NL: shape {code_NL.shape} of {code_NL.dtype}, expected integers"
      f" [N, 1 to {len(codebook_sizes)}]"
    )
  bad_N = ((code_NL < 0) | (code_NL >= np.asarray(codebook_sizes[:levels]))).any(-1)
  if bad_N.any():
    row = int(np.argmax(bad_N))
    raise ValueError(
      f"code_NL: row {row} is {code_NL[row].tolist()}, levels have {tuple(codebook_sizes)} codes"
    )
