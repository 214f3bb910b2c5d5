"""Searches a split for every request and writes what a report needs.

    metrics.json     flat name -> number
    about.json       the data and how it was cut
    sid_health.json  tokenizer health
    samples.json     a few users with history, generated ads and what they then bought
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gr4ad_jax.catalog.catalog import ContextMaker
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.evaluation.rivals import Rivals, find_rivals, rank_trained
from gr4ad_jax.machine import distributed
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.search.baseline import Baseline
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.ranking import (
  EvalRequests,
  paired_difference,
  prospecting_metrics,
  ranking_metrics,
)
from gr4ad_jax.search.recommender import Recommendations, Recommender, concatenate
from gr4ad_jax.tokenizer import judge
from gr4ad_jax.tokenizer.health_verdicts import as_record
from gr4ad_jax.training.metric_log import read_log

DEPTH = 50
NUM_SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """Recommendations for the requests of a split, and how fast they came."""

  recommendations: Recommendations
  requests_per_second: float
  """After the first (compiling) batch; look-up, search and expansion included."""


def search_split(
  recommender: Recommender,
  contexts: ContextMaker,
  groups: Sequence[Sequence[Example]],
  config: SearchConfig,
  *,
  seen: SeenAds | None = None,
  k: int = DEPTH,
) -> SearchResult:
  """The k best ads for every request; each of several processes searches its share.

  Args:
    recommender: of the run.
    contexts: what its model reads.
    groups: the requests.
    config: of the search; whether seen ads are left out is not asked of it.
    seen: prospecting: leaves out what users had seen before each request; None = nothing.
    k: ads wanted.
  """
  batch_size = config.batch_size
  parts, seconds, counted = [], 0.0, 0
  share = distributed.share_of(len(groups), batch_size)
  mine = [groups[min(i, len(groups) - 1)][0] for i in share]
  starts = range(0, len(mine), batch_size)

  def found_for(examples: Sequence[Example]) -> Recommendations:
    allowed = None
    if seen is not None:
      allowed = [recommender.without(seen.before(e.user, e.time_s)) for e in examples]
    return recommender(contexts.context(examples), k, allowed=allowed)

  found_for(mine[:1])  # compiles
  for start in track(starts, "search, requests", len(mine), step=batch_size):
    begin = time.monotonic()
    parts.append(found_for(mine[start : start + batch_size]))
    seconds += time.monotonic() - begin
    counted += sum(i < len(groups) for i in share[start : start + batch_size])
  found = distributed.gather(concatenate(parts), len(groups))
  rates = distributed.gather(np.array([counted / seconds]), jax.process_count())
  return SearchResult(found, float(rates.sum()))


def prospecting_lists(
  recommender: Recommender, opened: Opened, groups: Sequence[Sequence[Example]]
) -> np.ndarray:
  """ranked_RK, int32 [R, DEPTH], without what users had seen; -1 where a request has no new target.

  Such requests are not searched: no metric of prospecting counts them.
  """
  ranked_RK = np.full((len(groups), DEPTH), -1, np.int32)
  rows = [row for row, group in enumerate(groups) if any(e.new_C.any() for e in group)]
  if rows:
    result = search_split(
      recommender, opened.contexts, [groups[row] for row in rows], opened.search,
      seen=SeenAds(opened.logs),
    )
    ranked_RK[rows] = result.recommendations.ad_RK
  return ranked_RK


def invalid_rate(result: Recommendations, codes_AL: np.ndarray) -> float:
  """Share of generated SIDs that no ad has, by a look-up independent of the search's tree."""
  existing = {tuple(row) for row in codes_AL.tolist()}
  found_RKL = result.code_RKL[result.ad_RK >= 0]
  if not len(found_RKL):
    return 0.0
  return float(np.mean([tuple(row) not in existing for row in found_RKL.tolist()]))


def require_held_out(opened: Opened, split: str) -> None:
  """Raises ConfigError where a run's parameters have learned from a split, or from later days."""
  if opened.unscorable:
    raise ConfigError(f"{opened.folder}: {opened.unscorable}")
  if split not in opened.held_out:
    raise ConfigError(
      f"{opened.folder}: has learned from the {split} split; --split test judges it"
    )


def evaluate(
  opened: Opened, *, split: str = "test", bootstrap: int = 1000, baselines: Sequence[Baseline] = ()
) -> dict[str, float]:
  """Evaluates a run against the simple baselines and writes the files above.

  Baselines are tuned on the validation split, so `split="validation"` flatters them.

  Args:
    opened: a trained run; the files go into its folder.
    split: "validation" or "test".
    bootstrap: resamples of users for the intervals.
    baselines: trained runs of the same data, which stand beside the simple ones.

  Returns:
    The metrics; {} where another process of this run has them.

  Raises:
    ConfigError: the parameters have learned from days that are not before the split.
  """
  require_held_out(opened, split)
  workdir, logs = opened.folder, opened.logs
  groups = group_requests(read_split(opened.examples, split))
  requests = eval_requests(groups)
  advertisers, advertiser_A = np.unique(logs.ads.advertiser_id, return_inverse=True)

  recommender = opened.recommender()
  result = search_split(recommender, opened.contexts, groups, opened.search)
  prospecting_RK = prospecting_lists(recommender, opened, groups)
  trained = rank_trained(baselines, groups, logs, k=DEPTH, split=split)
  if not distributed.is_first():
    distributed.wait_for_all("evaluated")
    return {}
  rivals = find_rivals(
    logs, opened.examples, requests, k=DEPTH, with_validation="validation" not in opened.held_out
  ).beside(trained)
  metrics = judged(
    result.recommendations.ad_RK, prospecting_RK, rivals.lists, rivals.prospecting, requests,
    advertiser_A=advertiser_A, bootstrap=bootstrap,
  )
  # As the tokenizer has measured it, with the embeddings, which are not here.
  health = (opened.sids.health or {}).get("metrics") or judge.health(logs, opened.sids)
  rates = [row["examples_per_second"] for row in read_log(workdir) if "examples_per_second" in row]
  metrics |= {
    "invalid_sid_rate": invalid_rate(result.recommendations, opened.sids.codes_AL),
    "decode_requests_per_second": result.requests_per_second,
    "train_examples_per_second": float(np.median(rates)) if rates else float("nan"),
    "num_params": opened.num_params,
    "sid_collision_rate": health["sid_collision_rate"],
    "num_requests": len(groups),
    "num_users": len(np.unique(requests.user_R)),
    "num_ads": len(advertiser_A),
    "checkpoint_step": opened.step,
  }
  metrics = {name: float(value) for name, value in metrics.items()}
  # JSON has no NaN: what cannot be measured (no new targets, no value) is left out.
  metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
  write_json(workdir / "about.json", _about(opened, advertisers, rivals, split))
  lines = judge.judge(opened.sids, health)
  write_json(workdir / "sid_health.json", as_record(health, lines))
  write_json(workdir / "samples.json", _samples(opened, groups))
  write_json(workdir / "metrics.json", metrics)
  distributed.wait_for_all("evaluated")
  return metrics


def judged(
  ranked_RK: np.ndarray | None,
  prospecting_RK: np.ndarray | None,
  lists: Mapping[str, np.ndarray],
  prospecting: Mapping[str, np.ndarray],
  requests: EvalRequests,
  *,
  advertiser_A: np.ndarray,
  bootstrap: int,
) -> dict[str, float]:
  """Metrics of both tasks, of every baseline and, where there are lists, of ours.

  Args:
    ranked_RK, prospecting_RK: lists of a model for either task; None = there are none.
    lists, prospecting: name -> those of the baselines.
    requests: R requests with their targets.
    advertiser_A: int, advertiser of every ad.
    bootstrap: resamples of users for the intervals.

  Returns:
    NAME of ours, baseline/ROW/NAME, difference/ROW/NAME: ours minus that baseline's, paired.
  """
  metrics: dict[str, float] = {}
  how = {"bootstrap": bootstrap}
  tasks = (
    ("all targets", ranking_metrics, ranked_RK, lists),
    ("prospecting", prospecting_metrics, prospecting_RK, prospecting),
  )
  for task, measure, ours_RK, of_rivals in tasks:
    all_lists = {} if ours_RK is None else {"": ours_RK}
    all_lists |= {f"baseline/{name}/": theirs for name, theirs in of_rivals.items()}
    rows = track(all_lists.items(), f"metrics and intervals, {task}", len(all_lists))
    for prefix, list_RK in rows:
      values = measure(list_RK, requests, advertiser_A=advertiser_A, ks=(10, DEPTH), **how)
      metrics |= {prefix + name: value for name, value in values.items()}
    for name, list_RK in of_rivals.items() if ours_RK is not None else ():
      differences = paired_difference(ours_RK, list_RK, requests=requests, k=DEPTH, **how)
      if task == "prospecting":  # where no other targets count
        differences = {
          key.replace("new/", "prospecting/"): value
          for key, value in differences.items() if key.startswith("new/")
        }
      metrics |= {f"difference/{name}/{key}": value for key, value in differences.items()}
  return metrics


def _about(
  opened: Opened, advertisers: np.ndarray, rivals: Rivals, split: str
) -> dict[str, Any]:
  logs = opened.logs
  return {
    "model": opened.model,
    "source": logs.source, "currency": logs.currency, "value_of": opened.value_of,
    "caveats": list(logs.caveats),
    "cleaning": logs.cleaning, "counts": opened.examples.counts,
    "num_users": len(logs.users.user_id), "num_ads": len(logs.ads.ad_id),
    "num_advertisers": len(advertisers), "num_events": len(logs.events.user),
    "split": opened.examples.config.split, "evaluated_split": split,
    "baseline_settings": dataclasses.asdict(rivals.settings),
    "prospecting_settings":
      rivals.prospecting_settings and dataclasses.asdict(rivals.prospecting_settings),
  }


def _samples(
  opened: Opened, groups: Sequence[Sequence[Example]]
) -> list[dict[str, Any]]:
  """Users spread over the split, one request each, with expected values."""
  recommender, batch_size = opened.recommender(with_value=True), opened.search.batch_size
  first_of_user = {group[0].user: group for group in reversed(groups)}
  users = sorted(first_of_user)
  chosen = [users[i] for i in np.linspace(0, len(users) - 1, NUM_SAMPLES).astype(int)]
  chosen = list(dict.fromkeys(chosen))
  groups = [first_of_user[user] for user in chosen]
  found = concatenate([
    recommender(opened.contexts.context([g[0] for g in groups[i : i + batch_size]]), DEPTH)
    for i in range(0, len(groups), batch_size)
  ])
  return [_sample(opened, group, found, row) for row, group in enumerate(groups)]


def _sample(
  opened: Opened, group: Sequence[Example], found: Recommendations, row: int
) -> dict[str, Any]:
  logs, ads = opened.logs, opened.logs.ads
  first = group[0]
  target_C = np.concatenate([e.target_C for e in group])
  ranked = found.ad_RK[row].tolist()
  values = dict(zip(opened.examples.features.names, first.feature_F.tolist(), strict=True))
  vocabulary = opened.examples.features.user | opened.examples.features.request
  return {
    "user_id": logs.users.user_id[first.user],
    "features": {n: vocabulary[n][v - 1] for n, v in values.items() if v > 0},
    "history": describe_history(logs, first, limit=12),
    "generated": [
      {
        "rank": k + 1, "ad_id": ads.ad_id[ad], "advertiser_id": ads.advertiser_id[ad],
        "text": ads.text[ad], "category": ads.category[ad],
        "sid": found.code_RKL[row, k].tolist(), "logp": float(found.logp_RK[row, k]),
        "expected_value": float(found.expected_value_RK[row, k]),
        "hit": ad in target_C, "in_history": ad in first.ad_T,
      }
      for k, ad in enumerate(ranked[:10]) if ad >= 0
    ],
    "targets": [
      {
        "ad_id": ads.ad_id[ad], "text": ads.text[ad], "advertiser": ads.advertiser_id[ad],
        "value": float(value), "new": bool(new),
        "rank": ranked.index(ad) + 1 if ad in ranked else None,
      }
      for e in group
      for ad, value, new in zip(e.target_C.tolist(), e.value_C, e.new_C, strict=True)
    ],
  }


def describe_history(logs: Logs, example: Example, *, limit: int) -> list[dict[str, Any]]:
  """The most recent ads and organic contents of a request's history, in words."""
  ads, contents = logs.ads, logs.contents

  def described(kind, ids, texts, advertisers, row_T, count_T, age_T) -> list[dict[str, Any]]:
    # The smallest count, and age in days, of each bucket.
    count_T = np.ceil(2 ** (count_T / 2) - 1e-6).astype(int)
    age_T = np.round((2 ** (age_T / 2) - 1) / 24, 2)
    return [
      {"kind": kind, "id": ids[row], "text": texts[row], "advertiser": advertisers[row],
       "count": count, "age_days": age}
      for row, count, age in zip(row_T, count_T.tolist(), age_T.tolist(), strict=True)
    ]

  shown = described("ad", ads.ad_id, ads.text, ads.advertiser_id,
                    example.ad_T, example.ad_count_T, example.ad_age_T)
  shown += described("organic", contents.content_id, contents.text, [""] * len(contents.text),
                     example.organic_O, example.organic_count_O, example.organic_age_O)
  return sorted(shown, key=lambda item: item["age_days"])[:limit]
