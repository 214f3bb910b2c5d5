"""What a system gives the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gr4ad_jax.machine.sharding import Layouts

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, count); the mean of anything is sum / count over any number of steps and hosts."""


class Task(NamedTuple):
  """A trainable system."""

  init: Callable[[jax.Array], Any]
  """key -> float32 parameters."""
  loss: Callable[..., Metrics]
  """(params, batch, dropout key or None) -> metrics; sum/count of "loss" is minimised. Behind them
  comes what `frozen` gives, where there is any."""
  layouts: Layouts = ()
  """How parameters lie on a mesh; optimizer state follows them."""
  sparse_tables: tuple[str, ...] = ()
  """Endings of the paths of tables of which a batch touches few rows: where
  `TrainConfig.table_learning_rate` is set they learn by row-wise Adagrad."""
  frozen: Callable[[], Any] | None = None
  """Gives arrays that the loss reads and no step changes, such as the weights beside an adapter:
  they have no gradient, no optimizer state and no place in a checkpoint, and lie by `layouts`."""
  rate: Callable[[str, jax.Array], jax.Array | float] | None = None
  """(path of a parameter, step) -> factor of its learning rate, 0 = it stays; None = 1."""


def count_params(params: Any) -> int:
  """Numbers in all parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
