"""One compiled step of any task: gradients, AdamW, metrics as (sum, count)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gr4ad_jax import sharding
from gr4ad_jax.config import TrainConfig
from gr4ad_jax.learning.task import Metrics, Task
from gr4ad_jax.training.optimizer import build_optimizer, learning_rate


class TrainState(NamedTuple):
  """Everything that a step changes."""

  step: jax.Array  # int32
  params: Any
  optimizer: Any


def init_state(task: Task, config: TrainConfig, key: jax.Array) -> TrainState:
  """Step 0."""
  params = task.init(key)
  return TrainState(jnp.zeros((), jnp.int32), params, build_optimizer(config).init(params))


def abstract_state(task: Task, config: TrainConfig, mesh: Mesh) -> TrainState:
  """Shapes, types and layouts of the state; nothing is computed."""
  abstract = jax.eval_shape(lambda key: init_state(task, config, key), jax.random.key(0))
  return jax.tree.map(
    lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
    abstract, sharding.state_sharding(mesh, abstract),
  )


def _layout(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def compile_init(
  task: Task, config: TrainConfig, abstract: TrainState
) -> Callable[[jax.Array], TrainState]:
  """key -> state, born in its layout."""
  return jax.jit(lambda key: init_state(task, config, key), out_shardings=_layout(abstract))


def begin_with(state: TrainState, params: Any) -> TrainState:
  """The state with other parameters, in its layout; copies, as steps give their buffers away."""
  layout = jax.tree.map(lambda leaf: leaf.sharding, state.params)
  return state._replace(params=jax.device_put(jax.tree.map(np.array, params), layout))


def compile_train_step(
  task: Task, config: TrainConfig, mesh: Mesh, abstract: TrainState
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """(state, batch) -> (state, metrics); the state is donated.

  The loss is a ratio of sums over the whole batch, so it does not depend on the mesh. Dropout keys
  follow from the seed and the step, so a resumed run draws the same ones. The seed is an argument
  of the program, so that runs of other seeds find it in the compile cache.
  """
  optimizer, schedule = build_optimizer(config), learning_rate(config)

  def train_step(state: TrainState, batch: Any, seed: jax.Array):
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params):
      metrics = task.loss(params, batch, key)
      total, weight = metrics["loss"]
      return total / jnp.maximum(weight, 1e-9), metrics

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    one = jnp.ones(())
    metrics["grad_norm"] = (optax.tree.norm(grads), one)
    metrics["learning_rate"] = (schedule(state.step), one)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, optimizer_state), metrics

  layout, everywhere = _layout(abstract), sharding.replicated(mesh)
  compiled = jax.jit(
    train_step,
    in_shardings=(layout, sharding.batch_sharding(mesh), everywhere),
    out_shardings=(layout, everywhere),
    donate_argnums=0,
  )
  return lambda state, batch: compiled(state, batch, np.int32(config.seed))


def compile_loss(
  task: Task, mesh: Mesh, abstract: TrainState
) -> Callable[[Any, Any], Metrics]:
  """(params, batch) -> metrics, without dropout."""
  return jax.jit(
    lambda params, batch: task.loss(params, batch, None),
    in_shardings=(_layout(abstract.params), sharding.batch_sharding(mesh)),
    out_shardings=sharding.replicated(mesh),
  )
