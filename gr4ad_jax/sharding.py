"""Meshes and parameter layouts; the only file that knows of devices.

Axes: `data` splits the batch; `fsdp` splits the batch too and shards every parameter of two or more
dimensions (and its optimizer state) along its largest divisible dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
_MIN_SHARDED_SIZE = 2**12  # smaller arrays cost more to gather than to keep


def build_mesh(
  *, data_parallel: int = 0, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A (data, fsdp) mesh over all devices, or over the first data_parallel * fsdp of them.

  Raises:
    ValueError: more devices asked for than there are.
  """
  devices = list(jax.devices() if devices is None else devices)
  data = data_parallel or len(devices) // fsdp
  if data < 1 or data * fsdp > len(devices):
    raise ValueError(
      f"train.data_parallel={data_parallel}, train.fsdp={fsdp}: need {max(data, 1) * fsdp} devices,"
      f" {len(devices)} are there"
    )
  grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
  return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def data_mesh(divides: int) -> Mesh:
  """A mesh that splits rows over as many of this host's devices as divide a number of parts."""
  devices = jax.local_devices()
  return build_mesh(data_parallel=math.gcd(divides, len(devices)), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all devices."""
  return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, abstract_state: Any) -> Any:
  """A sharding for every leaf of parameters and optimizer state."""
  size = mesh.shape[FSDP]

  def layout(leaf) -> NamedSharding:
    if size == 1 or leaf.ndim < 2 or leaf.size < _MIN_SHARDED_SIZE:
      return replicated(mesh)
    largest_first = sorted(range(leaf.ndim), key=lambda axis: -leaf.shape[axis])
    for axis in largest_first:
      if leaf.shape[axis] % size == 0:
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, FSDP))
    return replicated(mesh)

  return jax.tree.map(layout, abstract_state)


def global_batch(mesh: Mesh) -> Callable[[Any], Any]:
  """Makes this host's rows into arrays spread over the whole mesh."""
  sharding = batch_sharding(mesh)
  return lambda batch: jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
