"""Embeddings on disk by the content of their text, so that interrupted work goes on.

A folder for each encoder holds part files; a part is written whole and never changed, so that a
killed process loses at most the part it was at, and several processes may write at once.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gr4ad_jax.machine import atomic
from gr4ad_jax.training.resume import fingerprint

KEY_BYTES = 16
TEXTS_PER_PART = 2048


def encoder_identity(name: str, params: Mapping[str, Any], *, max_tokens: int) -> str:
  """The name of an encoder's folder: what an embedding depends on beside its text.

  Args:
    name: of the encoder.
    params: a tree of arrays; its contents are part of the identity.
    max_tokens: where texts are cut.
  """
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
  return f"{name}-{max_tokens}-{fingerprint(*leaves)}"


def cached_encode(
  texts: Sequence[str],
  encode_fn: Callable[[list[str]], np.ndarray],
  *,
  folder: Path | None,
  identity: str,
  texts_per_part: int = TEXTS_PER_PART,
  progress: Callable | None = None,
) -> np.ndarray:
  """Embeds texts; only those that the cache does not hold are encoded, equal ones once.

  Args:
    texts: N strings, at least one.
    encode_fn: some of the texts -> [n, D] float32; called with texts of similar length.
    folder: of the cache; None = no cache.
    identity: of the encoder (`encoder_identity`), the name of its folder in `folder`.
    texts_per_part: texts encoded between two writes.
    progress: called as `progress(parts, description, total)`; None shows nothing.

  Returns:
    [N, D] float32.

  Raises:
    ValueError: no text, texts_per_part below 1, or encode_fn gives another number of rows.
  """
  if not len(texts):
    raise ValueError("texts: at least one text is needed")
  if texts_per_part < 1:
    raise ValueError(f"texts_per_part: {texts_per_part}, must be >= 1")
  distinct: dict[str, int] = {}
  row_N = np.array([distinct.setdefault(text, len(distinct)) for text in texts])
  distinct_texts = list(distinct)
  part_folder = None if folder is None else Path(folder) / identity
  vector_UD, found_U = _look_up(part_folder, distinct_texts)
  # By length, so that what is encoded together has one shape; the order is by content alone.
  missing = sorted(
    np.flatnonzero(~found_U).tolist(), key=lambda u: (len(distinct_texts[u]), distinct_texts[u])
  )
  parts = [missing[i : i + texts_per_part] for i in range(0, len(missing), texts_per_part)]
  if progress is not None and parts:
    parts = progress(parts, description=f"embed ({texts_per_part} texts a part)", total=len(parts))
  for part in parts:
    part_texts = [distinct_texts[u] for u in part]
    part_ND = np.asarray(encode_fn(part_texts), np.float32)
    if part_ND.ndim != 2 or len(part_ND) != len(part):
      raise ValueError(f"encode_fn: shape {part_ND.shape} for {len(part)} texts, expected [n, D]")
    if vector_UD is None or vector_UD.shape[1] != part_ND.shape[1]:
      vector_UD = np.empty((len(distinct_texts), part_ND.shape[1]), np.float32)
    vector_UD[part] = part_ND
    if part_folder is not None:
      _write_part(part_folder, _keys(part_texts), part_ND)
  return vector_UD[row_N]


def _keys(texts: Sequence[str]) -> np.ndarray:
  """uint8 [n, 16], a hash of the content of each text."""
  digests = (hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest() for text in texts)
  return np.frombuffer(b"".join(digests), np.uint8).reshape(len(texts), KEY_BYTES)


def _look_up(folder: Path | None, texts: list[str]) -> tuple[np.ndarray | None, np.ndarray]:
  """Embeddings of the distinct texts and which of them the cache holds; None where it is empty."""
  found_U, vector_UD = np.zeros(len(texts), bool), None
  if folder is None or not folder.is_dir():
    return None, found_U
  text_of_key = {key.tobytes(): u for u, key in enumerate(_keys(texts))}
  for keys, vectors in _read_parts(folder):
    wanted = [(n, text_of_key.get(key.tobytes())) for n, key in enumerate(keys)]
    wanted = [(n, u) for n, u in wanted if u is not None]
    if not wanted:
      continue
    row_M, text_M = np.array(wanted).T
    if vector_UD is None:
      vector_UD = np.empty((len(texts), vectors.shape[1]), np.float32)
    if vector_UD.shape[1] == vectors.shape[1]:
      vector_UD[text_M] = vectors[row_M]
      found_U[text_M] = True
  return vector_UD, found_U


def _read_parts(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Keys and vectors of each part; a damaged one is deleted, and what it held encoded again."""
  for file in sorted(folder.glob("*.npz")):
    try:
      with file.open("rb") as raw, np.load(raw) as arrays:  # NumPy leaves damaged ones open
        keys, vectors = arrays["keys"], arrays["vectors"]
    except FileNotFoundError:
      continue
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
      keys, vectors = np.empty(0), np.empty(0)
    is_whole = (
      keys.dtype == np.uint8
      and vectors.dtype == np.float32
      and keys.shape == (*vectors.shape[:1], KEY_BYTES)
      and vectors.ndim == 2
      and np.isfinite(vectors).all()
    )
    if is_whole:
      yield keys, vectors
    else:
      file.unlink(missing_ok=True)


def _write_part(folder: Path, keys: np.ndarray, vectors: np.ndarray) -> None:
  """Named by its keys: two processes that encode the same texts replace each other's part."""
  with atomic.new_file(folder / f"{fingerprint(keys)}.npz") as out:
    np.savez(out, keys=keys, vectors=vectors)
