"""How long a training will take, said once its first steps are measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax

from gr4ad_jax.machine.progress import console

MEASURED_STEPS, MEASURED_S = 5, 10.0  # after the first step, which compiles; whichever comes first


class Pace:
  """Times the first steps of a training on this machine, and nothing between them."""

  def __init__(self, instead: Mapping[str, float] | None = None):
    """`instead`: what else could be trained, and the share of this training's time it would take.
    """
    self._instead = instead or {}
    self._steps, self._seconds, self._begin = 0, 0.0, None
    self._said = False

  def before(self) -> None:
    """To be called before each step but the first, which compiles."""
    self._begin = time.monotonic()

  def after(self, done: Any, *, left: int) -> None:
    """To be called after each step.

    Args:
      done: what the step computed; waited for while steps are measured.
      left: steps to come.
    """
    if self._said or self._begin is None:
      return
    jax.block_until_ready(done)
    self._seconds += time.monotonic() - self._begin
    self._steps += 1
    if self._steps >= MEASURED_STEPS or self._seconds >= MEASURED_S:
      self._said = True
      if left:
        self._say(self._seconds / self._steps, left)

  def _say(self, step_s: float, left: int) -> None:
    all_s = step_s * left
    said = f"{in_words(step_s)} a step on this machine, {in_words(all_s)} for the {left:,} left"
    for name, share in self._instead.items():
      said += f"; {name} would take about {in_words(share * all_s)}"
    console.print(said)


def in_words(seconds: float) -> str:
  """A span in its largest fitting unit: 12.3 ms, 4.1 s, 7.5 min, 293.0 h."""
  for unit, length in (("h", 3600), ("min", 60), ("s", 1)):
    if seconds >= 2 * length:
      return f"{seconds / length:,.1f} {unit}"
  return f"{1e3 * seconds:,.1f} ms"
