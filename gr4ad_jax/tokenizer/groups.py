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
from jax.sharding import Mesh, PartitionSpec

from gr4ad_jax.sharding import DATA, build_mesh

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
