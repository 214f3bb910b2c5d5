"""The course of stage 3: push after push, candidates are made and then learned from.

A push is a training of its own up to the next one, in the same folder and by the same schedule. So
one that is stopped anywhere goes on to the same bits: from its last checkpoint, with the candidates
that lie in its folder, or with those made again from the parameters of the push's own step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.ad_index import AdIndex
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.pipeline import read_ahead
from gr4ad_jax.gpr.asked import TrainingRequests
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.candidates import (
  Candidates,
  FinalValue,
  ListBatches,
  Pricer,
  fit_final_value,
  make_candidates,
  read_push,
  write_push,
)
from gr4ad_jax.gpr.config import Config
from gr4ad_jax.gpr.policy import PolicyBatch
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import kept_step, read_params
from gr4ad_jax.training.train_step import TrainState


def read_final_value(workdir: Place) -> FinalValue | None:
  """By what a run measures its rewards; None before its first push."""
  file = workdir / "candidates" / "scale.json"
  if not storage.exists(file):
    return None
  return FinalValue(**config_lib.read_values(storage.fetch(file)))


@dataclasses.dataclass(frozen=True)
class Pushes:
  """Candidates of a run.

  Attributes:
    workdir: of the run.
    config: its settings.
    make_batch: contexts, and which codes lead on.
    index: SIDs and their ads.
    pricer: the simulator or the reward model.
    requests: that candidates are made for.
    searcher: the run's search, whose parameters are exchanged.
  """

  workdir: Place
  config: Config
  make_batch: BatchMaker
  index: AdIndex
  pricer: Pricer
  requests: TrainingRequests
  searcher: Recommender

  def candidates(self, push: int, params: Callable[[], Any]) -> Candidates:
    """Of a push: as they lie in the folder, or made, and stored, with its parameters."""
    found = read_push(self.workdir, push)
    if found is None:
      found = make_candidates(
        self.searcher.with_params(params()), self.pricer, self.requests,
        make_batch=self.make_batch, index=self.index, config=self.config, push=push,
      )
      write_push(found, self.workdir, push)
    return found

  def final_value(self, start_params: Any) -> FinalValue:
    """By what rewards are measured: by the candidates of the first push."""
    if (value := read_final_value(self.workdir)) is None:
      first = self.candidates(0, lambda: start_params)
      value = fit_final_value(first, self.config.policy.rate_alpha)
      storage.write_json(
        self.workdir / "candidates" / "scale.json", dataclasses.asdict(value)
      )
    return value

  def train(
    self, task: Task, value: FinalValue, *, start_params: Any, logged: grain.MapDataset,
    train_until: Callable[[grain.DatasetIterator, int], TrainState],
  ) -> TrainState:
    """Learns from one push after another, to the last step.

    Args:
      task: of the policy.
      value: by what rewards are measured.
      start_params: of step 0.
      logged: batches of logged labels, by the number of the step.
      train_until: (batches, step) -> the state after that step, from the last checkpoint on.
    """
    train, every = self.config.training, self.config.policy.push_every
    step = self._step()

    @functools.lru_cache(maxsize=2)
    def lists(push: int) -> ListBatches:
      # Where the newest checkpoint cannot be read, steps of the push before it are taken again.
      found = read_push(self.workdir, push)
      if found is None:
        raise ConfigError(f"{self.workdir}: the candidates of push {push} are gone")
      return ListBatches(found, value, self.make_batch, self.requests, self.config, push)

    while True:
      push = min(step, train.num_steps - 1) // every

      def params(push: int = push) -> Any:
        if push == 0:
          return start_params
        found, at = read_params(task, train, self.workdir, newest=True)
        if at != push * every:
          raise ConfigError(
            f"{self.workdir}: the candidates of step {push * every} are gone, and so are its "
            "parameters; train a new run"
          )
        return found

      self.candidates(push, params)
      until = min((push + 1) * every, train.num_steps)
      batches = grain.MapDataset.range(until).map(
        lambda at: PolicyBatch(logged[at], lists(at // every)(at))
      )
      state = train_until(read_ahead(batches), until)
      if int(state.step) < until or until == train.num_steps:  # gave up, or is done
        return state
      step = int(state.step)

  def _step(self) -> int:
    """Of the newest checkpoint; 0 before the first one."""
    try:
      return kept_step(self.workdir, newest=True)
    except ConfigError:
      return 0
