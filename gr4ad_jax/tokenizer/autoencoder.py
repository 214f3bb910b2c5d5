"""What the quantizers with a neural encoder share: MLPs, their training, codes of many rows.

Results do not depend on the number of devices: every batch is cut into equal groups, and their
gradients are added in order (`groups.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gr4ad_jax.config import Bounded, Count, CountOrZero, NotNegative, Positive, require
from gr4ad_jax.embedding.rows import ROWS_PER_CHECK, distinct_rows
from gr4ad_jax.machine.sharding import DATA, replicated
from gr4ad_jax.tokenizer import groups
from gr4ad_jax.tokenizer.groups import (
  NUM_GROUPS,
  add_in_order,
  check_codes,
  check_mesh,
  map_groups,
)
from gr4ad_jax.training.resume import Upkeep, run_fit
from gr4ad_jax.training.task import Metrics

Arrays = dict[str, np.ndarray]
Params = Mapping[str, jax.Array]

ROWS_PER_BLOCK = 64  # rows of one program, so that a code depends on its row alone
MIN_BLOCKS, MAX_BLOCKS = NUM_GROUPS, 128  # of a call
ROWS_PER_CHUNK = ROWS_PER_BLOCK * MAX_BLOCKS  # rows that are on the devices together


@dataclass(frozen=True)
class TrainingConfig(Bounded):
  """Length, batches and optimizer of a fit.

  Attributes:
    num_steps: optimizer steps; 0 leaves the initial parameters.
    batch_size: rows a step, a multiple of 8; at most the rows there are (rounded down).
    learning_rate: of AdamW at its highest: up in the first 5% of the steps, down a cosine to 0.
    weight_decay: of AdamW, on the kernels of the MLPs.
  """

  num_steps: CountOrZero = 1500
  batch_size: Count = 256
  learning_rate: Positive = 1e-3
  weight_decay: NotNegative = 1e-4

  def _check(self):
    require(self.batch_size % NUM_GROUPS == 0, "batch_size", self.batch_size,
            f"must be a multiple of {NUM_GROUPS}")


def center_and_scale(embedding_ND: np.ndarray) -> Arrays:
  """Mean row `center` [D] and `scale`, the power of two nearest to the deviation from it.

  Dividing by a power of two is exact. Sums are float64; rows that are all equal have scale 1.
  """
  starts = range(0, len(embedding_ND), ROWS_PER_CHECK)
  chunks = [slice(start, start + ROWS_PER_CHECK) for start in starts]
  total_D = sum(embedding_ND[rows].sum(0, dtype=np.float64) for rows in chunks)
  center_D = (total_D / len(embedding_ND)).astype(np.float32)
  square = sum(
    np.square(embedding_ND[rows] - center_D, dtype=np.float64).sum() for rows in chunks
  )
  exponent = np.round(np.log2(np.sqrt(square / embedding_ND.size))) if square > 0 else 0
  return {"center": center_D, "scale": np.float32(2.0**exponent)}


def init_mlp(rng: np.random.Generator, name: str, widths: Sequence[int]) -> Arrays:
  """Kernels (variance 1 / inputs) and zero biases of an MLP, under names that begin with `name`."""
  params = {}
  for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
    kernel = rng.standard_normal((inputs, outputs), np.float32) * np.float32(inputs**-0.5)
    params[f"{name}_kernel_{i}"] = kernel
    params[f"{name}_bias_{i}"] = np.zeros(outputs, np.float32)
  return params


def init_coders(rng: np.random.Generator, widths: Sequence[int]) -> Arrays:
  """An MLP `encoder` of these widths, and an MLP `decoder` of the same in reverse."""
  return init_mlp(rng, "encoder", widths) | init_mlp(rng, "decoder", widths[::-1])


def apply_mlp(params: Params, name: str, x_BD: jax.Array) -> jax.Array:
  """The MLP `name` with GELU between its layers."""
  layers = sum(key.startswith(f"{name}_kernel_") for key in params)
  for i in range(layers):
    x_BD = x_BD @ params[f"{name}_kernel_{i}"]
    x_BD += jnp.broadcast_to(params[f"{name}_bias_{i}"], x_BD.shape)
    if i < layers - 1:
      x_BD = jax.nn.gelu(x_BD)
  return x_BD


def in_units(arrays: Params, x_BD: jax.Array) -> jax.Array:
  """Rows as the encoder reads them: from `center`, in units of `scale`."""
  return (x_BD - arrays["center"][None]) / arrays["scale"]


def decoded(arrays: Params, latent_BW: jax.Array) -> jax.Array:
  """The rows that the decoder makes of latents."""
  with jax.default_matmul_precision("float32"):  # the same rows on every kind of device
    x_BD = apply_mlp(arrays, "decoder", latent_BW)
  return x_BD * arrays["scale"] + jnp.broadcast_to(arrays["center"], x_BD.shape)


def learning_rate(config: TrainingConfig, first_step: int = 0) -> optax.Schedule:
  """Warm-up and cosine between `first_step` and the last step; 0 before `first_step`."""
  steps = max(config.num_steps - first_step, 1)
  cosine = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, warmup_steps=steps // 20, decay_steps=steps
  )
  if not first_step:
    return cosine
  return optax.join_schedules([optax.constant_schedule(0.0), cosine], [first_step])


def adamw(config: TrainingConfig, first_step: int = 0) -> optax.GradientTransformation:
  """AdamW from `first_step` on, whose decay is on the kernels alone."""
  return optax.adamw(
    learning_rate(config, first_step), weight_decay=config.weight_decay,
    mask=lambda params: {name: "_kernel_" in name for name in params},
  )


class Objective(NamedTuple):
  """What is minimised, and how."""

  loss: Callable  # (params, x_BD, key) -> (mean loss, aux) of one group of rows
  optimizer: optax.GradientTransformation
  after_step: Callable | None = None  # (params, extra, aux of all groups, step) -> (params, extra)
  extra: Any = ()  # what `after_step` carries from step to step


class _State(NamedTuple):
  params: dict[str, jax.Array]
  opt_state: Any
  extra: Any


def train(
  objective: Objective,
  params: Arrays,
  embedding_ND: np.ndarray,
  config: TrainingConfig,
  *,
  seed: int,
  mesh: Mesh,
  upkeep: Upkeep,
) -> Arrays:
  """Minimises a loss over batches of a new permutation of the rows every epoch.

  Args:
    objective: loss and optimizer.
    params: initial parameters.
    embedding_ND: [N, D] float32.
    config: steps and batches.
    seed: of the permutations and keys.
    mesh: of `check_mesh`.
    upkeep: progress, and the file of the state.

  Returns:
    The parameters.
  """
  N, width = embedding_ND.shape
  batch_size = min(config.batch_size, max(NUM_GROUPS, N - N % NUM_GROUPS))
  key = jax.random.key(seed)
  by_group, whole = NamedSharding(mesh, PartitionSpec(DATA)), replicated(mesh)

  def group_gradient(shared, group):
    params, step_key = shared
    x_BD, index = group
    group_key = jax.random.fold_in(step_key, index)
    with jax.default_matmul_precision("float32"):
      return jax.grad(objective.loss, has_aux=True)(params, x_BD, group_key)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, step, x_GBD):
    step_key = jax.random.fold_in(key, step)
    grouped = map_groups(
      group_gradient, (state.params, step_key), (x_GBD, jnp.arange(NUM_GROUPS)), mesh
    )
    # The same whole on every device, and apart from how it was made.
    grouped = jax.lax.with_sharding_constraint(grouped, whole)
    gradients, aux = jax.lax.optimization_barrier(grouped)
    gradient = jax.tree.map(lambda g_G: add_in_order(g_G) / NUM_GROUPS, gradients)
    updates, opt_state = objective.optimizer.update(gradient, state.opt_state, state.params)
    params, extra = optax.apply_updates(state.params, updates), state.extra
    if objective.after_step is not None:
      params, extra = objective.after_step(params, extra, aux, step)
    return _State(params, opt_state, extra)

  def step_fn(state: _State, batch: tuple[np.int32, jax.Array]) -> tuple[_State, Metrics]:
    state = train_step(state, *batch)
    jax.block_until_ready(state)  # queued collectives of simulated devices wait for each other
    return state, {}

  rows_of = _row_stream(N, batch_size, seed)

  def batch_of(step: int) -> tuple[np.int32, jax.Array]:
    x_GBD = embedding_ND[rows_of(step)].reshape(NUM_GROUPS, -1, width)
    return np.int32(step), jax.device_put(x_GBD, by_group)

  first = _State(params, objective.optimizer.init(params), objective.extra)
  state = run_fit(step_fn, first, batch_of, config.num_steps, upkeep, layout=whole)
  return {name: np.asarray(value) for name, value in state.params.items()}


def _row_stream(num_rows, batch_size, seed):
  """Batch i of all epochs' permutations one after the other, so that no row is left out."""

  @functools.lru_cache(maxsize=2)
  def permutation(epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_rows)

  def rows_of(step):
    epoch_B, row_B = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_rows)
    return np.concatenate([permutation(e)[row_B[epoch_B == e]] for e in np.unique(epoch_B)])

  return rows_of


def encode_rows(codes_of: Callable, embedding_ND: np.ndarray) -> np.ndarray:
  """Codes of a table by its distinct rows, so that equal rows get equal codes.

  Args:
    codes_of: numbers of rows [M] -> their codes [M, L]; called with ROWS_PER_CHUNK rows at most.
    embedding_ND: [N, D] float32.

  Returns:
    [N, L] int32.
  """
  distinct = distinct_rows(embedding_ND)
  row_U = distinct.first_U
  starts = range(0, len(row_U), ROWS_PER_CHUNK)
  chunks = [codes_of(row_U[start : start + ROWS_PER_CHUNK]) for start in starts]
  return np.concatenate(chunks).astype(np.int32, copy=False)[distinct.of_N]


def decode_rows(
  program: Callable, code_NL: np.ndarray, codebook_sizes: Sequence[int]
) -> np.ndarray:
  """Rows of codes that each are in their codebook, by a program of whole blocks.

  Raises:
    ValueError: codes of another shape or out of range.
  """
  check_codes(code_NL, codebook_sizes)
  return map_rows(program, code_NL.astype(np.int32), np.arange(len(code_NL)), check_mesh(None))


def map_rows(f: Callable, x_ND: np.ndarray, row_M: np.ndarray, mesh: Mesh) -> np.ndarray:
  """`groups.map_rows` with the blocks of this module: `f` sees K from 8 to 128."""
  return groups.map_rows(
    f, x_ND, row_M, mesh, rows_per_block=ROWS_PER_BLOCK, min_blocks=MIN_BLOCKS,
    max_blocks=MAX_BLOCKS,
  )
