"""The loop: batches in, steps, logs, validation, checkpoints; exact resume; stops on divergence."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import jax

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import distributed, sharding, storage
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.metric_log import MeanMetrics, MetricLog, read_log
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.preemption import PreemptedError, Preemption
from gr4ad_jax.training.profiling import Speed, Trace
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.steps import run_steps
from gr4ad_jax.training.task import Metrics, Task
from gr4ad_jax.training.train_step import (
  Programs,
  TrainState,
  abstract_state,
  begin_with,
  compile_programs,
)


class DivergedError(RuntimeError):
  """Training became useless; the message names the step and the last good checkpoint."""


# Eleven parameters: what is learned from what and where, and what is told of it.
def train(
  task: Task,
  config: TrainConfig,
  *,
  batches: grain.DatasetIterator,
  validation: Sequence[Any],
  folder: Place,
  start_params: Any = None,
  judge: Callable[[Any], dict[str, float]] | None = None,
  speed: Speed | None = None,
  profile: range | None = None,
  pace: Pace | None = None,
  until: int | None = None,
) -> TrainState:
  """Trains to `config.num_steps`, continuing from the newest checkpoint in `folder`, if any.

  It ends before that where `config.patience` validations in a row were no better. A run that is
  killed at any moment and started again ends with the same bits as one that is not: the state, the
  input position and the dropout keys all follow from the checkpoint.

  Args:
    task: what is trained.
    config: steps, optimizer, intervals, mesh.
    batches: this host's endless input; its state is saved and restored.
    validation: this host's fixed validation batches; without any, nothing is validated.
    folder: checkpoints/, train_log.jsonl and tb/ go here; to a bucket, the logs with every
      checkpoint and at the end.
    start_params: parameters of step 0; None = the task's own.
    judge: parameters -> further numbers of each validation, the larger the better; `config.best_by`
      may name one of them.
    speed: counts examples for the log; None = one that knows no FLOPs.
    profile: steps to trace into folder/profile; None = none.
    until: the step after which it ends, saved, and may go on by another call; None = the last.
    pace: says after the first steps how long all will take; None = one that compares with nothing.

  Returns:
    The final state.

  Raises:
    ConfigError: `config.best_by` names what is not measured.
    DivergedError: a loss or gradient that is not finite, or a loss twice that of the first window.
    PreemptedError: SIGTERM or Ctrl-C came; the state of the step then finished is saved.
    CheckpointError: a checkpoint could not be written.
  """
  programs = compile_programs(task, config, training_mesh(config))
  end = config.num_steps if until is None else min(until, config.num_steps)
  validate = _validation(programs, config, validation, judge)
  with Checkpoints(folder / "checkpoints") as checkpoints, Preemption() as preemption:
    state, position = begin(programs, checkpoints, seed=config.seed, start_params=start_params)
    first_step = int(state.step)
    if position is not None:
      batches.set_state(position)
    if first_step >= end:
      return state
    with storage.working_copy(folder) as copy:
      earlier = read_log(copy.path)
      distributed.wait_for_all("read the log")
      selection = Selection(config, (row for row in earlier if row["step"] <= first_step))
      if selection.gives_up:
        return state
      log = MetricLog(copy.path, first_step=first_step)
      trace = Trace(copy.path / "profile", profile)
      after_step = _AfterStep(
        config, validate, batches.get_state, selection, checkpoints, preemption,
        log, copy, trace, speed or Speed(), pace or Pace(),
        first_step=first_step, end=end, last_saved=first_step or None,
        first_loss=next(
          (row["loss"] for row in earlier if row["kind"] == "train" and "loss" in row), None
        ),
      )
      steps = range(first_step + 1, end + 1)
      shown = track(
        steps, "train, steps", end, completed=first_step, note=after_step.note
      )
      try:
        wanted = _batches(shown, batches, trace, selection)
        return run_steps(
          programs.step, state, map(programs.to_devices, wanted),
          after_step=after_step, first_step=first_step,
        )
      finally:
        trace.close()
        log.close()


def _validation(
  programs: Programs,
  config: TrainConfig,
  batches: Sequence[Any],
  judge: Callable[[Any], dict[str, float]] | None,
) -> Callable[[Any], dict[str, float]] | None:
  """Parameters -> the numbers of a validation; None where there is none."""
  if config.best_by != "loss" and judge is None:
    raise ConfigError(f"train.best_by={config.best_by!r}: nothing is searched here; only by loss")
  if not batches:
    return None
  return lambda params: mean_loss(programs, params, batches) | (judge(params) if judge else {})


def _batches(
  steps: Iterable[int], batches: Iterator[Any], trace: Trace, selection: Selection
) -> Iterator[Any]:
  """A batch for each step, until none is wanted; a step's trace begins before its batch is there.
  """
  for step in steps:
    if selection.gives_up:
      return
    trace.before(step)
    yield next(batches)


def begin(
  programs: Programs, checkpoints: Checkpoints, *, seed: int, start_params: Any = None
) -> tuple[TrainState, Any]:
  """The newest state that can be read, with what its checkpoint says of the input.

  Without any, step 0 and None; `start_params` are its parameters, None = the task's own.
  """
  if restored := checkpoints.restore_newest(programs.abstract):
    return restored
  state = programs.init(jax.random.key(seed))
  return (state if start_params is None else begin_with(state, start_params)), None


def read_params(
  task: Task, config: TrainConfig, folder: Place, *, newest: bool = False
) -> tuple[Any, int]:
  """Parameters that `train` has kept in `folder`, on one device, and their step.

  Args:
    task, config: those of the training.
    folder: as given to `train`.
    newest: the last checkpoint instead of that with the best validation.

  Raises:
    ConfigError: no checkpoint, or none that can be read.
  """
  # Several processes share whole parameters: each can read them all.
  mesh = sharding.build_mesh(data_parallel=0 if jax.process_count() > 1 else 1)
  abstract = abstract_state(task, config, mesh)
  with Checkpoints(folder / "checkpoints", only_read=True) as checkpoints:
    found = checkpoints.restore_params(abstract, newest=newest)
    if found is None:
      raise _no_checkpoint(folder)
    return found


def kept_step(folder: Place, *, newest: bool = False) -> int:
  """The step whose parameters `read_params` gives, without reading them; raises as it does."""
  with Checkpoints(folder / "checkpoints", only_read=True) as checkpoints:
    step = checkpoints.latest_step if newest else checkpoints.best_step
  if step is None:
    raise _no_checkpoint(folder)
  return step


def _no_checkpoint(folder: Place) -> ConfigError:
  return ConfigError(f"{folder}: no checkpoint yet; run `gr4ad train` first")


@dataclasses.dataclass
class _AfterStep:
  """What a training does after each step: logs, validation, checkpoints, and reasons to stop."""

  config: TrainConfig
  validate: Callable[[Any], dict[str, float]] | None  # parameters -> means
  position: Callable[[], Any]  # of the input
  selection: Selection
  checkpoints: Checkpoints
  preemption: Preemption
  log: MetricLog
  copy: storage.Copy
  trace: Trace
  speed: Speed
  pace: Pace
  first_step: int
  end: int  # step after which this call ends
  last_saved: int | None
  first_loss: float | None  # of the first window; twice as much is divergence
  window: MeanMetrics = dataclasses.field(default_factory=MeanMetrics)
  shown: dict[str, float] = dataclasses.field(default_factory=dict)

  def note(self) -> str:
    """The last losses, for people who wait."""
    return ", ".join(f"{name} {loss:.3f}" for name, loss in self.shown.items())

  def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
    config, first = self.config, step == self.first_step + 1
    self.window.add(metrics)
    self.speed.add(config.batch_size)
    self.trace.after(step, state)
    self.pace.after(metrics, left=config.num_steps - step)
    last = step == config.num_steps
    stopping = self.preemption.reached(step) and not last
    validating = self.validate is not None and (last or step % config.eval_every == 0)
    ending = last or step == self.end
    saving = ending or validating or stopping or step % config.checkpoint_every == 0
    logging = saving or step % config.log_every == 0
    if logging:
      self._log(step, with_speed=not first)  # the first step is mostly compilation
    measured = self._validate(step, state.served) if validating else None
    if saving:
      # Only after the checks above, so that the last checkpoint is always a good one.
      self.copy.push()
      self.checkpoints.save(state, data_iterator=self.position(), validation=measured)
      self.last_saved = step
    if stopping:
      self.checkpoints.wait()
      raise PreemptedError(
        f"asked to stop: step {step} is saved in {self.copy.place}; the same command goes on "
        "(train and reward with --resume)", self.preemption.asked or signal.SIGTERM,
      )
    if self.selection.gives_up and not ending:
      console.print(
        f"step {step:,}: {config.patience} validations in a row were no better; training ends here"
      )
    if first or logging:
      self.speed.restart()
    self.pace.before()

  def _log(self, step: int, *, with_speed: bool) -> None:
    means = self.window.means()
    self.log.write(step, "train", means | (self.speed.values() if with_speed else {}))
    self.first_loss = self.first_loss or means["loss"]
    self.shown["loss"] = means["loss"]
    if name := not_finite(means):
      raise self._diverged(step, f"{name} is {means[name]}")
    if means["loss"] > 2 * self.first_loss + 1:
      raise self._diverged(
        step, f"loss {means['loss']:.3f} is over twice the first one ({self.first_loss:.3f})"
      )

  def _validate(self, step: int, params: Any) -> dict[str, float]:
    """What decides which checkpoint is the best."""
    values, by = self.validate(params), self.config.best_by
    loss, value = values["loss"], values[by]
    if not math.isfinite(loss):
      raise self._diverged(step, f"validation loss is {loss}")
    self.log.write(step, "validation", values)
    self.selection.add(step, value)
    self.shown["validation"] = loss
    if by == "loss":
      return {"loss": loss}
    self.shown[by] = value
    return {"loss": loss, "score": value}

  def _diverged(self, step: int, what: str) -> DivergedError:
    kept = "no checkpoint yet"
    if self.last_saved:
      kept = f"the last good checkpoint is step {self.last_saved}"
    return DivergedError(
      f"step {step}: {what}; {kept}; "
      "start a new run with a lower train.learning_rate or train.clip_norm"
    )


def not_finite(means: dict[str, float]) -> str | None:
  """Which of loss and gradient is no longer finite, None = neither."""
  return next((n for n in ("loss", "grad_norm") if not math.isfinite(means.get(n, 0.0))), None)


def mean_loss(programs: Programs, params: Any, batches: Sequence[Any]) -> dict[str, float]:
  """Means of all metrics over this host's batches; {} where there are none."""
  total = MeanMetrics()
  for batch in batches:
    total.add(programs.loss(params, programs.to_devices(batch)))
  return total.means()
