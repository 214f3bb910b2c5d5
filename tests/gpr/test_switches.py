"""Parts of GPR left out one by one, and the two baselines that are left: HSTU and OneRec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.gpr.attention import EncoderAttention, HstuAttention, allow_causal, allow_encoder
from gr4ad_jax.gpr.batch import Context
from gr4ad_jax.gpr.config import BASES, PRESETS, LossConfig, ModelConfig, presets_of
from gr4ad_jax.gpr.generator import generator_of
from gr4ad_jax.gpr.hsd import Hsd, TokenFeedForward, TokenNorm
from gr4ad_jax.gpr.model import Gpr, init_params
from gr4ad_jax.gpr.mtp import mtp_task
from gr4ad_jax.search.generator import whatever
from tests.gpr.support import SMALL, VOCABULARY, asked, random_batch, shaken
from tests.gpr.test_hsd import (
  feed_forward_by_hand,
  norm_by_hand,
  sigmoid,
  stream,
)
from tests.gpr.test_hsd import shaken as shaken_module

WHOLE = dataclasses.replace(SMALL, num_token_layers=1)


def silu(x):
  return x * sigmoid(x)


def test_an_hstu_token_sees_what_came_before_it_an_encoder_the_whole_past():
  """U O E I of two requests; the last request's ad is seen by nobody."""
  _, age_BGY, _ = stream(2)
  there_BGY = jnp.ones(age_BGY.shape, bool)
  np.testing.assert_array_equal(allow_causal(there_BGY, age_BGY)[0], np.tri(8) == 1)
  seen_SS = np.ones((8, 8), bool)
  seen_SS[7] = seen_SS[:, 7] = False
  np.testing.assert_array_equal(allow_encoder(there_BGY, age_BGY)[0], seen_SS)
  # An ad of the first request that was clicked after the second one had begun, and padding.
  late_BGY = jnp.array([[[90, 90, 90, 0], [50, 50, 50, 40]]])
  seen_SS[3] = seen_SS[:, 3] = False
  np.testing.assert_array_equal(allow_encoder(there_BGY, late_BGY)[0], seen_SS)
  padded = there_BGY.at[0, 0].set(False)
  seen_SS[:4] = seen_SS[:, :4] = False
  np.testing.assert_array_equal(allow_encoder(padded, age_BGY)[0], seen_SS)


@pytest.fixture(scope="module")
def attended():
  """Normalised states, a bias, who sees whom: of three requests, the second with no ad."""
  x_BGYD, age_BGY, _ = stream()
  there_BGY = jnp.ones(age_BGY.shape, bool).at[0, 1, 3].set(False)
  bias_BHSS = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 12, 12)), jnp.float32)
  return x_BGYD.reshape(1, 12, 8), bias_BHSS, allow_causal(there_BGY, age_BGY)


THERE = np.arange(12) != 7


def heads_by_hand(kernel, inputs, mix):
  """mix(q_K, k_NK, v_NK, bias_N) of every token and head, [S, 8], N the tokens that it may see."""
  (x_BSD, bias_BHSS, allowed_BSS), mixed_SD = inputs, np.zeros((12, 8))
  for head in range(2):
    q, k, v = (np.asarray(x_BSD[0], np.float64) @ kernel[:, part, head] for part in range(3))
    for i in np.flatnonzero(THERE):
      seen = np.flatnonzero(allowed_BSS[0, i])
      bias_N = np.asarray(bias_BHSS[0, head, i], np.float64)[seen]
      mixed_SD[i, 4 * head : 4 * head + 4] = mix(q[i], k[seen], v[seen], bias_N)
  return mixed_SD


def test_hstu_attention_by_hand(attended):
  """LN( sum_j SiLU(q k + bias) v / n ) * u, all four through SiLU, n = tokens that i may see."""
  attention = HstuAttention(ModelConfig(width=8, num_heads=2))
  params = shaken_module(attention.init, *attended)
  found_SD = np.asarray(attention.apply(params, *attended)[0])
  tree = params["params"]
  qkvu = np.asarray(tree["qkvu"]["kernel"], np.float64)

  def mix(q_K, k_NK, v_NK, bias_N):
    weight_N = silu(silu(k_NK) @ silu(q_K) + bias_N) / len(bias_N)
    return weight_N @ silu(v_NK)

  mixed_SD = heads_by_hand(qkvu, attended, mix)
  centred = mixed_SD - mixed_SD.mean(axis=1, keepdims=True)
  normal_SD = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
  gate_SD = silu(np.einsum("SD,DHK->SHK", attended[0][0], qkvu[:, 3])).reshape(12, 8)
  expected_SD = normal_SD * np.asarray(tree["norm"]["scale"]) * gate_SD
  expected_SD = expected_SD @ np.asarray(tree["out"]["kernel"])
  np.testing.assert_allclose(found_SD[THERE], expected_SD[THERE], rtol=2e-3, atol=2e-4)


def test_attention_of_the_encoder_is_softmax_without_a_gate(attended):
  attention = EncoderAttention(ModelConfig(width=8, num_heads=2))
  params = shaken_module(attention.init, *attended)
  found_SD = np.asarray(attention.apply(params, *attended)[0])
  tree = params["params"]

  def mix(q_K, k_NK, v_NK, bias_N):
    weight_N = np.exp(k_NK @ q_K / 2 + bias_N)
    return weight_N @ v_NK / weight_N.sum()

  mixed_SD = heads_by_hand(np.asarray(tree["qkv"]["kernel"], np.float64), attended, mix)
  expected_SD = mixed_SD @ np.asarray(tree["out"]["kernel"])
  np.testing.assert_allclose(found_SD[THERE], expected_SD[THERE], rtol=2e-3, atol=2e-4)


def test_one_norm_and_one_network_for_all_types_by_hand():
  x_BGYD = stream()[0]
  x_GYD = np.asarray(x_BGYD[0], np.float64)
  norm, network = TokenNorm(1), TokenFeedForward(1)
  params = shaken_module(norm.init, x_BGYD)
  np.testing.assert_allclose(
    norm.apply(params, x_BGYD)[0], norm_by_hand(params["params"], x_GYD), rtol=2e-4, atol=2e-5
  )
  params = shaken_module(network.init, x_BGYD)
  four = {name: np.tile(x, (4, 1, 1)) for name, x in params["params"].items()}
  np.testing.assert_allclose(
    network.apply(params, x_BGYD)[0], feed_forward_by_hand(four, x_GYD), rtol=2e-4, atol=2e-5
  )


def test_no_gradient_leads_from_anything_later_to_an_hstu_token():
  hsd = Hsd(dataclasses.replace(WHOLE, width=8, num_layers=2, **BASES["hstu"]))
  x_BGYD, age_BGY, _ = stream()
  inputs = (age_BGY, allow_causal(jnp.ones(age_BGY.shape, bool), age_BGY))
  params = shaken_module(hsd.init, x_BGYD, *inputs)
  direction_D = jnp.asarray(np.random.default_rng(5).normal(size=8), jnp.float32)

  def intents(x_BGYD):
    return (hsd.apply(params, x_BGYD, *inputs).intent_BGYD @ direction_D).reshape(-1)

  slope = np.asarray(jax.jit(jax.jacrev(intents))(x_BGYD)).reshape(12, 12, 8)
  np.testing.assert_array_equal(np.any(slope != 0, axis=-1), np.tri(12) == 1)


@pytest.fixture(scope="module", params=["hstu", "onerec"])
def base(request):
  """A baseline, its parameters far from their start, a batch with one label a row."""
  model = Gpr(dataclasses.replace(WHOLE, num_layers=2, **BASES[request.param]), VOCABULARY)
  return model, shaken(model), random_batch(groups=3, labels=1, heads=1), asked(model)


def test_a_baseline_is_told_nothing_of_its_own_request_s_ads(base):
  """The context of an own ad in the last group changed: the same to the last bit."""
  model, params, batch, ask = base
  expected = np.asarray(ask(params, *batch).logp_BPNL)
  age_BG = batch.context.ad_age_BG.copy()
  age_BG[:, -1] = 0
  told = batch.context._replace(ad_age_BG=age_BG)
  found = []
  for seed in (3, 4):
    ad_code_BTL, action_BT = (x.copy() for x in (told.ad_code_BTL, told.ad_action_BT))
    ad_code_BTL[:, -2:] = random_batch(groups=1, seed=seed).context.organic_code_BOL
    action_BT[:, -2:] = seed - 2
    changed = Context(**told._asdict() | {"ad_code_BTL": ad_code_BTL, "ad_action_BT": action_BT})
    found.append(np.asarray(ask(params, changed, *batch[1:]).logp_BPNL))
  np.testing.assert_array_equal(*found)
  np.testing.assert_allclose(found[0], expected, rtol=1e-5)
  ad_code_BTL = told.ad_code_BTL.copy()
  ad_code_BTL[:, :2] = (ad_code_BTL[:, :2] + 1) % 5
  seen = ask(params, batch.context._replace(ad_code_BTL=ad_code_BTL), *batch[1:]).logp_BPNL
  assert np.abs(np.asarray(seen) - expected).min() > 0  # and what came before is read


def test_a_baseline_s_search_says_what_its_training_says_and_values_all_ads_alike(base):
  model, params, batch, ask = base
  generator, target_BL = generator_of(model), batch.target_BPNL[:, 0, 0]

  @jax.jit
  def search(params, context):
    shared, state, logp_BWV = generator.start(params, context, whatever)
    found = [logp_BWV]
    for level in (1, 2, 3):
      code_BW = target_BL[:, level - 1 : level]
      state, logp_BWV = generator.step(params, shared, state, code_BW, level)
      found.append(logp_BWV)
    return found

  *found, value = search(params, batch.context)
  expected_BL = np.asarray(ask(params, *batch).logp_BPNL)[:, 0, 0]
  for level, logp_BWV in enumerate(found):
    picked_B = np.asarray(logp_BWV)[np.arange(2), 0, target_BL[:, level]]
    np.testing.assert_allclose(picked_B, expected_BL[:, level], rtol=2e-4, atol=2e-5)
  np.testing.assert_allclose(np.exp(value), np.full((2, 1, 1), 5.0), rtol=1e-6)


def paths(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter."""
  model = Gpr(config, VOCABULARY)
  tree = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


@pytest.mark.parametrize(("change", "gone"), [
  ({"recursions": 1}, ("hsd/router",)),
  ({"refining": 0}, ("refiner/",)),
  ({"thinking": 0, "refining": 0}, ("refiner/", "ptd/start")),
  ({"values": False}, ("hte/",)),
])
def test_what_is_left_out_has_no_parameters(change, gone):
  whole, rest = paths(WHOLE), paths(dataclasses.replace(WHOLE, **change))
  assert {name for name in whole if name.startswith(gone)} == whole.keys() - rest.keys()
  assert rest.keys() < whole.keys()


def test_what_all_types_share_is_there_once():
  whole = paths(WHOLE)
  shared = paths(dataclasses.replace(WHOLE, token_norm=False, token_ffn=False))
  changed = {name for name in whole if whole[name] != shared[name]}
  assert changed == {name for name in whole if name.startswith("hsd/") and (
    "norm/scale" in name or "feed_forward/" in name)}
  assert all(whole[name][0] == 4 and shared[name] == (1, *whole[name][1:]) for name in changed)


def test_a_baseline_learns_from_its_codes_alone(base):
  """The loss is the mean of -log p of one head; no other term, and no part to have one."""
  model, params, batch, ask = base
  task = mtp_task(model, LossConfig())
  found = jax.jit(lambda params, batch: task.loss(params, batch, None))(params, batch)
  logp_BPNL = np.asarray(ask(params, *batch).logp_BPNL)
  assert float(found["loss"][0]) == pytest.approx(-logp_BPNL.sum(), rel=1e-5)
  assert found["loss"][1] == 2 and found["value_loss"][0] == 0


def test_presets_of_a_baseline_differ_from_gpr_s_in_what_is_left_out():
  for size in ("tiny", "small"):
    gpr = PRESETS[f"gpr-{size}"]
    for system, parts in BASES.items():
      config = PRESETS[f"{system}-{size}"]
      changes = {f"model.{name}": value for name, value in parts.items()}
      if system == "onerec":
        changes |= {"stream.labels": 1, "train.batch_size": config.train.batch_size}
      assert override_all(gpr, changes) == config
  assert presets_of("hstu") == ("hstu-tiny", "hstu-small")


@pytest.mark.parametrize(("preset", "path", "value", "message"), [
  ("onerec-tiny", "stream.labels", 2, "stream.labels=2: must be 1 with model.attention bidirect"),
  ("hstu-tiny", "search.value_exponent", 0.5, "search.value_exponent=0.5: must be 0 without"),
])
def test_settings_that_would_do_nothing_are_refused(preset, path, value, message):
  with pytest.raises(ConfigError, match=message):
    override_all(PRESETS[preset], {path: value})
