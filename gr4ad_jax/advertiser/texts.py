"""Histories as tokens: lines of a stream, prompts, names; packed rows of training.

Dimension key beyond docs/architecture.md: `T` tokens of a packed row, `P` its labels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.advertiser.histories import Rows
from gr4ad_jax.advertiser.prepared import Prepared
from gr4ad_jax.advertiser.weights import LanguageModel
from gr4ad_jax.config import ConfigError


class Text(NamedTuple):
  """One text: its tokens, and where the next token is to be told."""

  token_T: list[int]
  label_P: list[int]  # places t whose next token, t + 1, is a label


class Batch(NamedTuple):
  """B packed rows of training."""

  token_BT: np.ndarray  # int32
  position_BT: np.ndarray  # int32, from the begin of each text
  segment_BT: np.ndarray  # int32, number of the text in its row; -1 = padding
  label_BP: np.ndarray  # int32, places whose next token is to be told; -1 = none


class Speller:
  """Advertisers and histories of one data set in the tokens of one model.

  Names and titles are made tokens apart from each other: joined to a colon some would be cut in
  other places, and a name would have two spellings.
  """

  def __init__(self, data: Prepared, model: LanguageModel, *, max_tokens: int):
    """Encodes every name and title once.

    Args:
      data: prepared.
      model: gives the tokenizer.
      max_tokens: of a text with the name that follows it.

    Raises:
      ConfigError: a line cannot end with one token, or no text fits beside the longest name.
    """
    self.data, self.max_tokens = data, max_tokens
    (self._line_end,) = self._single(model, "\n")
    colon = self._single(model, ":")
    self._prompt = data.config.form == "prompt"
    self.end = model.eos if self._prompt else colon[0]
    self.name_A = [model.encode(name) for name in data.name_A]
    self._title_N = [model.encode(f" {title}") if title else [] for title in data.title_N]
    self._encode = functools.lru_cache(maxsize=1 << 16)(model.encode)
    self.room = max_tokens - max(map(len, self.name_A)) - 1
    if self.room < 8:
      raise ConfigError(
        f"model.max_tokens={max_tokens}: the longest name alone has {max_tokens - self.room - 1} "
        "tokens"
      )

  @staticmethod
  def _single(model: LanguageModel, text: str) -> list[int]:
    found = model.encode(text)
    if len(found) != 1:
      raise ConfigError(f"{model.name}: writes {text!r} as {len(found)} tokens, must be one")
    return found

  def line(self, item: int) -> list[int]:
    """`brand: title` and the end of the line."""
    name = self.name_A[self.data.advertiser_N[item]]
    return [*name, self.end, *self._title_N[item], self._line_end]

  def stream(self, items: Sequence[int]) -> Text:
    """A stream of lines, oldest first; its labels are all names but the first, ends included."""
    tokens, labels = [self._line_end], []
    for number, item in enumerate(items):
      name = len(self.name_A[self.data.advertiser_N[item]])
      if number:
        # The end of the line before tells the name's first token, and so on to its end.
        labels += range(len(tokens) - 1, len(tokens) + name)
      tokens += self.line(item)
    return Text(tokens, labels)

  def pieces(self, items: Sequence[int]) -> list[Text]:
    """A stream as texts that fit; each begins with the last line of the one before.

    So every name but the first is told once, unless two lines alone do not fit.
    """
    found, at = [], 0
    while at < len(items) - 1:
      end, left = at, self.max_tokens - 1
      while end < len(items) and (left := left - len(self.line(items[end]))) >= 0:
        end += 1
      if end - at > 1:
        found.append(self.stream(items[at:end]))
        at = end - (end < len(items))
      else:
        at += 1
    return found

  def _fitting(self, items: Sequence[int], room: int) -> list[int]:
    kept, left = [], room - 1
    for item in reversed(list(items)):
      left -= len(self.line(item))
      if left < 0:
        break
      kept.append(item)
    return kept[::-1]

  def known(self, split: str, rows: Rows, row: int) -> list[int]:
    """Tokens before the name that a row asks for: its history's lines, or its prompt.

    Raises:
      ConfigError: a prompt does not fit.
    """
    if not self._prompt:
      items = self._fitting(rows.item_E[rows.history(row)].tolist(), self.room)
      return [self._line_end, *(token for item in items for token in self.line(item))]
    tokens = [*self._encode(self.data.prompts[split][row]), self._line_end]
    if len(tokens) > self.room:
      raise ConfigError(
        f"model.max_tokens={self.max_tokens}: a prompt has {len(tokens)} tokens, {self.room} fit; "
        "prepare with fewer --prompt-chars"
      )
    return tokens

  def asked(self, split: str, rows: Rows, row: int) -> Text:
    """A row with the name it asks for as its only label."""
    known, name = self.known(split, rows, row), self.name_A[rows.target_R[row]]
    tokens = [*known, *name, self.end]
    return Text(tokens, list(range(len(known) - 1, len(tokens) - 1)))

  def training(self) -> list[Text]:
    """What a training reads: all streams, or all prompts with a label."""
    rows = self.data.splits["train"]
    if self._prompt:
      return [self.asked("train", rows, row) for row in range(len(rows))]
    streams = self.data.streams
    return [
      text for row in range(len(streams))
      for text in self.pieces(streams.item_E[streams.history(row)].tolist())
    ]

  def validation(self) -> list[Text]:
    """Rows of validation with their labels, as they will be asked."""
    rows = self.data.splits["validation"]
    return [self.asked("validation", rows, row) for row in np.flatnonzero(rows.target_R >= 0)]


def pack(texts: Sequence[Text], max_tokens: int) -> list[list[Text]]:
  """Texts that share rows of `max_tokens`: the longest first, each where it leaves least room.

  Args:
    texts: none of them longer than that.
    max_tokens: T.
  """
  rows: list[list[Text]] = []
  of_room: list[list[int]] = [[] for _ in range(max_tokens + 1)]  # rows with so much room left
  for number in sorted(range(len(texts)), key=lambda n: (-len(texts[n].token_T), n)):
    size = len(texts[number].token_T)
    room = next((room for room in range(size, max_tokens + 1) if of_room[room]), None)
    if room is None:
      room = max_tokens
      of_room[room].append(len(rows))
      rows.append([])
    at = of_room[room].pop()
    rows[at].append(texts[number])
    of_room[room - size].append(at)
  return rows


class BatchMaker(NamedTuple):
  """Packed rows -> batches of one shape."""

  max_tokens: int
  max_labels: int

  def __call__(self, rows: Sequence[Sequence[Text]]) -> Batch:
    """A batch; padding looks at itself alone and tells nothing."""
    shape = len(rows), self.max_tokens
    token_BT, position_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segment_BT = np.full(shape, -1, np.int32)
    label_BP = np.full((len(rows), self.max_labels), -1, np.int32)
    for b, texts in enumerate(rows):
      at, told = 0, 0
      for number, text in enumerate(texts):
        here = slice(at, at + len(text.token_T))
        token_BT[b, here] = text.token_T
        position_BT[b, here] = np.arange(len(text.token_T))
        segment_BT[b, here] = number
        label_BP[b, told : told + len(text.label_P)] = np.array(text.label_P) + at
        at, told = here.stop, told + len(text.label_P)
    return Batch(token_BT, position_BT, segment_BT, label_BP)


def batch_maker(packed: Sequence[Sequence[Text]], max_tokens: int) -> BatchMaker:
  """The maker of batches whose labels all fit."""
  return BatchMaker(max_tokens, max(sum(len(t.label_P) for t in row) for row in packed))
