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


def by_hand(params, h_PD, context_SD, config):
  """One candidate of one request through the layer, as the papers write it, in numpy."""
  heads, width = config.num_heads, config.width // config.num_heads

  def norm(x_PD, n):
    if config.norm == "layer":
      x_PD = x_PD - x_PD.mean(-1, keepdims=True)
    return x_PD / np.sqrt((x_PD**2).mean(-1, keepdims=True) + 1e-6) * params[f"norms_{n}"]["scale"]

  def project(x, *path):
    kernel = params[path[0]][path[1]]["kernel"]
    return np.tensordot(x, kernel, axes=1)

  def attention(query_PHK, key_SHK, value_SHK, seen):
    mixed = np.zeros(query_PHK.shape)
    for p, h in np.ndindex(*query_PHK.shape[:2]):
      score_S = key_SHK[: seen(p), h] @ query_PHK[p, h] / np.sqrt(width)
      weight_S = np.exp(score_S - score_S.max())
      mixed[p, h] = weight_S / weight_S.sum() @ value_SHK[: seen(p), h]
    return mixed.reshape(len(mixed), -1)

  if config.kv_mode == "projected":
    key_SHK, value_SHK = (project(context_SD, "cross", name) for name in ("key", "value"))
  else:
    key_SHK = value_SHK = context_SD.reshape(len(context_SD), heads, width)
  query = project(norm(h_PD, 0), "cross", "query")
  mixed = attention(query, key_SHK, value_SHK, lambda p: len(context_SD))
  h_PD = h_PD + project(mixed, "cross", "out")
  qkv = project(norm(h_PD, 1), "self_attention", "qkv")
  mixed = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], lambda p: p + 1)
  h_PD = h_PD + project(mixed, "self_attention", "out")
  both = project(norm(h_PD, 2), "feed_forward", "in")
  hidden = both[:, 0] / (1 + np.exp(-both[:, 0])) * both[:, 1]
  return h_PD + project(hidden, "feed_forward", "out")


@pytest.mark.parametrize("change", [{}, {"kv_mode": "projected", "norm": "layer"}])
def test_a_layer_is_attention_and_swiglu_as_they_are_written(change):
  config = dataclasses.replace(SMALL, **change)
  h_BCPD, context_BSD, mask_BS = inputs()
  params = DecoderLayer(config).init(
    jax.random.key(0), h_BCPD, context_BSD, mask_BS, method=whole
  )
  rng = np.random.default_rng(1)  # scales of norms are 1 at first
  params = jax.tree.map(lambda x: x + np.float32(0.3 * rng.standard_normal(x.shape)), params)
  got = DecoderLayer(config).apply(params, h_BCPD, context_BSD, mask_BS, method=whole)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
  for b, c in np.ndindex(B, C):
    real_SD = np.asarray(context_BSD[b], np.float64)[np.asarray(mask_BS[b])]
    expected = by_hand(exact, np.asarray(h_BCPD[b, c], np.float64), real_SD, config)
    np.testing.assert_allclose(got[b, c], expected, rtol=1e-4, atol=1e-4)


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


def test_each_candidate_may_see_tokens_of_its_own():
  """As if each were asked alone, with what it may see for all."""
  layer, (h_BCPD, context_BSD, _) = DecoderLayer(SMALL), inputs()
  mask_BCS = jnp.asarray(np.random.default_rng(3).random((B, C, S)) < 0.5).at[:, :, 0].set(True)
  params = layer.init(jax.random.key(0), h_BCPD, context_BSD, mask_BCS, method=whole)
  found = layer.apply(params, h_BCPD, context_BSD, mask_BCS, method=whole)
  for c in range(C):
    alone = layer.apply(params, h_BCPD[:, c : c + 1], context_BSD, mask_BCS[:, c], method=whole)
    np.testing.assert_allclose(found[:, c], alone[:, 0], rtol=1e-5, atol=1e-5)


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
