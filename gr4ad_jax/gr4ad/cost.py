"""Parameters and matrix-product FLOPs of a decoder, from its config alone.

A product of [n, a] with [a, b] counts 2 n a b. Norms, softmax and other element-wise work are left
out; compiled programs count a few percent more (tests/gr4ad/test_cost.py). The sums over cached
positions of decoding are element-wise too, and the narrow projection of hashed ids is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from gr4ad_jax.data import neighbours
from gr4ad_jax.gr4ad.batch import Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.copy_path import CopyScore
from gr4ad_jax.gr4ad.item_scorer import ItemShare


def num_params(config: ModelConfig, vocabulary: Vocabulary) -> int:
  """Numbers in all parameters."""
  d, levels = config.width, vocabulary.num_levels
  layer = _layer_weights(config) + 3 * d
  if config.kv_mode == "projected":
    layer += 2 * d * d
  depth = config.num_layers - config.num_lazy_layers
  match config.decoder:
    case "lazy":
      own = config.num_layers * layer + 3 * d * d + (levels + 1) * d + d * config.fuse_bos
    case "autoregressive":
      own = config.num_layers * layer + (levels + 2) * d
    case "multi_token":
      own = config.num_layers * layer + d + levels * (depth * layer + 2 * d * d + 2 * d)
  tables = sum(vocabulary.codebook_sizes) * d
  output = d + d * vocabulary.num_ecpm_bins
  if config.id_rows:
    output += config.id_width * (config.id_rows + d)
  if config.copy_path:
    hidden, rows = CopyScore.HIDDEN, _row_width(config)
    output += d + 1 + 2 + hidden * (config.copied_numbers + 1 + rows + 1 + hidden + 1 + 1)
    output += _code_params(config, vocabulary)
    output += len(neighbours.WEIGHTS) if config.neighbours else 0
  if config.item_scorer:
    output += _item_params(config, vocabulary)
  return own + tables + output + _context_params(config, vocabulary)


def _row_width(config: ModelConfig) -> int:
  """Width of the rows of codes that the copy path's network reads."""
  return 0 if config.neighbours else CopyScore.WIDTH


def _code_params(config: ModelConfig, vocabulary: Vocabulary) -> int:
  """Those rows, and what each code is worth."""
  width = _row_width(config)
  return sum(vocabulary.codebook_sizes) * (width + bool(width))


def _item_params(config: ModelConfig, vocabulary: Vocabulary) -> int:
  """The item scorer: ad vectors, its encoder, the gate of its share."""
  w, filtered = config.item_width, bool(config.history_filter)
  block = 12 * w * w + (2 + 2 * filtered) * w
  encoder = (config.history_length + 1) * w + config.history_blocks * block
  share = 0 if config.item_share else len(ItemShare.RANKS) + 2 + 1
  return _item_rows(vocabulary) * w + w + encoder + share


def _item_rows(vocabulary: Vocabulary) -> int:
  """Rows of the item scorer's tables: an ad's own, and one for each code."""
  return len(vocabulary.ads or ()) + sum(vocabulary.codebook_sizes)


def num_table_params(config: ModelConfig, vocabulary: Vocabulary) -> int:
  """Numbers in tables of embeddings: codes (and heads, which are tied), features, buckets.

  What is left of `num_params` without them is the N of scaling laws.
  """
  context = _context_params(config, vocabulary) - config.width
  groups = 3 + bool(vocabulary.num_trending)
  tables = sum(vocabulary.codebook_sizes) * config.width + config.id_rows * config.id_width
  if config.copy_path:
    tables += _code_params(config, vocabulary)
  if config.item_scorer:
    tables += _item_rows(vocabulary) * config.item_width
  return tables + context - groups * config.width**2


def _context_params(config: ModelConfig, vocabulary: Vocabulary) -> int:
  d = config.width
  buckets = (
    vocabulary.num_count_buckets + vocabulary.num_age_buckets + vocabulary.num_trend_buckets
  )
  rows = 1 + sum(vocabulary.feature_sizes) + 2 * buckets + vocabulary.num_organic_buckets
  groups = 3
  if vocabulary.num_trending:
    rows += vocabulary.num_trending + vocabulary.num_trend_buckets
    groups += 1
  return rows * d + groups * d * d + d


def _layer_weights(config: ModelConfig) -> int:
  """Weights of one decoder layer that meet every token: attention to X 2, to itself 4, SwiGLU."""
  return 6 * config.width**2 + 3 * config.width * config.feed_forward_width


def decode_flops(
  config: ModelConfig,
  vocabulary: Vocabulary,
  *,
  context_tokens: int,
  widths: Sequence[int],
  with_value: bool = False,
) -> int:
  """FLOPs of one request's beam search.

  Args:
    config: of the decoder.
    vocabulary: its sizes.
    context_tokens: S, the constant token included.
    widths: beams after each level.
    with_value: also the step that predicts the value bucket.
  """
  d, S, levels = config.width, context_tokens, vocabulary.num_levels
  per_layer = 2 * (_layer_weights(config) + 2 * S * d)  # of one token
  fuse = 2 * 3 * d * d
  depth, layers_with_kv = config.num_layers - config.num_lazy_layers, config.num_layers
  if config.decoder == "multi_token":
    layers_with_kv += (levels - 1 + with_value) * depth
  # Tokens that each position decodes: one at level 1, then one a beam.
  tokens = [1, *widths[: levels - 1], *([widths[-1]] if with_value else [])]
  match config.decoder:
    case "lazy":
      positions = levels + 1
      trunk = config.num_lazy_layers * positions * (per_layer + 2 * 2 * positions * d)
      own = trunk + sum(tokens) * depth * per_layer + sum(tokens[1:]) * fuse
      own += fuse if config.fuse_bos else 0
    case "autoregressive":
      own = sum(tokens) * config.num_layers * per_layer
    case "multi_token":
      own = config.num_layers * (per_layer + 2 * 2 * d)
      own += sum(tokens[1:]) * (depth * (per_layer + 2 * 2 * d) + 2 * 2 * d * d)
  heads = sum(
    2 * n * v * d for n, v in zip(tokens[:levels], vocabulary.codebook_sizes, strict=True)
  )
  if config.copy_path:
    copied = config.copied_ads
    if config.item_scorer:
      heads += _item_flops(config, vocabulary)
      copied += min(config.copied_items, len(vocabulary.ads or ()))
    heads += _score_flops(config) + sum(
      2 * n * copied * v
      for n, v in zip(tokens[:levels], vocabulary.codebook_sizes, strict=True)
    )
  if with_value:
    heads += 2 * tokens[-1] * d * vocabulary.num_ecpm_bins
  return _context_flops(config, S, layers_with_kv) + own + heads


def _context_flops(config: ModelConfig, tokens: int, layers_with_kv: int) -> int:
  """Context tokens, and keys and values where layers project them."""
  products = 1 + (2 * layers_with_kv if config.kv_mode == "projected" else 0)
  return 2 * tokens * config.width**2 * products


def _score_flops(config: ModelConfig) -> int:
  """The copy path's network over the numbers of the shortlist."""
  hidden, read = CopyScore.HIDDEN, config.copied_numbers + 1 + _row_width(config)
  return 2 * config.copied_ads * hidden * (read + hidden + 1)


def _item_flops(config: ModelConfig, vocabulary: Vocabulary) -> int:
  """The encoder over a full history, and a product with the vector of every ad."""
  w, length, filtered = config.item_width, config.history_length, bool(config.history_filter)
  mixing = 2 * (2 + filtered) * length * w  # of one place, to all
  deep = length * (2 * 12 * w * w + mixing)
  last = length * 2 * 2 * w * w + 2 * 10 * w * w + mixing  # which gives the newest place alone
  return (config.history_blocks - 1) * deep + last + 2 * len(vocabulary.ads or ()) * w


def train_flops(
  config: ModelConfig, vocabulary: Vocabulary, *, context_tokens: int, targets: int
) -> int:
  """FLOPs of one request's forward and backward pass under teacher forcing.

  The backward pass counts twice the forward pass; what `remat` computes again does not count.

  Args:
    config: of the decoder.
    vocabulary: its sizes.
    context_tokens: S, the constant token included.
    targets: C, padded ones included.
  """
  d, S, levels = config.width, context_tokens, vocabulary.num_levels
  positions = levels + 1
  depth = config.num_layers - config.num_lazy_layers
  per_layer = 2 * (_layer_weights(config) + 2 * S * d)  # of one token
  causal = per_layer + 2 * 2 * positions * d  # with attention over all positions
  alone = per_layer + 2 * 2 * d  # with attention to itself
  fuse = 2 * 3 * d * d
  head_rows, layers_with_kv = targets, config.num_layers
  match config.decoder:
    case "lazy":
      head_rows += 1  # the un-fused row
      own = config.num_lazy_layers * positions * causal + head_rows * positions * depth * causal
      own += targets * (levels + config.fuse_bos) * fuse
    case "autoregressive":
      own = targets * positions * config.num_layers * causal
    case "multi_token":
      layers_with_kv += levels * depth
      own = config.num_layers * alone + targets * levels * (depth * alone + 2 * 2 * d * d)
  heads = 2 * head_rows * d * sum(vocabulary.codebook_sizes)
  heads += 2 * targets * d * vocabulary.num_ecpm_bins
  if config.copy_path:
    heads += _score_flops(config)
  if config.item_scorer:
    heads += _item_flops(config, vocabulary)
  return 3 * (_context_flops(config, S, layers_with_kv) + own + heads)
