"""One compiled step of any task: gradients, AdamW, metrics as (sum, count)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gr4ad_jax.machine import sharding
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.optimizer import build_optimizer, learning_rate
from gr4ad_jax.training.task import Metrics, Task


class TrainState(NamedTuple):
  """Everything that a step changes."""

  step: jax.Array  # int32
  params: Any
  optimizer: Any
  ema: Any = None  # a moving average of the parameters; None where `TrainConfig.ema` is 0

  @property
  def served(self) -> Any:
    """The parameters that are validated, and that a run gives."""
    return self.params if self.ema is None else self.ema


def init_state(task: Task, config: TrainConfig, key: jax.Array) -> TrainState:
  """Step 0."""
  params = task.init(key)
  optimizer = build_optimizer(config, task.sparse_tables).init(params)
  ema = jax.tree.map(jnp.copy, params) if config.ema else None
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer, ema)


@functools.lru_cache(maxsize=16)
def abstract_state(task: Task, config: TrainConfig, mesh: Mesh) -> TrainState:
  """Shapes, types and layouts of the state; nothing is computed."""
  abstract = jax.eval_shape(lambda key: init_state(task, config, key), jax.random.key(0))
  return jax.tree.map(
    lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
    abstract, sharding.state_sharding(mesh, abstract, task.layouts),
  )


def begin_with(state: TrainState, params: Any) -> TrainState:
  """The state with other parameters, in its layout; copies, as steps give their buffers away."""
  layout = jax.tree.map(lambda leaf: leaf.sharding, state.params)

  def laid_out() -> Any:
    return jax.device_put(jax.tree.map(np.array, params), layout)

  return state._replace(params=laid_out(), ema=None if state.ema is None else laid_out())


class Programs(NamedTuple):
  """What a training runs on its mesh; each program is compiled when it is first called."""

  abstract: TrainState  # shapes, types and layouts
  init: Callable[[jax.Array], TrainState]  # key -> the state of step 0, born in its layout
  step: sharding.MeshProgram  # (state, batch) -> (state, metrics); the state is donated
  loss: sharding.MeshProgram  # (params, batch) -> metrics, without dropout
  to_devices: Callable[[Any], Any]  # this host's rows -> a batch


@functools.lru_cache(maxsize=8)
def compile_programs(task: Task, config: TrainConfig, mesh: Mesh) -> Programs:
  """The programs of a training; those of the last trainings of this process are still there.

  The loss is a ratio of sums over the whole batch, so it does not depend on the mesh. Dropout keys
  follow from the seed and the step, so a resumed run draws the same ones. The seed is an argument
  of the program, so that runs of other seeds find it in the compile cache.
  """
  abstract = abstract_state(task, config, mesh)
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  # Arguments of the programs: closed over, they would be folded in as constants.
  frozen = () if task.frozen is None else (task.frozen(),)
  lies = sharding.state_sharding(mesh, frozen, task.layouts)
  frozen = jax.device_put(frozen, lies)
  step = jax.jit(
    _train_step(task, config), in_shardings=(layout, rows, everywhere, *lies),
    out_shardings=(layout, everywhere), donate_argnums=0,
  )
  loss = jax.jit(
    lambda params, batch, *frozen: task.loss(params, batch, None, *frozen),
    in_shardings=(layout.params, rows, *lies), out_shardings=everywhere,
  )
  return Programs(
    abstract,
    jax.jit(lambda key: init_state(task, config, key), out_shardings=layout),
    sharding.MeshProgram(mesh, step, (np.int32(config.seed), *frozen)),
    sharding.MeshProgram(mesh, loss, frozen),
    sharding.global_batch(mesh),
  )


def _train_step(task: Task, config: TrainConfig) -> Callable[..., tuple[TrainState, Metrics]]:
  optimizer, schedule = build_optimizer(config, task.sparse_tables), learning_rate(config)

  def train_step(state: TrainState, batch: Any, seed: jax.Array, *frozen: Any):
    def sums(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
      metrics = task.loss(params, batch, key, *frozen)
      return metrics["loss"][0], metrics

    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient = jax.grad(sums, has_aux=True)
    if config.accumulate == 1:
      grads, metrics = gradient(state.params, batch, key)
    else:
      grads, metrics = _accumulated(gradient, state.params, batch, key, config.accumulate)
    # The weight does not depend on the parameters, so sums can be added before they are divided.
    weight = jnp.maximum(metrics["loss"][1], 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    if task.rate is not None:
      updates = jax.tree_util.tree_map_with_path(
        lambda path, x: x * task.rate(_name(path), state.step), updates
      )
    one = jnp.ones(())
    metrics["grad_norm"] = (optax.tree.norm(grads), one)
    metrics["learning_rate"] = (schedule(state.step), one)
    params = optax.apply_updates(state.params, updates)
    ema = moving_average(state.ema, params, state.step, config.ema) if config.ema else None
    return TrainState(state.step + 1, params, optimizer_state, ema), metrics

  return train_step


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def moving_average(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """d average + (1 - d) params with d = min(decay, (1 + t) / (10 + t)), for t = 0, 1, ...

  The parameters of the start, of which the average is made, are forgotten within some steps, so
  that a short run has an average of what it has learned. Source: TensorFlow's
  `ExponentialMovingAverage` with `num_updates`.
  """
  decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def _accumulated(gradient, params: Any, batch: Any, key: jax.Array, parts: int):
  """Sums of gradients and metrics over parts of the batch; every device keeps its own rows."""

  def split(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

  def add(sums, part):
    number, rows = part
    return jax.tree.map(jnp.add, sums, gradient(params, rows, jax.random.fold_in(key, number))), ()

  batch = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], batch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, key)
  )
  return jax.lax.scan(add, zeros, (jnp.arange(parts), batch))[0]
