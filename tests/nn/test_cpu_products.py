import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.nn.cpu_products import project


def integers(shape, dtype="float32"):
  """Small ones, whose products are exact in every type."""
  values = np.random.default_rng(len(shape)).integers(-3, 4, shape)
  return jnp.asarray(values, dtype)


def assert_same(ours, theirs, *inputs):
  """Values and gradients, and their types."""
  (y, pull_back), (expected, pull_back_expected) = jax.vjp(ours, *inputs), jax.vjp(theirs, *inputs)
  bar = integers(y.shape)
  pairs = zip((y, *pull_back(bar)), (expected, *pull_back_expected(bar)), strict=True)
  for x, x_expected in pairs:
    assert x.dtype == x_expected.dtype
    np.testing.assert_array_equal(np.float32(x), np.float32(x_expected))


@pytest.mark.parametrize("out", [(6,), (3, 4), (3, 2, 4)])
@pytest.mark.parametrize("rows", [(), (5,), (2, 5)])
def test_project_is_a_product_over_the_last_axis(rows, out):
  assert_same(
    project, lambda x, kernel: jnp.tensordot(x, kernel, axes=1),
    integers((*rows, 7)), integers((7, *out)),
  )
