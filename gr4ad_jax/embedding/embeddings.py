"""Embeddings of the ads and contents of a log: pretrained, fine-tuned, or the user's own."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gr4ad_jax.data.records import AdTable, ContentTable, Logs
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.embedding.ad_text import ad_inputs, content_inputs
from gr4ad_jax.embedding.cache import encoder_identity
from gr4ad_jax.embedding.config import Encoder
from gr4ad_jax.embedding.cooccurrence import swing_pairs, training_interactions
from gr4ad_jax.embedding.rows import as_float32, check_embeddings, first_bad_row, unit_rows
from gr4ad_jax.embedding.text_encoder import (
  BLANK_TEXT,
  MAX_TOKENS,
  BertEncoder,
  encode_texts,
  load_minilm,
)
from gr4ad_jax.embedding.uae import embed_inputs, fine_tune, load_params, save_params
from gr4ad_jax.embedding.uae_steps import UaeConfig
from gr4ad_jax.training.resume import ResumeFile, fingerprint


class LogEmbeddings(NamedTuple):
  """Unit rows of all ads, and of the contents that have a text but no ad."""

  ad_AD: np.ndarray  # float32
  content_rows: np.ndarray  # int64, rows of the content table
  content_ND: np.ndarray  # float32, one row for each of these
  encoder_file: str = ""  # name of the fine-tuned encoder's, where there is one in a folder


def given_embeddings(ads: AdTable, file: Path | None) -> LogEmbeddings:
  """The user's own: a .npy file [num_ads, D] in the order of the ads table, or its column.

  Contents have none, so only those that promote an ad get codes. Numbers of any real type count as
  the float32 numbers nearest to them. An .npz file holds one array.

  Raises:
    LogError: no such file or column, another number of rows, or a row without direction.
  """
  if file is None:
    name, embedding_AD = "ads, column embedding", ads.embedding_AD
    if embedding_AD is None:
      raise LogError(
        "ads: encoder 'given' needs the column `embedding`, which these logs lack, or --embeddings"
        " FILE.npy"
      )
  else:
    name = str(file)
    embedding_AD = _read_array(file)
    if embedding_AD.ndim != 2 or len(embedding_AD) != len(ads.ad_id):
      raise LogError(
        f"{file}: shape {embedding_AD.shape}, expected [{len(ads.ad_id)}, D], one row for each row"
        " of the ads table"
      )
  try:
    embedding_AD = as_float32(embedding_AD)
    check_embeddings(embedding_AD)
  except ValueError as error:
    raise LogError(f"{name}: {error}") from None
  bad = first_bad_row(embedding_AD, nonzero=True)
  if bad is not None:
    raise LogError(
      f"{name}: row {bad} (ad_id {ads.ad_id[bad]}) is all zeros and has no direction; give it an"
      " embedding or leave the ad out"
    )
  return LogEmbeddings(
    unit_rows(embedding_AD), np.empty(0, np.int64),
    np.empty((0, embedding_AD.shape[1]), np.float32),
  )


def _read_array(file: Path) -> np.ndarray:
  """The array of a .npy file, or the one array of an .npz file; errors as `given_embeddings`."""
  try:
    with file.open("rb") as raw:  # NumPy leaves damaged ones open
      found = np.load(raw, allow_pickle=False)
      if isinstance(found, np.ndarray):
        return found
      if len(found.files) != 1:
        names = ", ".join(found.files) or "none"
        raise LogError(f"{file}: holds {len(found.files)} arrays ({names}), must hold one")
      return found[found.files[0]]
  except LogError:
    raise
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise LogError(f"{file}: not readable as .npy or .npz ({error})") from None


class _Reader(NamedTuple):
  """How an encoder of texts reads ads and contents."""

  encode: Callable[[Sequence[str]], np.ndarray]  # texts -> unit rows
  of_ads: Callable[[AdTable], Sequence[str]]
  of_contents: Callable[[ContentTable], Sequence[str]]


def _plain_reader(encode: Callable[[Sequence[str]], np.ndarray]) -> _Reader:
  return _Reader(encode, lambda ads: ads.text, lambda contents: contents.text)


def _minilm_reader(
  minilm: BertEncoder, tuned: Mapping[str, Any] | None, folder: Path | None = None,
  progress: Callable | None = None,
) -> _Reader:
  """MiniLM as it is published reads texts; fine-tuned, it reads all fields of an ad in words."""
  max_tokens = MAX_TOKENS if tuned is None else UaeConfig().max_tokens

  def encode(texts: Sequence[str]) -> np.ndarray:
    return embed_inputs(
      [text if text.strip() else BLANK_TEXT for text in texts], minilm, params=tuned,
      max_tokens=max_tokens, cache=folder, progress=progress,
    )

  return _plain_reader(encode) if tuned is None else _Reader(encode, ad_inputs, content_inputs)


def _tuned_params(
  logs: Logs, minilm: BertEncoder, *, folder: Path | None, train_E: np.ndarray | None, seed: int,
  progress: Callable | None,
) -> tuple[dict[str, Any], str]:
  """MiniLM's parameters fine-tuned on a log, and their file's name in the folder ("" = none).

  The folder keeps them by what they were made of.

  It keeps the state of an interrupted fine-tuning, too.

  Source: GR4AD (arXiv 2602.22732) 3.1, unified advertisement embedding.
  """
  config = UaeConfig()
  pairs = swing_pairs(
    *training_interactions(logs, train_E), num_items=len(logs.ads.ad_id), progress=progress
  )
  options = {"encoder": minilm, "config": config, "seed": seed, "progress": progress}
  if folder is None:
    return fine_tune(logs.ads, pairs, **options), ""
  key = fingerprint(
    encoder_identity(minilm.name, minilm.params, max_tokens=config.max_tokens),
    dataclasses.asdict(config), seed, list(ad_inputs(logs.ads)), pairs.item_P, pairs.neighbour_P,
    pairs.score_P,
  )
  file = folder / f"uae-{key}.npz"
  if file.exists():
    return load_params(file, encoder=minilm), file.name
  resume = ResumeFile(folder / f"uae-{key}.resume.npz", key)
  params = fine_tune(logs.ads, pairs, resume=resume, **options)
  save_params(file, params, encoder=minilm)
  resume.remove()
  return params, file.name


def embed(
  logs: Logs,
  encoder: Encoder,
  *,
  file: Path | None = None,
  folder: Path | None = None,
  train_E: np.ndarray | None = None,
  seed: int = 0,
  progress: Callable | None = None,
) -> LogEmbeddings:
  """Embeds a log's ads, and its contents that have a text and are not an ad's product.

  Args:
    logs: the log.
    encoder: "wordllama" or "minilm" (pretrained, of the text alone), "uae" (MiniLM fine-tuned on
      this log's attributes and co-occurrences), or "given" (see `given_embeddings`).
    file: for "given".
    folder: where embeddings and fine-tuned parameters are kept for the next time; None = nowhere.
    train_E: bool [E], events that "uae" may learn from; None = all.
    seed: of the fine-tuning.
    progress: called as `progress(iterable, description, total)`; None shows nothing.

  Returns:
    Unit rows.

  Raises:
    LogError, ValueError: what the encoder needs is missing or invalid.
  """
  if encoder == "given":
    return given_embeddings(logs.ads, file)
  if file is not None:
    raise ValueError(f"embeddings: a file goes with encoder 'given', not with {encoder!r}")
  encoder_file = ""
  if encoder == "wordllama":
    reader = _plain_reader(lambda texts: encode_texts(texts, "wordllama"))
  else:
    minilm, tuned = load_minilm(), None
    if encoder == "uae":
      tuned, encoder_file = _tuned_params(
        logs, minilm, folder=folder, train_E=train_E, seed=seed, progress=progress
      )
    reader = _minilm_reader(minilm, tuned, folder, progress)
  has_text_O = np.array([bool(text.strip()) for text in logs.contents.text], bool)
  content_rows = np.flatnonzero((logs.contents.ad < 0) & has_text_O)
  ad_text_A = reader.of_ads(logs.ads)
  content_text_N = np.asarray(reader.of_contents(logs.contents), object)[content_rows]
  # One call, so that a text that ads and contents share is encoded once.
  embedding_ND = reader.encode([*ad_text_A, *content_text_N])
  num_ads = len(ad_text_A)
  return LogEmbeddings(
    embedding_ND[:num_ads], content_rows, embedding_ND[num_ads:], encoder_file
  )


def open_encoder(
  encoder: Encoder, *, folder: Path | None = None, file: str = ""
) -> Callable[[AdTable], np.ndarray]:
  """What embeds ads that come later, as `embed` embedded the log's.

  Args:
    encoder: as given to `embed`.
    folder: as given to `embed`; holds the fine-tuned parameters of "uae".
    file: their name there (`LogEmbeddings.encoder_file`); "" = the only ones.

  Returns:
    A function: ads -> float32 [N, D] unit rows; it raises ValueError where encoder "given" meets
    an ad without embedding.

  Raises:
    ValueError: no such file in the folder, or without a name not exactly one.
  """
  if encoder == "given":
    return lambda ads: given_embeddings(ads, None).ad_AD
  if encoder == "wordllama":
    return lambda ads: encode_texts(ads.text, "wordllama")
  minilm, params = load_minilm(), None
  if encoder == "uae":
    tuned = [p for p in folder.glob("uae-*.npz") if not p.name.endswith(".resume.npz")]
    if file:
      tuned = [p for p in tuned if p.name == file]
    if len(tuned) != 1:
      wanted = file or "uae-*.npz"
      raise ValueError(f"{folder}: {len(tuned)} fine-tuned encoders ({wanted}), needs one")
    params = load_params(tuned[0], encoder=minilm)
  reader = _minilm_reader(minilm, params)
  return lambda ads: reader.encode(reader.of_ads(ads))
