import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.nn.attention import attend

B, H, R, S, K = 3, 2, 7, 5, 8


def inputs(dtype):
  rng = np.random.default_rng(0)
  shapes = (B, R, H, K), (B, S, H, K), (B, S, H, K), (B, R, H, K)
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def ours(query_BRHK, key_BSHK, value_BSHK, mask):
  mixed_BHRK = attend(
    query_BRHK.swapaxes(1, 2), key_BSHK.transpose(0, 2, 3, 1), value_BSHK.swapaxes(1, 2), mask
  )
  return mixed_BHRK.swapaxes(1, 2)


def theirs(query_BRHK, key_BSHK, value_BSHK, mask):
  """JAX's attention and its gradient."""
  return jax.nn.dot_product_attention(query_BRHK, key_BSHK, value_BSHK, mask=mask, scale=1.0)


def with_gradients(attention, query, key, value, bar, mask):
  mixed, pull_back = jax.vjp(lambda *args: attention(*args, mask), query, key, value)
  return [np.asarray(x, np.float32) for x in (mixed, *pull_back(bar))]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_are_those_of_jax(dtype, tolerance, causal):
  query, key, value, bar = inputs(dtype)
  if causal:
    query, bar = query[:, :S], bar[:, :S]
    mask = jnp.tril(jnp.ones((S, S), bool))[None, None]
  else:
    mask = jnp.asarray(np.random.default_rng(1).random((B, S)) < 0.6).at[:, 0].set(True)
    mask = mask[:, None, None]
  expected = with_gradients(theirs, query, key, value, bar, mask)
  for ours_, theirs_ in zip(
    with_gradients(ours, query, key, value, bar, mask), expected, strict=True
  ):
    np.testing.assert_allclose(ours_, theirs_, rtol=tolerance, atol=tolerance)


def test_a_row_that_sees_nothing_gives_the_mean_and_no_gradient_to_scores():
  query, key, value, bar = inputs("float32")
  mask = jnp.ones((B, 1, R, S), bool).at[1].set(False)
  mixed, query_bar, key_bar, value_bar = with_gradients(ours, query, key, value, bar, mask)
  np.testing.assert_allclose(
    mixed[1], np.broadcast_to(np.mean(value[1], axis=0), mixed[1].shape), rtol=1e-5, atol=1e-6
  )
  assert not query_bar[1].any() and not key_bar[1].any()
  np.testing.assert_allclose(
    value_bar[1], np.broadcast_to(np.sum(bar[1], axis=0) / S, value_bar[1].shape), rtol=1e-5,
    atol=1e-6,
  )


def test_scores_of_any_size_stay_finite():
  query, key, value, bar = inputs("float32")
  mask = jnp.ones((1, 1, 1, S), bool)
  for x in with_gradients(ours, 1e4 * query, 1e4 * key, value, bar, mask):
    assert np.isfinite(x).all()
