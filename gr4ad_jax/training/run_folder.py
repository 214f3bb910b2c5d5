"""A run's folder before a training begins: whether one is there, and of which system."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from gr4ad_jax.config import ConfigError, differences, read_values
from gr4ad_jax.machine import distributed, storage
from gr4ad_jax.machine.storage import Place

RunT = TypeVar("RunT", bound=Any)


def is_taken(workdir: Place, *, resume: bool) -> bool:
  """Whether a run is there, to go on with; all processes have to ask.

  Raises:
    ConfigError: one is, and nobody asked to go on with it.
  """
  taken = storage.exists(workdir / "run.json")
  distributed.wait_for_all("looked for run.json")  # before the first process writes it
  if taken and not resume:
    raise ConfigError(
      f"{workdir}: holds a run already; pass --resume to go on with it, or another --workdir"
    )
  return taken


def changed_settings(there: RunT, run: RunT) -> list[str]:
  """Settings in which a run differs from the one that is there, as `config.differences`.

  Places of data are none of them: data may have moved, and the fingerprint says if they are others.
  """
  places = {field.name for field in dataclasses.fields(run)} & {"data", "sids"}
  return differences(
    dataclasses.replace(there, **{name: getattr(run, name) for name in places}), run
  )


def going_on(run: RunT, there: RunT, workdir: Place) -> RunT:
  """The run with the fingerprint of the one that is there, which it goes on with.

  Raises:
    ConfigError: that one has other settings.
  """
  run = dataclasses.replace(run, fingerprint=there.fingerprint)
  if changed := changed_settings(there, run):
    raise ConfigError(f"{workdir}: the run there has other settings ({', '.join(changed)})")
  return run


def require_system(workdir: Place, system: str) -> None:
  """Raises ConfigError where a folder holds no run, or one of another system."""
  there = read_values(storage.fetch(workdir / "run.json")).get("system", "gr4ad")
  if there != system:
    raise ConfigError(f"{workdir}: holds a run of the system {there!r}, not {system!r}")
