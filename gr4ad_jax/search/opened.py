"""A trained run, opened: what evaluation, serving and export take, whatever system trained it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from gr4ad_jax.catalog.catalog import ContextMaker
from gr4ad_jax.catalog.prepared import Prepared
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.generator import Generator
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.task import count_params


@dataclasses.dataclass(frozen=True)
class Opened(Prepared):
  """A run folder with its data and parameters.

  Attributes:
    system: that trained it, as run.json names it.
    model: a sentence on it, for people.
    folder: of the run.
    data: folder that `gr4ad prepare` wrote.
    config: every setting of the run, a nested dataclass.
    search: the part of it that searches.
    contexts: histories -> what the model reads.
    bin_means: mean value of each value bucket, currency.
    value_of: what expected values are of: one "impression" of the ad (the log has eCPM), or one
      "engagement" with it.
    generator: the model.
    read_params: () -> float32 parameters that the folder holds now, and their step.
    params, step: of the moment of opening.
    mesh: devices of this host that share a search; None = one.
    history_tables: what an artifact reads raw histories with, beside logs and examples.
    held_out: splits of the data that these parameters have not learned from.
    unscorable: why the splits of the data tell nothing of these parameters; "" = they do.
  """

  system: str
  model: str
  folder: Place
  data: Place
  config: Any
  search: SearchConfig
  contexts: ContextMaker
  bin_means: Sequence[float]
  generator: Generator
  read_params: Callable[[], tuple[Any, int]]
  params: Any
  step: int
  mesh: Mesh | None = None
  value_of: Literal["impression", "engagement"] = "engagement"
  history_tables: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  held_out: tuple[str, ...] = ("validation", "test")
  unscorable: str = ""

  @property
  def num_params(self) -> int:
    """Numbers in all parameters."""
    return count_params(self.params)

  def recommender(
    self, search: SearchConfig | None = None, *, with_value: bool = False
  ) -> Recommender:
    """The run's search, on the devices of this host.

    Args:
      search: None = the run's own settings.
      with_value: compute expected values even where they do not rank.
    """
    return Recommender(
      self.generator, self.params, index=self.index, config=search or self.search,
      bin_means=self.bin_means, with_value=with_value, mesh=self.mesh,
    )
