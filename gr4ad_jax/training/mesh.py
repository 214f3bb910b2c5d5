"""Meshes as a run's settings ask for them."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine.sharding import build_mesh, row_parts
from gr4ad_jax.training.config import TrainConfig


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
