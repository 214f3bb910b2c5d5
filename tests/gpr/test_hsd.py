"""The sequence decoder: who sees whom at any depth, and every equation by hand."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.gpr.attention import (
  DistanceBias,
  HybridAttention,
  allow,
  distance_bucket,
  gap_bucket,
)
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.gpr.hsd import Depths, Hsd, HsdBlock, TokenFeedForward, TokenNorm, balance_loss

SMALL = ModelConfig(width=8, num_heads=2, num_layers=2, recursions=2, dropout=0.0)


def shaken(init, *args):
  """Parameters far from their start."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(init, jax.random.key(0), *args)
  return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


def stream(num_groups=3, *, width=8, rows=1, seed=0):
  """Tokens, ages and who sees whom; every group is a thousand seconds after the one before."""
  rng = np.random.default_rng(seed)
  x_BGYD = jnp.asarray(rng.normal(size=(rows, num_groups, 4, width)), jnp.float32)
  age_G1 = 1000 * np.arange(num_groups)[::-1, None]
  age_BGY = np.broadcast_to(np.maximum(age_G1 - np.array([0, 0, 0, 5]), 0), (rows, num_groups, 4))
  age_BGY = jnp.asarray(age_BGY, jnp.int32)
  return x_BGYD, age_BGY, allow(jnp.ones(age_BGY.shape, bool), age_BGY)


def test_eight_tokens_see_what_the_table_says():
  """U O E I of two requests, row by row: both ways between U, O and E of one request alone."""
  table = """
    1 1 1 0  0 0 0 0
    1 1 1 0  0 0 0 0
    1 1 1 0  0 0 0 0
    1 1 1 1  0 0 0 0
    1 1 1 1  1 1 1 0
    1 1 1 1  1 1 1 0
    1 1 1 1  1 1 1 0
    1 1 1 1  1 1 1 1
  """
  expected_SS = np.array(table.split(), int).reshape(8, 8) == 1
  np.testing.assert_array_equal(stream(2)[2][0], expected_SS)


def test_padding_and_what_came_too_late_are_not_seen():
  """The first request's ad was clicked after the second request had begun, before the third."""
  age_BGY = jnp.array([[[90, 90, 90, 20], [50, 50, 50, 40], [0, 0, 0, 0]]])
  there_BGY = jnp.ones((1, 3, 4), bool).at[0, 1, 3].set(False)
  seen_SS = np.asarray(allow(there_BGY, age_BGY)[0])
  assert not seen_SS[4:7, 3].any() and seen_SS[8:11, 3].all()
  assert seen_SS[4:7, :3].all() and seen_SS[8:, 4:7].all()
  assert not seen_SS[7].any() and not seen_SS[:, 7].any()
  # Two requests of one second do not see each other.
  same = np.asarray(allow(jnp.ones((1, 2, 4), bool), jnp.zeros((1, 2, 4), jnp.int32))[0])
  assert not same[4:, :4].any() and same[4:7, 4:7].all()


def test_no_path_of_any_length_leads_to_a_requests_own_ad():
  """By brute force over who has seen whom, with random times of clicks."""
  rng = np.random.default_rng(3)
  start_G = np.sort(rng.integers(0, 50, 6))
  click_G = start_G + rng.integers(0, 30, 6)
  time_GY = np.stack([start_G, start_G, start_G, click_G], axis=1)
  age_BGY = jnp.asarray(np.maximum(start_G[-1] - time_GY, 0)[None], jnp.int32)
  seen_SS = np.asarray(allow(jnp.ones((1, 6, 4), bool), age_BGY)[0])
  for _ in range(5):
    seen_SS = (seen_SS.astype(int) @ seen_SS) > 0
  time_S, is_ad_S = time_GY.ravel(), np.arange(24) % 4 == 3
  for row, column in itertools.product(np.flatnonzero(~is_ad_S), np.flatnonzero(is_ad_S)):
    if seen_SS[row, column]:
      assert time_S[column] < time_S[row]
  for group in range(6):
    assert not seen_SS[4 * group : 4 * group + 3, 4 * group + 3 :].any()


@pytest.mark.parametrize(("layers", "recursions"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)])
def test_no_gradient_leads_from_a_request_to_its_own_label_or_later_ones(layers, recursions):
  """Which token of the stream each intent depends on; I of a group depends on the group's own, too.
  """
  hsd = Hsd(ModelConfig(width=8, num_heads=2, num_layers=layers, recursions=recursions, dropout=0))
  x_BGYD, age_BGY, allowed_BSS = stream()
  params = shaken(hsd.init, x_BGYD, age_BGY, allowed_BSS)
  direction_D = jnp.asarray(np.random.default_rng(5).normal(size=8), jnp.float32)

  def intents(x_BGYD):
    out_BGYD = hsd.apply(params, x_BGYD, age_BGY, allowed_BSS).intent_BGYD
    return (out_BGYD @ direction_D).reshape(-1)

  slope = jax.jit(jax.jacrev(intents))(x_BGYD).reshape(12, 12, 8)
  depends_SS = np.any(np.asarray(slope) != 0, axis=-1)
  group_S, type_S = np.divmod(np.arange(12), 4)
  for row, column in itertools.product(range(12), range(12)):
    if group_S[column] < group_S[row] or (
      group_S[column] == group_S[row] and (type_S[column] != 3 or row == column)
    ):
      assert depends_SS[row, column], (row, column)
    else:
      assert not depends_SS[row, column], (row, column)


def test_distances_and_gaps_have_their_buckets():
  """Half octaves of 1 + tokens: 1, 2, 3, 4, 6, 8 begin buckets 0, 2, 3, 4, 5, 6."""
  assert distance_bucket(9)[0].tolist() == [0, 2, 3, 4, 4, 5, 5, 6, 6]
  np.testing.assert_array_equal(distance_bucket(9), distance_bucket(9).T)
  age_BS = jnp.array([[2**31 - 1, 1000, 999, 997, 0]])
  bucket_SS = np.asarray(gap_bucket(age_BS))[0]
  assert bucket_SS[-1].tolist() == [30, 9, 9, 9, 0]
  assert bucket_SS[3].tolist() == [30, 2, 1, 0, 0]  # 3 s, 2 s, none, and one that is younger


def test_the_bias_begins_at_zero_and_adds_both_tables():
  bias, (_, age_BGY, _) = DistanceBias(2), stream(2)
  params = bias.init(jax.random.key(0), age_BGY)
  np.testing.assert_array_equal(bias.apply(params, age_BGY), np.zeros((1, 2, 8, 8)))
  params = shaken(bias.init, age_BGY)
  found_HSS = np.asarray(bias.apply(params, age_BGY))[0]
  tables = params["params"]
  # From U of the second request back to I of the first one: one token, 1,000 - 5 seconds.
  expected_H = tables["distance"][2] + tables["gap"][9]
  np.testing.assert_allclose(found_HSS[:, 4, 3], expected_H, rtol=1e-6)


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def attention_by_hand(params, x_SD, bias_HSS, seen_SS):
  qkvu, out = (np.asarray(params[name]["kernel"], np.float64) for name in ("qkvu", "out"))
  mixed_SD = np.zeros_like(x_SD)
  for head in range(2):
    q, k, v, u = (x_SD @ qkvu[:, part, head] for part in range(4))
    for i in range(len(x_SD)):
      seen = np.flatnonzero(seen_SS[i])
      weight = softmax(np.array([q[i] @ k[j] / math.sqrt(4) + bias_HSS[head, i, j] for j in seen]))
      mixed_SD[i, 4 * head : 4 * head + 4] = weight @ v[seen] * (u[i] * sigmoid(u[i]))
  return mixed_SD @ out


def test_attention_is_gated_softmax_by_hand():
  x_BGYD, _, allowed_BSS = stream()
  x_BSD = x_BGYD.reshape(1, 12, 8)
  bias_BHSS = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 12, 12)), jnp.float32)
  attention = HybridAttention(SMALL)
  params = shaken(attention.init, x_BSD, bias_BHSS, allowed_BSS)
  found = attention.apply(params, x_BSD, bias_BHSS, allowed_BSS)
  expected_SD = attention_by_hand(
    params["params"], np.asarray(x_BSD[0], np.float64), np.asarray(bias_BHSS[0]),
    np.asarray(allowed_BSS[0]),
  )
  np.testing.assert_allclose(found[0], expected_SD, rtol=2e-4, atol=2e-5)


def norm_by_hand(params, x_GYD):
  centred = x_GYD - x_GYD.mean(axis=-1, keepdims=True)
  scale_YD = np.asarray(params["scale"], np.float64)
  return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * scale_YD


def feed_forward_by_hand(params, x_GYD):
  """All four networks on every token, of which its type's own counts."""
  weights = [np.asarray(params[name], np.float64) for name in ("in", "out")]
  out_GYD = np.zeros_like(x_GYD)
  for kind in range(4):
    hidden = x_GYD @ weights[0][kind]
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    every_GYD = (hidden * 0.5 * (1 + np.tanh(inner))) @ weights[1][kind]
    one_hot_Y1 = (np.arange(4) == kind)[:, None]
    out_GYD += every_GYD * one_hot_Y1
  return out_GYD


def test_each_token_type_has_its_own_norm_and_network():
  x_BGYD = stream()[0]
  x_GYD = np.asarray(x_BGYD[0], np.float64)
  for module, by_hand in ((TokenNorm(), norm_by_hand), (TokenFeedForward(), feed_forward_by_hand)):
    params = shaken(module.init, x_BGYD)
    np.testing.assert_allclose(
      module.apply(params, x_BGYD)[0], by_hand(params["params"], x_GYD), rtol=2e-4, atol=2e-5
    )


def block_by_hand(params, x_GYD, seen_SS):
  normal_SD = norm_by_hand(params["attention_norm"], x_GYD).reshape(-1, 8)
  bias_HSS = np.zeros((2, len(normal_SD), len(normal_SD)))
  mixed_SD = attention_by_hand(params["attention"], normal_SD, bias_HSS, seen_SS)
  a_GYD = x_GYD + mixed_SD.reshape(x_GYD.shape)
  normal_GYD = norm_by_hand(params["feed_forward_norm"], a_GYD)
  return a_GYD + feed_forward_by_hand(params["feed_forward"], normal_GYD)


def test_a_block_normalises_first_and_adds_twice():
  x_BGYD, _, allowed_BSS = stream(2)
  block, bias_BHSS = HsdBlock(SMALL), jnp.zeros((1, 2, 8, 8))
  params = shaken(block.init, x_BGYD, bias_BHSS, allowed_BSS, True)
  found = block.apply(params, x_BGYD, bias_BHSS, allowed_BSS, True)
  expected = block_by_hand(
    params["params"], np.asarray(x_BGYD[0], np.float64), np.asarray(allowed_BSS[0])
  )
  np.testing.assert_allclose(found[0], expected, rtol=5e-4, atol=5e-5)


@pytest.fixture(scope="module")
def recursive():
  """A sequence decoder of three recursions, its parameters, and a stream for it."""
  hsd = Hsd(ModelConfig(width=8, num_heads=2, num_layers=1, recursions=3, dropout=0))
  inputs = stream(6)
  params = shaken(hsd.init, *inputs)
  params["params"]["bias"] = jax.tree.map(jnp.zeros_like, params["params"]["bias"])
  return hsd, params, inputs


def test_a_token_goes_through_the_blocks_as_often_as_it_chooses(recursive):
  """By hand: those that have stopped keep their state, and are looked at as they are."""
  hsd, params, (x_BGYD, age_BGY, allowed_BSS) = recursive
  tree, seen_SS = params["params"], np.asarray(allowed_BSS[0])
  x_GYD = np.asarray(x_BGYD[0], np.float64)
  logit_GYR = norm_by_hand(tree["router_norm"], x_GYD) @ np.asarray(tree["router"]["kernel"])
  depth_GY = 1 + logit_GYR.argmax(axis=-1)
  assert set(depth_GY.ravel().tolist()) == {1, 2, 3}  # so that the test says something
  for recursion in (1, 2, 3):
    through_GYD = block_by_hand(tree["blocks_0"], x_GYD, seen_SS)
    x_GYD = np.where((depth_GY >= recursion)[..., None], through_GYD, x_GYD)
  found = hsd.apply(params, x_BGYD, age_BGY, allowed_BSS)
  np.testing.assert_array_equal(found.depths.chosen_BGY[0], depth_GY)
  np.testing.assert_allclose(
    found.intent_BGYD[0], norm_by_hand(tree["final_norm"], x_GYD), rtol=2e-3, atol=2e-4
  )


def test_where_every_token_stops_at_once_it_is_the_plain_stack(recursive):
  """A router of zeros ties, and a tie chooses one."""
  hsd, params, inputs = recursive
  tree = dict(params["params"])
  tree["router"] = jax.tree.map(jnp.zeros_like, tree["router"])
  plain = Hsd(ModelConfig(width=8, num_heads=2, num_layers=1, recursions=1, dropout=0))
  without = {name: x for name, x in tree.items() if not name.startswith("router")}
  np.testing.assert_allclose(
    hsd.apply({"params": tree}, *inputs).intent_BGYD,
    plain.apply({"params": without}, *inputs).intent_BGYD, atol=1e-6,
  )


def test_the_router_learns_from_what_its_choice_gives(recursive):
  """d/dp of g = p / stop_gradient(p) is 1/p, times what the recursions have changed."""
  hsd, params, inputs = recursive

  def total(router):
    tree = params["params"] | {"router": router}
    return jnp.sum(hsd.apply({"params": tree}, *inputs).intent_BGYD[..., 0])

  slope = jax.jit(jax.grad(total))(params["params"]["router"])["kernel"]
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-4


def test_balance_by_hand():
  """Three tokens of four count: depths 1, 2, 2; p of depth 1: .5, .25, .25."""
  share_BGYR = jnp.array([[[[0.5, 0.5], [0.25, 0.75], [0.25, 0.75], [0.9, 0.1]]]])
  there_BGY = jnp.array([[[True, True, True, False]]])
  found_B = balance_loss(Depths(share_BGYR, jnp.array([[[1, 2, 2, 1]]])), there_BGY)
  np.testing.assert_allclose(found_B, [2 * (1 / 3 * 1 / 3 + 2 / 3 * 2 / 3)], rtol=1e-6)
  alike = Depths(jnp.full((1, 1, 4, 2), 0.5), jnp.array([[[1, 2, 1, 2]]]))
  np.testing.assert_allclose(balance_loss(alike, jnp.ones((1, 1, 4), bool)), [1.0])
  assert balance_loss(alike, jnp.zeros((1, 1, 4), bool)) == 0


def test_requests_of_a_batch_do_not_meet():
  hsd, (x_BGYD, age_BGY, allowed_BSS) = Hsd(SMALL), stream(rows=2)
  params = shaken(hsd.init, x_BGYD, age_BGY, allowed_BSS)
  apply = functools.partial(hsd.apply, params)
  both = apply(x_BGYD, age_BGY, allowed_BSS).intent_BGYD
  alone = apply(x_BGYD[1:], age_BGY[1:], allowed_BSS[1:]).intent_BGYD
  np.testing.assert_allclose(both[1:], alone, atol=1e-5)
