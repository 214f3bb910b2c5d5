"""Parameters handed from a learner to whoever serves or generates: one file each, and a pointer.

    FOLDER/params-00000500.msgpack
    FOLDER/latest.json            {"step": 500, "file": ..., and what the learner knows of them}

Both appear in one piece, so a reader sees whole parameters at any moment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flax import serialization

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import atomic


def publish(folder: Path, step: int, params: Any, about: dict[str, Any]) -> None:
  """Makes parameters the latest ones; the same step again replaces the same file.

  Args:
    folder: created where missing.
    step: of the learner.
    params: pytree of arrays.
    about: JSON values that readers may want.
  """
  name = f"params-{step:08d}.msgpack"
  with atomic.new_file(folder / name, durable=True) as file:
    file.write(serialization.to_bytes(params))
  with atomic.new_file(folder / "latest.json", durable=True) as file:
    file.write(json.dumps(about | {"step": step, "file": name}, indent=2).encode())


def latest(folder: Path) -> dict[str, Any]:
  """What the pointer says.

  Raises:
    ConfigError: nothing has been published.
  """
  try:
    return json.loads((folder / "latest.json").read_text())
  except FileNotFoundError:
    raise ConfigError(f"{folder}: nothing is published here; `gr4ad online` does that") from None


def read_published(folder: Path, template: Any, *, step: int | None = None) -> Any:
  """Published parameters, shaped as `template`.

  Args:
    folder: as given to `publish`.
    template: pytree of arrays of the same model.
    step: the newest parameters of at most this step; None = the latest.

  Raises:
    ConfigError: nothing is published, or nothing of so early a step.
  """
  steps = published_steps(folder)
  if step is None:
    step = latest(folder)["step"]
  steps = [at for at in steps if at <= step]
  if not steps:
    raise ConfigError(f"{folder}: no parameters of step {step} or before")
  return serialization.from_bytes(
    template, (folder / f"params-{steps[-1]:08d}.msgpack").read_bytes()
  )


def published_steps(folder: Path) -> list[int]:
  """Steps whose parameters are there, ascending."""
  return sorted(int(path.stem.split("-")[1]) for path in folder.glob("params-*.msgpack"))


def forget_before(folder: Path, step: int) -> None:
  """Removes all parameters but the newest of at most this step, and later ones."""
  older = [at for at in published_steps(folder) if at <= step]
  for at in older[:-1]:
    (folder / f"params-{at:08d}.msgpack").unlink()
