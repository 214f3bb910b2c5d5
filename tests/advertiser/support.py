"""A tiny random decoder, written as a GGUF file and as a Hugging Face folder; its forward in numpy.
"""

import functools
import json
import struct

import jax
import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from gr4ad_jax.advertiser.llama import Llama, LlamaConfig, causal
from gr4ad_jax.advertiser.weights import LanguageModel

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TINY = LlamaConfig(
  vocab_size=300, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_width=8, hidden=48,
  rope_layout="interleaved",
)


def random_params(config: LlamaConfig, seed: int = 0):
  """Weights of unlike sizes, so that no part can stand in for another."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: init(Llama(config)))["params"]
  return jax.tree.map(lambda x: rng.normal(0.3, 0.3, x.shape).astype(np.float32), shapes)


def init(model: Llama):
  """Parameters of its own."""
  token_BT = np.zeros((1, 2), np.int32)
  return model.init(jax.random.key(0), token_BT, **look(token_BT), method=Llama.both)


def look(token_BT):
  """Positions and mask of rows of one sequence each."""
  position_BT = np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape)
  return {"position_BT": position_BT, "allow_BTS": causal(np.zeros(token_BT.shape, np.int32))}


@functools.cache
def compiled(config: LlamaConfig):
  """(params, token_BT) -> logits_BTV, compiled once a configuration."""
  model = Llama(config)
  return jax.jit(
    lambda params, token_BT: model.apply(
      {"params": params}, token_BT, **look(token_BT), method=Llama.both
    )
  )


def write_home(folder):
  """FOLDER/windows, histories to prepare, and FOLDER/tiny.gguf, the decoder."""
  write_windows(folder / "windows")
  model = tiny_model()
  write_gguf(folder / "tiny.gguf", model.config, model.params)


def words() -> list[str]:
  """Tokens of a byte-level vocabulary: control tokens, bytes, some pairs."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "st", "or", "al", "ar"]
  tokens = [*CONTROL, *alphabet, *pairs]
  return tokens + [f"unused{n}" for n in range(TINY.vocab_size - len(tokens))]


def tiny_model(seed: int = 0) -> LanguageModel:
  """A random language model with a tokenizer of bytes and pairs."""
  tokens = words()
  merges = [tuple(pair) for pair in tokens if len(pair) == 2]
  tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  params = random_params(TINY, seed)
  return LanguageModel("tiny", TINY, jax.tree.map(lambda x: x - 0.3, params), tokenizer, 2)


_GGUF_NAMES = {
  "query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output", "gate": "ffn_gate",
  "up": "ffn_up", "down": "ffn_down", "attention_norm": "attn_norm",
  "feed_forward_norm": "ffn_norm",
}
_HF_NAMES = {
  "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
  "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
  "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
  "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm",
}


def _published(params, names, block, top):
  tensors = {top[0]: params["embedding"], top[1]: params["final_norm"]["scale"]}
  for part, leaves in params["layers"].items():
    for leaf, x_N in leaves.items():
      kind = "bias" if leaf == "bias" else "weight"
      for n, x in enumerate(x_N):
        tensors[f"{block}.{n}.{names[part]}.{kind}"] = x.T.copy() if leaf == "kernel" else x
  return tensors


def write_folder(folder, config: LlamaConfig, params, model_type: str) -> None:
  """A model as Hugging Face publishes it."""
  tensors = _published(
    params, _HF_NAMES, "model.layers", ("model.embed_tokens.weight", "model.norm.weight")
  )
  if "head" in params:
    tensors["lm_head.weight"] = params["head"]
  save_file(tensors, folder / "model.safetensors")
  about = {
    "model_type": model_type, "vocab_size": config.vocab_size, "hidden_size": config.width,
    "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_width,
    "intermediate_size": config.hidden, "rope_theta": config.rope_base,
    "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, "eos_token_id": [2, 0],
  }
  (folder / "config.json").write_text(json.dumps(about))
  tiny_model().tokenizer.save(str(folder / "tokenizer.json"))


def write_gguf(file, config: LlamaConfig, params) -> None:
  """A model as llama.cpp stores it, all float32."""
  tokens = words()
  values = {
    "general.architecture": "llama", "llama.embedding_length": config.width,
    "llama.block_count": config.num_layers, "llama.attention.head_count": config.num_heads,
    "llama.attention.head_count_kv": config.num_kv_heads,
    "llama.feed_forward_length": config.hidden, "llama.rope.freq_base": config.rope_base,
    "llama.attention.layer_norm_rms_epsilon": config.norm_eps, "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.merges": [" ".join(pair) for pair in tokens if len(pair) == 2],
    "tokenizer.ggml.token_type": [3 if n < len(CONTROL) else 1 for n in range(len(tokens))],
  }
  tensors = _published(params, _GGUF_NAMES, "blk", ("token_embd.weight", "output_norm.weight"))
  write_gguf_file(file, values, {name: (0, x.shape, x.tobytes()) for name, x in tensors.items()})


def write_gguf_file(file, values, tensors) -> None:
  """A GGUF file of version 3; tensors are (type, shape, bytes)."""
  def text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()

  def value(x) -> bytes:
    kinds = {str: (8, text), int: (4, lambda n: struct.pack("<I", n)),
             float: (6, lambda n: struct.pack("<f", n))}
    if isinstance(x, list):
      kind, write = kinds[type(x[0])]
      return struct.pack("<IIQ", 9, kind, len(x)) + b"".join(map(write, x))
    kind, write = kinds[type(x)]
    return struct.pack("<I", kind) + write(x)

  head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
  head += b"".join(text(name) + value(x) for name, x in values.items())
  body = b""
  for name, (kind, shape, raw) in tensors.items():
    head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind,
                                     len(body))  # fmt: skip
    body += raw + bytes(-len(raw) % 32)
  file.write_bytes(head + bytes(-len(head) % 32) + body)


def logits_by_hand(config: LlamaConfig, params, tokens) -> np.ndarray:
  """float64 [T, V] of one sequence: the equations, token by token and head by head."""
  def norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale

  def turn(x, position):
    half, turned = config.head_width // 2, np.empty(config.head_width)
    for k in range(half):
      a, b = (2 * k, 2 * k + 1) if config.rope_layout == "interleaved" else (k, k + half)
      angle = position * config.rope_base ** (-2 * k / config.head_width)
      turned[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
      turned[b] = x[a] * np.sin(angle) + x[b] * np.cos(angle)
    return turned

  H, share = config.head_width, config.num_heads // config.num_kv_heads
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  states = [params["embedding"][token] for token in tokens]
  for n in range(config.num_layers):
    w = jax.tree.map(lambda x: x[n], params["layers"])  # noqa: B023 (used at once)

    def line(name, x):
      return x @ w[name]["kernel"] + w[name].get("bias", 0)  # noqa: B023

    def heads(name, number, x, position):
      rows = line(name, x).reshape(number, H)
      if f"{name}_norm" in w:  # noqa: B023
        rows = [norm(row, w[f"{name}_norm"]["scale"]) for row in rows]  # noqa: B023
      return [turn(row, position) for row in rows] if name != "value" else rows

    normed = [norm(x, w["attention_norm"]["scale"]) for x in states]
    query, key, value = (
      [heads(name, number, x, t) for t, x in enumerate(normed)]
      for name, number in (("query", config.num_heads), ("key", config.num_kv_heads),
                           ("value", config.num_kv_heads))
    )
    for t in range(len(tokens)):
      mixed = []
      for head in range(config.num_heads):
        scores = np.array([query[t][head] @ key[s][head // share] for s in range(t + 1)])
        weight = np.exp(scores / np.sqrt(H))
        weight /= weight.sum()
        mixed.append(sum(weight[s] * value[s][head // share] for s in range(t + 1)))
      states[t] = states[t] + line("out", np.concatenate(mixed))
      y = norm(states[t], w["feed_forward_norm"]["scale"])
      gate = line("gate", y)
      states[t] = states[t] + line("down", gate / (1 + np.exp(-gate)) * line("up", y))
  table = params["embedding"] if config.tied else params["head"]
  return np.stack([table @ norm(x, params["final_norm"]["scale"]) for x in states])


BRANDS = ("Acme", "Acme Pro", "Bolt", "Bo", "Cut", "Dry")


def write_windows(folder) -> None:
  """A folder of windows: thirty users who keep to two of six brands each."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  pd.DataFrame({
    "item_id": range(12), "title": [f"{BRANDS[n % 6]} kit {n}" for n in range(12)],
    "brand": [BRANDS[n % 6] for n in range(12)],
  }).to_parquet(folder / "items.parquet")
  rows = {"train": [], "valid": [], "test": []}
  for user in range(30):
    mine = [user % 6, (user + 1) % 6]
    bought = [int(rng.choice(mine)) + 6 * int(rng.integers(2)) for _ in range(7)]
    for at, name in ((3, "train"), (4, "train"), (5, "valid"), (6, "test")):
      rows[name].append((f"u{user}", bought[:at], bought[at]))
  for name, windows in rows.items():
    frame = pd.DataFrame(windows, columns=["user_id", "history", "target"])
    frame.to_parquet(folder / f"{name}.parquet")
