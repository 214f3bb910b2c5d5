"""The newest place's state: by hand, and what it may and may not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.nn.config import HistoryConfig
from gr4ad_jax.nn.history_encoder import HistoryEncoder

SMALL = HistoryConfig(width=8, max_length=6, num_blocks=2, num_heads=2, dropout=0.0)
FILTERED = dataclasses.replace(SMALL, filter_share=0.7, num_low=2)


@pytest.fixture(scope="module", params=[SMALL, FILTERED], ids=["attention", "and filter"])
def encoder(request):
  module = HistoryEncoder(request.param)
  items = jnp.zeros((1, 6, 8))
  params = module.init(jax.random.key(0), items, jnp.ones((1, 6), bool))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = tree.unflatten([
    leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)
  ])
  return lambda items, mask, method="__call__": module.apply(params, items, mask, method=method)


def histories(*lengths):
  """Random items, the newest last, and what is none."""
  item_BTD = np.random.default_rng(0).standard_normal((len(lengths), 6, 8)).astype(np.float32)
  return item_BTD, np.arange(6) >= 6 - np.array(lengths)[:, None]


def test_what_fills_the_places_before_a_history_changes_nothing(encoder):
  item_BTD, mask_BT = histories(3, 6)
  whole = encoder(item_BTD, mask_BT)
  other = np.where(mask_BT[..., None], item_BTD, 7.0)
  np.testing.assert_allclose(encoder(other, mask_BT), whole, atol=1e-6)
  np.testing.assert_allclose(encoder(item_BTD[:1, 3:], mask_BT[:1, 3:]), whole[:1], atol=1e-5)


def test_a_place_sees_itself_and_those_before(encoder):
  item_BTD, mask_BT = histories(6)

  def states(item_TD):
    return jnp.sum(encoder(item_TD[None], mask_BT, "places")[0] ** 3, axis=-1)

  slope_TTD = jax.jacrev(states)(item_BTD[0])
  seen_TT = np.any(np.abs(slope_TTD) > 1e-7, axis=-1)
  np.testing.assert_array_equal(seen_TT, np.tril(np.ones((6, 6), bool)))


def test_the_newest_place_is_the_last_of_all_places(encoder):
  item_BTD, mask_BT = histories(4, 6)
  places = encoder(item_BTD, mask_BT, "places")
  np.testing.assert_allclose(encoder(item_BTD, mask_BT), places[:, -1], atol=1e-6)
  np.testing.assert_array_equal(places[0, :2], np.zeros((2, 8)))


def test_the_order_of_items_counts(encoder):
  item_BTD, mask_BT = histories(6)
  swapped = item_BTD[:, [1, 0, 2, 3, 4, 5]]
  assert np.abs(encoder(item_BTD, mask_BT) - encoder(swapped, mask_BT)).max() > 1e-3


def test_a_history_without_items_gives_zeros(encoder):
  item_BTD, mask_BT = histories(0)
  np.testing.assert_array_equal(encoder(item_BTD, mask_BT), np.zeros((1, 8)))


def norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def test_one_block_by_hand_with_numpys_own_fourier_transform():
  """As both papers write it, for the newest place of a history of four in a window of six."""
  config = dataclasses.replace(FILTERED, num_blocks=1, num_heads=1)
  module, (item_BTD, mask_BT) = HistoryEncoder(config), histories(4)
  variables = module.init(jax.random.key(2), item_BTD, mask_BT)
  p = jax.tree.map(np.asarray, variables["params"])
  block = p["blocks_0"]

  def linear(name):
    return block["self_attention"][name]["kernel"].reshape(8, 8)

  h_TD = np.where(mask_BT[0][:, None], norm(item_BTD[0] + p["places"]), 0)
  score_T = (h_TD[2:] @ linear("key")) @ (h_TD[-1] @ linear("query")) / np.sqrt(8)
  weight_T = np.exp(score_T) / np.exp(score_T).sum()
  attended = norm(h_TD[-1] + weight_T @ (h_TD[2:] @ linear("value")) @ linear("out"))
  spectrum = np.fft.rfft(h_TD, axis=0, norm="ortho")
  spectrum[2:] = 0
  low = np.fft.irfft(spectrum, n=6, axis=0, norm="ortho")[-1]
  filtered = norm(h_TD[-1] + low + block["beta"] ** 2 * (h_TD[-1] - low))
  h = 0.7 * filtered + 0.3 * attended
  hidden = np.asarray(jax.nn.gelu(h @ block["feed_forward_in"]["kernel"]))
  expected = norm(h + hidden @ block["feed_forward_out"]["kernel"])
  np.testing.assert_allclose(module.apply(variables, item_BTD, mask_BT)[0], expected, atol=1e-5)


def test_dropout_needs_training_mode():
  module, (item_BTD, mask_BT) = HistoryEncoder(dataclasses.replace(SMALL, dropout=0.5)), (
    histories(5)
  )
  variables = module.init(jax.random.key(0), item_BTD, mask_BT)

  def run(key):
    return module.apply(
      variables, item_BTD, mask_BT, deterministic=False, rngs={"dropout": jax.random.key(key)}
    )

  assert not np.allclose(run(0), run(1))
  np.testing.assert_array_equal(run(0), run(0))
