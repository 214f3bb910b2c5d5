"""Balanced residual k-means: capacity, stability, residual codes by brute force, duplicates."""

import numpy as np
import pytest

from gr4ad_jax.tokenizer import residual_kmeans


def clustered(seed=0, num_points=300, width=8):
  rng = np.random.default_rng(seed)
  centres = 4 * rng.standard_normal((10, width))
  noise = rng.standard_normal((num_points, width))
  return (centres[rng.integers(0, 10, num_points)] + noise).astype(np.float32)


def brute_force_codes(embedding, centroids):
  residual = embedding.astype(np.float64)
  codes = []
  for table in centroids:
    distance = ((residual[:, None] - table[None]) ** 2).sum(-1)
    codes.append(distance.argmin(1))
    residual = residual - table[codes[-1]]
  return np.stack(codes, 1)


def test_assignment_is_the_stable_one_under_the_capacity():
  rng = np.random.default_rng(0)
  points, centroids = rng.standard_normal((90, 4)), 0.3 * rng.standard_normal((8, 4))
  codes = np.asarray(residual_kmeans.assign_balanced(points, centroids, capacity=12))
  counts = np.bincount(codes, minlength=8)
  assert counts.max() == 12  # the capacity binds here
  distance = ((points[:, None] - centroids[None]) ** 2).sum(-1)
  for n, code in enumerate(codes):
    for closer in np.flatnonzero(distance[n] < distance[n, code] - 1e-5):
      members = distance[codes == closer, closer]
      assert len(members) == 12 and members.max() <= distance[n, closer] + 1e-5


def test_leftovers_fill_centroids_with_room():
  # All points rank the 40 centroids alike, so 32 candidates hold 32 * 5 of the 200 points.
  points = np.linspace(0, 0.01, 200)[:, None]
  centroids = np.arange(1.0, 41.0)[:, None]
  codes = np.asarray(residual_kmeans.assign_balanced(points, centroids, capacity=5))
  assert np.bincount(codes, minlength=40).tolist() == [5] * 40


def test_codes_equal_brute_force():
  embedding = clustered()
  centroids = residual_kmeans.fit(embedding, (16, 8), seed=1, iterations=4)
  assert [c.shape for c in centroids] == [(16, 8), (8, 8)]
  codes = residual_kmeans.encode(embedding, centroids)
  assert codes.dtype == np.int32
  np.testing.assert_array_equal(codes, brute_force_codes(embedding, centroids))


def test_more_levels_leave_less_and_fitting_helps():
  embedding = clustered()
  centroids = residual_kmeans.fit(embedding, (16, 8), iterations=10)
  codes = residual_kmeans.encode(embedding, centroids)
  first = embedding - centroids[0][codes[:, 0]]
  second = first - centroids[1][codes[:, 1]]
  energy = [float((x**2).sum()) for x in (embedding - embedding.mean(0), first, second)]
  assert energy[0] > 4 * energy[1] and energy[1] > 1.2 * energy[2]


def test_same_seed_same_codebooks_other_seed_others():
  embedding = clustered()
  first, again, other = (
    residual_kmeans.fit(embedding, (16,), seed=seed, iterations=4)[0] for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_order_and_repeats_of_rows_change_nothing():
  embedding = clustered()
  rows = np.random.default_rng(1).permutation(np.repeat(np.arange(300), 3))
  centroids = residual_kmeans.fit(embedding, (16, 8), iterations=4)
  repeated = residual_kmeans.fit(embedding[rows], (16, 8), iterations=4)
  for table, table_of_repeated in zip(centroids, repeated, strict=True):
    np.testing.assert_array_equal(table, table_of_repeated)
  codes = residual_kmeans.encode(embedding, centroids)
  np.testing.assert_array_equal(residual_kmeans.encode(embedding[rows], centroids), codes[rows])


@pytest.mark.parametrize("num_distinct", [1, 3, 5])
def test_fewer_distinct_vectors_than_codes_get_codes_of_their_own(num_distinct):
  distinct = clustered(num_points=num_distinct)
  embedding = np.repeat(distinct, 4, axis=0)
  centroids = residual_kmeans.fit(embedding, (5, 4))
  assert [c.shape[0] for c in centroids] == [5, 4]
  assert all(np.isfinite(c).all() for c in centroids)
  codes = residual_kmeans.encode(embedding, centroids)
  assert len(np.unique(codes[:, 0])) == num_distinct
  np.testing.assert_array_equal(codes[:, 1], 0)  # nothing is left over
  # A new vector near an old one takes its code, never one that no vector filled.
  nearby = residual_kmeans.encode(distinct + 1e-3, centroids)[:, 0]
  np.testing.assert_array_equal(nearby, codes[::4, 0])


def test_one_heavy_cluster_is_split_by_the_capacity():
  rng = np.random.default_rng(0)
  heavy = 0.1 * rng.standard_normal((160, 4))
  light = 10 + 0.1 * rng.standard_normal((8, 4))
  embedding = np.concatenate([heavy, light]).astype(np.float32)
  codes = residual_kmeans.encode(embedding, residual_kmeans.fit(embedding, (8,)))[:, 0]
  assert len(np.unique(codes[:160])) >= 6


@pytest.mark.parametrize(
  ("embedding", "options", "message"),
  [
    (np.zeros((0, 3)), {}, "embedding_ND: shape"),
    (np.array([[0.0], [np.nan]]), {}, "row 1"),
    (np.ones((2, 1)), {"iterations": 0}, "iterations"),
  ],
)
def test_bad_input_is_named(embedding, options, message):
  with pytest.raises(ValueError, match=message):
    residual_kmeans.fit(embedding, (2,), **options)
