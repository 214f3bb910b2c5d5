"""An Example as it is stored, and back."""

from __future__ import annotations

import numpy as np
import tensorflow_datasets as tfds

from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.shortlist import NUM_COUNTS

_SCALARS = {
  "request": np.int32, "user": np.int32, "time_s": np.int64, "past_value": np.float32,
  "num_targets": np.int32,
}
_ARRAYS = {
  "feature_F": np.int32, "ad_T": np.int32, "ad_count_T": np.uint8, "ad_age_T": np.uint8,
  "organic_O": np.int32, "organic_count_O": np.uint8, "organic_age_O": np.uint8,
  "met_P": np.int32, "met_count_PH": np.float16,
  "target_C": np.int32, "action_C": np.int8, "value_C": np.float32, "ecpm_C": np.float32,
  "new_C": np.uint8,
}


def bytes_array(dtype, ndim: int = 1) -> tfds.features.Tensor:
  """A numpy array of any length, stored as raw bytes."""
  # Int lists of a protocol buffer take five times as long to read.
  return tfds.features.Tensor(
    shape=(None,) * ndim, dtype=dtype, encoding=tfds.features.Encoding.BYTES
  )


def example_features() -> dict:
  """What a stored Example consists of."""
  return _SCALARS | {name: bytes_array(dtype) for name, dtype in _ARRAYS.items()}


def to_record(example: Example) -> dict:
  """An `Example` as it is stored."""
  record = {name: getattr(example, name) for name in (*_SCALARS, *_ARRAYS)}
  # TFDS cannot store a table without rows.
  return record | {
    "new_C": example.new_C.astype(np.uint8), "met_count_PH": example.met_count_PH.ravel()
  }


def to_example(record: dict, split: int) -> Example:
  """A stored record as an `Example`."""
  scalars = {name: kind(record[name]).item() for name, kind in _SCALARS.items()}
  arrays = {name: record[name] for name in _ARRAYS} | {
    "new_C": record["new_C"].astype(bool),
    "met_count_PH": record["met_count_PH"].reshape(-1, NUM_COUNTS),
  }
  return Example(split=split, **scalars, **arrays)
