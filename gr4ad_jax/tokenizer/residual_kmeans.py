"""Balanced residual k-means with one codebook size a level (RQ-Kmeans, multi-resolution).

Equal vectors always get equal codes, so the fit works on distinct vectors: many ads with one text
count once, and the capacity of a code is a number of distinct vectors.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

NUM_CANDIDATES = 32  # centroids a point proposes to before it is a leftover
INIT_POINTS_PER_CODE = 16  # size of the k-means++ sample
ROWS_PER_CHUNK = 8192  # rows whose distances to all centroids are in memory at once
FAR = 1e3  # unused codes lie this many data radii away, so that no vector takes them


def fit(
  embedding_ND: np.ndarray,
  codebook_sizes: Sequence[int],
  *,
  seed: int = 0,
  iterations: int = 20,
  balance_epsilon: float = 0.1,
  progress: Callable | None = None,
) -> tuple[np.ndarray, ...]:
  """Fits one balanced codebook a level, each on what the levels before it left over.

  Where a level has no more distinct vectors than codes, its codes are these vectors.

  Args:
    embedding_ND: [N, D] float, finite.
    codebook_sizes: codes V_l of each level.
    seed: of the k-means++ draws; the same seed gives the same codebooks.
    iterations: k-means iterations a level.
    balance_epsilon: at fit time no code holds more than ceil((1 + epsilon) n / V_l) of the n
      distinct vectors.
    progress: called as `progress(iterations, description, total)`; None shows nothing.

  Returns:
    For each level the centroids [V_l, D], float32.

  Raises:
    ValueError: shapes, sizes or values out of range.

  Source: GR4AD (arXiv 2602.22732) 3.1; proposal rounds are our reading of "balanced".
  """
  _check(embedding_ND, codebook_sizes)
  if iterations < 1 or balance_epsilon < 0:
    raise ValueError(
      f"iterations must be >= 1 and balance_epsilon >= 0, got {iterations} and {balance_epsilon}"
    )
  residual_ND = np.asarray(embedding_ND, np.float32)
  centroids = []
  for level, size in enumerate(codebook_sizes):
    residual_ND = np.unique(residual_ND, axis=0)
    steps = range(iterations)
    if progress is not None:
      steps = progress(steps, description=f"k-means level {level + 1}", total=iterations)
    key = jax.random.fold_in(jax.random.key(seed), level)
    centroid_VD = _fit_level(residual_ND, size, key, steps, balance_epsilon)
    centroids.append(centroid_VD)
    residual_ND = residual_ND - centroid_VD[_nearest_of(residual_ND, centroid_VD)]
  return tuple(centroids)


def encode(embedding_ND: np.ndarray, centroids: Sequence[np.ndarray]) -> np.ndarray:
  """Codes of the nearest centroid, level by level, without a capacity; equal rows, equal codes.

  Args:
    embedding_ND: [N, D] float, finite.
    centroids: for each level [V_l, D].

  Returns:
    [N, levels] int32. Ties go to the lower code.

  Raises:
    ValueError: shapes or values out of range.
  """
  _check(embedding_ND, [len(c) for c in centroids])
  residual_ND, row_N = np.unique(
    np.asarray(embedding_ND, np.float32), axis=0, return_inverse=True
  )
  code_NL = np.empty((len(residual_ND), len(centroids)), np.int32)
  for level, centroid_VD in enumerate(centroids):
    code_NL[:, level] = _nearest_of(residual_ND, centroid_VD)
    residual_ND = residual_ND - centroid_VD[code_NL[:, level]]
  return code_NL[row_N.reshape(-1)]


def _check(embedding_ND, codebook_sizes):
  if embedding_ND.ndim != 2 or not embedding_ND.size:
    raise ValueError(f"embedding_ND: shape {embedding_ND.shape}, expected [N > 0, D > 0]")
  bad_row = np.flatnonzero(~np.isfinite(embedding_ND).all(-1))
  if bad_row.size:
    raise ValueError(f"embedding_ND: row {bad_row[0]} holds a value that is not finite")
  if not all(size >= 1 for size in codebook_sizes):
    raise ValueError(f"codebook_sizes: {tuple(codebook_sizes)}, each must be >= 1")


def _fit_level(point_ND, size, key, steps, epsilon):
  if len(point_ND) <= size:
    for _ in steps:  # nothing to iterate; lets a progress bar end
      pass
    radius = float(np.linalg.norm(point_ND, axis=-1).max())
    unused_VD = np.full((size - len(point_ND), point_ND.shape[1]), FAR * (1 + radius), np.float32)
    return np.concatenate([point_ND, unused_VD])
  capacity = math.ceil((1 + epsilon) * len(point_ND) / size)
  init_key, sample_key = jax.random.split(key)
  sample_size = min(len(point_ND), INIT_POINTS_PER_CODE * size)
  sample = np.asarray(jax.random.permutation(sample_key, len(point_ND)))[:sample_size]
  point_ND = jnp.asarray(point_ND)
  centroid_VD = _plus_plus(point_ND[np.sort(sample)], init_key, size=size)
  for _ in steps:
    code_N = assign_balanced(point_ND, centroid_VD, capacity=capacity)
    centroid_VD = _update_means(point_ND, centroid_VD, code_N).block_until_ready()
  return np.asarray(centroid_VD)


@functools.partial(jax.jit, static_argnames="size")
def _plus_plus(point_ND, key, *, size):
  """k-means++: the next centroid is drawn with probability ~ squared distance to the nearest."""

  def add(v, state):
    centroid_VD, nearest_N, key = state
    key, draw_key = jax.random.split(key)
    # At first all distances are inf, so the draw is uniform.
    weight_N = jnp.where(jnp.isinf(nearest_N), 1.0, nearest_N)
    chosen_D = point_ND[jax.random.categorical(draw_key, jnp.log(weight_N))]
    distance_N = jnp.square(point_ND - chosen_D).sum(-1)
    return centroid_VD.at[v].set(chosen_D), jnp.minimum(nearest_N, distance_N), key

  N, D = point_ND.shape
  state = (jnp.zeros((size, D)), jnp.full(N, jnp.inf), key)
  return jax.lax.fori_loop(0, size, add, state)[0]


def _map_row_chunks(f, point_ND):
  """Applies a row-wise function chunk by chunk, so that only [chunk, V] distances exist."""
  N, D = point_ND.shape
  chunk = min(N, ROWS_PER_CHUNK)
  chunks = -(-N // chunk)
  padded = jnp.pad(point_ND, ((0, chunks * chunk - N), (0, 0))).reshape(chunks, chunk, D)
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:N], jax.lax.map(f, padded))


def _squared_distance(point_ND, centroid_VD):
  """[N, V] up to the point's own norm, which does not change its ranking of centroids."""
  with jax.default_matmul_precision("float32"):  # the same codes on every kind of device
    dot_NV = jnp.einsum("ND,VD->NV", point_ND, centroid_VD)
  return jnp.square(centroid_VD).sum(-1) - 2 * dot_NV


@jax.jit
def _nearest(point_ND, centroid_VD):
  return _map_row_chunks(
    lambda chunk_ND: _squared_distance(chunk_ND, centroid_VD).argmin(-1), point_ND
  )


def _nearest_of(point_ND, centroid_VD):
  return np.asarray(_nearest(jnp.asarray(point_ND), jnp.asarray(centroid_VD)))


@functools.partial(jax.jit, static_argnames="capacity")
def assign_balanced(point_ND, centroid_VD, *, capacity):
  """Nearest centroids under a capacity: the assignment step of balanced k-means.

  In rounds, every point proposes to its nearest centroid that has not refused it yet, 32 at most,
  and every centroid keeps the `capacity` closest. Points refused by all go, in row order, to the
  nearest centroid with room.

  Args:
    point_ND: [N, D] float.
    centroid_VD: [V, D] float.
    capacity: points a code may hold; capacity * V >= N.

  Returns:
    [N] int32 codes.
  """
  N, V = len(point_ND), len(centroid_VD)
  num_candidates = min(NUM_CANDIDATES, V)

  def candidates(chunk_ND):
    negative, code = jax.lax.top_k(-_squared_distance(chunk_ND, centroid_VD), num_candidates)
    return code, -negative + jnp.square(chunk_ND).sum(-1, keepdims=True)

  code_NC, distance_NC = _map_row_chunks(candidates, point_ND)
  # A last column for points that ran out of candidates: "code" V, which holds everybody.
  code_NC = jnp.pad(code_NC, ((0, 0), (0, 1)), constant_values=V)
  distance_NC = jnp.pad(distance_NC, ((0, 0), (0, 1)))

  def propose(state):
    choice_N, _ = state
    code_N = jnp.take_along_axis(code_NC, choice_N[:, None], 1)[:, 0]
    distance_N = jnp.take_along_axis(distance_NC, choice_N[:, None], 1)[:, 0]
    order_N = jnp.lexsort((distance_N, code_N))  # stable: among equals the earlier row stays
    start_V = jnp.cumsum(jnp.bincount(code_N, length=V + 1)) - jnp.bincount(code_N, length=V + 1)
    rank_N = jnp.zeros(N, int).at[order_N].set(jnp.arange(N) - start_V[code_N[order_N]])
    rejected_N = (rank_N >= capacity) & (code_N < V)
    return choice_N + rejected_N, rejected_N.any()

  choice_N, _ = jax.lax.while_loop(lambda s: s[1], propose, (jnp.zeros(N, int), jnp.array(True)))
  code_N = jnp.take_along_axis(code_NC, choice_N[:, None], 1)[:, 0]

  leftover_N = jnp.argsort(code_N < V, stable=True)  # rows of leftovers first

  def place(i, state):
    code_N, held_V = state
    row = leftover_N[i]
    distance_V = _squared_distance(point_ND[row][None], centroid_VD)[0]
    code = jnp.where(held_V < capacity, distance_V, jnp.inf).argmin()
    return code_N.at[row].set(code), held_V.at[code].add(1)

  held_V = jnp.bincount(code_N, length=V + 1)[:V]
  return jax.lax.fori_loop(0, (code_N == V).sum(), place, (code_N, held_V))[0]


@jax.jit
def _update_means(point_ND, centroid_VD, code_N):
  """Means of the codes; the j-th empty code takes the farthest point of the j-th largest code."""
  N, V = len(point_ND), len(centroid_VD)
  count_V = jnp.bincount(code_N, length=V)
  sum_VD = jax.ops.segment_sum(point_ND, code_N, V)
  mean_VD = sum_VD / jnp.maximum(count_V, 1)[:, None]
  distance_N = jnp.square(point_ND - mean_VD[code_N]).sum(-1)
  farthest_V = jax.ops.segment_max(distance_N, code_N, V)
  row_N = jnp.where(distance_N == farthest_V[code_N], jnp.arange(N), N)
  row_V = jax.ops.segment_min(row_N, code_N, V)
  empty_V = count_V == 0
  donor_V = jnp.argsort(-count_V, stable=True)[jnp.cumsum(empty_V) - 1]
  seed_VD = point_ND[jnp.minimum(row_V[donor_V], N - 1)]
  return jnp.where(empty_V[:, None], seed_VD, mean_VD)
