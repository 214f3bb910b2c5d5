"""The decoder against its equations; cache, packing, adapters."""

import dataclasses

import jax
import numpy as np
import pytest

from gr4ad_jax.advertiser.config import LoraConfig
from gr4ad_jax.advertiser.llama import Llama, LlamaConfig, Past, causal, lower_layers, rotate
from gr4ad_jax.config import ConfigError
from tests.advertiser import support

TOKENS = np.array([[7, 250, 3, 91, 91, 12]], np.int32)


@pytest.fixture(scope="module")
def params():
  return support.random_params(support.TINY)


def _read(params, token_BT, *, position_BT, allow_BTS, past=None):
  model = Llama(support.TINY)
  return model.apply(
    {"params": params}, token_BT, position_BT=position_BT, allow_BTS=allow_BTS, past=past
  )


@pytest.mark.parametrize("changes", [
  {}, {"rope_layout": "halves", "qkv_bias": True, "tied": False},
  {"rope_layout": "halves", "qk_norm": True, "num_kv_heads": 1, "rope_base": 50.0},
], ids=["llama, GGUF", "qwen2, head of its own", "qwen3, one key head"])
def test_logits_are_those_of_the_equations(changes):
  config = dataclasses.replace(support.TINY, **changes)
  params = support.random_params(config)
  by_hand = support.logits_by_hand(config, params, TOKENS[0])
  np.testing.assert_allclose(
    support.compiled(config)(params, TOKENS)[0], by_hand, rtol=2e-4, atol=2e-3
  )


def test_a_key_head_repeated_for_each_query_head_changes_nothing(params):
  grouped = support.compiled(support.TINY)(params, TOKENS)
  config = dataclasses.replace(support.TINY, num_kv_heads=4)
  H = config.head_width

  def repeat(kernel_NDM):
    N, D, _ = kernel_NDM.shape
    return np.repeat(kernel_NDM.reshape(N, D, 2, H), 2, axis=2).reshape(N, D, 4 * H)

  layers = dict(params["layers"])
  for name in ("key", "value"):
    layers[name] = {"kernel": repeat(layers[name]["kernel"])}
  repeated = support.compiled(config)(params | {"layers": layers}, TOKENS)
  np.testing.assert_allclose(repeated, grouped, rtol=1e-4, atol=1e-3)


def test_tokens_read_behind_a_cache_are_those_of_one_reading(params):
  whole = _read(params, TOKENS, **support.look(TOKENS))
  look = support.look(TOKENS)
  first, rest = slice(0, 4), slice(4, 6)
  begun = _read(params, TOKENS[:, first], position_BT=look["position_BT"][:, first],
                allow_BTS=look["allow_BTS"][:, first, first])
  then = _read(params, TOKENS[:, rest], position_BT=look["position_BT"][:, rest],
               allow_BTS=look["allow_BTS"][:, rest], past=begun.past)
  np.testing.assert_allclose(then.state_BTD, whole.state_BTD[:, rest], rtol=1e-4, atol=1e-4)
  for mine, all_of in zip(then.past, whole.past, strict=True):
    np.testing.assert_allclose(mine, all_of[:, :, rest], rtol=1e-4, atol=1e-4)
  assert isinstance(then.past, Past)


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_the_product_of_turned_vectors_depends_on_the_distance_alone(layout):
  rng = np.random.default_rng(0)
  query, key = (rng.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(2))

  def product(at, distance):
    turned = [rotate(x, np.array([[p]]), base=100.0, layout=layout).ravel()
              for x, p in ((query, at + distance), (key, at))]
    return float(turned[0] @ turned[1])

  assert product(3, 5) == pytest.approx(product(40, 5), abs=1e-4)
  assert product(3, 0) == pytest.approx(float(query.ravel() @ key.ravel()), abs=1e-5)
  assert abs(product(3, 5) - product(3, 6)) > 1e-2


def test_sequences_that_share_a_row_do_not_see_each_other(params):
  alone = support.compiled(support.TINY)(params, TOKENS[:, 3:])
  packed = np.array([[7, 250, 3, 91, 91, 12]], np.int32)
  segment_BT = np.array([[0, 0, 0, 1, 1, 1]], np.int32)
  position_BT = np.array([[0, 1, 2, 0, 1, 2]], np.int32)
  model = Llama(support.TINY)
  both = model.apply({"params": params}, packed, position_BT=position_BT,
                     allow_BTS=causal(segment_BT), method=Llama.both)
  np.testing.assert_allclose(both[:, 3:], alone, rtol=1e-4, atol=1e-3)


def test_who_may_look_at_whom_by_hand():
  allow_TT = np.asarray(causal(np.array([[0, 0, 1, -1, -1]]))[0])
  assert allow_TT.astype(int).tolist() == [
    [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1],
  ]


def test_an_adapter_is_the_product_of_its_factors_beside_the_kernel(params):
  lora = LoraConfig(rank=2, alpha=6.0)
  model = Llama(support.TINY, lora)
  variables = support.init(model)
  assert sorted(variables["lora"]["layers"]) == ["query", "value"]
  assert all(not np.any(x["b"]) for x in variables["lora"]["layers"].values())
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), variables["lora"]
  )
  adapted = model.apply({"params": params, "lora": adapters}, TOKENS, **support.look(TOKENS),
                        method=Llama.both)
  layers = dict(params["layers"])
  for name, factors in adapters["layers"].items():
    added = 3.0 * np.einsum("NDR,NRM->NDM", factors["a"], factors["b"])
    layers[name] = {"kernel": layers[name]["kernel"] + added}
  merged = support.compiled(support.TINY)(params | {"layers": layers}, TOKENS)
  np.testing.assert_allclose(adapted, merged, rtol=1e-3, atol=5e-3)


def test_lower_layers_are_the_first_ones(params):
  config, lower = lower_layers(support.TINY, params, 1)
  assert config.num_layers == 1
  np.testing.assert_array_equal(
    lower["layers"]["query"]["kernel"], params["layers"]["query"]["kernel"][:1]
  )
  with pytest.raises(ConfigError, match="layer=3: the model has 2 layers"):
    lower_layers(support.TINY, params, 3)


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ConfigError, match="num_heads=3: must be a multiple of num_kv_heads=2"):
    LlamaConfig(10, 8, 1, 3, 2, 4, 8)
