"""Held-out requests to rank ads for, with what their users engaged with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.data.example_records import to_example
from gr4ad_jax.data.examples import ExampleSet
from gr4ad_jax.data.pipeline import pad
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.search.ranking import EvalRequests


def group_requests(examples: Sequence[Example]) -> list[list[Example]]:
  """Examples of one request (its targets may be split over several), in order of appearance."""
  groups: dict[int, list[Example]] = {}
  for example in examples:
    groups.setdefault(example.request, []).append(example)
  return list(groups.values())


def sample_requests(examples: ExampleSet, split: str, *, most: int) -> list[list[Example]]:
  """A fixed sample of the requests of a split, with all their examples; a larger one holds it.

  Only the sample is kept in memory.
  """
  source = examples.sources[split]
  request_N = np.array([record["request"] for record in source], np.int64)
  drawn = np.random.default_rng(0).permutation(np.unique(request_N))[:most]
  rows = np.flatnonzero(np.isin(request_N, drawn)).tolist()
  return group_requests([to_example(source[row], SPLITS.index(split)) for row in rows])


def eval_requests(groups: Sequence[Sequence[Example]]) -> EvalRequests:
  """Targets of every request as padded arrays."""
  width = max(sum(len(e.target_C) for e in group) for group in groups)

  def padded(name: str, fill: float, dtype) -> np.ndarray:
    rows = [np.concatenate([getattr(e, name) for e in group]) for group in groups]
    return pad(rows, width, fill=fill, dtype=dtype)

  return EvalRequests(
    np.array([g[0].user for g in groups], np.int32),
    np.array([g[0].time_s for g in groups], np.int64),
    padded("target_C", -1, np.int32), padded("value_C", 0, np.float32), padded("new_C", 0, bool),
  )
