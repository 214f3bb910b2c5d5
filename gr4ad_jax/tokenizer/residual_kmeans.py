"""Residual k-means: plain (RQ-Kmeans) or balanced, one codebook size a level (multi-resolution).

Equal vectors always get equal codes, so the fit works on distinct vectors: many ads with one text
count once, and so does the size of a code.

Balance: a code with many more vectors than its even share is halved, and the smallest code gives up
its place for the second half. Codes are always those of the nearest centroid, so what the fit
evens out is what new vectors meet too, and it costs nothing beside the distances.

Sums over rows are made in groups (`groups.py`), so the codebooks have the same bits on 1, 2, 4
and 8 devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gr4ad_jax.embedding.rows import check_embeddings, distinct_rows
from gr4ad_jax.machine import sharding
from gr4ad_jax.tokenizer.groups import (
  NUM_GROUPS,
  add_in_order,
  check_codes,
  check_mesh,
  map_groups,
  map_rows,
)
from gr4ad_jax.training.resume import ResumeFile

Arrays = dict[str, np.ndarray]

GROUP_ROWS = 512  # rows of a group that are computed together, a block is that of all groups
MAX_BLOCKS = 8  # of one call
ENCODE_ROWS = 1024  # rows computed together while encoding; one call takes up to
MAX_ENCODE_BLOCKS = 4  # of them
BATCH_ROWS_PER_CODE = 64  # rows of an iteration; where there are more, batches take turns
FIRST_ROWS_PER_CODE = 16  # the same in the first iterations, and for the first centroids
FIRST_SHARE = 0.9  # of the iterations
INIT_ROUNDS = 16  # in which the first centroids are drawn
COUNT_DECAY = 0.5  # what the rows of earlier batches still count one iteration later
MOVE_BELOW = 0.1  # a code moves to one that is so many times its size
SPLIT_STEP = 0.1  # half the distance of the two halves of a code when it is split, in its spread
FAR = 1e3  # unused codes lie this many data radii away, so that no vector takes them


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
  """How residual k-means fits.

  Attributes:
    iterations: a level. All but the last ones use FIRST_ROWS_PER_CODE * V_l of the distinct
      vectors, in turns; the last ones BATCH_ROWS_PER_CODE * V_l (all, where there are not more).
    balance_epsilon: a code with more than (1 + epsilon) times its even share of the distinct
      vectors is halved; inf = none is, which is plain RQ-Kmeans.
  """

  iterations: int = 20
  balance_epsilon: float = 1.0

  def __post_init__(self):
    if self.iterations < 1:
      raise ValueError(f"iterations: {self.iterations}, must be >= 1")
    if not self.balance_epsilon >= 0:
      raise ValueError(f"balance_epsilon: {self.balance_epsilon}, must be >= 0")


class _State(NamedTuple):
  """Of the fit of one level."""

  centroid_VD: jax.Array
  count_V: jax.Array  # float, rows behind each centroid, earlier batches counting less


def fit(
  embedding_ND: np.ndarray,
  codebook_sizes: Sequence[int],
  config: KMeansConfig = KMeansConfig(),
  *,
  seed: int = 0,
  mesh: Mesh | None = None,
  resume: ResumeFile | None = None,
  progress: Callable | None = None,
) -> Arrays:
  """Fits one codebook a level, each on what the levels before it left over.

  Where a level has no more distinct vectors than codes, its codes are these vectors.

  Args:
    embedding_ND: [N, D] float, finite.
    codebook_sizes: codes V_l of each level.
    config: iterations and balance.
    seed: of all draws; the same seed gives the same codebooks.
    mesh: rows are split over its `data` axis; None = one device.
    resume: where an interrupted fit of the same input left its state; None keeps none.
    progress: called as `progress(iterations, description, total)`; None shows nothing.

  Returns:
    centroids_0, centroids_1, ...: float32 [V_l, D].

  Raises:
    ValueError: shapes, sizes or values out of range, or a mesh whose data axis does not divide 8.

  Source: GR4AD (arXiv 2602.22732) 3.1; halving is our reading of "balanced".
  """
  check_embeddings(embedding_ND, codebook_sizes)
  mesh = check_mesh(mesh)
  embedding_ND = np.asarray(embedding_ND, np.float32)
  row_U = distinct_rows(embedding_ND).first_U
  done = (resume.load() if resume is not None else None) or {}
  centroids: list[np.ndarray] = []
  for level, size in enumerate(codebook_sizes):
    name = f"centroids_{level}"
    if name not in done:
      rows = _Residuals(embedding_ND, row_U, tuple(centroids), mesh)

      def save(state: _State, step: int, done=done) -> None:
        if resume is not None and resume.due():
          arrays = {n: np.asarray(x) for n, x in state._asdict().items()}
          resume.save(done | arrays | {"step": np.array(step)})

      start = int(done["step"]) if "step" in done else 0
      steps = range(start, config.iterations)
      if progress is not None:
        steps = progress(
          steps, description=f"k-means level {level + 1}", total=config.iterations, completed=start
        )
      state = _State(*(done[n] for n in _State._fields)) if start else None
      fitted = _fit_level(rows, size, config, (seed, level), mesh, steps, state, save)
      done = {n: c for n, c in done.items() if n.startswith("centroids_")} | {name: fitted}
      if resume is not None:
        resume.save(done)
    centroids.append(done[name])
  return {f"centroids_{level}": c for level, c in enumerate(centroids)}


def encode(arrays: Arrays, embedding_ND: np.ndarray, *, mesh: Mesh | None = None) -> np.ndarray:
  """Codes of the nearest centroid, level by level; equal rows, equal codes.

  Args:
    arrays: from `fit`.
    embedding_ND: [N, D] float, finite.
    mesh: rows are split over its `data` axis; None = one device.

  Returns:
    [N, levels] int32. Ties go to the lower code.

  Raises:
    ValueError: shapes or values out of range.
  """
  centroids = _centroids(arrays)
  check_embeddings(embedding_ND, width=centroids[0].shape[1])
  embedding_ND = np.asarray(embedding_ND, np.float32)
  distinct = distinct_rows(embedding_ND)
  return _encode_rows(embedding_ND, distinct.first_U, centroids, check_mesh(mesh))[distinct.of_N]


def decode(arrays: Arrays, code_NL: np.ndarray) -> np.ndarray:
  """The vector that a code path stands for: the sum of its centroids.

  Args:
    arrays: from `fit`.
    code_NL: [N, l] int, the first l codes of each row; 1 <= l <= levels.

  Returns:
    [N, D] float32.

  Raises:
    ValueError: more codes than levels, or a code outside its codebook.
  """
  centroids, code_NL = _centroids(arrays), np.asarray(code_NL)
  check_codes(code_NL, [len(c) for c in centroids])
  sum_ND = np.zeros((len(code_NL), centroids[0].shape[1]), np.float32)
  for code_N, centroid_VD in zip(code_NL.T, centroids, strict=False):
    sum_ND += centroid_VD[code_N]
  return sum_ND


def _centroids(arrays: Arrays) -> tuple[np.ndarray, ...]:
  return tuple(arrays[f"centroids_{level}"] for level in range(len(arrays)))


class _Residuals:
  """What the levels before left over of the distinct rows of a table, in batches on the mesh."""

  def __init__(self, embedding_ND, row_U, centroids, mesh):
    self._embedding_ND, self._row_U, self._centroids = embedding_ND, row_U, centroids
    self._mesh = mesh
    self._code_UL = _encode_rows(embedding_ND, row_U, centroids, mesh) if centroids else None
    self.num_rows = len(row_U)

  def take(self, of_U: np.ndarray) -> np.ndarray:
    """[len(of_U), D] residuals."""
    residual = self._embedding_ND[self._row_U[of_U]]
    for level, centroid_VD in enumerate(self._centroids):
      residual -= centroid_VD[self._code_UL[of_U, level]]
    return residual

  def merge_equal(self) -> None:
    """Residuals may be equal where vectors were not; each is to count once."""
    if not self._centroids:
      return  # the vectors themselves, distinct already
    self._embedding_ND, self._centroids = self.take(np.arange(self.num_rows)), ()
    self._row_U = distinct_rows(self._embedding_ND).first_U
    self.num_rows = len(self._row_U)

  def batch(self, number: int, size: int, seed: Sequence[int]) -> np.ndarray:
    """Row numbers of a batch; no row is seen twice before (nearly) all were."""
    epoch, part = divmod(number, max(1, self.num_rows // size))
    order_U = np.random.default_rng([*seed, epoch]).permutation(self.num_rows)
    return np.sort(order_U[part * size : (part + 1) * size])

  def pieces(self, of_U: np.ndarray) -> Iterator[_Piece]:
    """Rows in the layout of an iteration, evenly spread over as few blocks as hold them."""
    layout = NamedSharding(self._mesh, PartitionSpec(sharding.DATA))
    blocks = -(-len(of_U) // (NUM_GROUPS * GROUP_ROWS))
    per_piece = min(blocks, MAX_BLOCKS)
    for start in range(0, blocks, per_piece):
      stop = min(start + per_piece, blocks)
      point_ND = self.take(of_U[len(of_U) * start // blocks : len(of_U) * stop // blocks])
      padded = np.zeros((NUM_GROUPS, per_piece, GROUP_ROWS, point_ND.shape[1]), np.float32)
      rows_GK = np.zeros((NUM_GROUPS, per_piece), np.int32)
      # Cells of unused blocks stay empty.
      used = [(g, k) for g in range(NUM_GROUPS) for k in range(stop - start)]
      for cell, part_ND in zip(used, np.array_split(point_ND, len(used)), strict=True):
        padded[cell][: len(part_ND)] = part_ND
        rows_GK[cell] = len(part_ND)
      yield _Piece(*jax.device_put((padded, rows_GK), layout), stop - start)


class _Piece(NamedTuple):
  """K blocks of rows; each device holds whole groups of every block."""

  point_GKRD: jax.Array
  rows_GK: jax.Array  # int32, how many of R are rows, not padding
  num_blocks: int  # of K, the others are empty


def _fit_level(rows, size, config, seed, mesh, steps, state, save) -> np.ndarray:
  large, small = BATCH_ROWS_PER_CODE * size, FIRST_ROWS_PER_CODE * size
  stay = rows.num_rows <= large  # on the devices, where blocks take turns as batches
  if stay:
    rows.merge_equal()
  if rows.num_rows <= size:
    for _ in steps:  # nothing to iterate; lets a progress bar end
      pass
    point_ND = rows.take(np.arange(rows.num_rows))
    radius = float(np.linalg.norm(point_ND, axis=-1).max())
    unused_VD = np.full((size - len(point_ND), point_ND.shape[1]), FAR * (1 + radius), np.float32)
    return np.concatenate([point_ND, unused_VD])
  accumulate, update = _compile_accumulate(mesh), _compile_update(mesh)
  key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
  if state is None:
    sample_SD = rows.take(rows.batch(0, small, seed))
    state = _State(_spread(jnp.asarray(sample_SD), key, size=size), jnp.zeros(size))
  state = jax.device_put(state, sharding.replicated(mesh))
  num_small = min(round(FIRST_SHARE * config.iterations), config.iterations - 1)
  kept = list(rows.pieces(np.arange(rows.num_rows))) if stay else []
  all_blocks = sum(piece.num_blocks for piece in kept)
  turns = max(1, all_blocks // -(-small // (NUM_GROUPS * GROUP_ROWS)))
  for step in steps:
    is_small = step < num_small
    if stay:
      turn, of = (step % turns, turns) if is_small else (0, 1)
      pieces, first, stop = kept, all_blocks * turn // of, all_blocks * (turn + 1) // of
    else:
      of_U = rows.batch(step, small if is_small else large, seed)
      pieces, first, stop = rows.pieces(of_U), 0, len(of_U)
    sums, before = None, 0
    for piece in pieces:
      blocks = max(first - before, 0), min(stop - before, piece.num_blocks)
      if blocks[0] < blocks[1]:
        part = accumulate(piece.point_GKRD, piece.rows_GK, state.centroid_VD, *blocks)
        sums = part if sums is None else _add(sums, part)
      before += piece.num_blocks
    is_last = step == config.iterations - 1  # moves no code, so that all of them are means
    epsilon = math.inf if is_last else config.balance_epsilon
    decay = 0.0 if (first, stop) == (0, all_blocks) else COUNT_DECAY
    last = state
    state = update(sums, state, jax.random.fold_in(key, step), epsilon, decay)
    jax.block_until_ready(last)  # the host prepares one step while the devices work on another
    save(state, step + 1)
  return np.asarray(state.centroid_VD)


@functools.partial(jax.jit, static_argnames="size")
def _spread(point_ND: jax.Array, key: jax.Array, *, size: int) -> jax.Array:
  """First centroids: points drawn ~ squared distance to those drawn before, many a round."""
  N, D = point_ND.shape
  per_round = -(-size // INIT_ROUNDS)
  rounds = -(-size // per_round)
  norm_N = jnp.square(point_ND).sum(-1)

  def draw(r, state):
    centroid_VD, nearest_N, free_N = state
    noise_N = jax.random.gumbel(jax.random.fold_in(key, r), (N,))
    weight_N = jnp.log(jnp.maximum(nearest_N, 1e-20)) + noise_N
    _, chosen = jax.lax.top_k(jnp.where(free_N, weight_N, -jnp.inf), per_round)
    new_KD = point_ND[chosen]
    centroid_VD = jax.lax.dynamic_update_slice(centroid_VD, new_KD, (r * per_round, 0))
    distance_NK = squared_distance(point_ND, new_KD) + norm_N[:, None]
    nearest_N = jnp.minimum(nearest_N, jnp.maximum(distance_NK.min(-1), 0))
    return centroid_VD, nearest_N, free_N.at[chosen].set(False)

  # At first all distances are equal, so the draw is uniform.
  state = (jnp.zeros((rounds * per_round, D)), jnp.full(N, 1e9), jnp.ones(N, bool))
  return jax.lax.fori_loop(0, rounds, draw, state)[0][:size]


def squared_distance(point_ND: jax.Array, centroid_VD: jax.Array) -> jax.Array:
  """[N, V] up to the point's own norm, which does not change its ranking of centroids."""
  with jax.default_matmul_precision("float32"):  # the same codes on every kind of device
    dot_NV = jnp.einsum("ND,VD->NV", point_ND, centroid_VD)
  return jnp.square(centroid_VD).sum(-1) - 2 * dot_NV


class _Sums(NamedTuple):
  """Over rows, one partial sum for each group; the last code is that of padding."""

  sum_GWD: jax.Array  # vectors of each code, W = V + 1
  count_GW: jax.Array
  distance_GW: jax.Array  # squared, to the code's centroid


@functools.cache
def _compile_accumulate(mesh: Mesh) -> Callable:
  """(points [G, K, R, D], real rows [G, K], centroids, first block, stop) -> sums over blocks."""

  def assign(shared, group):
    centroid_VD, first, stop = shared
    point_KRD, rows_K = group
    V, D = centroid_VD.shape

    def add_block(k, sums):
      point_RD = point_KRD[k]
      distance_RV = squared_distance(point_RD, centroid_VD)
      code_R = jnp.where(jnp.arange(len(point_RD)) < rows_K[k], distance_RV.argmin(-1), V)
      distance_R = jnp.maximum(distance_RV.min(-1) + jnp.square(point_RD).sum(-1), 0)
      return jax.tree.map(lambda sum_W, x_R: sum_W.at[code_R].add(x_R), sums,
                          _Sums(point_RD, 1, distance_R))

    zeros = _Sums(jnp.zeros((V + 1, D)), jnp.zeros(V + 1, jnp.int32), jnp.zeros(V + 1))
    return jax.lax.fori_loop(first, stop, add_block, zeros)

  def accumulate(point_GKRD, rows_GK, centroid_VD, first, stop):
    return map_groups(assign, (centroid_VD, first, stop), (point_GKRD, rows_GK), mesh)

  return jax.jit(accumulate)


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


@functools.cache
def _compile_update(mesh: Mesh) -> Callable:
  """(sums, state, key, epsilon, count decay) -> state one iteration later."""

  def update(sums, state, key, epsilon, decay):
    centroid_VD, count_V = state
    V, D = centroid_VD.shape
    sum_VD, new_V, distance_V = (add_in_order(x)[:V] for x in sums)
    # Means; earlier batches keep a share that decays.
    count_V = decay * count_V + new_V
    step_VD = sum_VD - new_V[:, None] * centroid_VD
    centroid_VD = centroid_VD + step_VD / jnp.maximum(count_V, 1e-9)[:, None]
    # The j-th smallest code leaves its place and halves the j-th largest one.
    even = count_V.sum() / V
    from_V = jnp.argsort(count_V, stable=True)
    to_V = from_V[::-1]
    small_V, large_V = count_V[from_V], count_V[to_V]
    moves_V = (large_V > (1 + epsilon) * even) & (small_V < MOVE_BELOW * large_V)
    moves_V |= (small_V < 0.5) & (large_V >= 2)
    moves_V &= jnp.arange(V) < V // 2
    spread_V = jnp.sqrt(distance_V / jnp.maximum(new_V, 1) / D)[to_V]
    offset_VD = SPLIT_STEP * spread_V[:, None] * jax.random.normal(key, (V, D))
    half_V = jnp.where(moves_V, large_V / 2, large_V)
    kept_VD = jnp.where(moves_V[:, None], centroid_VD[to_V] - offset_VD, centroid_VD[to_V])
    moved_VD = jnp.where(moves_V[:, None], centroid_VD[to_V] + offset_VD, centroid_VD[from_V])
    centroid_VD = centroid_VD.at[to_V].set(kept_VD)
    count_V = count_V.at[to_V].set(half_V)
    first = jnp.where(moves_V, from_V, V)  # codes that do not move are left as they are
    centroid_VD = centroid_VD.at[first].set(moved_VD, mode="drop")
    count_V = count_V.at[first].set(half_V, mode="drop")
    return _State(centroid_VD, count_V)

  return jax.jit(update, out_shardings=sharding.replicated(mesh))


@functools.cache
def _compile_encode(mesh: Mesh) -> Callable:
  """(centroids of each level, points [blocks, rows, D]) -> codes [blocks, rows, levels]."""

  def block(centroids, residual_RD):
    codes = []
    for centroid_VD in centroids:
      codes.append(squared_distance(residual_RD, centroid_VD).argmin(-1).astype(jnp.int32))
      residual_RD = residual_RD - centroid_VD[codes[-1]]
    return jnp.stack(codes, -1)

  return jax.jit(lambda centroids, point_BRD: map_groups(block, centroids, point_BRD, mesh))


def _encode_rows(embedding_ND, row_U, centroids, mesh) -> np.ndarray:
  """int32 [U, levels], codes of the rows `row_U`."""
  centroids = jax.device_put(centroids, sharding.replicated(mesh))
  return map_rows(
    functools.partial(_compile_encode(mesh), centroids), embedding_ND, row_U, mesh,
    rows_per_block=ENCODE_ROWS, max_blocks=MAX_ENCODE_BLOCKS * mesh.shape[sharding.DATA],
  )
