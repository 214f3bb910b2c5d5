"""Finite scalar quantisation: codes are rounded coordinates of a bounded latent, no codebooks.

A level of V codes is a group of coordinates whose numbers of values multiply to V, and its code is
the mixed-radix number of the group's rounded values, the first coordinate counting most.

FSQ has no order among its groups. Ours get one: in training, rows lose the groups after a random
prefix (the decoder gets zeros there), so that the first codes carry what matters most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gr4ad_jax.config import Count, Share
from gr4ad_jax.embedding.rows import check_embeddings
from gr4ad_jax.tokenizer import autoencoder
from gr4ad_jax.tokenizer.autoencoder import Arrays, TrainingConfig
from gr4ad_jax.tokenizer.groups import check_mesh, map_groups
from gr4ad_jax.training.resume import ResumeFile, Upkeep

MIN_VALUES, MAX_VALUES = 2, 9  # of a coordinate


@dataclass(frozen=True)
class FsqConfig(TrainingConfig):
  """FSQ; the attributes of TrainingConfig, and these.

  Attributes:
    hidden_widths: of the encoder; the decoder has them in reverse.
    prefix_dropout: probability that a row of a batch loses its last groups; how many of the L
      groups stay is then uniform in 1 to L - 1.
  """

  learning_rate: float = 3e-3
  hidden_widths: tuple[Count, ...] = (512, 256)
  prefix_dropout: Share = 0.5


def fit(
  embedding_ND: np.ndarray, codebook_sizes: Sequence[int], config: FsqConfig = FsqConfig(), *,
  seed: int = 0, mesh: Mesh | None = None, resume: ResumeFile | None = None,
  progress: Callable | None = None,
) -> Arrays:
  """Trains encoder and decoder on the squared error of the reconstruction.

  Arguments, result and errors: see `quantizers.Quantizer`. Sizes are products of factors from 2 to
  9.

  Source: FSQ (arXiv 2309.15505); levels as groups and the dropout of groups are our choices.
  """
  check_embeddings(embedding_ND, codebook_sizes)
  mesh = check_mesh(mesh)
  values = [scalar_values(size) for size in codebook_sizes]
  constants = autoencoder.center_and_scale(embedding_ND)
  constants["codebook_sizes"] = np.array(codebook_sizes, np.int32)
  widths = (embedding_ND.shape[1], *config.hidden_widths, sum(map(len, values)))
  params = autoencoder.init_coders(np.random.default_rng(seed), widths)
  values_C = np.concatenate(values)
  group_C = np.repeat(np.arange(len(values)), [len(v) for v in values])

  def loss(params, x_BD, key):
    h_BD = autoencoder.in_units(constants, x_BD)
    z_BC = quantize(autoencoder.apply_mlp(params, "encoder", h_BD), values_C)
    kept_B = _kept_groups(key, len(x_BD), len(values), config.prefix_dropout)
    z_BC = jnp.where(group_C[None] < kept_B[:, None], z_BC, 0.0)
    error_BD = h_BD - autoencoder.apply_mlp(params, "decoder", z_BC)
    return jnp.square(error_BD).sum(-1).mean(), ()

  return constants | autoencoder.train(
    autoencoder.Objective(loss, autoencoder.adamw(config)), params, embedding_ND, config,
    seed=seed, mesh=mesh, upkeep=Upkeep(resume, progress, "FSQ"),
  )


def encode(arrays: Arrays, embedding_ND: np.ndarray, *, mesh: Mesh | None = None) -> np.ndarray:
  """The numbers of the grid points that rows are rounded to; see `quantizers.Quantizer`."""
  check_embeddings(embedding_ND, width=len(arrays["center"]))
  mesh = check_mesh(mesh)
  sizes = tuple(arrays["codebook_sizes"].tolist())
  program = functools.partial(_codes, dict(arrays), sizes=sizes, mesh=mesh)
  return autoencoder.encode_rows(
    lambda row_M: autoencoder.map_rows(program, embedding_ND, row_M, mesh), embedding_ND
  )


def decode(arrays: Arrays, code_NL: np.ndarray) -> np.ndarray:
  """Rows that the decoder makes of codes; of the first levels only, the best guess from these.

  Arguments, result and errors: see `quantizers.Quantizer`.
  """
  sizes = tuple(arrays["codebook_sizes"].tolist())
  program = functools.partial(_decoded, dict(arrays), sizes=sizes)
  return autoencoder.decode_rows(program, code_NL, sizes)


def scalar_values(size: int) -> tuple[int, ...]:
  """How many values each coordinate of a level has: 256 gives (4, 4, 4, 4), 48 gives (8, 6).

  Factors of 2 are left out where that is possible; then the largest is as near to the smallest as
  can be; then they are as few as can be.

  Raises:
    ValueError: the size is no product of factors from 2 to 9 (with the nearest that are).
  """
  found = _factorisation(size)
  if found is None:
    lower = next((s for s in range(size - 1, 1, -1) if _factorisation(s)), None)
    upper = next(s for s in range(max(size, 1) + 1, 2 * max(size, 1) + 1) if _factorisation(s))
    near = f"{lower} or {upper}" if lower else f"{upper}"
    raise ValueError(
      f"codebook_sizes: {size} is no product of factors from {MIN_VALUES} to {MAX_VALUES}; near"
      f" sizes that are: {near}"
    )
  return found


@functools.cache
def _factorisation(size: int) -> tuple[int, ...] | None:
  def splits(rest, smallest, largest):
    found = [(rest,)] if smallest <= rest <= largest else []
    for factor in range(largest, smallest - 1, -1):
      if rest % factor == 0 and rest > factor:
        found += [(factor, *others) for others in splits(rest // factor, smallest, factor)]
    return found

  found = splits(size, 3, MAX_VALUES) or splits(size, MIN_VALUES, MAX_VALUES)
  return min(found, key=lambda factors: (factors[0] / factors[-1], len(factors)), default=None)


def quantize(latent_BC: jax.Array, values_C: np.ndarray) -> jax.Array:
  """Bounds and rounds coordinates to their grids; the gradient is that of the bound alone.

  A coordinate of n values has the grid -1, -1 + 2 / (n - 1), ..., 1. For even n it has no zero:
  this is the half step by which FSQ shifts even grids, without its shift of the input, so that a
  latent of 0 lies between the two middle values.

  Args:
    latent_BC: float, unbounded.
    values_C: values of each coordinate, at least 2.

  Returns:
    [B, C] points of the grids.
  """
  bounded_BC = jnp.tanh(latent_BC)
  rounded_BC = grid_point(scalar_index(latent_BC, values_C), values_C)
  return bounded_BC + jax.lax.stop_gradient(rounded_BC - bounded_BC)


def scalar_index(latent_BC: jax.Array, values_C: np.ndarray) -> jax.Array:
  """The number of the grid point that each coordinate is rounded to, 0 to n - 1."""
  steps_BC = jnp.broadcast_to(values_C - 1, latent_BC.shape)
  return jnp.round((jnp.tanh(latent_BC) + 1) / 2 * steps_BC).astype(jnp.int32)


def grid_point(index_BC: jax.Array, values_C: np.ndarray) -> jax.Array:
  """The grid point of each number, from -1 to 1."""
  return 2 * index_BC / jnp.broadcast_to(values_C - 1, index_BC.shape) - 1


def _kept_groups(key, rows, levels, dropout):
  drop_key, number_key = jax.random.split(key)
  fewer_B = jax.random.randint(number_key, (rows,), 1, max(levels, 2))
  return jnp.where(jax.random.bernoulli(drop_key, float(dropout), (rows,)), fewer_B, levels)


@functools.partial(jax.jit, static_argnames=("sizes", "mesh"))
def _codes(arrays, x_KBD, *, sizes, mesh):
  values = [scalar_values(size) for size in sizes]
  starts = np.cumsum([len(v) for v in values])[:-1]

  def codes(arrays, x_BD):
    latent_BC = autoencoder.apply_mlp(arrays, "encoder", autoencoder.in_units(arrays, x_BD))
    groups = jnp.split(scalar_index(latent_BC, np.concatenate(values)), starts, axis=-1)
    pairs = zip(groups, values, strict=True)
    return jnp.stack([(index_BC * _radix(v)[None]).sum(-1) for index_BC, v in pairs], axis=-1)

  with jax.default_matmul_precision("float32"):  # the same codes on every kind of device
    return map_groups(codes, arrays, x_KBD, mesh)


@functools.partial(jax.jit, static_argnames="sizes")
def _decoded(arrays, code_KBL, *, sizes):
  groups = []
  for level, size in enumerate(sizes):
    values = scalar_values(size)
    if level < code_KBL.shape[-1]:
      code_KB1 = code_KBL[..., level, None]
      index_KBC = code_KB1 // _radix(values)[None, None] % np.array(values)[None, None]
      groups.append(grid_point(index_KBC, np.array(values)))
    else:
      groups.append(jnp.zeros((*code_KBL.shape[:-1], len(values))))
  return autoencoder.decoded(arrays, jnp.concatenate(groups, -1))


def _radix(values):
  """What a step of each coordinate adds to the code."""
  return np.array([math.prod(values[i + 1 :]) for i in range(len(values))], np.int32)
