"""Meshes and layouts on them; the only file that builds either.

Axes: `data` and `fsdp` split the rows of a batch; `fsdp` also splits the weights of layers, and
`tensor` splits heads, hidden units and the rows of embedding tables (which are the columns of tied
heads). A model says how its parameters lie (`Layouts`); optimizer state follows its parameter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROWS = (DATA, FSDP)  # what a batch is split over
_MIN_SHARDED_SIZE = 2**12  # smaller arrays cost more to gather than to keep

Axes = tuple[str | tuple[str, ...] | None, ...]
Layouts = tuple[tuple[str, Axes], ...]
"""Rules (pattern, axes): the first whose pattern ends a parameter's path lays it out, with an axis,
several or None for each dimension. A dimension that its axis does not divide stays whole."""


def build_mesh(
  *,
  data_parallel: int = 0,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A (data, fsdp, tensor) mesh over the first data_parallel * fsdp * tensor devices.

  Args:
    data_parallel: 0 takes all devices that the other two leave.
    fsdp, tensor: sizes of these axes.
    devices: None = all.

  Raises:
    ValueError: more devices asked for than there are.
  """
  devices = list(jax.devices() if devices is None else devices)
  data = data_parallel or len(devices) // (fsdp * tensor)
  size = max(data, 1) * fsdp * tensor
  if data < 1 or size > len(devices):
    raise ValueError(
      f"train.data_parallel={data_parallel}, train.fsdp={fsdp}, train.tensor={tensor}: need {size} "
      f"devices, {len(devices)} are there"
    )
  return jax.make_mesh(
    (data, fsdp, tensor), (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3,
    devices=devices[:size],
  )


def data_mesh(divides: int) -> Mesh:
  """A mesh that splits rows over as many of this host's devices as divide a number of parts."""
  devices = jax.local_devices()
  return build_mesh(data_parallel=math.gcd(divides, len(devices)), devices=devices)


@dataclasses.dataclass(frozen=True)
class MeshProgram:
  """A compiled program that is traced and run with its mesh set, so that `constrain` knows it.

  Attributes:
    mesh: of its arguments.
    compiled: from jax.jit.
    last: arguments that follow those of each call.
  """

  mesh: Mesh
  compiled: Any
  last: tuple[Any, ...] = ()

  def __call__(self, *args: Any) -> Any:
    with jax.set_mesh(self.mesh):
      return self.compiled(*args, *self.last)

  def lower(self, *args: Any) -> Any:
    """Lowers the program for arguments, as `jax.jit(...).lower` does."""
    with jax.set_mesh(self.mesh):
      return self.compiled.lower(*args, *self.last)


def row_parts(mesh: Mesh) -> int:
  """Parts that a batch is split into."""
  return mesh.shape[DATA] * mesh.shape[FSDP]


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, abstract_state: Any, layouts: Layouts) -> Any:
  """A sharding for every leaf of parameters and optimizer state.

  Args:
    mesh: from `build_mesh`.
    abstract_state: any pytree of arrays, or of their shapes.
    layouts: the model's own; what no rule names is split over `fsdp` along its largest dimension.
  """

  def layout(path, leaf) -> NamedSharding:
    if leaf.ndim < 2 or leaf.size < _MIN_SHARDED_SIZE:
      return replicated(mesh)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = _rule(layouts, name, leaf.ndim) or _largest_first(leaf.shape, mesh.shape[FSDP])
    return NamedSharding(mesh, _dividing(axes, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(layout, abstract_state)


def _rule(layouts: Layouts, name: str, ndim: int) -> Axes | None:
  for pattern, axes in layouts:
    if len(axes) == ndim and re.search(rf"(^|/)({pattern})$", name):
      return axes
  return None


def _largest_first(shape: tuple[int, ...], size: int) -> tuple[str | None, ...]:
  for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
    if shape[axis] % size == 0:
      return (None,) * axis + (FSDP,)
  return ()


def _dividing(axes: Sequence[Any], shape: tuple[int, ...], mesh) -> PartitionSpec:
  """The axes as a spec, without those that do not divide their dimension."""
  def size(axis) -> int:
    return math.prod(mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,)))

  return PartitionSpec(*(
    axis if axis and dim % size(axis) == 0 else None
    for axis, dim in zip(axes, shape, strict=False)
  ))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
  """Lays an activation out over the mesh that the program is traced under; without one, nothing.

  Args:
    x: any array.
    axes: a mesh axis, several, or None for each dimension; those that do not divide are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or TENSOR not in mesh.axis_names:
    return x
  return jax.lax.with_sharding_constraint(x, _dividing(axes, x.shape, mesh))


def is_split(axis: str) -> bool:
  """Whether the mesh that the program is traced under has this axis, larger than one."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1


def global_batch(mesh: Mesh) -> Callable[[Any], Any]:
  """Makes this host's rows into arrays spread over the whole mesh."""
  sharding = batch_sharding(mesh)
  return lambda batch: jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
