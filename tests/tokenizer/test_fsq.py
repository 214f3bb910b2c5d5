"""FSQ: grids and rounding by hand, codes and grids by round trip, prefixes, resume, meshes."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.machine.sharding import build_mesh
from gr4ad_jax.tokenizer import fsq
from gr4ad_jax.tokenizer.fsq import FsqConfig
from gr4ad_jax.training.resume import ResumeFile
from tests.support import check_rows_stand_alone, clustered

SIZES = (16, 12, 9)
SMALL = FsqConfig(num_steps=60, batch_size=64, hidden_widths=(32,))


def errors_of_prefixes(arrays, embedding):
  codes = fsq.encode(arrays, embedding)
  return [
    np.square(fsq.decode(arrays, codes[:, : level + 1]) - embedding).sum(1).mean()
    for level in range(codes.shape[1])
  ]


@pytest.fixture(scope="module")
def small():
  return fsq.fit(clustered(), SIZES, SMALL)


@pytest.fixture(scope="module")
def trained():
  config = FsqConfig(num_steps=500, batch_size=64, hidden_widths=(32,), learning_rate=3e-3)
  return fsq.fit(clustered(), SIZES, config)


@pytest.mark.parametrize(
  ("size", "values"),
  [(2, (2,)), (9, (9,)), (12, (4, 3)), (100, (5, 5, 4)), (256, (4,) * 4), (128, (8, 4, 4))],
)
def test_values_multiply_to_the_size(size, values):
  assert fsq.scalar_values(size) == values


def test_splits_are_exact_even_and_short_by_brute_force():
  def ratio(factors):
    return max(factors) / min(factors)

  splits = {}
  for count in range(1, 7):
    for factors in itertools.combinations_with_replacement(range(2, 10), count):
      splits.setdefault(math.prod(factors), []).append(factors)
  for size in range(2, 128):  # at most 6 factors
    if size not in splits:
      with pytest.raises(ValueError, match=f"{size} is no product"):
        fsq.scalar_values(size)
      continue
    without_2 = [factors for factors in splits[size] if min(factors) > 2]
    allowed = without_2 or splits[size]
    best = min((ratio(factors), len(factors)) for factors in allowed)
    values = fsq.scalar_values(size)
    assert tuple(sorted(values)) in allowed
    assert (ratio(values), len(values)) == best


def test_a_size_without_factors_is_refused_with_near_sizes():
  with pytest.raises(ValueError, match="codebook_sizes: 257 .* 256 or 270"):
    fsq.fit(clustered(), (16, 257))


def test_grids_are_even_and_symmetric():
  values = np.array([2, 3, 4, 5])
  grid = [np.asarray(fsq.grid_point(np.arange(n), n)) for n in values]
  np.testing.assert_allclose(grid[0], [-1, 1])
  np.testing.assert_allclose(grid[1], [-1, 0, 1])
  np.testing.assert_allclose(grid[2], [-1, -1 / 3, 1 / 3, 1], atol=1e-6)  # even: no zero
  np.testing.assert_allclose(grid[3], [-1, -0.5, 0, 0.5, 1])


@pytest.mark.parametrize("n", range(2, 10))
def test_grid_points_round_to_themselves(n):
  index = np.arange(n)
  points = np.asarray(fsq.grid_point(index, n))
  latent = np.arctanh(np.clip(points, -1 + 1e-6, 1 - 1e-6))[:, None]
  np.testing.assert_array_equal(fsq.scalar_index(latent, np.array([n]))[:, 0], index)
  np.testing.assert_allclose(fsq.quantize(latent, np.array([n]))[:, 0], points, atol=1e-6)
  assert len(np.unique(fsq.scalar_index(np.linspace(-9, 9, 999)[:, None], np.array([n])))) == n


def test_the_gradient_passes_the_rounding():
  values, latent = np.array([4, 5, 8]), jnp.array([[0.3, -0.7, 1.1]])
  gradient = jax.grad(lambda x: (jnp.array([[1.0, 2.0, 3.0]]) * fsq.quantize(x, values)).sum())
  expected = np.array([1.0, 2.0, 3.0]) * (1 - np.tanh(np.asarray(latent)) ** 2)
  np.testing.assert_allclose(gradient(latent), expected, rtol=1e-5)


def test_codes_are_mixed_radix_numbers_of_rounded_coordinates(small):
  embedding = clustered(seed=1)
  x = (embedding - small["center"]) / small["scale"]
  x = np.asarray(jax.nn.gelu(x @ small["encoder_kernel_0"] + small["encoder_bias_0"]))
  bounded = np.tanh(x @ small["encoder_kernel_1"] + small["encoder_bias_1"])
  values, codes, start = [(4, 4), (4, 3), (9,)], [], 0
  for group in values:
    code = 0
    for n in group:
      code = code * n + np.rint((bounded[:, start] + 1) / 2 * (n - 1)).astype(int)
      start += 1
    codes.append(code)
  encoded = fsq.encode(small, embedding)
  assert encoded.dtype == np.int32
  np.testing.assert_array_equal(encoded, np.stack(codes, 1))
  assert (encoded >= 0).all() and (encoded < SIZES).all()


def test_decoding_reads_every_code_back_to_its_grid_points(small):
  # An identity in place of the decoder shows the grid points that it is given.
  arrays = {name: value for name, value in small.items() if not name.startswith("decoder")}
  arrays |= {"decoder_kernel_0": np.eye(5, 12, dtype=np.float32)}
  arrays |= {"decoder_bias_0": np.zeros(12, np.float32)}
  arrays |= {"center": np.zeros(12, np.float32), "scale": np.float32(1)}
  codes = np.indices(SIZES).reshape(3, -1).T
  grid = fsq.decode(arrays, codes)
  assert len(np.unique(grid, axis=0)) == math.prod(SIZES)
  row = fsq.decode(arrays, np.array([[4 * 3 + 0, 3 * 1 + 2, 6]]))[0, :5]
  np.testing.assert_allclose(row, [1, -1, -1 / 3, 1, 0.5], atol=1e-6)
  prefix = fsq.decode(arrays, np.array([[4 * 3 + 0]]))[0, :5]
  np.testing.assert_allclose(prefix, [1, -1, 0, 0, 0], atol=1e-6)


def test_training_lowers_the_error_below_that_of_the_mean(small, trained):
  embedding = clustered()
  error = errors_of_prefixes(trained, embedding)[-1]
  assert error < errors_of_prefixes(small, embedding)[-1]
  assert error < 0.4 * np.square(embedding - embedding.mean(0)).sum(1).mean()


def test_every_longer_prefix_says_more(trained):
  embedding = clustered()
  errors = errors_of_prefixes(trained, embedding)
  assert errors[0] > errors[1] > errors[2]
  assert errors[0] < 0.7 * np.square(embedding - embedding.mean(0)).sum(1).mean()


def test_same_seed_same_arrays_other_seed_others(small):
  again, other = (fsq.fit(clustered(), SIZES, SMALL, seed=seed) for seed in (0, 1))
  for name, value in small.items():
    np.testing.assert_array_equal(value, again[name], err_msg=name)
  assert not np.array_equal(small["encoder_kernel_0"], other["encoder_kernel_0"])


def test_a_mesh_changes_no_bit(small):
  mesh = build_mesh(data_parallel=8)
  on_mesh = fsq.fit(clustered(), SIZES, SMALL, mesh=mesh)
  for name, value in small.items():
    np.testing.assert_array_equal(value, on_mesh[name], err_msg=name)
  embedding = clustered(seed=1)
  np.testing.assert_array_equal(
    fsq.encode(small, embedding), fsq.encode(small, embedding, mesh=mesh)
  )


def test_an_interrupted_fit_goes_on_to_the_same_bits(small, tmp_path):
  def interrupted(steps, **_):
    for step in steps:
      if step == 30:
        raise KeyboardInterrupt
      yield step

  path = tmp_path / "state.npz"
  with pytest.raises(KeyboardInterrupt):
    resume = ResumeFile(path, "key", seconds_between_saves=0)
    fsq.fit(clustered(), SIZES, SMALL, resume=resume, progress=interrupted)
  seen = []
  resumed = fsq.fit(
    clustered(), SIZES, SMALL, resume=ResumeFile(path, "key"),
    progress=lambda steps, **_: seen.extend(steps) or steps,
  )
  assert seen == list(range(30, SMALL.num_steps))
  for name, value in small.items():
    np.testing.assert_array_equal(value, resumed[name], err_msg=name)


def test_equal_rows_have_equal_codes_whatever_comes_with_them(small):
  check_rows_stand_alone(functools.partial(fsq.encode, small))


def test_bad_input_is_refused(small):
  embedding = clustered()
  with pytest.raises(ValueError, match="level 1 has 16 codes for 10 rows"):
    fsq.fit(embedding[:10], SIZES, SMALL)
  with pytest.raises(ValueError, match="mesh.*divides 8"):
    fsq.fit(embedding, SIZES, SMALL, mesh=build_mesh(data_parallel=3))
  with pytest.raises(ValueError, match="columns"):
    fsq.encode(small, embedding[:, :4])
  with pytest.raises(ValueError, match="row 1 is .*levels have"):
    fsq.decode(small, np.array([[0, 0, 0], [0, 12, 0]]))
  embedding[7, 2] = np.inf
  with pytest.raises(ValueError, match="row 7"):
    fsq.encode(small, embedding)
  with pytest.raises(ValueError, match="prefix_dropout=1.5"):
    FsqConfig(prefix_dropout=1.5)
  with pytest.raises(ValueError, match="hidden_widths"):
    FsqConfig(hidden_widths=(0,))
