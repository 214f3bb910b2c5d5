"""Meshes and parameter layouts; the only file that knows of devices.

Axes: `data` and `fsdp` split the rows of a batch; `fsdp` also splits the weights of layers, and
`tensor` splits heads, hidden units and the rows of embedding tables (which are the columns of tied
heads); the table of ids is split over both. Layouts are rules from a parameter's path to axes;
optimizer state follows its parameter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gr4ad_jax.config import ConfigError
from gr4ad_jax.training.config import TrainConfig

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROWS = (DATA, FSDP)  # what a batch is split over
_MIN_SHARDED_SIZE = 2**12  # smaller arrays cost more to gather than to keep

# The first rule whose pattern ends a parameter's path lays it out, a name a dimension. A dimension
# that its axis does not divide stays whole.
LAYOUTS: tuple[tuple[str, tuple[str | tuple[str, str] | None, ...]], ...] = (
  (r"ids/table", ((TENSOR, FSDP), None)),  # hash rows, width; optimizer: hash rows, 1
  (r"tables/level_\d+|features|organic_id|content|ad_\d+", (TENSOR, None)),  # vocabulary, width
  (r"cross/(query|key|value)/kernel", (FSDP, TENSOR, None)),  # width, heads, head width
  (r"qkv/kernel", (FSDP, None, TENSOR, None)),  # width, 3, heads, head width
  (r"(cross|self_attention)/out/kernel", (TENSOR, FSDP)),  # heads x head width, width
  (r"feed_forward/in/kernel", (FSDP, None, TENSOR)),  # width, 2, hidden units
  (r"feed_forward/out/kernel", (TENSOR, FSDP)),  # hidden units, width
  (r"\w+_projection/kernel", (FSDP, TENSOR)),  # width, width
  (r"(fuse|copy)/\w+/kernel", (FSDP, None)),  # width, width
)


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


def training_mesh(config: TrainConfig) -> Mesh:
  """The mesh that a run's settings ask for.

  Raises:
    ConfigError: too few devices, or a batch that the rows' parts or the accumulation do not divide.
  """
  try:
    mesh = build_mesh(
      data_parallel=config.data_parallel, fsdp=config.fsdp, tensor=config.tensor
    )
  except ValueError as error:
    raise ConfigError(str(error)) from None
  check_rows(mesh, config, "train.batch_size", config.batch_size)
  return mesh


def check_rows(mesh: Mesh, config: TrainConfig, name: str, rows: int) -> None:
  """Raises ConfigError unless every part of an accumulated batch divides over the mesh."""
  parts = row_parts(mesh) * config.accumulate
  if rows % parts:
    raise ConfigError(
      f"{name}={rows}: must be a multiple of {parts}: {row_parts(mesh)} devices along the batch, "
      f"train.accumulate={config.accumulate}"
    )


def search_mesh(config: TrainConfig, batch_size: int) -> Mesh | None:
  """This host's devices as a run's settings use them, for searches of so many requests.

  None, the default device alone, where they use one, or do not fit these devices.
  """
  devices, split = jax.local_devices(), config.fsdp * config.tensor
  if len(devices) == 1 or len(devices) % split or batch_size % config.fsdp:
    return None
  available = min(config.data_parallel or len(devices), len(devices) // split)
  data = math.gcd(available, batch_size // config.fsdp)
  if data * split == 1:
    return None
  return build_mesh(
    data_parallel=data, fsdp=config.fsdp, tensor=config.tensor, devices=devices
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
    """As jax.jit's."""
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


def state_sharding(mesh: Mesh, abstract_state: Any) -> Any:
  """A sharding for every leaf of parameters and optimizer state: LAYOUTS, else over `fsdp`."""

  def layout(path, leaf) -> NamedSharding:
    if leaf.ndim < 2 or leaf.size < _MIN_SHARDED_SIZE:
      return replicated(mesh)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = _rule(name, leaf.ndim) or _largest_first(leaf.shape, mesh.shape[FSDP])
    return NamedSharding(mesh, _dividing(axes, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(layout, abstract_state)


def _rule(name: str, ndim: int) -> tuple[str | tuple[str, str] | None, ...] | None:
  for pattern, axes in LAYOUTS:
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
