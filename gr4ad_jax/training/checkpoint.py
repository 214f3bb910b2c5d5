"""Checkpoints: asynchronous, latest and best kept, data iterator included. The only orbax file."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import bucket, distributed, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.train_step import TrainState

_policies = ocp.training.preservation_policies
_PLAIN_NAME = re.compile(r"[\w./ ,=+@-]*")


class CheckpointError(RuntimeError):
  """A checkpoint could not be written; the message names the last good one."""


class Checkpoints:
  """The checkpoints of one run: the two latest steps and the one with the best validation.

  A step appears under its final name only when all of it is on disk, so a killed process leaves
  either a whole checkpoint or none. In gs:// orbax writes and reads in place, every host its part.
  It knows no s3://: there one process writes into a local copy, which is pushed with each save.
  """

  def __init__(self, folder: Place, *, only_read: bool = False):
    """Opens `folder` (created where missing); half-written steps of a killed run are removed.

    Args:
      folder: of the checkpoints.
      only_read: leave half-written steps, which may be those of a run that is going on.

    Raises:
      ConfigError: several processes would write to s3://.
      StorageError: the bucket cannot be read or written.
    """
    # What they say of damaged files, at length, this class says in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_not_orbax)
    warnings.filterwarnings("ignore", r"coroutine 'Store\..*' was never awaited", RuntimeWarning)
    self._place = folder.absolute() if isinstance(folder, Path) else folder
    self._staging, self._copy = contextlib.ExitStack(), None
    if isinstance(folder, Path):
      self._folder = self._place
    elif folder.scheme == "gs":
      bucket.require_driver(folder)
      self._folder = epath.Path(str(folder))
    elif jax.process_count() > 1:
      raise ConfigError(
        f"{folder}: several processes cannot write checkpoints to {folder.scheme}://; use gs:// or "
        "a folder that all of them mount"
      )
    else:
      copied = storage.scratch_copy if only_read else storage.working_copy
      self._copy = self._staging.enter_context(copied(folder))
      self._folder = self._copy.path
      for step in self._folder.iterdir():
        if step.is_dir() and not (step / "commit_success.txt").exists():  # a push was killed
          shutil.rmtree(step)
    # ValueError is what tensorstore raises; drivers of buckets have errors of their own.
    self._only_read = only_read
    self._errors = (OSError, ValueError) if isinstance(folder, Path) else Exception
    self._without_loss: list[int] = []
    if isinstance(self._folder, Path):
      self._folder = self._under_plain_name(self._folder.absolute())
    if isinstance(self._folder, Path) and (damaged := _without_loss(self._folder)):
      self._leave_out_losses(damaged)
    self._open()

  def _under_plain_name(self, folder: Path) -> Path:
    """A name that orbax takes as it is: it reads patterns and URLs in others, and only UTF-8."""
    if _PLAIN_NAME.fullmatch(str(folder)):
      return folder
    folder.mkdir(parents=True, exist_ok=True)
    link = Path(self._staging.enter_context(tempfile.TemporaryDirectory())) / "checkpoints"
    link.symlink_to(folder)
    return link

  def _leave_out_losses(self, damaged: Sequence[Path]) -> None:
    """Steps whose validation cannot be read have none; orbax would open none of them all."""
    self._without_loss = [int(step.name) for step in damaged]
    if not self._only_read:
      self._say_without_loss(self._without_loss)
      for step in damaged if distributed.is_first() else ():
        shutil.rmtree(step / "metrics", ignore_errors=True)
      distributed.wait_for_all("left out damaged losses")
      return
    view = Path(self._staging.enter_context(tempfile.TemporaryDirectory()))
    for step in self._folder.iterdir():
      if step not in damaged:
        (view / step.name).symlink_to(step)
        continue
      (view / step.name).mkdir()
      for part in step.iterdir():
        if part.name != "metrics":
          (view / step.name / part.name).symlink_to(part)
    self._folder = view

  def _say_without_loss(self, steps: Sequence[int]) -> None:
    for step in steps if distributed.is_first() else ():
      console.print(
        f"{self._place / str(step)}: its validation cannot be read; it does not count as best"
      )

  def _open(self) -> None:
    self._saving: ocp.AsyncResponse[bool] | None = None  # of the last save
    self._checkpointer = ocp.training.Checkpointer(
      self._folder,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=_policies.AnyPreservationPolicy(
        [
          _policies.LatestN(2),
          _policies.BestN(
            get_metric_fn=lambda metrics: -_cost(metrics), n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
      cleanup_tmp_directories=not self._only_read,
    )

  def save(
    self, state: TrainState, *, data_iterator: Any, validation: Mapping[str, float] | None
  ) -> None:
    """Starts writing; returns once the arrays are copied.

    Args:
      state: the training state; its step names the checkpoint.
      data_iterator: the JSON state of this run's input.
      validation: of these parameters, where they were validated: the "loss", and the "score" where
        one was measured. The step with the highest score, or the lowest loss, is the best.

    Raises:
      CheckpointError: this step, or the one before, could not be written (a full disk).
    """
    with self._writing():
      self._finish()
      self._saving = self._checkpointer.save_async(
        int(state.step), _stored(state), metrics=validation,
        custom_metadata={"data_iterator": data_iterator},
      )
      if self._copy:
        self._finish()
        self._copy.push()

  def _finish(self) -> None:
    """Waits for the last save; a save that nobody asks how it went keeps its thread and files."""
    if (saving := self._saving) is not None:
      self._saving = None
      saving.result()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except self._errors as error:
      kept = f"the last good step is {self.latest_step}" if self.latest_step else "none is kept yet"
      ask = "Is the disk full?" if isinstance(self._place, Path) else "Is the bucket still there?"
      raise CheckpointError(
        f"{self._place}: a checkpoint could not be written; {kept}. {ask} ({error})"
      ) from error

  @property
  def latest_step(self) -> int | None:
    """The newest whole checkpoint."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def best_step(self) -> int | None:
    """The checkpoint with the best validation, the latest of equals; without any, the newest."""
    measured = [c for c in self._checkpointer.checkpoints if c.metrics]
    if not measured:
      return self.latest_step
    return min(measured, key=lambda c: (_cost(c.metrics), -c.step)).step

  def restore_newest(self, abstract: TrainState) -> tuple[TrainState, Any] | None:
    """Restores the newest step that can be read; None where there is none at all.

    Damaged steps after it are renamed to STEP.damaged, and said so.

    Raises:
      ConfigError: no step can be read; nothing is renamed.
    """
    found = self._first(self._steps(), lambda step: self.restore(abstract, step))
    if found is None:
      return None
    restored, step, failed = found
    if failed:
      self._checkpointer.close()
      for damaged in failed if distributed.is_first() else ():
        self._set_aside(str(damaged))
        console.print(
          f"{self._place / str(damaged)}: cannot be read, set aside; going on from step {step}"
        )
      distributed.wait_for_all("set damaged checkpoints aside")
      self._open()
    return restored

  def _steps(self) -> list[int]:
    """All of them, newest first."""
    return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

  def _first(
    self, steps: Sequence[int], read: Callable[[int], Any]
  ) -> tuple[Any, int, list[int]] | None:
    """What the first step holds that can be read, that step, and those before it that cannot.

    Raises:
      ConfigError: there are steps, and none can be read.
    """
    failed: dict[int, Exception] = {}
    with _without_stragglers():
      for step in steps:
        try:
          return read(step), step, list(failed)
        except Exception as error:  # whatever reading half a file gives
          failed[step] = error
    if not failed:
      return None
    first, error = next(iter(failed.items()))
    raise ConfigError(
      f"{self._place}: none of the steps {sorted(failed)} can be read: step {first} is damaged "
      f"or does not fit this run's settings ({_shortly(error)})"
    ) from error

  def _set_aside(self, step: str) -> None:
    aside = f"{step}.damaged"
    if isinstance(self._folder, Path):
      (self._folder / step).rename(self._folder / aside)
    else:
      bucket.move(self._place / step, self._place / aside)

  def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, Any]:
    """State (laid out as `abstract`) and data-iterator state of a step."""
    state = self._load(step, _stored(abstract))
    metadata = self._checkpointer.metadata(step).custom_metadata
    return TrainState(**state), metadata["data_iterator"]

  def restore_params(self, abstract: TrainState, *, newest: bool) -> tuple[Any, int] | None:
    """Parameters alone, of the best step or of the newest, and the step; None where there is none.

    Where that one is damaged, the newest other that can be read takes its place, and that is said;
    nothing is renamed, as the folder may be another process's.

    Raises:
      ConfigError: no step can be read.
    """
    steps = self._steps()
    if not newest and (best := self.best_step) is not None:
      steps = [best, *(step for step in steps if step != best)]
    found = self._first(steps, lambda step: self._params(abstract, step))
    if found is None:
      return None
    params, step, failed = found
    for damaged in failed if distributed.is_first() else ():
      console.print(f"{self._place / str(damaged)}: cannot be read; using step {step} instead")
    self._say_without_loss([step for step in self._without_loss if step not in failed])
    return params, step

  def _params(self, abstract: TrainState, step: int) -> Any:
    name = "params" if abstract.ema is None else "ema"
    partial = _placeholders(_stored(abstract)) | {name: abstract.served}
    return self._load(step, partial)[name]

  def _load(self, step: int, abstract: Any) -> Any:
    try:
      return self._checkpointer.load(step, abstract)
    except ValueError as error:
      raise ConfigError(
        f"{self._place / str(step)}: does not fit this run's settings ({_shortly(error)})"
      ) from error

  def wait(self) -> None:
    """Returns once everything that was saved is on disk.

    Raises:
      CheckpointError: it is not.
    """
    with self._writing():
      self._finish()
      self._checkpointer.wait()

  def close(self) -> None:
    """Waits for pending writes; errors as `wait`."""
    with self._writing():
      try:
        self._finish()
      finally:
        self._checkpointer.close()
        self._staging.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      self.close()
    except CheckpointError:
      if kind is None:  # else the first error is the one to hear of
        raise


def _cost(metrics: Mapping[str, float]) -> float:
  """What the best checkpoint has least of; those of earlier versions have only a loss."""
  return -metrics["score"] if "score" in metrics else metrics["loss"]


def _without_loss(folder: Path) -> list[Path]:
  """Steps of a folder that have a validation in a file that is damaged."""
  damaged = []
  for file in sorted(folder.glob("[0-9]*/metrics/metrics")):
    if not file.parent.parent.name.isdigit():  # set aside before
      continue
    try:
      float(_cost(json.loads(file.read_bytes())))
    except (ValueError, LookupError, TypeError, OSError):
      damaged.append(file.parent.parent)
  return damaged


@contextlib.contextmanager
def _without_stragglers() -> Iterator[None]:
  """Says nothing of arrays that are still read when another one of their step has failed."""
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
      before(unraisable)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = before


def _is_not_orbax(record: logging.LogRecord) -> bool:
  return "async_deserialize" not in record.getMessage()


def _shortly(error: Exception) -> str:
  """Its first words; tensorstore's own go on for hundreds of lines."""
  words = " ".join(str(error).split()) or type(error).__name__
  return words if len(words) <= 200 else f"{words[:200]} ..."


def _stored(state: TrainState) -> dict[str, Any]:
  """What a checkpoint holds; without an average it is that of earlier versions."""
  return {name: part for name, part in state._asdict().items() if part is not None}


def _placeholders(tree: Any) -> Any:
  return jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
