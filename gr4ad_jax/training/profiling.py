"""Where the time of some steps goes: a trace for xprof, and the share of the peak (MFU)."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jax

from gr4ad_jax.config import ConfigError, require


def parse_steps(text: str) -> range:
  """Steps 10 to 20, both included, of "10:20".

  Raises:
    ConfigError: not of this form, or no step.
  """
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if not match:
    raise ConfigError(f"profile={text!r}: needs FIRST:LAST, as 10:20")
  steps = range(int(match[1]), int(match[2]) + 1)
  require(steps.start >= 1 and len(steps) >= 1, "profile", text, "needs 1 <= FIRST <= LAST")
  return steps


class Trace:
  """Traces some steps into FOLDER/plugins/profile, which `xprof` and TensorBoard read.

  A run that ends earlier, or fails, still writes what it has.
  """

  def __init__(self, folder: Path, steps: range | None):
    """Steps None = none."""
    self._folder, self._steps, self._on = folder, steps, False

  def before(self, step: int) -> None:
    """To be called before each step; a resumed run may begin in the middle."""
    if self._steps and step in self._steps and not self._on:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def after(self, step: int, done: Any) -> None:
    """To be called after each step; `done` is waited for where the trace ends."""
    if self._on and step == self._steps[-1]:
      jax.block_until_ready(done)
      self.close()

  def close(self) -> None:
    """Writes a trace that is still open."""
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


class Speed:
  """Examples/s and MFU since the last call, with work that is not training left out.

  MFU is matrix-product FLOP/s of the model over the peak of the devices; recomputation does not
  count as work.
  """

  def __init__(self, *, example_flops: float = 0.0, peak: float = 0.0):
    """FLOPs of an example and the FLOP/s of all devices; 0 where one is not known."""
    self._share = example_flops / peak if peak > 0 else 0.0
    self.restart()

  def restart(self) -> None:
    """Begins to count here."""
    self._rows, self._start = 0, time.monotonic()

  def add(self, rows: int) -> None:
    """Counts the examples of a step."""
    self._rows += rows

  def values(self) -> dict[str, float]:
    """{} where nothing was counted."""
    if not self._rows:
      return {}
    rate = self._rows / (time.monotonic() - self._start)
    return {"examples_per_second": rate} | ({"mfu": rate * self._share} if self._share else {})
