"""What a system gives the training loop: two functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, count); the mean of anything is sum / count over any number of steps and hosts."""


class Task(NamedTuple):
  """A trainable system."""

  init: Callable[[jax.Array], Any]
  """key -> float32 parameters."""
  loss: Callable[[Any, Any, jax.Array | None], Metrics]
  """(params, batch, dropout key or None) -> metrics; sum/count of "loss" is minimised."""
