"""Training metrics on disk: one JSON object per line, and TensorBoard event files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from gr4ad_jax.machine import atomic, distributed, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.task import Metrics


class MeanMetrics:
  """Sums (sum, count) pairs over steps; reading them waits for the device once."""

  def __init__(self):
    self._steps: list[Metrics] = []

  def add(self, metrics: Metrics) -> None:
    """Takes one step's metrics without waiting for them."""
    self._steps.append(metrics)

  def means(self) -> dict[str, float]:
    """The means since the last call; NaN where nothing was counted."""
    sums: dict[str, list[float]] = {}
    for metrics in self._steps:
      for name, (total, count) in metrics.items():
        pair = sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(np.asarray(total))
        pair[1] += float(np.asarray(count))
    self._steps = []
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


class MetricLog:
  """Appends rows to train_log.jsonl and scalars to tb/; a resumed run drops rows past its start.

  Of several processes only the first one writes.
  """

  def __init__(self, folder: Path, *, first_step: int):
    """Opens the logs of a run that continues after `first_step` (0 = a new run)."""
    self._writes = distributed.is_first()
    if not self._writes:
      return
    self._path = folder / "train_log.jsonl"
    kept = [row for row in read_log(folder) if row["step"] <= first_step] if first_step else []
    atomic.write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
    self._missed: set[str] = set()  # names that were said to be missing
    self._file = self._path.open("a", encoding="utf-8")
    from tensorboardX import SummaryWriter  # loads the clients of gs:// and s3://, where they are

    self._writer = SummaryWriter(str(folder / "tb"), purge_step=first_step + 1)

  def write(self, step: int, kind: str, values: dict[str, float]) -> None:
    """One row.

    Args:
      step: optimizer steps done.
      kind: "train" or "validation".
      values: name -> number; those that are not finite are left out, and named once.
    """
    if not self._writes:
      return
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for name in values.keys() - finite.keys() - self._missed:
      self._missed.add(name)
      console.print(
        f"step {step}: {name} ({kind}) has no finite value, as where nothing was counted; such "
        f"numbers are left out of {self._path.name}",
      )
    row = {"step": step, "kind": kind, **finite}
    self._file.write(json.dumps(row, allow_nan=False) + "\n")  # JSON knows no NaN
    self._file.flush()
    for name, value in finite.items():
      self._writer.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    """Flushes both."""
    if not self._writes:
      return
    self._file.close()
    self._writer.close()


def read_log(folder: Place) -> list[dict]:
  """The rows of a run's train_log.jsonl, each with the numbers that it has.

  An unfinished last line (a killed run) is left out; numbers that are not finite, which earlier
  versions wrote, are too.
  """
  path = folder / "train_log.jsonl"
  rows = []
  for line in storage.read_text(path).splitlines() if storage.exists(path) else []:
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      break
    rows.append({k: x for k, x in row.items() if isinstance(x, str) or math.isfinite(x)})
  return rows
