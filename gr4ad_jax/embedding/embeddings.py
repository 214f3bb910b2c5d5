"""Embeddings of the ads and contents of a log: pretrained, fine-tuned, or the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.records import AdTable, Logs
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.embedding.ad_text import ad_inputs, content_inputs
from gr4ad_jax.embedding.cache import encoder_identity
from gr4ad_jax.embedding.config import Encoder
from gr4ad_jax.embedding.cooccurrence import swing_pairs, training_interactions
from gr4ad_jax.embedding.rows import check_embeddings, first_bad_row
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


def given_embeddings(ads: AdTable, file: Path | None) -> LogEmbeddings:
  """The user's own: a .npy file [num_ads, D] in the order of the ads table, or its column.

  Contents have none, so only those that promote an ad get codes.

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
    try:
      embedding_AD = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
      raise LogError(f"{file}: not readable as .npy ({error})") from None
    if embedding_AD.ndim != 2 or len(embedding_AD) != len(ads.ad_id):
      raise LogError(
        f"{file}: shape {embedding_AD.shape}, expected [{len(ads.ad_id)}, D], one row for each row"
        " of the ads table"
      )
  try:
    check_embeddings(embedding_AD)
  except ValueError as error:
    raise LogError(f"{name}: {error}") from None
  bad = first_bad_row(embedding_AD, nonzero=True)
  if bad is not None:
    raise LogError(
      f"{name}: row {bad} (ad_id {ads.ad_id[bad]}) is all zeros and has no direction; give it an"
      " embedding or leave the ad out"
    )
  norm_A1 = np.linalg.norm(embedding_AD, axis=-1, keepdims=True)
  return LogEmbeddings(
    (embedding_AD / norm_A1).astype(np.float32), np.empty(0, np.int64),
    np.empty((0, embedding_AD.shape[1]), np.float32),
  )


def text_embeddings(
  logs: Logs,
  encode: Callable[[list[str]], np.ndarray],
  ad_text_A: Sequence[str],
  content_text_O: Sequence[str],
) -> LogEmbeddings:
  """Embeds the texts of ads, and of the contents that have a text and are not an ad's product.

  Args:
    logs: tells which contents these are.
    encode: texts -> unit rows.
    ad_text_A: [A] what stands for each ad.
    content_text_O: [O] what stands for each content.
  """
  has_text_O = np.array([bool(text.strip()) for text in logs.contents.text], bool)
  content_rows = np.flatnonzero((logs.contents.ad < 0) & has_text_O)
  # One call, so that a text that ads and contents share is encoded once.
  embedding_ND = encode([*ad_text_A, *np.asarray(content_text_O, object)[content_rows]])
  num_ads = len(ad_text_A)
  return LogEmbeddings(embedding_ND[:num_ads], content_rows, embedding_ND[num_ads:])


def unified_embeddings(
  logs: Logs,
  encoder: BertEncoder,
  config: UaeConfig | None = None,
  *,
  folder: Path | None = None,
  train_E: np.ndarray | None = None,
  seed: int = 0,
  progress: Callable | None = None,
) -> LogEmbeddings:
  """Fine-tunes a sentence encoder on a log and embeds the log with it.

  Args:
    logs: the log.
    encoder: where the fine-tuning starts.
    config: of the fine-tuning; None = the defaults.
    folder: keeps the tuned parameters and the embeddings, by what they were made of, and the state
      of an interrupted fine-tuning; None = nothing is kept.
    train_E: bool [E], events that may be learned from; None = all.
    seed: of the fine-tuning.
    progress: called as `progress(iterable, description, total)`; None shows nothing.

  Source: GR4AD (arXiv 2602.22732) 3.1, unified advertisement embedding.
  """
  config = UaeConfig() if config is None else config
  pairs = swing_pairs(
    *training_interactions(logs, train_E), num_items=len(logs.ads.ad_id), progress=progress
  )
  inputs_A = ad_inputs(logs.ads)
  options = {"encoder": encoder, "config": config, "seed": seed, "progress": progress}
  if folder is None:
    params = fine_tune(logs.ads, pairs, **options)
  else:
    key = fingerprint(
      encoder_identity(encoder.name, encoder.params, max_tokens=config.max_tokens),
      dataclasses.asdict(config), seed, list(inputs_A), pairs.item_P, pairs.neighbour_P,
      pairs.score_P,
    )
    file = folder / f"uae-{key}.npz"
    if file.exists():
      params = load_params(file, encoder=encoder)
    else:
      resume = ResumeFile(folder / f"uae-{key}.resume.npz", key)
      params = fine_tune(logs.ads, pairs, resume=resume, **options)
      save_params(file, params, encoder=encoder)
      resume.remove()
  return text_embeddings(
    logs,
    lambda texts: embed_inputs(
      texts, encoder, params=params, max_tokens=config.max_tokens, cache=folder, progress=progress
    ),
    inputs_A, content_inputs(logs.contents),
  )


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
  """Embeds a log's ads and contents.

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
  if encoder == "uae":
    return unified_embeddings(
      logs, load_minilm(), folder=folder, train_E=train_E, seed=seed, progress=progress
    )
  if encoder == "minilm":
    minilm = load_minilm()

    def encode(texts):
      return embed_inputs(
        [text if text.strip() else BLANK_TEXT for text in texts], minilm, max_tokens=MAX_TOKENS,
        cache=folder, progress=progress,
      )

  else:

    def encode(texts):
      return encode_texts(texts, encoder)

  return text_embeddings(logs, encode, logs.ads.text, logs.contents.text)


def open_encoder(
  encoder: Encoder, *, folder: Path | None = None
) -> Callable[[AdTable], np.ndarray]:
  """What embeds ads that come later, as `embed` embedded the log's.

  Args:
    encoder: as given to `embed`.
    folder: as given to `embed`; holds the fine-tuned parameters of "uae".

  Returns:
    A function: ads -> float32 [N, D] unit rows; it raises ValueError where encoder "given" meets
    an ad without embedding.

  Raises:
    ValueError: not exactly one fine-tuned encoder in the folder.
  """
  if encoder == "given":
    return lambda ads: given_embeddings(ads, None).ad_AD
  if encoder == "wordllama":
    return lambda ads: encode_texts(ads.text, "wordllama")
  minilm, params, inputs, max_tokens = load_minilm(), None, lambda ads: ads.text, MAX_TOKENS
  if encoder == "uae":
    tuned = [p for p in folder.glob("uae-*.npz") if not p.name.endswith(".resume.npz")]
    if len(tuned) != 1:
      raise ValueError(f"{folder}: {len(tuned)} fine-tuned encoders (uae-*.npz), needs one")
    params, inputs = load_params(tuned[0], encoder=minilm), ad_inputs
    max_tokens = UaeConfig().max_tokens
  return lambda ads: embed_inputs(
    [text if text.strip() else BLANK_TEXT for text in inputs(ads)], minilm, params=params,
    max_tokens=max_tokens,
  )
