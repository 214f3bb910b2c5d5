"""What one segment of a log gives to learn from: its samples, lists of candidates, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.list_records import CandidateList
from gr4ad_jax.data.pipeline import hash_ids
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.segments import Appended
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.trending import build_trending
from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.batch_maker import BatchMaker
from gr4ad_jax.gr4ad.list_batches import ListBatchMaker
from gr4ad_jax.gr4ad.run import Inputs
from gr4ad_jax.gr4ad.segment_queue import Learned
from gr4ad_jax.gr4ad.unified_task import UnifiedBatch

MAX_JUDGED = 20  # batches that tell the loss before and after learning


class Segment(NamedTuple):
  """What is learned from one segment."""

  file: Path
  number: int  # of segments learned from before
  appended: Appended  # the logs with it
  maker: ExampleMaker  # of its requests
  examples: list[Example]
  make_batch: BatchMaker  # with the users of these logs, and what is trending by their end
  lists: list[CandidateList]
  learned: Learned  # what is remembered of the file

  @property
  def newest_s(self) -> int:
    """Time of the newest event."""
    return int(self.appended.logs.events.time_s.max())

  @property
  def has_views(self) -> bool:
    """Whether the segment tells what was shown and not clicked."""
    events = self.appended.logs.events
    views_E = (events.ad >= 0) & (events.action == Action.IMPRESSION)
    return bool((views_E & self.appended.new_R[events.request]).any())


def open_segment(file: Path, number: int, appended: Appended, inputs: Inputs) -> Segment:
  """The samples of a segment, made as those of the run's data; without lists.

  Args:
    file: of the segment.
    number: of segments learned from before.
    appended: the logs with it.
    inputs: of the run that goes on learning.
  """
  logs, examples, make_batch = appended.logs, inputs.examples, inputs.make_batch
  split_R = np.where(appended.new_R, 0, -1).astype(np.int8)
  maker = ExampleMaker(logs, examples.config, split_R=split_R, vocabulary=examples.features)
  users = np.unique(logs.events.user[appended.new_R[logs.events.request]]).tolist()
  samples = [example for user in users for example in maker.user_examples(user, 0)]
  if make_batch.user_hash_U is not None:  # users may be new
    make_batch = dataclasses.replace(make_batch, user_hash_U=hash_ids(logs.users.user_id))
  if make_batch.trending is not None:
    make_batch = dataclasses.replace(make_batch, trending=build_trending(logs))
  return Segment(file, number, appended, maker, samples, make_batch, [], Learned(None, None))


def step_batches(
  segment: Segment, make_lists: ListBatchMaker | None, *, seed: int, size: int, passes: int,
  lists_per_step: int,
) -> Iterator[Batch | UnifiedBatch]:
  """Every sample `passes` times, beside it the lists in turn; the same ones for a seed and segment.

  Args:
    segment: with samples and lists.
    make_lists: pads lists; None = samples alone.
    seed: of the orders.
    size: samples a step.
    passes: over the samples, each in another order.
    lists_per_step: where the segment has no list, so many that weigh nothing.
  """
  rng = np.random.default_rng([seed, segment.number])
  turn = _endless(len(segment.lists), rng)
  for _ in range(passes):
    order = rng.permutation(len(segment.examples))
    for at in range(0, len(order), size):
      logged = _batch(segment, order[at : at + size], size)
      if make_lists is None:
        yield logged
        continue
      chosen = [_no_list(segment.examples[0], logged)] * lists_per_step
      if segment.lists:
        chosen = [segment.lists[next(turn)] for _ in range(lists_per_step)]
      yield UnifiedBatch(logged, make_lists(chosen))


def judged_batches(segment: Segment, size: int) -> list[Batch]:
  """At most MAX_JUDGED batches of the segment's samples, evenly spread."""
  count = len(segment.examples)
  picked = np.linspace(0, count - 1, min(count, MAX_JUDGED * size)).astype(int)
  return [_batch(segment, picked[at : at + size], size) for at in range(0, len(picked), size)]


def _batch(segment: Segment, picked: Sequence[int], size: int) -> Batch:
  """A batch of some samples, filled up with ones that have no target and weigh nothing."""
  rows = [segment.examples[i] for i in picked]
  first = rows[0]
  empty = dataclasses.replace(
    first, target_C=first.target_C[:0], action_C=first.action_C[:0], value_C=first.value_C[:0],
    ecpm_C=first.ecpm_C[:0], new_C=first.new_C[:0],
  )
  return segment.make_batch(rows + [empty] * (size - len(rows)))


def _no_list(context: Example, batch: Batch) -> CandidateList:
  levels, nothing = batch.target_BCL.shape[-1], np.zeros(0, np.float32)
  return CandidateList(
    context, nothing.astype(np.int32), nothing, np.zeros((0, levels), np.float32),
    nothing.astype(bool), nothing.astype(np.int8),
  )


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
  while count:
    yield from rng.permutation(count).tolist()
