"""Ads to semantic IDs: quantised codes of an embedding, then a level that tells twins apart."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gr4ad_jax.data.records import Logs
from gr4ad_jax.embedding.embeddings import LogEmbeddings
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.tokenizer.config import HASH_COLUMNS, TokenizerConfig
from gr4ad_jax.tokenizer.feature_hash import hash_codes
from gr4ad_jax.tokenizer.quantizers import Quantizer, quantizer
from gr4ad_jax.training.resume import ResumeFile, fingerprint

_OF_QUANTIZER = "quantizer."  # stands before the names of its arrays in codes.npz


@dataclasses.dataclass(frozen=True)
class SemanticIds:
  """Codes of all ads and contents, and what is needed to code new ones.

  Attributes:
    codes_AL: [A, L] int32, row = ad index.
    content_codes_OL: [O, L] int32; -1 in a row = the content has no code.
    codebook_sizes: codes of each of the L levels.
    quantizer_arrays: what the quantizer has learned.
    config: as given to `assign_semantic_ids`.
    of_rows: `name_rows` of the logs that the codes belong to; "" = not known.
    encoder_file: name of the fine-tuned encoder that ads were embedded with; "" = not known.
    health: what health.json beside the codes holds (`health_verdicts.as_record`); None = nothing.
  """

  codes_AL: np.ndarray
  content_codes_OL: np.ndarray
  codebook_sizes: tuple[int, ...]
  quantizer_arrays: dict[str, np.ndarray]
  config: TokenizerConfig
  of_rows: str = ""
  encoder_file: str = ""
  health: dict[str, Any] | None = None

  @property
  def num_quantised(self) -> int:
    """Levels that come from the embedding, the first ones."""
    return self.config.num_quantised(len(self.codebook_sizes))

  def reconstruct(self) -> np.ndarray:
    """float32 [A, D], what the quantised codes of the ads stand for."""
    return _functions(self.config).decode(
      self.quantizer_arrays, self.codes_AL[:, : self.num_quantised]
    )


def _functions(config: TokenizerConfig) -> Quantizer:
  return quantizer(
    config.quantizer, kmeans_iterations=config.kmeans_iterations,
    balance_epsilon=config.balance_epsilon,
  )


def name_rows(logs: Logs) -> str:
  """A short name for which ads and contents there are, and in which order."""
  return fingerprint(logs.ads.ad_id.tolist(), logs.contents.content_id.tolist())


def default_sizes(num_ads: int, config: TokenizerConfig) -> tuple[int, int, int]:
  """Three codebook sizes for a catalogue: V_1 = 4 V_2, V_2, and max(16, V_2 / 4) or max(16, V_1).

  The last level is as wide as the first where it hashes ad_id: there it has to tell ads apart, and
  ads with one text are many. A suffix is as wide as it has to be (0 here). No quantised level has
  more codes than there are ads.

  Args:
    num_ads: N; V_2 is the power of two nearest to sqrt(2.7 N / 4), by its logarithm.
    config: last_level and hash_columns matter.

  Source: derived from GR4AD's (16384, 4096, 1024) at 24.5M ads; the wide level is our choice.
  """
  v2 = 2 ** max(0, round(math.log2(math.sqrt(2.7 * num_ads / 4))))
  v1, v2 = min(4 * v2, num_ads), min(v2, num_ads)
  match config.last_level:
    case "suffix":
      return v1, v2, 0
    case "quantised":
      return v1, v2, min(num_ads, max(16, v2 // 4))
  return v1, v2, max(16, 4 * v2 if "ad_id" in config.hash_columns else v2 // 4)


def assign_semantic_ids(
  logs: Logs,
  embeddings: LogEmbeddings,
  config: TokenizerConfig,
  *,
  mesh: Mesh | None = None,
  resume_path: Path | None = None,
  progress: Callable | None = None,
) -> SemanticIds:
  """Codes every ad, and every content that stands for an ad or has an embedding.

  The quantizer is fitted on the ads' embeddings alone. A content that promotes an ad takes the ad's
  codes; another one with an embedding takes the quantizer's codes and the hash of its content id.

  Args:
    logs: ads and contents.
    embeddings: of these logs.
    config: quantizer, sizes, last level, seed.
    mesh: devices to fit on; None = one.
    resume_path: file for the state of an interrupted fit; None keeps none.
    progress: called as `progress(iterable, description, total)` on the long steps.

  Returns:
    Codes of ads and contents; the same input gives the same codes.

  Raises:
    ValueError: sizes or embeddings that do not work.
  """
  sizes = config.codebook_sizes or default_sizes(len(logs.ads.ad_id), config)
  num_quantised = config.num_quantised(len(sizes))
  functions = _functions(config)
  resume = None
  if resume_path is not None:
    key = fingerprint(dataclasses.asdict(config), sizes, embeddings.ad_AD)
    resume = ResumeFile(resume_path, key)
  arrays = functions.fit(
    embeddings.ad_AD, sizes[:num_quantised], seed=config.seed, mesh=mesh, resume=resume,
    progress=progress,
  )
  codes_AL = _with_last_level(
    functions.encode(arrays, embeddings.ad_AD, mesh=mesh),
    {name: getattr(logs.ads, name) for name in HASH_COLUMNS},
    config,
    size=sizes[-1],
    held_codes_AL=np.empty((0, len(sizes)), np.int32),
  )
  if config.last_level == "suffix" and not config.codebook_sizes:
    # Twice the largest number, so that new ads find room.
    sizes = (*sizes[:-1], max(16, 2 << int(codes_AL[:, -1].max()).bit_length()))
  content_codes_OL = np.full((len(logs.contents.content_id), len(sizes)), -1, np.int32)
  rows = embeddings.content_rows
  if len(rows):
    content_codes_OL[rows, :num_quantised] = functions.encode(
      arrays, embeddings.content_ND, mesh=mesh
    )
    if config.last_level != "quantised":
      ids = logs.contents.content_id[rows]
      content_codes_OL[rows, -1] = hash_codes([ids], size=sizes[-1], seed=config.seed)
  promotes_O = logs.contents.ad >= 0
  content_codes_OL[promotes_O] = codes_AL[logs.contents.ad[promotes_O]]
  if resume is not None:
    resume.remove()
  return SemanticIds(
    codes_AL, content_codes_OL, sizes, arrays, config, name_rows(logs), embeddings.encoder_file
  )


def code_new_ads(
  sids: SemanticIds,
  embedding_ND: np.ndarray,
  columns: Mapping[str, np.ndarray],
  *,
  held_codes_AL: np.ndarray | None = None,
  mesh: Mesh | None = None,
) -> np.ndarray:
  """Semantic IDs of ads that were not there when the quantizer was fitted.

  Args:
    sids: fitted on other ads.
    embedding_ND: [N, D] float, from the encoder that the quantizer was fitted on.
    columns: hash column -> [N] values; those of the config's hash_columns are needed.
    held_codes_AL: codes that are taken (a suffix counts on from them, past its codebook where none
      is left in it); None = those of `sids`.
    mesh: devices; None = one.

  Returns:
    [N, L] int32.

  Raises:
    ValueError: the embeddings do not fit, or a column is missing.
  """
  code_NL = _functions(sids.config).encode(sids.quantizer_arrays, embedding_ND, mesh=mesh)
  return _with_last_level(
    code_NL, columns, sids.config,
    size=0 if sids.config.last_level == "suffix" else sids.codebook_sizes[-1],
    held_codes_AL=sids.codes_AL if held_codes_AL is None else held_codes_AL,
  )


def _with_last_level(code_NL, columns, config, *, size, held_codes_AL) -> np.ndarray:
  """Quantised codes and, unless it is quantised too, the last one."""
  match config.last_level:
    case "hash":
      missing = [name for name in config.hash_columns if name not in columns]
      if missing:
        raise ValueError(f"columns: {', '.join(missing)} missing, needed by hash_columns")
      values = [columns[name] for name in config.hash_columns]
      last_N = hash_codes(values, size=size, seed=config.seed)
    case "suffix":
      last_N = _suffixes(code_NL, held_codes_AL)
      if size and len(last_N) and last_N.max() >= size:
        n = int(last_N.argmax())
        raise ValueError(
          f"codebook_sizes: the last level has {size} codes, but {last_N[n] + 1} ads share the"
          f" codes {tuple(code_NL[n].tolist())} (row {n}); give it {last_N[n] + 1} or more"
        )
    case _:
      return code_NL
  return np.column_stack([code_NL, last_N]).astype(np.int32)


def _suffixes(prefix_NL: np.ndarray, held_codes_AL: np.ndarray) -> np.ndarray:
  """Numbers that continue after the highest one held in each prefix, in row order."""
  num_held = len(held_codes_AL)
  both = np.concatenate([held_codes_AL[:, :-1], prefix_NL])
  _, group = np.unique(both, axis=0, return_inverse=True)
  group = group.reshape(-1)
  next_G = np.zeros(group.max() + 1, np.int64)
  np.maximum.at(next_G, group[:num_held], held_codes_AL[:, -1] + 1)
  group_N = group[num_held:]
  order_N = np.argsort(group_N, kind="stable")
  count_G = np.bincount(group_N, minlength=len(next_G))
  rank_N = np.empty(len(group_N), np.int64)
  rank_N[order_N] = np.arange(len(group_N)) - np.repeat(np.cumsum(count_G) - count_G, count_G)
  return next_G[group_N] + rank_N


def save(sids: SemanticIds, folder: str | os.PathLike) -> None:
  """Writes codes.npz, config.json and health.json; the folder appears, or is replaced, whole."""
  with atomic.new_folder(Path(folder)) as fresh:
    np.savez(
      fresh / "codes.npz",
      codes_AL=sids.codes_AL,
      content_codes_OL=sids.content_codes_OL,
      codebook_sizes=np.array(sids.codebook_sizes, np.int64),
      of_rows=np.array(sids.of_rows),
      encoder_file=np.array(sids.encoder_file),
      **{_OF_QUANTIZER + name: array for name, array in sids.quantizer_arrays.items()},
    )
    text = json.dumps(dataclasses.asdict(sids.config), indent=2)
    (fresh / "config.json").write_text(text + "\n", encoding="utf-8")
    if sids.health is not None:
      storage.write_json(fresh / "health.json", sids.health)


def load(folder: str | os.PathLike) -> SemanticIds:
  """Reads what `save` wrote.

  Raises:
    ValueError: the folder holds no semantic IDs, or damaged ones.
  """
  folder = Path(folder)
  for name in ("codes.npz", "config.json"):
    if not (folder / name).is_file():
      raise ValueError(f"{folder}: no {name} here; make semantic IDs with `gr4ad tokenize`")
  file = folder / "config.json"
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    config = TokenizerConfig(**fields)
    file, health = folder / "health.json", None
    if file.exists():
      health = json.loads(file.read_text(encoding="utf-8"))
    file = folder / "codes.npz"
    with file.open("rb") as raw, np.load(raw) as arrays:  # NumPy leaves damaged ones open
      return SemanticIds(
        codes_AL=arrays["codes_AL"],
        content_codes_OL=arrays["content_codes_OL"],
        codebook_sizes=tuple(int(size) for size in arrays["codebook_sizes"]),
        quantizer_arrays={
          # Folders written before there was more than one quantizer name centroids alone.
          name.removeprefix(_OF_QUANTIZER): arrays[name]
          for name in arrays.files
          if name.startswith((_OF_QUANTIZER, "centroids_"))
        },
        config=config,
        **{name: str(arrays[name]) for name in ("of_rows", "encoder_file") if name in arrays.files},
        health=health,
      )
  except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
          zlib.error) as error:
    raise ValueError(
      f"{file}: not readable ({error}); make semantic IDs again with `gr4ad tokenize --overwrite`"
    ) from None
