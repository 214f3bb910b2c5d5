"""A family of compiled programs, one for each beam factor and batch size: compiled, timed, used.

All of them before the first request; or one, which answers everything, and the others meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax.machine.progress import track
from gr4ad_jax.serving.config import ServingConfig

REPEATS = 5  # timed calls of a program


class NotCompiled(Exception):
  """The program that is asked for is still being compiled."""


class Timing(NamedTuple):
  """How long programs take."""

  call_s: dict[tuple[float, int], float]  # (factor, batch size) -> seconds
  together: float  # times as long where as many calls run as may run


class Compiled:
  """An engine's programs; an engine is one, and says how each is run.

  Attributes:
    config: its batch sizes and beam factors are those that can be used now.
    call_s, together: the `Timing` of these.
  """

  def __init__(self, config: ServingConfig):
    self.config = self._wanted = config
    self.call_s, self.together = Timing({}, 1.0)
    self._stopped = False

  @property
  def is_whole(self) -> bool:
    """Whether everything that is wanted can be used."""
    return self.config is self._wanted

  def run_program(self, factor: float, size: int, *, conditions: bool) -> None:
    """Runs the program for these beams and so many requests, with conditions on ads or without."""
    raise NotImplementedError

  def compile_all(self) -> None:
    """Compiles and times every program, and uses them from now on."""
    timing = self.compile_rest()
    assert timing is not None, "stopped before it began"
    self.use_all(timing)

  def compile_one(self) -> None:
    """Compiles the program that answers everything: base widths, smallest batch, conditions."""
    self.config = dataclasses.replace(
      self._wanted, batch_sizes=self._wanted.batch_sizes[:1], beam_factors=(1.0,)
    )
    timing = self._compiled(self.config, (True,))
    assert timing is not None, "stopped before it began"
    self.call_s, self.together = timing

  def compile_rest(self) -> Timing | None:
    """What `use_all` takes, None after `stop`; any thread may call, and requests go on."""
    return self._compiled(self._wanted, (True, False))

  def use_all(self, timing: Timing) -> None:
    """From now on every program may be used."""
    self.call_s, self.together = timing
    self.config = self._wanted

  def stop(self) -> None:
    """Ends a `compile_rest` after the program that it is at."""
    self._stopped = True

  def _compiled(self, config: ServingConfig, conditions: tuple[bool, ...]) -> Timing | None:
    programs = [(factor, size) for size in config.batch_sizes for factor in config.beam_factors]
    for program in track(programs, "compile searches"):
      for with_conditions in conditions:
        if self._stopped:
          return None
        self.run_program(*program, conditions=with_conditions)
    return timed(
      functools.partial(self.run_program, conditions=conditions[-1]), programs, config
    )


def seconds_of(call: Callable[[], Any]) -> float:
  """How long a call takes until its arrays are there."""
  began = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - began


def timed(
  call: Callable[[float, int], Any], programs: Sequence[tuple[float, int]], config: ServingConfig
) -> Timing:
  """Median seconds of compiled programs, and how many times as long one takes beside others.

  Args:
    call: runs the program of (factor, batch size).
    programs: all of them.
    config: `calls_at_once` run side by side, which takes each 1 to so many times as long.
  """
  # By turns, so that a machine that is slower for a while is so for all of them.
  seconds = [
    [seconds_of(functools.partial(call, *program)) for program in programs]
    for _ in range(REPEATS)
  ]
  call_s = dict(zip(programs, np.median(seconds, axis=0).tolist(), strict=True))
  at_once, largest = config.calls_at_once, (1.0, config.batch_sizes[-1])
  if at_once == 1:
    return Timing(call_s, 1.0)
  rounds = 4
  with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
    begin = time.perf_counter()
    for done in [threads.submit(call, *largest) for _ in range(at_once * rounds)]:
      done.result()
    together_s = (time.perf_counter() - begin) / rounds
  return Timing(call_s, min(max(together_s / call_s[largest], 1.0), float(at_once)))
