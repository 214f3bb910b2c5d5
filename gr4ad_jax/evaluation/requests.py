"""Held-out requests to rank ads for, and what the baselines may count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.data.engagements import product_engagements
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.evaluation.interactions import Interactions
from gr4ad_jax.evaluation.ranking import EvalRequests


def group_requests(examples: Sequence[Example]) -> list[list[Example]]:
  """Examples of one request (its targets may be split over several), in order of appearance."""
  groups: dict[int, list[Example]] = {}
  for example in examples:
    groups.setdefault(example.request, []).append(example)
  return list(groups.values())


def eval_requests(groups: Sequence[Sequence[Example]]) -> EvalRequests:
  """Targets of every request as padded arrays."""
  def joined(name: str) -> list[np.ndarray]:
    return [np.concatenate([getattr(e, name) for e in group]) for group in groups]

  targets, values, news = joined("target_C"), joined("value_C"), joined("new_C")
  width = max(len(t) for t in targets)

  def pad(rows: list[np.ndarray], fill, dtype) -> np.ndarray:
    out = np.full((len(rows), width), fill, dtype)
    for i, row in enumerate(rows):
      out[i, : len(row)] = row
    return out

  return EvalRequests(
    np.array([g[0].user for g in groups], np.int32),
    np.array([g[0].time_s for g in groups], np.int64),
    pad(targets, -1, np.int32), pad(values, 0, np.float32), pad(news, False, bool),
  )


def interactions(logs: Logs) -> Interactions:
  """Engagements with products of the catalogue, promoted or organic, for the baselines."""
  event_N, ad_N = product_engagements(logs)
  events = logs.events
  return Interactions(
    events.user[event_N], ad_N, events.time_s[event_N], events.ad[event_N] >= 0
  )
