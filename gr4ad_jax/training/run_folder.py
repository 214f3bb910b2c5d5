"""A run's folder before a training begins: whether one is there, and of which system."""

from __future__ import annotations

from gr4ad_jax.config import ConfigError, read_values
from gr4ad_jax.machine import distributed, storage
from gr4ad_jax.machine.storage import Place


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


def require_system(workdir: Place, system: str) -> None:
  """Raises ConfigError where a folder holds no run, or one of another system."""
  there = read_values(storage.fetch(workdir / "run.json")).get("system", "gr4ad")
  if there != system:
    raise ConfigError(f"{workdir}: holds a run of the system {there!r}, not {system!r}")
