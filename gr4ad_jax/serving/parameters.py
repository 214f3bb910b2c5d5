"""Which parameters queries are answered with: the run's, or the newest that are published.

Parameters that are damaged, not finite, far from those that are served, or useless in a search are
refused: the old ones go on being served, and it is said and counted once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gr4ad_jax.catalog.rooms import NoRoom
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.machine.progress import console
from gr4ad_jax.serving.engine import Engine
from gr4ad_jax.serving.metrics import Metrics
from gr4ad_jax.training.published import UnfitError, latest, read_latest, require_fit

LOOK_S = 0.5  # between looks for published parameters


@dataclasses.dataclass
class Parameters:
  """Hands newer parameters to the engine, which begins with the run's; one reader at a time."""

  engine: Engine
  template: Any  # pytree of parameters of the same model, those that the engine begins with
  read_run: Callable[[], tuple[Any, int]]  # the run's parameters and step, as they are on disk now
  published: Path | None  # folder where `gr4ad online` publishes; None = the run's alone
  canary: Example  # a request that new parameters have to answer before they are served
  metrics: Metrics
  _lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

  def __post_init__(self):
    self.name = f"run {self.engine.step}"  # of those that are served; earlier replies go with it
    self._seen: object = None  # the state of the folder at the last look
    self._refused: object = None  # what of it was refused, None = nothing
    try:
      self._largest = require_fit(self.template)
    except UnfitError as error:
      raise ConfigError(f"the run's parameters cannot be served: {error}") from None

  def begin(self) -> None:
    """Takes what is published when a server starts; what is unfit does not keep it down."""
    if self.published is None:
      return
    try:
      if not self.take_newest():
        console.print(f"{self.published}: nothing is published yet; serving the run's parameters")
    except ValueError as error:
      self._refuse(error)

  async def reload(self) -> bool:
    """Takes the newest published parameters, or the run's; returns whether they are others.

    Raises:
      NoRoom: they cannot be read, or are unfit.
    """
    async with self._lock:
      try:
        changed = await asyncio.to_thread(self.take_newest)
      except ValueError as error:
        self._refuse(error)
        raise NoRoom(f"parameters: {error}") from None
      except (OSError, KeyError, TypeError) as error:
        self.metrics.reloads.labels("failed").inc()
        raise NoRoom(f"parameters: {error}") from None
      if changed:
        self.metrics.reloads.labels("ok").inc()
      return changed

  async def follow(self) -> None:
    """Waits a moment and looks once; a job to be done again and again."""
    await asyncio.sleep(LOOK_S)
    if self._refused is not None and self._refused == self._state():
      return
    try:
      await self.reload()
    except NoRoom:
      if self._refused is None:  # no refusal, which is told already
        raise

  def take_newest(self) -> bool:
    """What `reload` does, in any thread.

    Raises:
      ValueError: the parameters are unfit.
    """
    self._seen, self._refused = self._state(), None
    where = "the run"
    if self.published is None:
      params, step = self.read_run()
      name = f"run {step}"
    elif not (self.published / "latest.json").exists():  # the learner may start later
      return False
    else:
      pointer = latest(self.published)
      step, where = pointer["step"], self.published / str(pointer.get("file"))
      name = f"published {step} {pointer.get('sha256')}"
      if name != self.name:
        params = read_latest(self.published, self.template, pointer)
    if name == self.name:
      return False
    try:
      largest = require_fit(params, self._largest)
      self.engine.replace_params(params, step, canary=self.canary)
    except ValueError as error:
      raise UnfitError(f"{where}: {error}") from None
    self.name, self._largest = name, largest
    return True

  def _refuse(self, error: ValueError) -> None:
    """Counts and tells that the old parameters go on being served."""
    self._refused = self._seen
    self.metrics.reloads.labels("refused").inc()
    console.print(f"parameters refused: {error}; those of step {self.engine.step} are served on")

  def _state(self) -> object:
    """Changes with everything that a learner does in its folder."""
    found = []
    for file in self.published.glob("*") if self.published else ():
      with contextlib.suppress(FileNotFoundError):  # the learner has removed it meanwhile
        found.append((file.name, file.stat().st_mtime_ns, file.stat().st_size))
    return sorted(found)
