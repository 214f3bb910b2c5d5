"""RQ-VAE and RQ-Kmeans+: codes by brute force, start from k-means, restarts, resume, meshes."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from gr4ad_jax.machine.sharding import build_mesh
from gr4ad_jax.tokenizer import residual_kmeans, rq_vae
from gr4ad_jax.tokenizer.rq_vae import RqKmeansPlusConfig, RqVaeConfig
from gr4ad_jax.training.resume import ResumeFile
from tests.support import check_rows_stand_alone, clustered

SIZES = (16, 8)
SMALL = RqVaeConfig(num_steps=60, batch_size=64, hidden_widths=(32,), latent_width=8)
SMALL_PLUS = RqKmeansPlusConfig(num_steps=60, batch_size=64)
FITS = [(rq_vae.fit, SMALL), (rq_vae.fit_plus, SMALL_PLUS)]


def mean_squared_error(arrays, embedding):
  decoded = rq_vae.decode(arrays, rq_vae.encode(arrays, embedding))
  assert decoded.dtype == np.float32
  return np.square(decoded - embedding).sum(1).mean()


def gelu(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(arrays, name, x):
  for i in range(2):
    x = x @ arrays[f"{name}_kernel_{i}"].astype(np.float64) + arrays[f"{name}_bias_{i}"]
    x = gelu(x) if i == 0 else x
  return x


@pytest.fixture(scope="module", params=FITS, ids=["rq-vae", "rq-kmeans+"])
def fitted(request):
  fit, config = request.param
  return fit, config, fit(clustered(), SIZES, config)


def test_codes_and_decoded_rows_are_those_of_the_formulas(fitted):
  fit, _, arrays = fitted
  embedding = clustered()[:100]
  x = (embedding.astype(np.float64) - arrays["center"]) / arrays["scale"]
  residual = mlp(arrays, "encoder", x) + (x if fit is rq_vae.fit_plus else 0)
  codes, total = [], 0
  for level in range(len(SIZES)):
    codebook = arrays[f"codebook_{level}"].astype(np.float64)
    codes.append(np.square(residual[:, None] - codebook).sum(-1).argmin(1))
    residual = residual - codebook[codes[-1]]
    total = total + codebook[codes[-1]]
  codes = np.stack(codes, 1)
  encoded = rq_vae.encode(arrays, embedding)
  assert encoded.dtype == np.int32
  np.testing.assert_array_equal(encoded, codes)
  expected = mlp(arrays, "decoder", total) * arrays["scale"] + arrays["center"]
  np.testing.assert_allclose(rq_vae.decode(arrays, codes), expected, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_error_below_that_of_the_mean(fitted):
  fit, config, arrays = fitted
  embedding = clustered()
  longer = dataclasses.replace(config, num_steps=300, learning_rate=3e-3)
  longer = fit(embedding, SIZES, longer)
  error = mean_squared_error(longer, embedding)
  assert error < mean_squared_error(arrays, embedding)
  assert error < 0.3 * np.square(embedding - embedding.mean(0)).sum(1).mean()


def test_same_seed_same_arrays_other_seed_others(fitted):
  fit, config, arrays = fitted
  again, other = (fit(clustered(), SIZES, config, seed=seed) for seed in (0, 1))
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, again[name], err_msg=name)
  assert not np.array_equal(arrays["decoder_kernel_0"], other["decoder_kernel_0"])
  assert not np.array_equal(arrays["codebook_0"], other["codebook_0"])


def test_a_mesh_changes_no_bit(fitted):
  fit, config, arrays = fitted
  mesh = build_mesh(data_parallel=8)
  on_mesh = fit(clustered(), SIZES, config, mesh=mesh)
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, on_mesh[name], err_msg=name)
  embedding = clustered(seed=1)
  np.testing.assert_array_equal(
    rq_vae.encode(arrays, embedding), rq_vae.encode(arrays, embedding, mesh=mesh)
  )


@pytest.mark.parametrize("stop", [30, 55])
def test_an_interrupted_fit_goes_on_to_the_same_bits(fitted, tmp_path, stop):
  fit, config, arrays = fitted

  def interrupted(steps, description, **_):
    for step in steps:
      if step == stop and not description.startswith("k-means"):
        raise KeyboardInterrupt
      yield step

  seen = []

  def watched(steps, description, **_):
    seen.extend((description, step) for step in steps)
    return steps

  path = tmp_path / "state.npz"
  resume = ResumeFile(path, "key", seconds_between_saves=0)
  with pytest.raises(KeyboardInterrupt):
    fit(clustered(), SIZES, config, resume=resume, progress=interrupted)
  resumed = fit(
    clustered(), SIZES, config, resume=ResumeFile(path, "key"), progress=watched
  )
  assert {step for _, step in seen} == set(range(stop, config.num_steps))
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, resumed[name], err_msg=name)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_zero_steps_of_plus_give_the_codes_of_rq_kmeans(scale):
  embedding = scale * clustered(num_points=600)
  plain = residual_kmeans.KMeansConfig(balance_epsilon=math.inf)
  sizes = (16, 16, 16)
  centroids = residual_kmeans.fit(embedding, sizes, plain, seed=3)
  arrays = rq_vae.fit_plus(embedding, sizes, RqKmeansPlusConfig(num_steps=0), seed=3)
  fresh = scale * clustered(seed=5)
  for rows in (embedding, fresh):
    np.testing.assert_array_equal(
      rq_vae.encode(arrays, rows), residual_kmeans.encode(centroids, rows)
    )


def test_the_decoder_of_plus_trains_alone_for_the_first_epoch():
  config = RqKmeansPlusConfig(num_steps=40, batch_size=64)

  def after(num_steps):  # 400 rows are 7 batches of 64
    return rq_vae.fit_plus(
      clustered(), SIZES, config,
      progress=lambda steps, description, **_: (
        steps if description.startswith("k-means") else steps[:num_steps]
      ),
    )

  start, epoch, end = after(0), after(7), after(40)
  for name, value in start.items():
    constant = name in ("center", "scale", "residual")
    still = constant or not name.startswith("decoder")
    assert np.array_equal(value, epoch[name]) == still, name
    assert np.array_equal(value, end[name]) == constant, name


def test_restarts_bring_unused_codes_into_use():
  # Rows of one half are all the same, so that k-means of a level has codes to spare.
  embedding = clustered(num_points=64)
  embedding = np.concatenate([np.repeat(embedding[:8], 60, axis=0), embedding[:20]])
  config = dataclasses.replace(SMALL, num_steps=200, learning_rate=3e-3, usage_decay=0.9)
  used = {}
  for share in (0.0, 0.2):
    arrays = rq_vae.fit(
      embedding, (32, 32), dataclasses.replace(config, restart_below=share)
    )
    codes = rq_vae.encode(arrays, embedding)
    used[share] = sum(len(np.unique(codes[:, level])) for level in range(2))
  assert used[0.2] > used[0.0]


def test_equal_rows_have_equal_codes_whatever_comes_with_them(fitted):
  _, _, arrays = fitted
  check_rows_stand_alone(functools.partial(rq_vae.encode, arrays))


def test_a_prefix_is_decoded_from_its_part_of_the_sum(fitted):
  _, _, arrays = fitted
  decoded = rq_vae.decode(arrays, np.array([[3], [5]]))
  expected = mlp(arrays, "decoder", arrays["codebook_0"][[3, 5]].astype(np.float64))
  expected = expected * arrays["scale"] + arrays["center"]
  np.testing.assert_allclose(decoded, expected, rtol=1e-4, atol=1e-4)
  assert rq_vae.decode(arrays, np.zeros((0, 2), int)).shape == (0, 12)


def test_bad_input_is_refused(fitted):
  fit, config, arrays = fitted
  embedding = clustered()
  with pytest.raises(ValueError, match="level 1 has 16 codes for 10 rows"):
    fit(embedding[:10], SIZES, config)
  with pytest.raises(ValueError, match="mesh.*divides 8"):
    fit(embedding, SIZES, config, mesh=build_mesh(data_parallel=3))
  with pytest.raises(ValueError, match="columns"):
    rq_vae.encode(arrays, embedding[:, :4])
  with pytest.raises(ValueError, match="row 1 is .*levels have"):
    rq_vae.decode(arrays, np.array([[0, 0], [16, 0]]))
  with pytest.raises(ValueError, match="code_NL: shape"):
    rq_vae.decode(arrays, np.zeros((2, 3), int))
  embedding[7, 2] = np.nan
  with pytest.raises(ValueError, match="row 7"):
    rq_vae.encode(arrays, embedding)


@pytest.mark.parametrize(
  "field",
  [
    {"num_steps": -1}, {"batch_size": 12}, {"batch_size": 0}, {"learning_rate": 0.0},
    {"weight_decay": -1.0}, {"beta": -0.1}, {"restart_below": 1.0}, {"usage_decay": 1.0},
    {"hidden_widths": (0,)}, {"latent_width": 0},
  ],
)
def test_settings_out_of_range_are_refused(field):
  with pytest.raises(ValueError, match=next(iter(field))):
    RqVaeConfig(**field)


def test_settings_of_plus_out_of_range_are_refused():
  with pytest.raises(ValueError, match="hidden_factor=0"):
    RqKmeansPlusConfig(hidden_factor=0)
  with pytest.raises(ValueError, match="kmeans_iterations=0"):
    RqKmeansPlusConfig(kmeans_iterations=0)
