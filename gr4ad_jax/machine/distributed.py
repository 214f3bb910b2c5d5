"""Several processes as one: who joins whom, and what only one of them does.

    GR4AD_DISTRIBUTED=auto               a Cloud TPU slice, SLURM, Open MPI: JAX finds the others
    GR4AD_DISTRIBUTED=HOST:PORT,2,0      the first of two processes, which listens at HOST:PORT

`launch_tpu.sh` sets it. Unset, a process stands alone.
"""

from __future__ import annotations

import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine.progress import be_quiet

VARIABLE = "GR4AD_DISTRIBUTED"


def join() -> None:
  """Joins the other processes where there are any; before anything asks for a device.

  Only the first process tells of its progress.

  Raises:
    ConfigError: the variable is not of the form above.
  """
  value = os.environ.get(VARIABLE, "")
  if not value:
    return
  if value == "auto":
    jax.distributed.initialize()
  else:
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", value)
    if not match or int(match[3]) >= int(match[2]):
      raise ConfigError(f"{VARIABLE}={value!r}: needs auto, or HOST:PORT,PROCESSES,NUMBER")
    jax.distributed.initialize(match[1], int(match[2]), int(match[3]))
  if not is_first():
    be_quiet()


def is_first() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def first_says(truth: bool) -> bool:
  """What the first process says, on every process."""
  if jax.process_count() == 1:
    return truth
  return bool(multihost_utils.broadcast_one_to_all(np.int32(truth)))


def share_of(number: int, unit: int) -> range:
  """The positions of this process's part of `number` rows, in whole units of work.

  All parts are equally long, so that `gather` can join them: the last may reach beyond the rows.
  """
  units = -(-number // (unit * jax.process_count()))
  size = units * unit
  return range(jax.process_index() * size, (jax.process_index() + 1) * size)


def gather(part: Any, number: int) -> Any:
  """The rows of all processes in their order, on every process.

  Args:
    part: tree of arrays, this process's `share_of` the rows.
    number: rows in all; those beyond, which fill the last part, are left out.
  """
  if jax.process_count() == 1:
    return jax.tree.map(lambda x: x[:number], part)  # without a copy to the host
  joined = multihost_utils.process_allgather(part, tiled=True)
  return jax.tree.map(lambda x: np.asarray(x)[:number], joined)


def whole(arrays: Any) -> Any:
  """Arrays on any devices of any processes as numpy arrays, on every process; all have to ask."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, arrays)
  return multihost_utils.process_allgather(arrays, tiled=True)


def local(replicated: Any) -> Any:
  """This process's own copy of arrays that all processes hold whole."""
  return jax.tree.map(lambda x: x.addressable_data(0), replicated)
