"""How well searches with a training's parameters find what held-out requests engaged with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gr4ad_jax.catalog.catalog import ContextMaker
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.machine import distributed
from gr4ad_jax.search.held_out import eval_requests
from gr4ad_jax.search.ranking import mean_metrics
from gr4ad_jax.search.recommender import Recommender, concatenate

DEPTH = 50


class Judge:
  """Parameters -> recall@50, ndcg@50 and value_recall@50; the search is compiled once.

  The settings of the search are those of its users: its value exponent and bonus count.
  """

  def __init__(
    self,
    recommender: Callable[[Any], Recommender],
    contexts: ContextMaker,
    groups: Sequence[Sequence[Example]],
    *,
    batch_size: int,
  ):
    """Makes the contexts of this process's share of the requests; compiles nothing yet.

    Args:
      recommender: the search with these parameters, numpy arrays; called once.
      contexts: histories -> what the model reads.
      groups: the requests, each as its examples.
      batch_size: requests of a search.
    """
    self._make, self._recommender = recommender, None
    self._requests = eval_requests(groups)
    share = distributed.share_of(len(groups), batch_size)
    mine = [groups[min(i, len(groups) - 1)][0] for i in share]
    self._contexts = [
      contexts.context(mine[at : at + batch_size]) for at in range(0, len(mine), batch_size)
    ]

  def __call__(self, params: Any) -> dict[str, float]:
    """The metrics, the same on every process; all of them have to ask.

    Args:
      params: of a training, on any devices of any processes; they stay as they are.
    """
    params = distributed.whole(params)
    self._recommender = (
      self._make(params) if self._recommender is None else self._recommender.with_params(params)
    )
    found = concatenate([self._recommender(context, DEPTH) for context in self._contexts])
    ad_RK = distributed.gather(found.ad_RK, len(self._requests.user_R))
    return mean_metrics(ad_RK, self._requests, k=DEPTH)
