"""Residual k-means: balance, residual codes by brute force, duplicates, meshes, resuming."""

import math

import jax
import numpy as np
import pytest

from gr4ad_jax.machine import sharding
from gr4ad_jax.tokenizer import residual_kmeans
from gr4ad_jax.tokenizer.residual_kmeans import KMeansConfig
from gr4ad_jax.training.resume import ResumeFile


def clustered(seed=0, num_points=300, width=8):
  rng = np.random.default_rng(seed)
  centres = 4 * rng.standard_normal((10, width))
  noise = rng.standard_normal((num_points, width))
  return (centres[rng.integers(0, 10, num_points)] + noise).astype(np.float32)


def fit(embedding, sizes, *, iterations=4, epsilon=1.0, **options):
  return residual_kmeans.fit(embedding, sizes, KMeansConfig(iterations, epsilon), **options)


def brute_force_codes(embedding, arrays):
  residual = embedding.astype(np.float64)
  codes = []
  for level in range(len(arrays)):
    table = arrays[f"centroids_{level}"]
    distance = ((residual[:, None] - table[None]) ** 2).sum(-1)
    codes.append(distance.argmin(1))
    residual = residual - table[codes[-1]]
  return np.stack(codes, 1)


def same(first, second):
  assert first.keys() == second.keys()
  return all(np.array_equal(first[name], second[name]) for name in first)


def test_codes_equal_brute_force_and_decode_sums_centroids():
  embedding = clustered()
  arrays = fit(embedding, (16, 8), seed=1)
  assert [arrays[f"centroids_{level}"].shape for level in (0, 1)] == [(16, 8), (8, 8)]
  codes = residual_kmeans.encode(arrays, embedding)
  assert codes.dtype == np.int32
  np.testing.assert_array_equal(codes, brute_force_codes(embedding, arrays))
  by_hand = arrays["centroids_0"][codes[:, 0]] + arrays["centroids_1"][codes[:, 1]]
  np.testing.assert_allclose(residual_kmeans.decode(arrays, codes), by_hand, rtol=1e-6)
  first_level = arrays["centroids_0"][codes[:, 0]]
  np.testing.assert_array_equal(residual_kmeans.decode(arrays, codes[:, :1]), first_level)
  with pytest.raises(ValueError, match="row 0 is"):
    residual_kmeans.decode(arrays, np.array([[0, 8]]))


@pytest.mark.parametrize("group_rows", [512, 8])  # one block; seven, in pieces of two
def test_plain_kmeans_ends_where_lloyds_iteration_stands_still(monkeypatch, group_rows):
  monkeypatch.setattr(residual_kmeans, "GROUP_ROWS", group_rows)
  monkeypatch.setattr(residual_kmeans, "MAX_BLOCKS", 2)
  monkeypatch.setattr(residual_kmeans, "FIRST_SHARE", 0.5)
  embedding = clustered(num_points=400, width=3)
  table = fit(embedding, (12,), iterations=80, epsilon=math.inf)["centroids_0"]
  code = brute_force_codes(embedding, {"centroids_0": table})[:, 0]
  assert len(np.unique(code)) == 12  # no dead code
  means = np.stack([embedding[code == v].mean(0) for v in range(12)])
  np.testing.assert_allclose(table, means, atol=1e-4)


def test_plain_kmeans_is_as_good_as_faiss():
  faiss = pytest.importorskip("faiss")
  rng = np.random.default_rng(0)
  embedding = rng.standard_normal((3000, 16)).astype(np.float32)
  error = {}
  codes = residual_kmeans.encode(
    arrays := fit(embedding, (64, 64), iterations=20, epsilon=math.inf), embedding
  )
  error["ours"] = ((embedding - residual_kmeans.decode(arrays, codes)) ** 2).sum(-1).mean()
  left = embedding.copy()
  for _ in range(2):
    kmeans = faiss.Kmeans(16, 64, niter=20, seed=0)
    kmeans.train(left)
    left -= kmeans.centroids[kmeans.index.search(left, 1)[1][:, 0]]
  error["faiss"] = (left**2).sum(-1).mean()
  assert error["ours"] < 1.03 * error["faiss"]


def test_more_levels_leave_less_and_fitting_helps():
  embedding = clustered()
  arrays = fit(embedding, (16, 8), iterations=10)
  codes = residual_kmeans.encode(arrays, embedding)
  left = [embedding - residual_kmeans.decode(arrays, codes[:, :n]) for n in (1, 2)]
  energy = [float((x**2).sum()) for x in (embedding - embedding.mean(0), *left)]
  assert energy[0] > 4 * energy[1] and energy[1] > 1.2 * energy[2]


def test_balance_halves_large_codes():
  rng = np.random.default_rng(0)
  scale = np.exp(2 * rng.standard_normal((2000, 1)))  # dense in the middle, sparse outside
  embedding = (scale * rng.standard_normal((2000, 4))).astype(np.float32)
  largest = {}
  for epsilon in (math.inf, 1.0):
    codes = residual_kmeans.encode(fit(embedding, (32,), iterations=20, epsilon=epsilon), embedding)
    largest[epsilon] = np.bincount(codes[:, 0]).max() / (2000 / 32)
  assert largest[math.inf] > 15 and largest[1.0] < 6


def test_same_seed_same_codebooks_other_seed_others():
  embedding = clustered()
  first, again, other = (fit(embedding, (16,), seed=seed) for seed in (3, 3, 4))
  assert same(first, again) and not same(first, other)


def test_order_and_repeats_of_rows_change_nothing():
  embedding = clustered()
  rows = np.random.default_rng(1).permutation(np.repeat(np.arange(300), 3))
  arrays = fit(embedding, (16, 8))
  assert same(arrays, fit(embedding[rows], (16, 8)))
  codes = residual_kmeans.encode(arrays, embedding)
  np.testing.assert_array_equal(residual_kmeans.encode(arrays, embedding[rows]), codes[rows])


@pytest.mark.parametrize(
  ("num_points", "sizes"),
  [(5000, (16, 8)), (9000, (256, 8))],  # batches of few rows; blocks of all rows that take turns
)
def test_all_meshes_give_the_same_bits(num_points, sizes):
  embedding = clustered(num_points=num_points)
  expected = fit(embedding, sizes)
  codes = residual_kmeans.encode(expected, embedding)
  for devices in (2, 8):
    mesh = sharding.build_mesh(data_parallel=devices)
    assert same(expected, fit(embedding, sizes, mesh=mesh))
    np.testing.assert_array_equal(residual_kmeans.encode(expected, embedding, mesh=mesh), codes)


def test_all_meshes_divide_the_groups():
  with pytest.raises(ValueError, match="divides 8"):
    fit(clustered(), (16, 8), mesh=sharding.build_mesh(data_parallel=3))


def test_batches_take_turns_and_come_close_to_whole_passes(monkeypatch):
  embedding = clustered(num_points=8000)

  def error(**options):
    arrays = fit(embedding, (16,), iterations=20, **options)
    codes = residual_kmeans.encode(arrays, embedding)
    return ((embedding - residual_kmeans.decode(arrays, codes)) ** 2).sum(-1).mean()

  in_batches = error()  # 64 rows a code: batches of 1,024
  monkeypatch.setattr(residual_kmeans, "BATCH_ROWS_PER_CODE", 500)
  assert in_batches < 1.1 * error()


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_an_interrupted_fit_goes_on_to_the_same_end(tmp_path, stop_at):
  embedding = clustered(num_points=3000)
  expected = fit(embedding, (16, 8))
  file = ResumeFile(tmp_path / "state.npz", "key", seconds_between_saves=0)
  seen = []

  def stopping(steps, description, total, completed=0):
    for step in steps:
      if len(seen) == stop_at:
        raise KeyboardInterrupt
      seen.append(step)
      yield step

  with pytest.raises(KeyboardInterrupt):
    fit(embedding, (16, 8), resume=file, progress=stopping)
  later = []

  def counting(steps, description, total, completed=0):
    for step in steps:
      later.append(step)
      yield step

  again = ResumeFile(tmp_path / "state.npz", "key")
  assert same(expected, fit(embedding, (16, 8), resume=again, progress=counting))
  assert len(seen) + len(later) == 2 * 4  # nothing is done twice


@pytest.mark.parametrize(("rows_per_code", "blocks"), [(64, 1), (2048, 2)])
def test_what_goes_to_the_devices_at_once_is_bounded(monkeypatch, rows_per_code, blocks):
  """However many rows there are, it is a batch, and of a large batch a piece."""
  monkeypatch.setattr(residual_kmeans, "BATCH_ROWS_PER_CODE", rows_per_code)
  monkeypatch.setattr(residual_kmeans, "MAX_BLOCKS", 2)
  embedding = clustered(num_points=20_000)
  placed = []
  put = jax.device_put

  def spy(x, *args, **options):
    placed.extend(leaf.size // 8 for leaf in jax.tree.leaves(x) if isinstance(leaf, np.ndarray))
    return put(x, *args, **options)

  monkeypatch.setattr(jax, "device_put", spy)
  fit(embedding, (8,))
  expected = blocks * residual_kmeans.NUM_GROUPS * residual_kmeans.GROUP_ROWS
  assert max(placed) == expected


@pytest.mark.parametrize("num_distinct", [1, 3, 5])
def test_fewer_distinct_vectors_than_codes_get_codes_of_their_own(num_distinct):
  distinct = clustered(num_points=num_distinct)
  embedding = np.repeat(distinct, 5, axis=0)
  arrays = fit(embedding, (5, 4), iterations=20)
  assert [len(arrays[f"centroids_{level}"]) for level in (0, 1)] == [5, 4]
  assert all(np.isfinite(table).all() for table in arrays.values())
  codes = residual_kmeans.encode(arrays, embedding)
  assert len(np.unique(codes[:, 0])) == num_distinct
  np.testing.assert_array_equal(codes[:, 1], 0)  # nothing is left over
  # A new vector near an old one takes its code, never one that no vector filled.
  nearby = residual_kmeans.encode(arrays, distinct + 1e-3)[:, 0]
  np.testing.assert_array_equal(nearby, codes[::5, 0])


def test_one_heavy_cluster_is_split():
  rng = np.random.default_rng(0)
  heavy = 0.1 * rng.standard_normal((160, 4))
  light = 10 + 0.1 * rng.standard_normal((8, 4))
  embedding = np.concatenate([heavy, light]).astype(np.float32)
  codes = residual_kmeans.encode(fit(embedding, (8,), iterations=20), embedding)[:, 0]
  assert len(np.unique(codes[:160])) >= 6


@pytest.mark.parametrize(
  ("embedding", "options", "message"),
  [
    (np.zeros((0, 3)), {}, "embedding_ND: shape"),
    (np.zeros((4, 3), int), {}, "dtype int64"),
    (np.array([[0.0], [np.nan], [1.0]]), {}, "row 1"),
    (np.array([[0.0], [1.0], [-np.inf]]), {}, "row 2"),
    (np.ones((1, 1)), {}, "level 1 has 2 codes for 1 rows"),
    (np.ones((2, 1)), {"iterations": 0}, "iterations"),
    (np.ones((2, 1)), {"epsilon": -1.0}, "balance_epsilon"),
  ],
)
def test_bad_input_is_named(embedding, options, message):
  with pytest.raises(ValueError, match=message):
    fit(embedding, (2,), **options)


def test_another_width_is_named():
  arrays = fit(clustered(), (4,))
  with pytest.raises(ValueError, match="3 columns, but the codebooks have 8"):
    residual_kmeans.encode(arrays, np.ones((2, 3), np.float32))
