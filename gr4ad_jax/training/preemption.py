"""A request to stop (SIGTERM): asked for between steps, so that what is learned is saved first."""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils


class PreemptedError(RuntimeError):
  """Training was asked to stop and has saved its state; the message says how to go on."""


class Preemption:
  """Watches for SIGTERM while a training runs.

  With several processes JAX's own service watches, and all of them agree on the step to stop at.
  Elsewhere than in the main thread nothing is watched.
  """

  def __init__(self):
    self._asked = False
    self._before = None

  def __enter__(self) -> Preemption:
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, *_) -> None:
    self._asked = True

  def reached(self, step: int) -> bool:
    """Whether to save and stop after this step; every process asks after every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked
