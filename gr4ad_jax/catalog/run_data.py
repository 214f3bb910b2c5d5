"""The data of a run folder: its own copy of its codes, and data that have moved."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.semantic_id import SemanticIds

RunT = TypeVar("RunT", bound=Any)

_CODES = "codes"  # not "sids": a run may lie in its data folder


def own_codes(workdir: Place) -> str:
  """Folder of a run's own copy of its codes; "" = it has none."""
  there = storage.exists(workdir / _CODES / "config.json")  # the last of its files in a bucket
  return storage.absolute(workdir / _CODES) if there else ""


def keep_codes(sids: SemanticIds, workdir: Place) -> None:
  """Stores a run's own copy of its codes, so that tokenizing anew leaves the run as it is."""
  with storage.new_folder(workdir / _CODES) as copy:
    semantic_id.save(sids, copy.path)


def with_data(run: RunT, workdir: Place, data: Place | None) -> RunT:
  """The run with the place of its data, and of semantic IDs in them, as it is now.

  Args:
    run: a frozen dataclass with the places `data` and `sids`.
    workdir: its folder, for messages.
    data: where its data lie now; None = where they lay.

  Raises:
    ConfigError: no prepared data are there.
  """
  if data is not None:
    now, before = storage.absolute(data), run.data.rstrip("/")
    sids = now + run.sids[len(before):] if run.sids.startswith(f"{before}/") else run.sids
    run = dataclasses.replace(run, data=now, sids=sids)
  if not storage.exists(storage.place(run.data) / "examples" / "examples.json"):
    where = "are not there" if data is not None else "are gone; if they lie elsewhere, name --data"
    raise ConfigError(f"{run.data}: the prepared data of {workdir} {where}")
  return run
