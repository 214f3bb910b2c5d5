"""Records on disk: ArrayRecord shards that TFDS reads, shuffled by a hash of the records' keys.

Records come in runs, each sorted by hash; a shard takes a range of hashes from every run. So
several processes can make runs, and shards, without knowing of each other. The order of all records
follows from their keys alone, however many runs and shards there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import track

SHARD_BYTES = 1 << 26  # of serialized records, which are sorted in memory
VERSION = "1.0.0"  # of every dataset: TFDS wants one

Every = Callable[[Callable[[int], object], int, str], None]
"""Calls a function with 0 to count - 1, in any process; the string says what that does."""


def write_run(file: Path, split: str, records: Iterable[tuple[str, bytes]]) -> None:
  """Writes some records of a split, sorted by the hash of their keys.

  Args:
    file: appears when it is complete.
    split: its name.
    records: keys, different in the whole split, and serialized records.
  """
  # The hash is the one that TFDS's own writer sorts by: earlier data have the same order. Half of
  # its bits will do; of equal halves the smaller record comes first.
  hashed = sorted(
    (int.from_bytes(hashlib.md5((split + key).encode()).digest()[:8]), record)
    for key, record in records
  )
  table = pa.table({
    "hash": pa.array([number for number, _ in hashed], pa.uint64()),
    "record": pa.array([record for _, record in hashed], pa.large_binary()),
  })
  with atomic.new_file(file) as out, pa.ipc.new_file(out, table.schema) as writer:
    writer.write_table(table)


class ShardWriter(NamedTuple):
  """Writes one shard of a split; goes to other machines as it is.

  Not to a fork of this process: ArrayRecord's threads would be missing there once this process has
  read a file of it.

  Attributes:
    runs: files that `write_run` wrote, all of the split.
    prefix: of the shards' names.
    num_shards: shards of the split.
  """

  runs: Sequence[Path]
  prefix: Path
  num_shards: int

  def file(self, number: int) -> Path:
    """Where a shard lies."""
    return Path(f"{self.prefix}.array_record-{number:05d}-of-{self.num_shards:05d}")

  def __call__(self, number: int) -> None:
    """Gathers a shard from all runs."""
    edges = [(n << 64) // self.num_shards for n in range(1, self.num_shards)]
    hashed = []
    for run in self.runs:
      table = pa.ipc.open_file(pa.memory_map(str(run))).read_all()
      bounds = np.searchsorted(table["hash"].to_numpy(), np.array(edges, np.uint64))
      begin, end = [0, *bounds, len(table)][number : number + 2]
      mine = table.slice(begin, end - begin)
      hashed += zip(mine["hash"].to_pylist(), mine["record"].to_pylist(), strict=True)
    with atomic.new_file(self.file(number)) as out:  # a Beam runner may do a shard twice
      writer = ArrayRecordWriter(out.name, "group_size:1")  # any record can be read alone
      for _, record in sorted(hashed):
        writer.write(record)
      writer.close()


def one_by_one(function: Callable[[int], object], count: int, what: str) -> None:
  """An `Every` that stays in this process."""
  for number in track(range(count), what):
    function(number)


def write_dataset(
  folder: Path, runs: dict[str, Path], features: dict, *, description: str,
  every: Every = one_by_one,
) -> dict[str, int]:
  """Writes a dataset that `open_dataset`, and `tfds.builder_from_directory`, open.

  Args:
    folder: where it goes; its name is that of the dataset.
    runs: split -> the folder of its runs.
    features: what a record consists of.
    description: one line for who looks at the files.
    every: writes the shards.

  Returns:
    Records of each split.
  """
  home, splits = folder / VERSION, []
  for split, of_split in runs.items():
    files = sorted(of_split.glob("[!.]*"))
    num_shards = max(1, sum(file.stat().st_size for file in files) // SHARD_BYTES)
    write = ShardWriter(files, home / f"{folder.name}-{split}", num_shards)
    every(write, num_shards, f"shards ({split})")
    shards = [write.file(number) for number in range(num_shards)]
    splits.append(tfds.core.SplitInfo(
      name=split, num_bytes=sum(file.stat().st_size for file in shards),
      shard_lengths=[ArrayRecordReader(str(file)).num_records() for file in shards],
    ))
  tfds.folder_dataset.write_metadata(
    data_dir=str(home), features=features, split_infos=splits, check_data=False,
    description=description,
  )
  return {split.name: split.num_examples for split in splits}


def open_dataset(folder: Path, *, remedy: str) -> dict[str, Records]:
  """Random access to the records of every split of what `write_dataset` wrote.

  Args:
    folder: of the dataset.
    remedy: what to do where it is damaged, for messages.

  Raises:
    LogError: a file is missing, cut or damaged.
  """
  home = folder / VERSION
  try:
    builder = tfds.builder_from_directory(str(home))
    splits = dict(builder.info.splits)
  except Exception as error:  # TFDS has no error of its own for what it cannot read
    raise _damaged(home, error, remedy) from None
  opened = {}
  for name, split in splits.items():
    files = [Path(file) for file in split.filepaths]
    for file, length in zip(files, split.shard_lengths, strict=True):
      try:
        reader = ArrayRecordReader(str(file))
        found = reader.num_records()
        reader.close()
      except (RuntimeError, ValueError) as error:
        raise _damaged(file, error, remedy) from None
      if found != length:
        raise _damaged(file, f"{found:,} of {length:,} records", remedy)
    opened[name] = Records(
      builder.as_data_source(split=name), files, np.cumsum(split.shard_lengths), remedy
    )
  return opened


class Records(Sequence[dict]):
  """The records of a split; one that cannot be read is named by its file."""

  def __init__(
    self, source: Sequence[dict], files: Sequence[Path], ends: np.ndarray, remedy: str
  ):
    """`ends` [files] are the rows behind the last one of each file."""
    self._source, self._files, self._ends, self._remedy = source, files, ends, remedy

  def __len__(self) -> int:
    return len(self._source)

  def __iter__(self) -> Iterator[dict]:
    return (self[row] for row in range(len(self)))

  def __getitem__(self, row: int) -> dict:
    try:
      return self._source[row]
    except (RuntimeError, ValueError, TypeError) as error:
      if not -len(self) <= row < len(self):
        raise IndexError(row) from None
      number = int(np.searchsorted(self._ends, row % len(self), side="right"))
      raise _damaged(self._files[number], error, self._remedy) from None


def _damaged(file: Path, why: object, remedy: str) -> LogError:
  reason = " ".join(str(why).split())[:120] or "not readable"
  return LogError(f"{file}: missing or damaged ({reason}): {remedy}")
