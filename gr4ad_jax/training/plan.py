"""What training any task will need, before anything is started: `gr4ad plan`.

Parameters, optimizer state and their layout are those of the program itself, traced without
computing. Activations are what its backward pass keeps, as traced: an upper bound, for the compiler
fuses some away. A step takes as long as its products at the assumed share of the peak (`mfu`), or
as moving weights, optimizer state and activations through memory, whichever is longer; time between
devices is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from gr4ad_jax.config import ConfigError, require
from gr4ad_jax.machine import sharding
from gr4ad_jax.machine.peaks import Device
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.mesh import check_rows
from gr4ad_jax.training.task import Task, count_params
from gr4ad_jax.training.train_step import abstract_state


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one training run will need.

  Attributes:
    num_params: numbers in all parameters.
    mesh: devices along data, fsdp and tensor.
    flops_per_example: of one request, forward and backward, recomputation left out.
    flops_per_step: of the whole batch.
    params_bytes, optimizer_bytes, gradients_bytes: on each device; the average of `train.ema` is
      counted with the optimizer.
    activations_bytes: on each device, kept for the backward pass of one part of the batch.
    memory_bytes: of one device.
    mfu: assumed share of the peak.
    step_s: at that share, or as memory allows.
    examples_per_s: accordingly.
    run_s: of all steps.
  """

  num_params: int
  mesh: tuple[int, int, int]
  flops_per_example: int
  flops_per_step: int
  params_bytes: int
  optimizer_bytes: int
  gradients_bytes: int
  activations_bytes: int
  memory_bytes: float
  mfu: float
  step_s: float
  examples_per_s: float
  run_s: float

  @property
  def needed_bytes(self) -> int:
    """All of the above on one device; gradients and updates live side by side for a moment."""
    return (
      self.params_bytes + self.optimizer_bytes + 2 * self.gradients_bytes + self.activations_bytes
    )

  @property
  def fits(self) -> bool:
    """Whether a device's memory holds it."""
    return self.needed_bytes <= self.memory_bytes


def plan_run(
  task: Task,
  config: TrainConfig,
  example: Any,
  *,
  example_flops: int,
  device: Device,
  num_devices: int,
  mfu: float = 0.4,
) -> Plan:
  """Plans training on a number of devices of one kind.

  Args:
    task: what is trained.
    config: its mesh must fit the devices.
    example: a batch of one row, arrays or their shapes.
    example_flops: of one row, forward and backward.
    device: what each device can do.
    num_devices: how many.
    mfu: assumed share of the peak.

  Raises:
    ConfigError: the mesh does not fit the devices, or the batch not the mesh.
  """
  require(0 < mfu <= 1, "mfu", mfu, "needs (0, 1]")
  mesh = _mesh(config, num_devices)
  check_rows(mesh, config, "train.batch_size", config.batch_size)
  state = abstract_state(task, config, mesh)
  params_bytes = _bytes_per_device(state.params)
  rows = config.batch_size // (sharding.row_parts(mesh) * config.accumulate)
  per_step = example_flops * config.batch_size
  optimizer_bytes = _bytes_per_device((state.optimizer, state.ema))
  activations_bytes = _kept_for_backward(task, example, state.params, rows)
  # Weights are read twice for each part and written once; gradients, optimizer state and what is
  # kept for the backward pass are written and read.
  moved = params_bytes * (2 * config.accumulate + 1)
  moved += 2 * (params_bytes + optimizer_bytes + config.accumulate * activations_bytes)
  step_s = max(
    per_step / (device.flops_per_s * num_devices * mfu), moved / device.bytes_per_s
  )
  return Plan(
    num_params=count_params(state.params),
    mesh=tuple(mesh.shape.values()),
    flops_per_example=example_flops,
    flops_per_step=per_step,
    params_bytes=params_bytes,
    optimizer_bytes=optimizer_bytes,
    gradients_bytes=params_bytes,
    activations_bytes=activations_bytes,
    memory_bytes=device.memory_bytes,
    mfu=mfu,
    step_s=step_s,
    examples_per_s=config.batch_size / step_s,
    run_s=step_s * config.num_steps,
  )


def _mesh(train: TrainConfig, num_devices: int) -> AbstractMesh:
  split = train.fsdp * train.tensor
  data = train.data_parallel or num_devices // split
  if data < 1 or data * split != num_devices:
    raise ConfigError(
      f"train.data_parallel={train.data_parallel}, train.fsdp={train.fsdp}, "
      f"train.tensor={train.tensor}: do not fill {num_devices} devices"
    )
  return AbstractMesh(
    (data, train.fsdp, train.tensor), (sharding.DATA, sharding.FSDP, sharding.TENSOR),
    axis_types=(AxisType.Auto,) * 3,
  )


def _bytes_per_device(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _kept_for_backward(task: Task, example: Any, params: Any, rows: int) -> int:
  """Bytes that the loss of so many rows keeps between its passes, parameters left out."""
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), example)
  plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  key = jax.random.key(0)  # with dropout, as training has it

  def kept(params, batch):
    return jax.vjp(lambda params: task.loss(params, batch, key)["loss"][0], params)[1]

  # What jax.vjp returns is a pytree of all that it keeps.
  leaves = [leaf for leaf in jax.tree.leaves(jax.eval_shape(kept, plain, batch)) if leaf.ndim]
  own = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(plain)}
  return sum(
    leaf.size * leaf.dtype.itemsize for leaf in leaves if (leaf.shape, leaf.dtype) not in own
  )
