"""Baselines of a split: tuned on validation requests, asked for all targets and for new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import ExampleSet, read_split
from gr4ad_jax.data.interactions import Interactions
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.transitions import content_terms
from gr4ad_jax.evaluation.baseline_settings import BaselineSettings
from gr4ad_jax.evaluation.baseline_tuning import tune_baselines
from gr4ad_jax.evaluation.baselines import cooccurrence, own_history, popularity
from gr4ad_jax.evaluation.counter import counter
from gr4ad_jax.evaluation.question import Question, end_s_of_users
from gr4ad_jax.evaluation.rule import rule, trending
from gr4ad_jax.evaluation.trees import is_installed as trees_are_installed
from gr4ad_jax.evaluation.trees import trees
from gr4ad_jax.machine import extras
from gr4ad_jax.machine.progress import console
from gr4ad_jax.search.baseline import Baseline
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.ranking import EvalRequests

BASELINES: tuple[Callable[[Question, BaselineSettings], np.ndarray], ...] = (
  popularity, cooccurrence, own_history, counter, rule, trending
)


@dataclass(frozen=True)
class Rivals:
  """What stands beside a model on one split.

  Attributes:
    settings: as they were chosen for all targets.
    lists: name -> ranked_RK, int32 [R, k] for every request of the split. The names are those of
      BASELINES (no trending where no time is real) and, where LightGBM is installed and times are
      real, trees; trees_likeness, the same with one more feature, where it was asked for.
    prospecting_settings: as they were chosen for new targets; None where validation has none.
    prospecting: name -> ranked_RK without what was seen; {} where there are no such settings.
  """

  settings: BaselineSettings
  lists: dict[str, np.ndarray]
  prospecting_settings: BaselineSettings | None
  prospecting: dict[str, np.ndarray]

  def beside(self, trained: TrainedLists) -> Rivals:
    """The same with the lists of trained runs."""
    prospecting = self.prospecting and self.prospecting | trained.prospecting
    return replace(self, lists=self.lists | trained.lists, prospecting=prospecting)


class TrainedLists(NamedTuple):
  """Lists of trained runs for a split, by the name of the row: as those of `Rivals`."""

  lists: dict[str, np.ndarray]
  prospecting: dict[str, np.ndarray]


def rank_all(question: Question, settings: BaselineSettings) -> dict[str, np.ndarray]:
  """The lists of all baselines by name; trending ads where the settings have some."""
  wanted = [b for b in BASELINES if b is not trending or settings.trending is not None]
  return {baseline.__name__: baseline(question, settings) for baseline in wanted}


def find_simple(
  logs: Logs, examples: ExampleSet, requests: EvalRequests, *, k: int
) -> dict[str, np.ndarray]:
  """The lists of BASELINES for all targets, tuned as by `find_rivals`; its other arguments."""
  asked, horizon_s = _asked(logs, examples, k)
  console.print("baselines: choosing their settings on validation requests")
  settings = tune_baselines(asked, horizon_s=horizon_s)
  return rank_all(replace(asked, requests=requests), settings)


def _asked(logs: Logs, examples: ExampleSet, k: int) -> tuple[Question, int | None]:
  """What chooses settings: validation requests; and how far trending ads look back at the most."""
  config = examples.config
  by_time = config.split == "time"
  validation = eval_requests(group_requests(read_split(examples, "validation")))
  history = Interactions.of(logs)
  asked = Question(
    history, validation, len(logs.ads.ad_id), k, content_AN=content_terms(logs.ads),
    train_end_s=config.validation_start_s if by_time else end_s_of_users(history, validation, None),
  )
  return asked, int(logs.events.time_s.max()) + 1 - config.test_start_s if by_time else None


def find_rivals(
  logs: Logs, examples: ExampleSet, requests: EvalRequests, *, k: int,
  with_validation: bool = False, with_likeness: bool = False,
) -> Rivals:
  """Tunes the baselines on validation requests, then ranks for `requests`.

  Counts over users come from the training period, as a model's parameters do (leave-one-out: each
  user's events before the validating request), but for trending ads, which follow the days; a
  user's own history, as the model's context, goes up to the request.

  Args:
    logs: of the data.
    examples: cut from them.
    requests: of the split that is judged.
    k: length of the lists.
    with_validation: counts take in the validation period, as the parameters of a refit do.
    with_likeness: trees are also trained with the likeness that a copy path reads, which takes as
      long again.
  """
  asked, horizon_s = _asked(logs, examples, k)
  config, history, validation = examples.config, asked.interactions, asked.requests
  console.print("baselines: choosing their settings on validation requests")
  settings = tune_baselines(asked, horizon_s=horizon_s)
  judged = replace(asked, requests=requests)
  if with_validation:
    by_time = config.split == "time"
    end_s = config.test_start_s if by_time else end_s_of_users(history, requests, None)
    judged = replace(judged, train_end_s=end_s)
  lists = rank_all(judged, settings)
  training = training_of_trees(examples)
  kinds = {"trees": None}
  if with_likeness and examples.tastes is not None:
    kinds["trees_likeness"] = examples.tastes
  if training is not None:
    lists |= {
      name: trees(judged, training, validation, logs.ads, tastes) for name, tastes in kinds.items()
    }
  if not validation.new_RC.any():
    return Rivals(settings, lists, None, {})
  console.print("baselines without what a user has seen: choosing their settings")
  asked, judged = (replace(question, without_seen=True) for question in (asked, judged))
  prospecting_settings = tune_baselines(asked, horizon_s=horizon_s, known=settings)
  prospecting = rank_all(judged, prospecting_settings)
  if training is not None and training.new_RC.any():
    prospecting |= {
      name: trees(judged, training, validation, logs.ads, tastes) for name, tastes in kinds.items()
    }
  return Rivals(settings, lists, prospecting_settings, prospecting)


def rank_trained(
  runs: Sequence[Baseline], groups: Sequence[Sequence[Example]], logs: Logs, *, k: int, split: str
) -> TrainedLists:
  """The lists of trained runs, for all targets and without what users had seen.

  Args:
    runs: that have learned from the same data.
    groups: the requests, each as its examples.
    logs: say what users had seen.
    k: length of the lists.
    split: that the requests are of.

  Raises:
    ConfigError: two of them are of one system, and would have one row; or one has learned from the
      split.
  """
  names = [run.name for run in runs]
  if twice := next((name for name in names if names.count(name) > 1), None):
    raise ConfigError(f"two baseline runs of {twice}: one of each system can stand in the table")
  if learned := next((run.name for run in runs if split not in run.held_out), None):
    raise ConfigError(f"the run of {learned} has learned from the {split} split; --split test")
  examples, seen = [group[0] for group in groups], SeenAds(logs)
  for name in names:
    console.print(f"baselines: ranking by {name}")
  return TrainedLists(
    {run.name: run.rank(examples, k, None) for run in runs},
    {run.name: run.rank(examples, k, seen) for run in runs},
  )


def training_of_trees(examples: ExampleSet) -> EvalRequests | None:
  """The requests that trees learn from; None, and a line why, where there can be no trees."""
  if examples.config.split != "time":
    return None  # their features are of days
  if not trees_are_installed():
    console.print(f"baselines: no boosted trees; they need LightGBM, {extras.install('trees')}")
    return None
  return eval_requests(group_requests(read_split(examples, "train")))
