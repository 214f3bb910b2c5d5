"""Trained runs as baselines: one that searches as a row, one without semantic IDs by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.catalog.prepared import PreparedLogs
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.evaluation.evaluate import DEPTH, judged, search_split
from gr4ad_jax.evaluation.rivals import find_rivals, rank_trained
from gr4ad_jax.machine.storage import Place, write_json
from gr4ad_jax.search.baseline import Baseline
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.opened import Opened


def as_baseline(opened: Opened) -> Baseline:
  """A run that searches, as a row beside others; its lists are at most DEPTH long.

  Raises:
    ConfigError: the splits tell nothing of the run.
  """
  if opened.unscorable:
    raise ConfigError(f"{opened.folder}: {opened.unscorable}")
  recommender = opened.recommender()

  def rank(examples: Sequence[Example], k: int, seen: SeenAds | None) -> np.ndarray:
    groups = [[example] for example in examples]
    result = search_split(recommender, opened.contexts, groups, opened.search, seen=seen)
    return result.recommendations.ad_RK[:, :k]

  return Baseline(opened.system, rank, opened.held_out)


def evaluate_baseline(
  run: Baseline,
  data: PreparedLogs,
  folder: Place,
  *,
  split: str = "test",
  bootstrap: int = 1000,
  baselines: Sequence[Baseline] = (),
) -> dict[str, float]:
  """Evaluates a run without semantic IDs as `evaluate` does others; writes FOLDER/metrics.json.

  Args:
    run: what is judged.
    data: that it was trained on.
    folder: of the run.
    split, bootstrap, baselines: as of `evaluate`.

  Returns:
    The metrics.
  """
  logs, groups = data.logs, group_requests(read_split(data.examples, split))
  requests = eval_requests(groups)
  ours, others = (
    rank_trained(runs, groups, logs, k=DEPTH, split=split) for runs in ([run], baselines)
  )
  rivals = find_rivals(
    logs, data.examples, requests, k=DEPTH, with_validation="validation" not in run.held_out
  ).beside(others)
  metrics = judged(
    ours.lists[run.name], ours.prospecting[run.name], rivals.lists, rivals.prospecting, requests,
    advertiser_A=np.unique(logs.ads.advertiser_id, return_inverse=True)[1], bootstrap=bootstrap,
  )
  metrics = {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
  write_json(folder / "metrics.json", metrics)
  return metrics
