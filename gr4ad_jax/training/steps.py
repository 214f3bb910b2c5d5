"""The loop of steps, one for all that learns: runs, online learning, quantizers, encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from gr4ad_jax.training.task import Metrics

StateT = TypeVar("StateT")


def run_steps(
  step_fn: Callable[[StateT, Any], tuple[StateT, Metrics]],
  state: StateT,
  batches: Iterable[Any],
  *,
  after_step: Callable[[int, StateT, Metrics], None],
  first_step: int = 0,
) -> StateT:
  """Takes one step for each batch.

  Args:
    step_fn: (state, batch) -> (state, metrics); may give the buffers of the state away.
    state: what is learned, after `first_step` steps.
    batches: of the steps that are left.
    after_step: called as (steps done, state, metrics). What is logged, measured, saved or published
      is its matter, and it ends the loop early by raising.
    first_step: steps done before.

  Returns:
    The state after the last batch.
  """
  for step, batch in enumerate(batches, first_step + 1):
    state, metrics = step_fn(state, batch)
    after_step(step, state, metrics)
  return state
