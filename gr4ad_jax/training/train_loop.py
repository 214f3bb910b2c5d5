"""The loop: batches in, steps, logs, validation, checkpoints; exact resume; stops on divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import distributed, sharding, storage
from gr4ad_jax.machine.peaks import peak_flops
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.metric_log import MeanMetrics, MetricLog, read_log
from gr4ad_jax.training.preemption import PreemptedError, Preemption
from gr4ad_jax.training.profiling import Speed, Trace
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_step import (
  TrainState,
  abstract_state,
  begin_with,
  compile_init,
  compile_loss,
  compile_train_step,
)


class DivergedError(RuntimeError):
  """Training became useless; the message names the step and the last good checkpoint."""


def train(
  task: Task,
  config: TrainConfig,
  *,
  batches: grain.DatasetIterator,
  validation: Sequence[Any],
  folder: Place,
  mesh: Mesh | None = None,
  start_params: Any = None,
  example_flops: float = 0.0,
  dtype: str = "float32",
  profile: range | None = None,
) -> TrainState:
  """Trains to `config.num_steps`, continuing from the newest checkpoint in `folder`, if any.

  A run that is killed at any moment and started again ends with the same bits as one that is not:
  the state, the input position and the dropout keys all follow from the checkpoint.

  Args:
    task: what is trained.
    config: steps, optimizer, intervals, mesh.
    batches: this host's endless input; its state is saved and restored.
    validation: this host's fixed validation batches.
    folder: checkpoints/, train_log.jsonl and tb/ go here; to a bucket, the logs with every
      checkpoint and at the end.
    mesh: devices; None builds one from the config.
    start_params: parameters of step 0; None = the task's own.
    example_flops: of one example, for MFU in the log; 0 = not known.
    dtype: of its matrix products.
    profile: steps to trace into folder/profile; None = none.

  Returns:
    The final state.

  Raises:
    DivergedError: a loss or gradient that is not finite, or a loss twice that of the first window.
    PreemptedError: SIGTERM came; the state of the step then finished is saved.
    CheckpointError: a checkpoint could not be written.
  """
  mesh = mesh or training_mesh(config)
  to_devices = sharding.global_batch(mesh)
  abstract = abstract_state(task, config, mesh)
  with Checkpoints(folder / "checkpoints") as checkpoints, Preemption() as preemption:
    first_step = 0
    if restored := checkpoints.restore_newest(abstract):
      state, iterator_state = restored
      first_step = int(state.step)
      batches.set_state(iterator_state)
    else:
      state = compile_init(task, config, abstract)(jax.random.key(config.seed))
      if start_params is not None:
        state = begin_with(state, start_params)
    if first_step >= config.num_steps:
      return state
    step_fn = compile_train_step(task, config, mesh, abstract)
    loss_fn = compile_loss(task, mesh, abstract)
    with storage.working_copy(folder) as copy:
      earlier = read_log(copy.path)
      distributed.wait_for_all("read the log")
      log = MetricLog(copy.path, first_step=first_step)
      peak = peak_flops(list(mesh.devices.flat), dtype) if example_flops else 0.0
      trace = Trace(copy.path / "profile", profile)
      try:
        return _run(
          state, step_fn, lambda params: mean_loss(loss_fn, params, validation, to_devices),
          config=config, batches=batches, to_devices=to_devices, checkpoints=checkpoints,
          preemption=preemption, log=log, first_step=first_step, copy=copy, best_by=task.best_by,
          speed=Speed(example_flops=example_flops, peak=peak), trace=trace,
          first_loss=next((row["loss"] for row in earlier if row["kind"] == "train"), None),
        )
      finally:
        trace.close()
        log.close()


def read_params(
  task: Task, config: TrainConfig, folder: Place, *, newest: bool = False
) -> tuple[Any, int]:
  """Parameters that `train` has kept in `folder`, on one device, and their step.

  Args:
    task, config: those of the training.
    folder: as given to `train`.
    newest: the last checkpoint instead of that with the best validation loss.

  Raises:
    ConfigError: no checkpoint.
  """
  # Several processes share whole parameters: each can read them all.
  mesh = sharding.build_mesh(data_parallel=0 if jax.process_count() > 1 else 1)
  abstract = abstract_state(task, config, mesh)
  with Checkpoints(folder / "checkpoints", only_read=True) as checkpoints:
    step = checkpoints.latest_step if newest else checkpoints.best_step
    if step is None:
      raise ConfigError(f"{folder}: no checkpoint yet; run `gr4ad train` first")
    return checkpoints.restore_params(abstract, step), step


def _run(
  state, step_fn, validate, *, config, batches, to_devices, checkpoints, preemption, log,
  first_step, copy, best_by, speed, trace, first_loss,
) -> TrainState:
  window = MeanMetrics()
  last_saved = first_step or None
  steps = range(first_step + 1, config.num_steps + 1)
  for step in track(steps, "train, steps", config.num_steps, completed=first_step):
    trace.before(step)
    state, metrics = step_fn(state, to_devices(next(batches)))
    window.add(metrics)
    speed.add(config.batch_size)
    trace.after(step, state)
    last = step == config.num_steps
    stopping = preemption.reached(step) and not last
    saving = last or stopping or step % config.checkpoint_every == 0
    validating = last or step % config.eval_every == 0
    if last or saving or validating or step % config.log_every == 0:
      means = window.means()
      if step > first_step + 1:  # the first step is mostly compilation
        means |= speed.values()
      log.write(step, "train", means)
      first_loss = first_loss or means["loss"]
      _check(means, step, first_loss, last_saved)
    validation_loss = None
    if validating:
      values = validate(state.params)
      validation_loss = values[best_by]
      if not math.isfinite(validation_loss):
        raise DivergedError(
          f"step {step}: validation loss is {validation_loss}; {_kept(last_saved)}; {_ADVICE}"
        )
      log.write(step, "validation", values)
    if saving or validating:
      copy.push()
      checkpoints.save(
        state, data_iterator=batches.get_state(), validation_loss=validation_loss
      )
      last_saved = step
    if stopping:
      checkpoints.wait()
      raise PreemptedError(
        f"asked to stop: step {step} is saved in {copy.place}; the same command with --resume "
        "goes on"
      )
    if step == first_step + 1 or saving or validating or step % config.log_every == 0:
      speed.restart()
  return state


_ADVICE = "start a new run with a lower train.learning_rate or train.clip_norm"


def _kept(last_saved: int | None) -> str:
  return f"the last good checkpoint is step {last_saved}" if last_saved else "no checkpoint yet"


def _check(means: dict[str, float], step: int, first_loss: float, last_saved: int | None) -> None:
  """A checkpoint is only ever written after this has passed, so the last one is good."""
  kept = _kept(last_saved)
  for name in ("loss", "grad_norm"):
    if not math.isfinite(means[name]):
      raise DivergedError(f"step {step}: {name} is {means[name]}; {kept}; {_ADVICE}")
  if means["loss"] > 2 * first_loss + 1:
    raise DivergedError(
      f"step {step}: loss {means['loss']:.3f} is over twice the first one ({first_loss:.3f}); "
      f"{kept}; {_ADVICE}"
    )


def mean_loss(loss_fn, params, batches, to_devices) -> dict[str, float]:
  """Means of all metrics over batches, {} where there are none; `loss_fn` from `compile_loss`."""
  total = MeanMetrics()
  for batch in batches:
    total.add(loss_fn(params, to_devices(batch)))
  return total.means()
