import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.nn.config import LayerConfig
from gr4ad_jax.nn.layers import DecoderLayer, LayerCache

B, C, P, S = 2, 3, 4, 5  # requests, candidates, positions, context tokens
SMALL = LayerConfig(width=8, num_heads=2, feed_forward_width=16)


def inputs():
  rng = np.random.default_rng(0)
  h_BCPD = jnp.asarray(rng.standard_normal((B, C, P, SMALL.width)), jnp.float32)
  context_BSD = jnp.asarray(rng.standard_normal((B, S, SMALL.width)), jnp.float32)
  return h_BCPD, context_BSD, jnp.ones((B, S), bool).at[0, 3:].set(False)


def whole(layer, h_BCPD, context_BSD, mask_BS):
  return layer(h_BCPD, layer.keys_values(context_BSD), mask_BS)[0]


@pytest.mark.parametrize("change", [{}, {"kv_mode": "projected", "norm": "layer"}])
def test_positions_one_at_a_time_give_what_all_at_once_give(change):
  layer = DecoderLayer(dataclasses.replace(SMALL, **change))
  h_BCPD, context_BSD, mask_BS = inputs()
  params = layer.init(jax.random.key(0), h_BCPD, context_BSD, mask_BS, method=whole)
  expected = layer.apply(params, h_BCPD, context_BSD, mask_BS, method=whole)
  kv = layer.apply(params, context_BSD, method="keys_values")
  empty = (jnp.zeros((B, C, SMALL.num_heads, SMALL.width // SMALL.num_heads)),) * P
  cache = LayerCache(empty, empty)
  for p in range(P):
    one_BC1D, cache = layer.apply(
      params, h_BCPD[:, :, p : p + 1], kv, mask_BS, cache=cache, position=p
    )
    np.testing.assert_allclose(one_BC1D[:, :, 0], expected[:, :, p], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["products", "all"])
def test_what_is_computed_again_changes_no_gradient(remat):
  h_BCPD, context_BSD, mask_BS = inputs()
  params = DecoderLayer(SMALL).init(
    jax.random.key(0), h_BCPD, context_BSD, mask_BS, method=whole
  )

  def gradients(config):
    def loss(params):
      out = DecoderLayer(config).apply(params, h_BCPD, context_BSD, mask_BS, method=whole)
      return jnp.sum(out**2)

    return jax.tree.leaves(jax.grad(loss)(params))

  again = gradients(dataclasses.replace(SMALL, remat=remat))
  for x, expected in zip(again, gradients(SMALL), strict=True):
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
