"""FLOPs of the matrix products of any program, counted in its trace: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from gr4ad_jax.training.task import Task


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of all matrix products of a call, two for each product that is summed up.

  Loops count as often as they run, of branches the dearest. Element-wise work is left out.

  Args:
    function: to be called.
    args: arrays, or their shapes.

  Raises:
    ValueError: a matrix product stands in a loop whose length is known only as it runs.
  """
  return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def example_flops(task: Task, batch: Any) -> int:
  """FLOPs of learning from one row: forward and backward, with what the task computes twice.

  Args:
    task: what is trained.
    batch: of one row, arrays or their shapes.
  """
  key = jax.random.key(0)
  gradient = jax.grad(lambda params, batch: task.loss(params, batch, key)["loss"][0])
  return matmul_flops(gradient, jax.eval_shape(task.init, key), batch)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
  parts = [_of_jaxpr(part) for part in _inside(equation.params)]
  match equation.primitive.name:
    case "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      summed = math.prod(left[axis] for axis in contracted)
      return 2 * summed * math.prod(equation.outvars[0].aval.shape)
    case "scan":
      return equation.params["length"] * sum(parts)
    case "cond":
      return max(parts)
    case "while" if any(parts):
      raise ValueError("a matrix product in a loop of unknown length")
  return sum(parts)


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
  """The programs that an operation holds."""
  for value in params.values():
    for part in value if isinstance(value, tuple | list) else (value,):
      if isinstance(part, ClosedJaxpr):
        yield part.jaxpr
      elif isinstance(part, Jaxpr):
        yield part
