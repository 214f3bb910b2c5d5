"""Embeddings of the ads and contents of a log: pretrained, fine-tuned, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from gr4ad_jax.data.records import AdTable, Logs
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.tokenizer.rows import check_embeddings, first_bad_row
from gr4ad_jax.tokenizer.text_encoder import encode_texts

Encoder = Literal["wordllama", "minilm", "uae", "given"]
ENCODERS: tuple[Encoder, ...] = get_args(Encoder)


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
  logs: Logs, encode: Callable[[list[str]], np.ndarray], ad_text_A: np.ndarray,
  content_text_O: np.ndarray,
) -> LogEmbeddings:
  """Embeds the texts of ads and of the contents that are not an ad's product.

  Args:
    logs: tells which contents promote an ad.
    encode: texts -> unit rows; a text that ads and contents share comes once.
    ad_text_A: [A] strings.
    content_text_O: [O] strings; blank = the content gets no embedding.
  """
  has_text_O = np.array([bool(text.strip()) for text in content_text_O], bool)
  content_rows = np.flatnonzero((logs.contents.ad < 0) & has_text_O)
  embedding_ND = encode([*ad_text_A, *content_text_O[content_rows]])
  num_ads = len(ad_text_A)
  return LogEmbeddings(embedding_ND[:num_ads], content_rows, embedding_ND[num_ads:])


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
    raise NotImplementedError
  return text_embeddings(
    logs, lambda texts: encode_texts(texts, encoder, progress=progress), logs.ads.text,
    logs.contents.text,
  )
