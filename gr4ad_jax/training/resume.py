"""State of a long computation in one file, so that an interrupted one goes on where it was.

For fits of minutes that belong to one input: the file is found by what the result depends on, and
goes when the fit is done. Runs of hours keep steps apart, spread over hosts: `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.machine import atomic
from gr4ad_jax.training.steps import run_steps
from gr4ad_jax.training.task import Metrics

StateT = TypeVar("StateT")

_FINGERPRINT = "_fingerprint"


def fingerprint(*parts: Any) -> str:
  """A short name for inputs and settings: arrays by shape and bytes, other things by their JSON."""
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    if isinstance(part, np.ndarray):
      digest.update(f"{part.dtype.str}{part.shape}".encode())
      digest.update(np.ascontiguousarray(part).data)
    else:
      digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    digest.update(b"\0")
  return digest.hexdigest()


class ResumeFile:
  """Named arrays that a computation writes from time to time and reads when it starts again.

  A save replaces the file as a whole, so that a killed process leaves the old state or the new one.
  """

  def __init__(self, path: Path, key: str, *, seconds_between_saves: float = 20.0):
    """Opens nothing yet.

    Args:
      path: of the .npz file.
      key: `fingerprint` of everything the result depends on; the state of another one is ignored.
      seconds_between_saves: the next save is `due` this long after the last one.
    """
    self._path, self._key = path, key
    self._seconds, self._last = seconds_between_saves, time.monotonic()

  def load(self) -> dict[str, np.ndarray] | None:
    """The saved arrays; None where there are none for this key, or the file is damaged."""
    try:
      with self._path.open("rb") as raw, np.load(raw) as arrays:  # NumPy leaves damaged ones open
        if str(arrays[_FINGERPRINT]) != self._key:
          return None
        return {name: arrays[name] for name in arrays.files if name != _FINGERPRINT}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      return None

  def due(self) -> bool:
    """True once it is time for another save."""
    return time.monotonic() - self._last >= self._seconds

  def save(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the state, whether or not it is `due`."""
    with atomic.new_file(self._path) as file:
      np.savez(file, **{_FINGERPRINT: np.array(self._key)}, **arrays)
    self._last = time.monotonic()

  def remove(self) -> None:
    """Deletes the file: the computation is done."""
    self._path.unlink(missing_ok=True)


class Upkeep(NamedTuple):
  """What goes on around a fit: a bar that shows it, a file that an interrupted one goes on from."""

  resume: ResumeFile | None = None  # which the caller removes; None keeps nothing
  progress: Callable | None = None  # called as `progress(steps, description=, total=, completed=)`
  description: str = ""  # of the steps
  name: str = "train"  # of the state in the file
  beside: Mapping[str, np.ndarray] = {}  # what else the file has to hold

  def saved(self) -> dict[str, np.ndarray] | None:
    """What the file holds; None where it has no state of this name."""
    arrays = None if self.resume is None else self.resume.load()
    return arrays if arrays is not None and f"{self.name}_step" in arrays else None


def run_fit(
  step_fn: Callable[[StateT, Any], tuple[StateT, Metrics]],
  state: StateT,
  batch_of: Callable[[int], Any],
  num_steps: int,
  upkeep: Upkeep,
  *,
  layout: Any = None,
  after_step: Callable[[int, StateT], None] | None = None,
) -> StateT:
  """`run_steps` that shows its progress, and goes on where an interrupted one of this input was.

  Args:
    step_fn: (state, batch) -> (state, metrics).
    state: of step 0; the caller's arrays survive.
    batch_of: steps done before -> the batch of the next one.
    num_steps: in all.
    upkeep: progress and file.
    layout: of the state on the devices; None = the default.
    after_step: called as (steps done, state).
  """
  leaves, structure = jax.tree.flatten(state)
  name, first_step = upkeep.name, 0
  if saved := upkeep.saved():
    leaves = [saved[f"{name}_{i}"] for i in range(len(leaves))]
    first_step = int(saved[f"{name}_step"])
  # A copy, as steps give the buffers of their state away.
  state = jax.device_put(jax.tree.unflatten(structure, map(jnp.array, leaves)), layout)
  steps = range(first_step, num_steps)
  if upkeep.progress is not None:
    steps = upkeep.progress(
      steps, description=upkeep.description, total=num_steps, completed=first_step
    )

  def keep(step: int, state: StateT, metrics: Metrics) -> None:
    if after_step is not None:
      after_step(step, state)
    if upkeep.resume is not None and upkeep.resume.due():
      arrays = {f"{name}_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
      upkeep.resume.save({**upkeep.beside, **arrays, f"{name}_step": np.array(step)})

  return run_steps(
    step_fn, state, map(batch_of, steps), after_step=keep, first_step=first_step
  )
