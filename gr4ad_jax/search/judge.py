"""How well searches with a training's parameters find what held-out requests engaged with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gr4ad_jax.catalog.catalog import ContextMaker
from gr4ad_jax.catalog.prepared import Prepared
from gr4ad_jax.catalog.targeting import Allowed
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.machine import distributed
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.generator import Generator
from gr4ad_jax.search.held_out import eval_requests, sample_requests
from gr4ad_jax.search.ranking import mean_metrics, only_new
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.mesh import search_mesh

DEPTH = 50


def judge_of(
  train: TrainConfig,
  search: SearchConfig,
  *,
  data: Prepared,
  contexts: ContextMaker,
  generator: Generator,
  bin_means: Sequence[float],
) -> Judge | None:
  """Judges parameters of a training by the run's own search; None where the loss alone decides.

  Args:
    train: what names the best checkpoint, and by how many validation requests.
    search: of the run; where it leaves out what users have seen, new targets alone count.
    data: that it learns from.
    contexts: histories -> what the model reads.
    generator: the model.
    bin_means: mean value of each bucket.

  Raises:
    ConfigError: value decides, and no validation request has any; or new targets do, and none is.
  """
  by = train.best_by
  if by == "loss":
    return None
  groups = sample_requests(data.examples, "validation", most=train.rank_requests)
  if by == "value_recall@50" and not any(e.value_C.any() for group in groups for e in group):
    raise ConfigError(f"train.best_by={by!r}: nothing in the validation requests has a value")
  if search.exclude_seen and not any(e.new_C.any() for group in groups for e in group):
    raise ConfigError(f"train.best_by={by!r}: no target of the validation requests is new to them")

  def recommender(params: Any) -> Recommender:
    return Recommender(
      generator, params, index=data.index, config=search, bin_means=bin_means,
      mesh=search_mesh(train, search.batch_size),
    )

  return Judge(
    recommender, contexts, groups, batch_size=search.batch_size,
    seen=SeenAds(data.logs) if search.exclude_seen else None,
  )


class Judge:
  """Parameters -> recall@50, ndcg@50 and value_recall@50; the search is compiled once.

  The settings of the search are those of its users: its value exponent counts, and where it leaves
  out what users have seen, new targets alone do.
  """

  def __init__(
    self,
    recommender: Callable[[Any], Recommender],
    contexts: ContextMaker,
    groups: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    seen: SeenAds | None = None,
  ):
    """Makes the contexts of this process's share of the requests; compiles nothing yet.

    Args:
      recommender: the search with these parameters, numpy arrays; called once.
      contexts: histories -> what the model reads.
      groups: the requests, each as its examples.
      batch_size: requests of a search.
      seen: leaves out what users had seen before each request; None = nothing.

    Raises:
      ValueError: no target is new to its user, and seen ones are left out.
    """
    self._make, self._recommender, self._seen = recommender, None, seen
    self._requests = eval_requests(groups)
    if seen is not None:
      groups = [group for group in groups if any(e.new_C.any() for e in group)]
      self._requests = only_new(self._requests)
    share = distributed.share_of(len(groups), batch_size)
    mine = [groups[min(i, len(groups) - 1)][0] for i in share]
    parts = (mine[at : at + batch_size] for at in range(0, len(mine), batch_size))
    self._batches = [(part, contexts.context(part)) for part in parts]

  def __call__(self, params: Any) -> dict[str, float]:
    """The metrics, the same on every process; all of them have to ask.

    Args:
      params: of a training, on any devices of any processes; they stay as they are.
    """
    params = distributed.whole(params)
    self._recommender = (
      self._make(params) if self._recommender is None else self._recommender.with_params(params)
    )
    ad_RK = np.concatenate([
      self._recommender(context, DEPTH, allowed=self._allowed(examples)).ad_RK
      for examples, context in self._batches
    ])
    ad_RK = distributed.gather(ad_RK, len(self._requests.user_R))
    return mean_metrics(ad_RK, self._requests, k=DEPTH)

  def _allowed(self, examples: Sequence[Example]) -> list[Allowed] | None:
    if self._seen is None:
      return None
    return [self._recommender.without(self._seen.before(e.user, e.time_s)) for e in examples]
