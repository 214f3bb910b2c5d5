"""State of a long computation in one file, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gr4ad_jax.machine import atomic

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
      with np.load(self._path) as arrays:
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
