"""Which validation of a run is the best one, and when none better is waited for any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gr4ad_jax.training.config import TrainConfig


class Selection:
  """The validations of a run so far, judged by `train.best_by`."""

  def __init__(self, config: TrainConfig, log: Iterable[Mapping[str, Any]] = ()):
    """Begins behind the validations in `log`, rows of train_log.jsonl in their order."""
    self._name, self._patience = config.best_by, config.patience
    self.best: tuple[int, float] | None = None  # step, value; the latest of equal ones
    self._in_vain = 0  # validations since the last that was better than all before
    for row in log:
      if row["kind"] == "validation" and self._name in row:
        self.add(row["step"], row[self._name])

  def add(self, step: int, value: float) -> None:
    """Takes the next validation, after so many steps."""
    sign = -1 if self._name == "loss" else 1
    gain = 1.0 if self.best is None else sign * (value - self.best[1])
    if gain >= 0:
      self.best = step, value
    self._in_vain = 0 if gain > 0 else self._in_vain + 1

  @property
  def gives_up(self) -> bool:
    """Whether `train.patience` validations in a row were no better than one before them."""
    return 0 < self._patience <= self._in_vain

  def __str__(self) -> str:
    """The best one in words."""
    if self.best is None:
      return "nothing was validated"
    return f"best by {self._name}: step {self.best[0]:,} ({self.best[1]:.4f})"
