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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Interval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gr4ad_jax.config import Bounded, Count
from gr4ad_jax.embedding.rows import check_embeddings, distinct_rows
from gr4ad_jax.machine import sharding
from gr4ad_jax.tokenizer.groups import NUM_GROUPS, check_codes, check_mesh, map_rows
from gr4ad_jax.tokenizer.kmeans_programs import (
  LevelState,
  add_sums,
  compile_accumulate,
  compile_encode,
  compile_update,
  first_centroids,
)
from gr4ad_jax.training.resume import ResumeFile, Upkeep, run_fit
from gr4ad_jax.training.task import Metrics

Arrays = dict[str, np.ndarray]

GROUP_ROWS = 512  # rows of a group that are computed together, a block is that of all groups
MAX_BLOCKS = 8  # of one call
ENCODE_ROWS = 1024  # rows computed together while encoding; one call takes up to
MAX_ENCODE_BLOCKS = 4  # of them
BATCH_ROWS_PER_CODE = 64  # rows of an iteration; where there are more, batches take turns
FIRST_ROWS_PER_CODE = 16  # the same in the first iterations, and for the first centroids
FIRST_SHARE = 0.9  # of the iterations
COUNT_DECAY = 0.5  # what the rows of earlier batches still count one iteration later
FAR = 1e3  # unused codes lie this many data radii away, so that no vector takes them


@dataclasses.dataclass(frozen=True)
class KMeansConfig(Bounded):
  """How residual k-means fits.

  Attributes:
    iterations: a level. All but the last ones use FIRST_ROWS_PER_CODE * V_l of the distinct
      vectors, in turns; the last ones BATCH_ROWS_PER_CODE * V_l (all, where there are not more).
    balance_epsilon: a code with more than (1 + epsilon) times its even share of the distinct
      vectors is halved; inf = none is, which is plain RQ-Kmeans.
  """

  iterations: Count = 20
  balance_epsilon: Annotated[float, Interval(ge=0)] = 1.0


def fit(
  embedding_ND: np.ndarray, codebook_sizes: Sequence[int], config: KMeansConfig = KMeansConfig(), *,
  seed: int = 0, mesh: Mesh | None = None, resume: ResumeFile | None = None,
  progress: Callable | None = None,
) -> Arrays:
  """Fits one codebook a level, each on what the levels before it left over.

  Where a level has no more distinct vectors than codes, its codes are these vectors.

  Args:
    config: iterations and balance; for the others and for errors see `quantizers.Quantizer`.

  Returns:
    centroids_0, centroids_1, ...: float32 [V_l, D].

  Source: GR4AD (arXiv 2602.22732) 3.1; halving is our reading of "balanced".
  """
  check_embeddings(embedding_ND, codebook_sizes)
  mesh = check_mesh(mesh)
  embedding_ND = np.asarray(embedding_ND, np.float32)
  row_U = distinct_rows(embedding_ND).first_U
  saved = (None if resume is None else resume.load()) or {}
  centroids = {name: array for name, array in saved.items() if name.startswith("centroids_")}
  for level in range(len(centroids), len(codebook_sizes)):
    rows = _Residuals(embedding_ND, row_U, _by_level(centroids), mesh)
    upkeep = Upkeep(resume, progress, f"k-means level {level + 1}", "kmeans", beside=centroids)
    fitted_VD = _fit_level(rows, codebook_sizes[level], config, (seed, level), mesh, upkeep)
    centroids = centroids | {f"centroids_{level}": fitted_VD}
    if resume is not None:
      resume.save(centroids)
  return centroids


def encode(arrays: Arrays, embedding_ND: np.ndarray, *, mesh: Mesh | None = None) -> np.ndarray:
  """Codes of the nearest centroid, level by level; ties go to the lower code.

  Arguments, result and errors: see `quantizers.Quantizer`.
  """
  centroids = _by_level(arrays)
  check_embeddings(embedding_ND, width=centroids[0].shape[1])
  embedding_ND = np.asarray(embedding_ND, np.float32)
  distinct = distinct_rows(embedding_ND)
  return _encode_rows(embedding_ND, distinct.first_U, centroids, check_mesh(mesh))[distinct.of_N]


def decode(arrays: Arrays, code_NL: np.ndarray) -> np.ndarray:
  """The vector that a code path stands for: the sum of its centroids.

  Arguments, result and errors: see `quantizers.Quantizer`.
  """
  centroids, code_NL = _by_level(arrays), np.asarray(code_NL)
  check_codes(code_NL, [len(c) for c in centroids])
  sum_ND = np.zeros((len(code_NL), centroids[0].shape[1]), np.float32)
  for code_N, centroid_VD in zip(code_NL.T, centroids, strict=False):
    sum_ND += centroid_VD[code_N]
  return sum_ND


def _by_level(arrays: Arrays) -> tuple[np.ndarray, ...]:
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


class _Batch(NamedTuple):
  """Rows of an iteration: the blocks of the pieces from the `first` to before `stop`."""

  step: int
  pieces: Iterable[_Piece]
  first: int
  stop: int
  is_whole: bool  # all rows there are


def _batches(rows: _Residuals, size: int, config: KMeansConfig, seed) -> Callable[[int], _Batch]:
  """The batch of each iteration: few rows at first, many in the last ones."""
  large, small = BATCH_ROWS_PER_CODE * size, FIRST_ROWS_PER_CODE * size
  num_small = min(round(FIRST_SHARE * config.iterations), config.iterations - 1)
  if rows.num_rows > large:

    def draw(step: int) -> _Batch:
      of_U = rows.batch(step, small if step < num_small else large, seed)
      return _Batch(step, rows.pieces(of_U), 0, len(of_U), False)

    return draw
  # So few rows stay on the devices, where blocks take turns as batches.
  kept = list(rows.pieces(np.arange(rows.num_rows)))
  blocks = sum(piece.num_blocks for piece in kept)
  turns = max(1, blocks // -(-small // (NUM_GROUPS * GROUP_ROWS)))

  def take_turns(step: int) -> _Batch:
    turn, of = (step % turns, turns) if step < num_small else (0, 1)
    first, stop = blocks * turn // of, blocks * (turn + 1) // of
    return _Batch(step, kept, first, stop, stop - first == blocks)

  return take_turns


def _fit_level(
  rows: _Residuals, size: int, config: KMeansConfig, seed: Sequence[int], mesh: Mesh, upkeep: Upkeep
) -> np.ndarray:
  """The centroids of a level, [size, D]."""
  if rows.num_rows <= BATCH_ROWS_PER_CODE * size:
    rows.merge_equal()
  if rows.num_rows <= size:
    point_ND = rows.take(np.arange(rows.num_rows))
    radius = float(np.linalg.norm(point_ND, axis=-1).max())
    unused_VD = np.full((size - len(point_ND), point_ND.shape[1]), FAR * (1 + radius), np.float32)
    return np.concatenate([point_ND, unused_VD])
  accumulate, update = compile_accumulate(mesh), compile_update(mesh)
  key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])

  def step_fn(state: LevelState, batch: _Batch) -> tuple[LevelState, Metrics]:
    sums, before = None, 0
    for piece in batch.pieces:
      blocks = max(batch.first - before, 0), min(batch.stop - before, piece.num_blocks)
      if blocks[0] < blocks[1]:
        part = accumulate(piece.point_GKRD, piece.rows_GK, state.centroid_VD, *blocks)
        sums = part if sums is None else add_sums(sums, part)
      before += piece.num_blocks
    is_last = batch.step == config.iterations - 1  # moves no code, so that all of them are means
    epsilon = math.inf if is_last else config.balance_epsilon
    decay = 0.0 if batch.is_whole else COUNT_DECAY
    new = update(sums, state, jax.random.fold_in(key, batch.step), epsilon, decay)
    jax.block_until_ready(state)  # the host prepares one step while the devices work on another
    return new, {}

  sample_SD = rows.take(rows.batch(0, FIRST_ROWS_PER_CODE * size, seed))
  first = LevelState(first_centroids(jnp.asarray(sample_SD), key, size=size), jnp.zeros(size))
  state = run_fit(
    step_fn, first, _batches(rows, size, config, seed), config.iterations, upkeep,
    layout=sharding.replicated(mesh),
  )
  return np.asarray(state.centroid_VD)


def _encode_rows(embedding_ND, row_U, centroids, mesh) -> np.ndarray:
  """int32 [U, levels], codes of the rows `row_U`."""
  centroids = jax.device_put(centroids, sharding.replicated(mesh))
  return map_rows(
    functools.partial(compile_encode(mesh), centroids), embedding_ND, row_U, mesh,
    rows_per_block=ENCODE_ROWS, max_blocks=MAX_ENCODE_BLOCKS * mesh.shape[sharding.DATA],
  )
