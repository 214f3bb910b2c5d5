"""What an experiment keeps, so that it goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gr4ad_jax.machine import atomic


def kept_arrays(file: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Arrays of an .npz file; made, and written whole or not at all, where it is not there."""
  if not file.exists():
    arrays = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.new_file(file) as out:
      np.savez_compressed(out, **arrays)
  with np.load(file) as arrays:
    return dict(arrays)
