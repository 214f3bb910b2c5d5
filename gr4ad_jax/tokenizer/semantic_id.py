"""Ads to semantic IDs: residual codes of an embedding, then a hash of non-semantic features."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from gr4ad_jax.data.schema import LogError, Logs
from gr4ad_jax.tokenizer import residual_kmeans
from gr4ad_jax.tokenizer.feature_hash import hash_codes
from gr4ad_jax.tokenizer.text_encoder import encode_texts

HASH_COLUMNS = ("advertiser_id", "conversion_type", "ad_id", "category", "price")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """How ads become semantic IDs.

  Attributes:
    encoder: source of the embeddings: "wordllama" or "minilm" (pretrained, of the ads' text), or
      "given" (the logs' own embedding column).
    codebook_sizes: codes of each level, the last one the hash level's; empty = `default_sizes`.
    hash_columns: ad columns that the last level hashes, of `HASH_COLUMNS`. ("ad_id",) tells most
      ads apart; the paper's ("advertiser_id", "conversion_type") lets the level generalise over
      ads; empty = the last level is quantised like the others.
    seed: of k-means and of the hash.
    kmeans_iterations: iterations a level.
    balance_epsilon: a code holds at most (1 + this) times its even share of distinct embeddings
      while the codebook is fitted.
  """

  encoder: Literal["wordllama", "minilm", "given"] = "wordllama"
  codebook_sizes: tuple[int, ...] = ()
  hash_columns: tuple[str, ...] = ("ad_id",)
  seed: int = 0
  kmeans_iterations: int = 20
  balance_epsilon: float = 0.1

  def __post_init__(self):
    if self.encoder not in ("wordllama", "minilm", "given"):
      raise ValueError(f"encoder: {self.encoder!r} is none of wordllama, minilm, given")
    if len(self.codebook_sizes) == 1 or any(size < 1 for size in self.codebook_sizes):
      raise ValueError(
        f"codebook_sizes: {self.codebook_sizes}, expected two or more sizes >= 1, or ()"
      )
    for name in self.hash_columns:
      if name not in HASH_COLUMNS:
        raise ValueError(f"hash_columns: {name!r} is none of {', '.join(HASH_COLUMNS)}")
    if not 0 <= self.seed < 2**31:
      raise ValueError(f"seed: {self.seed}, must be in [0, 2^31)")
    if self.kmeans_iterations < 1:
      raise ValueError(f"kmeans_iterations: {self.kmeans_iterations}, must be >= 1")
    if self.balance_epsilon < 0:
      raise ValueError(f"balance_epsilon: {self.balance_epsilon}, must be >= 0")


@dataclasses.dataclass(frozen=True)
class SemanticIds:
  """Codes of all ads and contents, and what is needed to code new ones.

  Attributes:
    codes_AL: [A, L] int32, row = ad index.
    content_codes_OL: [O, L] int32; -1 in a row = the content has no code.
    codebook_sizes: codes of each of the L levels.
    centroids: float32 [V_l, D] of each quantised level (L - 1 of them, L without a hash level).
    config: as given to `assign_semantic_ids`.
  """

  codes_AL: np.ndarray
  content_codes_OL: np.ndarray
  codebook_sizes: tuple[int, ...]
  centroids: tuple[np.ndarray, ...]
  config: TokenizerConfig


def default_sizes(num_ads: int, hash_columns: tuple[str, ...]) -> tuple[int, int, int]:
  """Three codebook sizes for a catalogue: V_1 = 4 V_2, V_2, and max(16, V_2 / 4) or max(16, V_1).

  The last level is as wide as the first where it hashes ad_id: there it has to tell ads apart, and
  ads with one text are many.

  Args:
    num_ads: N; V_2 is the power of two nearest to sqrt(2.7 N / 4), by its logarithm.
    hash_columns: as in `TokenizerConfig`.

  Source: derived from GR4AD's (16384, 4096, 1024) at 24.5M ads; the wide level is our choice.
  """
  v2 = 2 ** max(0, round(math.log2(math.sqrt(2.7 * num_ads / 4))))
  return 4 * v2, v2, max(16, 4 * v2 if "ad_id" in hash_columns else v2 // 4)


def assign_semantic_ids(
  logs: Logs, config: TokenizerConfig, *, progress: Callable | None = None
) -> SemanticIds:
  """Codes every ad, and every content that stands for an ad or has a text.

  Codebooks are fitted on the ads' embeddings alone. A content that promotes an ad takes the ad's
  codes; one with a text takes the nearest centroids and the hash of its content id.

  Args:
    logs: ads and contents.
    config: encoder, sizes, hash columns, seed.
    progress: called as `progress(iterable, description, total)` on the long steps.

  Returns:
    Codes of ads and contents with their codebooks; the same logs and config give the same codes.

  Raises:
    ValueError: the encoder's package is missing, or the logs have no embedding to be "given".
  """
  sizes = config.codebook_sizes or default_sizes(len(logs.ads.ad_id), config.hash_columns)
  num_quantised = len(sizes) - bool(config.hash_columns)
  embedding_AD, content_rows, embedding_ND = _embeddings(logs, config, progress)
  centroids = residual_kmeans.fit(
    embedding_AD,
    sizes[:num_quantised],
    seed=config.seed,
    iterations=config.kmeans_iterations,
    balance_epsilon=config.balance_epsilon,
    progress=progress,
  )
  hashed = {"size": sizes[-1], "seed": config.seed}
  codes_AL = residual_kmeans.encode(embedding_AD, centroids)
  if config.hash_columns:
    columns = [getattr(logs.ads, name) for name in config.hash_columns]
    codes_AL = np.column_stack([codes_AL, hash_codes(columns, **hashed)])
  content_codes_OL = np.full((len(logs.contents.content_id), len(sizes)), -1, np.int32)
  if len(content_rows):
    content_codes_OL[content_rows, :num_quantised] = residual_kmeans.encode(embedding_ND, centroids)
    if config.hash_columns:
      ids = logs.contents.content_id[content_rows]
      content_codes_OL[content_rows, -1] = hash_codes([ids], **hashed)
  promotes_O = logs.contents.ad >= 0
  content_codes_OL[promotes_O] = codes_AL[logs.contents.ad[promotes_O]]
  return SemanticIds(codes_AL, content_codes_OL, sizes, centroids, config)


def _embeddings(logs, config, progress):
  """Unit rows of all ads, the contents that have a text of their own, and the rows of those."""
  if config.encoder == "given":
    embedding_AD = logs.ads.embedding_AD
    if embedding_AD is None:
      raise LogError("ads: encoder 'given' needs the column `embedding`, which these logs lack")
    norm_A = np.linalg.norm(embedding_AD, axis=-1)
    bad = np.flatnonzero(~(np.isfinite(norm_A) & (norm_A > 0)))
    if bad.size:
      raise LogError(
        f"ads: row {bad[0]} (ad_id {logs.ads.ad_id[bad[0]]}), column embedding: norm"
        f" {norm_A[bad[0]]}, must be finite and > 0"
      )
    return (embedding_AD / norm_A[:, None]).astype(np.float32), np.empty(0, int), None
  has_text_O = np.array([bool(text.strip()) for text in logs.contents.text], bool)
  content_rows = np.flatnonzero((logs.contents.ad < 0) & has_text_O)
  # One call, so that a text that ads and contents share is encoded once.
  texts = [*logs.ads.text, *logs.contents.text[content_rows]]
  embedding_ND = encode_texts(texts, config.encoder, progress=progress)
  num_ads = len(logs.ads.text)
  return embedding_ND[:num_ads], content_rows, embedding_ND[num_ads:]


def save(sids: SemanticIds, folder: str | os.PathLike) -> None:
  """Writes codes.npz and config.json; the folder appears or is replaced as a whole."""
  folder = Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    temporary.chmod(0o755)
    centroids = {f"centroids_{level}": c for level, c in enumerate(sids.centroids)}
    np.savez(
      temporary / "codes.npz",
      codes_AL=sids.codes_AL,
      content_codes_OL=sids.content_codes_OL,
      codebook_sizes=np.array(sids.codebook_sizes, np.int64),
      **centroids,
    )
    text = json.dumps(dataclasses.asdict(sids.config), indent=2)
    (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
    if folder.exists():
      old = temporary.with_name(temporary.name + "-old")
      folder.rename(old)
      temporary.rename(folder)
      shutil.rmtree(old)
    else:
      temporary.rename(folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def load(folder: str | os.PathLike) -> SemanticIds:
  """Reads what `save` wrote.

  Raises:
    ValueError: the folder holds no semantic IDs.
  """
  folder = Path(folder)
  for name in ("codes.npz", "config.json"):
    if not (folder / name).is_file():
      raise ValueError(f"{folder}: no {name} here; make semantic IDs with `gr4ad tokenize`")
  fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
  with np.load(folder / "codes.npz") as arrays:
    num_quantised = sum(name.startswith("centroids_") for name in arrays.files)
    return SemanticIds(
      codes_AL=arrays["codes_AL"],
      content_codes_OL=arrays["content_codes_OL"],
      codebook_sizes=tuple(int(size) for size in arrays["codebook_sizes"]),
      centroids=tuple(arrays[f"centroids_{level}"] for level in range(num_quantised)),
      config=TokenizerConfig(**fields),
    )


def health(
  sids: SemanticIds, *, events_A: np.ndarray | None = None, value_A: np.ndarray | None = None
) -> dict[str, float]:
  """How well the codes tell ads apart and use their codebooks.

  Args:
    sids: codes of the ads.
    events_A: [A] events of each ad; adds the share of events on ads that share their SID.
    value_A: [A] value of each ad, currency; the same for value.

  Returns:
    num_ads, num_sids, codebook_space; cpr = ads / SIDs; col = share of SIDs that hold several ads;
    util = SIDs / codebook space; util_as_printed = ads / codebook space (the paper's equation,
    which its table contradicts); sid_collision_rate = share of ads that share their SID;
    max_ads_per_sid; for each level l from 1: level{l}/used_share of its codes,
    level{l}/entropy_bits of the code over ads and level{l}/perplexity = 2^entropy;
    content_coded_share where there are contents; sid_collision_event_share and
    sid_collision_value_share where weights are given.

  Source: GR4AD (arXiv 2602.22732) A.3.1, equations 33 to 35.
  """
  _, sid_of_ad_A, count_S = np.unique(
    sids.codes_AL, axis=0, return_inverse=True, return_counts=True
  )
  num_ads, num_sids = len(sids.codes_AL), len(count_S)
  space = math.prod(sids.codebook_sizes)
  collides_A = count_S[sid_of_ad_A.reshape(-1)] > 1
  result = {
    "num_ads": num_ads,
    "num_sids": num_sids,
    "codebook_space": space,
    "sid_collision_rate": collides_A.mean(),
    "cpr": num_ads / num_sids,
    "col": (count_S > 1).mean(),
    "util": num_sids / space,
    "util_as_printed": num_ads / space,
    "max_ads_per_sid": count_S.max(),
  }
  for level, size in enumerate(sids.codebook_sizes):
    count_V = np.bincount(sids.codes_AL[:, level], minlength=size)
    p_V = count_V[count_V > 0] / num_ads
    entropy = abs(float(-(p_V * np.log2(p_V)).sum()))  # abs: one used code gives -0
    result[f"level{level + 1}/used_share"] = (count_V > 0).mean()
    result[f"level{level + 1}/entropy_bits"] = entropy
    result[f"level{level + 1}/perplexity"] = 2**entropy
  if len(sids.content_codes_OL):
    result["content_coded_share"] = (sids.content_codes_OL >= 0).all(-1).mean()
  for name, weight_A in (("event", events_A), ("value", value_A)):
    if weight_A is not None:
      total = max(float(weight_A.sum()), 1e-12)
      result[f"sid_collision_{name}_share"] = weight_A[collides_A].sum() / total
  return {name: float(value) for name, value in result.items()}
