"""What readers get of a learner: good parameters, and those from before where it goes wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gr4ad_jax.config import ConfigError
from gr4ad_jax.gr4ad.segment_batches import Segment
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.published import (
  UnfitError,
  back_to,
  forget_before,
  latest,
  publish,
  read_latest,
  read_published,
  require_fit,
)
from gr4ad_jax.training.train_loop import DivergedError
from gr4ad_jax.training.train_step import TrainState

Losses = tuple[dict[str, float], dict[str, float]]  # before the segment, and now; {} = no sample


class Publisher:
  """Judges parameters, publishes them, and takes them back."""

  def __init__(self, folder: Path, start_params: Any, *, start: Place):
    """Begins with the parameters of the run in `start`; `folder` is made where missing.

    Raises:
      ConfigError: they are not finite.
    """
    atomic.sweep(folder)
    self._folder, self._template = folder, start_params
    self._largest = _fit(start_params, start)
    self._first_step = 0  # of the segment that is learned from

  def begin(self) -> None:
    """Publishes the first parameters."""
    publish(self._folder, 0, self._template, {"segments": 0})

  def go_on(self, state: TrainState, *, segments: int, owner: Place) -> None:
    """Begins after a checkpoint of `owner`; mends what readers would find damaged or missing.

    Raises:
      ConfigError: its parameters are not finite.
    """
    self._largest = _fit(state.params, owner)
    try:
      read_latest(self._folder, self._template, latest(self._folder))
    except ConfigError as error:
      console.print(f"{error}; publishing step {int(state.step):,} anew")
      publish(self._folder, int(state.step), state.params, {"segments": segments})

  def known_by(self, state: TrainState) -> Any:
    """The newest parameters that readers had by a step; a restart finds the same ones."""
    try:
      return read_published(self._folder, self._template, step=int(state.step))
    except ConfigError as error:
      console.print(f"{error}; lists are made with step {int(state.step):,} instead")
      return state.params

  def begin_segment(self, step: int) -> None:
    """What follows is taken back to this step where it goes wrong."""
    self._first_step = step

  def publish(self, state: TrainState, segment: Segment, losses: Losses) -> None:
    """Publishes parameters; raises as `require_good`."""
    self.require_good(state, segment, losses)
    publish(self._folder, int(state.step), state.params, {
      "segments": segment.number, "learning_from": segment.file.name,
      "newest_event_s": segment.newest_s, "published_s": int(time.time()),
    })

  def require_good(self, state: TrainState, segment: Segment, losses: Losses) -> None:
    """Raises DivergedError where parameters must not be published or kept."""
    step, (before, now) = int(state.step), losses
    try:
      require_fit(state.params, self._largest)
    except UnfitError as error:
      raise self.diverged(segment, f"after step {step}, {error}") from None
    if now and not now["loss"] <= 2 * before["loss"] + 1:  # NaN is neither
      raise self.diverged(
        segment,
        f"after step {step} the loss is {now['loss']:.3g}, over twice that before the segment "
        f"({before['loss']:.3g})",
      )

  def diverged(self, segment: Segment, what: str) -> DivergedError:
    """The error, with readers pointed back to the parameters from before the segment."""
    good = back_to(self._folder, self._first_step, {
      "segments": segment.number, "went_back_from": segment.file.name,
    })
    return DivergedError(
      f"{segment.file}: {what}; back at step {self._first_step:,}, published is step {good:,}. "
      "Take the segment away, or begin another --out with a lower --learning-rate-share"
    )

  def kept(self, state: TrainState) -> None:
    """A checkpoint holds these parameters: earlier ones are not asked for any more."""
    self._largest = require_fit(state.params)
    forget_before(self._folder, int(state.step))


def _fit(params: Any, folder: Place) -> dict[str, float]:
  """Their largest numbers; ConfigError where nothing can be learned with them."""
  try:
    return require_fit(params)
  except UnfitError as error:
    raise ConfigError(f"{folder}: nothing can go on from its parameters: {error}") from None
