"""Examples -> batches: shuffled by grain, this host's rows, resumable; padding, look-up, hashes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.example_records import to_example
from gr4ad_jax.data.kept_rows import KeptRows
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.data.shortlist import AdFacts

_training_example = functools.partial(to_example, split=0)
_validation_example = functools.partial(to_example, split=1)


def hash_ids(ids: np.ndarray) -> np.ndarray:
  """int32 >= 0, the same for an id on every machine."""
  return (_digests(ids) >> 1).astype(np.int32)


def hash_buckets(ids: np.ndarray, num_buckets: int) -> np.ndarray:
  """int32 < num_buckets, the same for an id on every machine; trained models rely on both."""
  return (_digests(ids) % num_buckets).astype(np.int32)


def _digests(ids: np.ndarray) -> np.ndarray:
  digests = (hashlib.blake2b(str(i).encode(), digest_size=4).digest() for i in ids.tolist())
  return np.frombuffer(b"".join(digests), ">u4")


def pad(rows: list[np.ndarray], width: int, *, fill: float = -1, dtype=np.int32) -> np.ndarray:
  """Rows of up to `width` entries as one array."""
  padded = np.full((len(rows), width), fill, dtype)
  for i, row in enumerate(rows):
    padded[i, : len(row)] = row
  return padded


def ad_facts(ads: AdTable) -> AdFacts:
  """What shortlists need to know of ads."""
  parent_A = np.array([path.rpartition(" > ")[0] for path in ads.category], object)
  columns = (ads.advertiser_id, ads.category, parent_A, ads.text)
  keys = [hash_ids(column) for column in columns]
  return AdFacts(np.stack(keys, axis=1), np.nan_to_num(ads.price).astype(np.float32))


def look_up(table: np.ndarray, index: np.ndarray) -> np.ndarray:
  """table[index] with -1 where the index is -1; the table may have no rows."""
  if not len(table):
    return np.full((*index.shape, *table.shape[1:]), -1, np.int32)
  found = table[np.maximum(index, 0)]
  padding = index < 0
  return np.where(padding.reshape(padding.shape + (1,) * (found.ndim - index.ndim)), -1, found)


def train_batches(
  source: Any, make_batch: Callable[[Sequence[Any]], Any], *, read_threads: int = 2, **how: Any
) -> grain.DatasetIterator:
  """An endless, seeded iterator of the batches of `batch_dataset`, whose arguments it takes.

  Its `get_state()` goes into the checkpoint and `set_state()` continues at the very next batch.
  """
  return read_ahead(batch_dataset(source, make_batch, **how), read_threads)


def batch_dataset(
  source: Any,
  make_batch: Callable[[Sequence[Any]], Any],
  *,
  batch_size: int,
  seed: int,
  host: int = 0,
  num_hosts: int = 1,
  parse: Callable[[Any], Any] = _training_example,
) -> grain.MapDataset:
  """This host's share of every batch, by the number of the batch: dataset[n] is that of step n.

  Hosts read consecutive rows of one batch, so that any number of hosts makes the same batches.

  Args:
    source: random-access records of the training split.
    make_batch: rows -> a batch; padding and look-up.
    batch_size: rows over all hosts.
    seed: of the shuffle; each epoch has its own order.
    host, num_hosts: which rows of every batch this process reads.
    parse: a record of the source -> a row, an `Example` unless said otherwise.

  Raises:
    ValueError: the batch does not divide over the hosts, or is larger than the split.
  """
  if batch_size % num_hosts:
    raise ValueError(f"train.batch_size={batch_size}: must be a multiple of the {num_hosts} hosts")
  if len(source) < batch_size:
    raise ValueError(
      f"train.batch_size={batch_size}: larger than the {len(source)} training examples"
    )
  rows = batch_size // num_hosts
  order = grain.MapDataset.source(KeptRows(source, parse)).seed(seed).shuffle().repeat()

  def batch(number: int) -> Any:
    first = number * batch_size + host * rows
    return make_batch([order[first + row] for row in range(rows)])

  return grain.MapDataset.range(len(order) // batch_size).map(batch)


def validation_batches(
  source: Any,
  make_batch: Callable[[Sequence[Any]], Any],
  *,
  batch_size: int,
  most: int,
  host: int = 0,
  num_hosts: int = 1,
  parts: int = 1,
  parse: Callable[[Any], Any] = _validation_example,
) -> list[Any]:
  """The first batches of a split in its stored (shuffled) order.

  Args:
    source: random-access records of the split.
    make_batch: examples -> a batch.
    batch_size: rows over all hosts; fewer where the split is smaller.
    most: batches at the most.
    host, num_hosts: which rows of each batch this process reads.
    parts: rows of a batch are a multiple of this.
    parse: a record of the source -> a row, an `Example` unless said otherwise.

  Raises:
    ConfigError: the split has fewer rows than parts.
  """
  rows = min(batch_size, len(source) // parts * parts) // num_hosts
  if not rows:
    raise ConfigError(
      f"the validation split has {len(source)} examples, the batch is split over {parts} devices; "
      "take fewer with train.data_parallel"
    )
  batches = []
  for number in range(max(1, min(most, len(source) // (rows * num_hosts)))):
    first = (number * num_hosts + host) * rows
    records = [source[row] for row in range(first, first + rows)]
    batches.append(make_batch(list(map(parse, records))))
  return batches


def read_ahead(dataset: grain.MapDataset, read_threads: int = 2) -> grain.DatasetIterator:
  """An iterator whose position can be saved and restored; 0 threads read when asked to."""
  options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=4 * read_threads)
  return iter(dataset.to_iter_dataset(options))


def with_rows(x_AD: np.ndarray, row_N: np.ndarray, new_ND: np.ndarray) -> np.ndarray:
  """Other values in some rows; rows past the end follow without a gap."""
  num_rows = max(len(x_AD), int(row_N.max()) + 1)
  grown = np.concatenate([x_AD, np.zeros((num_rows - len(x_AD), *x_AD.shape[1:]), x_AD.dtype)])
  grown[row_N] = new_ND
  return grown


def repeat_last(x: np.ndarray, rows: int) -> np.ndarray:
  """Fills a batch up to `rows` by repeating its last row."""
  return x if len(x) == rows else np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])
