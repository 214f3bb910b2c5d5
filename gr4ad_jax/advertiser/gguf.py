"""GGUF files: metadata and tensors of a language model, as float32.

Own reader of the five types that these files hold here, so that a hundred lines stand for a
package.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # numbers that share a scale


class GgufError(ValueError):
  """A file that is none, or that holds what is not read here; the message names it."""


@dataclasses.dataclass(frozen=True)
class Gguf:
  """An opened file.

  Attributes:
    metadata: name -> number, text or list.
    tensors: name -> float32 array, the last axis the one that a product sums over; read when asked.
  """

  metadata: dict[str, Any]
  tensors: dict[str, Callable[[], np.ndarray]]


class _Cursor:
  """Reads values one after another."""

  def __init__(self, data: np.ndarray):
    self._data, self.at = data, 0

  def take(self, size: int) -> bytes:
    if self.at + size > len(self._data):
      raise EOFError
    self.at += size
    return self._data[self.at - size : self.at].tobytes()

  def scalar(self, code: str) -> Any:
    return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

  def text(self) -> str:
    return self.take(self.scalar("Q")).decode(errors="replace")

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.text()
    if kind == _ARRAY:
      of, count = self.scalar("I"), self.scalar("Q")
      if of in _SCALARS:
        size = struct.calcsize(f"<{_SCALARS[of]}")
        return list(struct.unpack(f"<{count}{_SCALARS[of]}", self.take(count * size)))
      return [self.value(of) for _ in range(count)]
    return self.scalar(_SCALARS[kind])


def read_gguf(file: Path) -> Gguf:
  """Opens a file; tensors stay on the disk until they are asked for.

  Raises:
    GgufError: no GGUF file, cut short, or of another version.
  """
  try:
    data = np.memmap(file, np.uint8, mode="r")
  except (OSError, ValueError) as error:
    raise GgufError(f"{file}: not readable ({type(error).__name__})") from None
  cursor = _Cursor(data)
  try:
    if cursor.take(4) != b"GGUF" or (version := cursor.scalar("I")) not in (2, 3):
      raise GgufError(f"{file}: no GGUF file of version 2 or 3")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_values):
      name = cursor.text()
      metadata[name] = cursor.value(cursor.scalar("I"))
    places = []
    for _ in range(num_tensors):
      name, dims = cursor.text(), cursor.scalar("I")
      shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
      places.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
  except (EOFError, KeyError, struct.error):
    raise GgufError(f"{file}: is damaged or cut short") from None
  del version
  align = metadata.get("general.alignment", 32)
  start = -(-cursor.at // align) * align
  tensors = {}
  for name, shape, kind, offset in places:
    if kind not in _TYPES:
      raise GgufError(f"{file}: tensor {name} is of type {kind}; read are {sorted(_TYPES)}")
    size, decode = _TYPES[kind]
    begin, end = start + offset, start + offset + size(math.prod(shape))
    if end > len(data):
      raise GgufError(f"{file}: is cut short before the end of {name}")
    tensors[name] = _reader(data, begin, end, decode, shape)
  return Gguf(metadata, tensors)


def _reader(data, begin: int, end: int, decode, shape) -> Callable[[], np.ndarray]:
  return lambda: decode(np.asarray(data[begin:end])).reshape(shape)


def _scales(blocks: np.ndarray, at: int) -> np.ndarray:
  """float32 [N, 1] from two bytes of each block."""
  return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _q4_1(raw: np.ndarray) -> np.ndarray:
  """d q + m, q of 4 bits: the low halves of 16 bytes, then the high ones."""
  blocks = raw.reshape(-1, 20)
  q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
  return _scales(blocks, 0) * q + _scales(blocks, 2)


def _q4_0(raw: np.ndarray) -> np.ndarray:
  """d (q - 8)."""
  blocks = raw.reshape(-1, 18)
  q = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
  return _scales(blocks, 0) * (q - 8)


def _q8_0(raw: np.ndarray) -> np.ndarray:
  """d q, q of 8 bits with sign."""
  blocks = raw.reshape(-1, 34)
  return _scales(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


# Type -> bytes of so many numbers, and bytes -> numbers.
_TYPES: dict[int, tuple[Callable[[int], int], Callable[[np.ndarray], np.ndarray]]] = {
  0: (lambda n: 4 * n, lambda raw: raw.view(np.float32)),
  1: (lambda n: 2 * n, lambda raw: raw.view(np.float16).astype(np.float32)),
  2: (lambda n: n // _BLOCK * 18, _q4_0),
  3: (lambda n: n // _BLOCK * 20, _q4_1),
  8: (lambda n: n // _BLOCK * 34, _q8_0),
}
