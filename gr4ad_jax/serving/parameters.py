"""Which parameters queries are answered with: the run's, or the newest that are published."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gr4ad_jax.catalog.catalog import NoRoom
from gr4ad_jax.serving.engine import Engine
from gr4ad_jax.serving.metrics import Metrics
from gr4ad_jax.training.published import latest, read_published

LOOK_S = 0.5  # between looks for published parameters


@dataclasses.dataclass
class Parameters:
  """Hands newer parameters to the engine, which begins with the run's; one reader at a time."""

  engine: Engine
  template: Any  # pytree of parameters of the same model
  read_run: Callable[[], tuple[Any, int]]  # the run's parameters and step, as they are on disk now
  published: Path | None  # folder where `gr4ad online` publishes; None = the run's alone
  metrics: Metrics
  _lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

  def __post_init__(self):
    self.name = f"run {self.engine.step}"  # of those that are served; earlier replies go with it

  async def reload(self) -> bool:
    """Takes the newest published parameters, or the run's; returns whether they are others.

    Raises:
      NoRoom: they cannot be read, or are of another model.
    """
    async with self._lock:
      try:
        changed = await asyncio.to_thread(self.take_newest)
      except (ValueError, OSError, KeyError, TypeError) as error:
        self.metrics.reloads.labels("failed").inc()
        raise NoRoom(f"parameters: {error}") from None
      if changed:
        self.metrics.reloads.labels("ok").inc()
      return changed

  async def follow(self) -> None:
    """Waits a moment and looks once; a job to be done again and again."""
    await asyncio.sleep(LOOK_S)
    await self.reload()

  def take_newest(self) -> bool:
    """What `reload` does, for the time before requests; what cannot be read raises as it is."""
    if self.published is None:
      params, step = self.read_run()
      name = f"run {step}"
    elif not (self.published / "latest.json").exists():  # the learner may start later
      return False
    else:
      step = latest(self.published)["step"]
      name = f"published {step}"
      if name != self.name:
        params = read_published(self.published, self.template, step=step)
    if name == self.name:
      return False
    self.engine.replace_params(params, step)
    self.name = name
    return True
