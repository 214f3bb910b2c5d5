"""Parameters handed from a learner to whoever serves or generates: one file each, and a pointer.

    FOLDER/params-00000500.msgpack
    FOLDER/latest.json            {"step": 500, "file": ..., "sha256": ..., "earlier": {file:
                                  sha256}, and what the learner knows of them}

Both appear in one piece, so a reader sees whole parameters at any moment. Nothing that is not
finite is published, and readers take nothing whose bytes are not those that were published.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import atomic

MOST_GROWTH = 100.0  # of the largest number of an array, from one publication to the next


class UnfitError(ConfigError):
  """Parameters that must not be served; the message says why."""


def require_fit(params: Any, before: dict[str, float] | None = None) -> dict[str, float]:
  """Raises UnfitError where parameters are not finite, or have jumped from those before.

  Args:
    params: pytree of arrays.
    before: what this returned for the parameters that they follow; None = they follow none.

  Returns:
    The largest number of each array, by path.
  """
  largest = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    most = float(np.max(np.abs(np.asarray(leaf, np.float32)), initial=0.0))
    if not math.isfinite(most):
      raise UnfitError(f"{name} is not finite")
    if before is not None and most > MOST_GROWTH * max(1.0, before.get(name, 0.0)):
      raise UnfitError(f"{name} has jumped: numbers up to {most:.3g}, {before[name]:.3g} before")
    largest[name] = most
  return largest


def publish(folder: Path, step: int, params: Any, about: dict[str, Any]) -> None:
  """Makes parameters the latest ones; the same step again replaces the same file.

  Args:
    folder: created where missing.
    step: of the learner.
    params: pytree of arrays.
    about: JSON values that readers may want.

  Raises:
    UnfitError: a number is not finite; nothing is written.
  """
  require_fit(params)
  data, name = serialization.to_bytes(params), _name(step)
  known = _checksums(folder)
  with atomic.new_file(folder / name, durable=True) as file:
    file.write(data)
  _point(folder, step, known | {name: hashlib.sha256(data).hexdigest()}, about)


def back_to(folder: Path, step: int, about: dict[str, Any]) -> int:
  """Makes the newest parameters of at most this step the latest ones again; later ones go.

  Args:
    folder: as given to `publish`.
    step: the last good one.
    about: JSON values that readers may want.

  Returns:
    The step that is the latest now.

  Raises:
    ConfigError: nothing of so early a step is there.
  """
  steps, known = published_steps(folder), _checksums(folder)
  good = _newest(folder, steps, step)
  _point(folder, good, known, about)
  for later in steps:
    if later > step:
      (folder / _name(later)).unlink()
  return good


def latest(folder: Path) -> dict[str, Any]:
  """What the pointer says.

  Raises:
    ConfigError: nothing has been published, or the pointer is damaged.
  """
  try:
    found = json.loads((folder / "latest.json").read_bytes())
  except FileNotFoundError:
    raise ConfigError(f"{folder}: nothing is published here; `gr4ad online` does that") from None
  except ValueError:
    found = None
  if not isinstance(found, dict) or not isinstance(found.get("step"), int):
    file = folder / "latest.json"
    raise UnfitError(f"{file}: is damaged; the learner's next publication mends it")
  return found


def read_latest(folder: Path, template: Any, pointer: dict[str, Any]) -> Any:
  """The parameters that a pointer names; arguments and errors as `read_published`.

  `pointer` is what `latest` said.
  """
  return _read(folder / _name(pointer["step"]), pointer.get("sha256"), template)


def read_published(folder: Path, template: Any, *, step: int) -> Any:
  """The newest parameters of at most one step, shaped as `template`.

  Args:
    folder: as given to `publish`.
    template: pytree of arrays of the same model.
    step: of the learner.

  Raises:
    ConfigError: nothing of so early a step is published.
    UnfitError: the file is not what was published, is of another model, or not finite.
  """
  name = _name(_newest(folder, published_steps(folder), step))
  return _read(folder / name, _checksums(folder).get(name), template)


def _read(file: Path, checksum: str | None, template: Any) -> Any:
  """Earlier versions wrote no checksum."""
  try:
    data = file.read_bytes()
  except FileNotFoundError:
    raise UnfitError(f"{file}: is gone, and was published") from None
  if checksum is not None and checksum != hashlib.sha256(data).hexdigest():
    raise UnfitError(f"{file}: is damaged; its bytes are not those that were published")
  try:
    params = serialization.from_bytes(template, data)
  except Exception as error:  # whatever reading half a file, or another one, gives
    reason = " ".join(str(error).split())[:100]
    raise UnfitError(f"{file}: is damaged, or of another model ({reason})") from None
  if _kinds(params) != _kinds(template):
    raise UnfitError(f"{file}: is of another model; shapes or types differ")
  try:
    require_fit(params)
  except UnfitError as error:
    raise UnfitError(f"{file}: {error}") from None
  return params


def _kinds(tree: Any) -> list[tuple]:
  return [(np.shape(x), np.asarray(x).dtype.name) for x in jax.tree.leaves(tree)]


def published_steps(folder: Path) -> list[int]:
  """Steps whose parameters are there, ascending."""
  numbers = (path.stem.split("-")[1] for path in folder.glob("params-*.msgpack"))
  return sorted(int(number) for number in numbers if number.isdigit())


def forget_before(folder: Path, step: int) -> None:
  """Removes all parameters but the newest of at most this step, and later ones."""
  older = [at for at in published_steps(folder) if at <= step]
  for at in older[:-1]:
    (folder / _name(at)).unlink()


def _name(step: int) -> str:
  return f"params-{step:08d}.msgpack"


def _newest(folder: Path, steps: list[int], step: int) -> int:
  steps = [at for at in steps if at <= step]
  if not steps:
    raise ConfigError(f"{folder}: no parameters of step {step} or before")
  return steps[-1]


def _point(folder: Path, step: int, checksums: dict[str, str], about: dict[str, Any]) -> None:
  name = _name(step)
  there = {_name(at) for at in published_steps(folder)} - {name}
  pointer = about | {
    "step": step, "file": name, "sha256": checksums.get(name),
    "earlier": {file: checksums[file] for file in sorted(there & checksums.keys())},
  }
  with atomic.new_file(folder / "latest.json", durable=True) as file:
    file.write(json.dumps(pointer, indent=2).encode())


def _checksums(folder: Path) -> dict[str, str]:
  """File -> checksum of its bytes; {} where the pointer is damaged, or of an earlier version."""
  try:
    pointer = latest(folder)
    return dict(pointer.get("earlier", {})) | {str(pointer["file"]): pointer["sha256"]}
  except (ConfigError, KeyError, TypeError, ValueError):
    return {}
