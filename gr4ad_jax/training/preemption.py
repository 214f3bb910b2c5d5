"""A request to stop: asked for between steps, so that what is learned is saved first.

It is SIGTERM, as machines send it that are taken away, or SIGINT, as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class PreemptedError(RuntimeError):
  """Training was asked to stop and has saved its state; the message says how to go on."""

  def __init__(self, message: str, asked: signal.Signals):
    """`asked`: the signal."""
    super().__init__(message)
    self.exit_code = 128 + asked  # what a shell says of a process that the signal ends


class Preemption:
  """Watches for SIGTERM and Ctrl-C while a training runs; a second Ctrl-C ends it at once.

  With several processes JAX's own service watches for SIGTERM, and all of them agree on the step to
  stop at; Ctrl-C is handed on to it. Elsewhere than in the main thread nothing is watched.
  """

  def __init__(self):
    self.asked: signal.Signals | None = None
    self._several = jax.process_count() > 1
    self._before: dict[signal.Signals, object] = {}

  def __enter__(self) -> Preemption:
    if threading.current_thread() is not threading.main_thread():
      return self
    if not self._several:
      self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job
      self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *_) -> None:
    for kind, handler in self._before.items():
      signal.signal(kind, handler)

  def _note(self, kind: int, _) -> None:
    if kind == signal.SIGINT:
      if self.asked == signal.SIGINT:
        raise KeyboardInterrupt
      # Not print, which may be what was interrupted.
      os.write(2, b"\nsaving after the present step; Ctrl-C again stops without it\n")
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)
    self.asked = signal.Signals(kind)

  def reached(self, step: int) -> bool:
    """Whether to save and stop after this step; every process asks after every step."""
    if self._several:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.asked is not None
