"""`gr4ad advertiser evaluate`: recall of the next advertiser, rivals beside each other."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from gr4ad_jax.advertiser.histories import Rows
from gr4ad_jax.advertiser.prepared import Prepared
from gr4ad_jax.advertiser.rivals import ranked, rivals
from gr4ad_jax.config import ConfigError
from gr4ad_jax.search.ranking import EvalRequests, paired_difference, ranking_metrics

DEPTHS = (1, 5, 20)


def asked_rows(data: Prepared, split: str) -> Rows:
  """The rows of a split that have a label.

  Raises:
    ConfigError: none has.
  """
  rows = data.splits[split]
  if not (rows.target_R >= 0).any():
    raise ConfigError(f"split={split!r}: no row of it has a label")
  return rows.take(rows.target_R >= 0)


def requests_of(data: Prepared, rows: Rows) -> EvalRequests:
  """Rows as requests with one target each; new = not in the history that the row tells."""
  new_R = np.ones(len(rows), bool)
  row_E = rows.row_E()
  new_R[row_E[data.advertiser_N[rows.item_E] == rows.target_R[row_E]]] = False
  return EvalRequests(
    rows.user_R, rows.cut_s_R, rows.target_R[:, None], np.ones((len(rows), 1), np.float32),
    new_R[:, None],
  )


def evaluate_rivals(data: Prepared, split: str, *, bootstrap: int = 1000) -> dict[str, float]:
  """`compare` of the rivals that need no language model.

  Raises:
    ConfigError: the split has no labels.
  """
  rows = asked_rows(data, split)
  return compare(data, rows, rivals(data, rows).score_RA, bar="linear", bootstrap=bootstrap)


def compare(
  data: Prepared, rows: Rows, score_RA: Mapping[str, np.ndarray], *, bar: str,
  bootstrap: int = 1000,
) -> dict[str, float]:
  """recall@1, @5 and @20 of several scores on the same rows.

  Args:
    data: prepared.
    rows: with labels.
    score_RA: name -> [R, A].
    bar: one of the names; each other one's difference to it is paired.
    bootstrap: resamples of users.

  Returns:
    NAME/recall@k, NAME/new/recall@k (labels that the history does not tell), NAME/known/recall@k,
    each with /ci_low and /ci_high; NAME_minus_BAR/recall@k and the same of new ones; rows, users
    and the share of new labels.
  """
  requests, of_A = requests_of(data, rows), np.arange(len(data.name_A))
  new_R = requests.new_RC[:, 0]
  found = {
    "rows": float(len(rows)), "users": float(len(np.unique(rows.user_R))),
    "advertisers": float(len(of_A)), "new_share": float(new_R.mean()),
  }
  lists = {name: ranked(score, max(DEPTHS)) for name, score in score_RA.items()}
  bar_RK = lists[bar]
  for name, ranked_RK in lists.items():
    measure = functools.partial(ranking_metrics, advertiser_A=of_A, bootstrap=bootstrap)
    for k in DEPTHS:
      found |= _recalls(name, measure(ranked_RK, requests, ks=(k,)))
      if not new_R.all():
        known = measure(ranked_RK[~new_R], requests.rows(~new_R), ks=(k,))
        found |= {
          key.replace("/recall", "/known/recall", 1): value
          for key, value in _recalls(name, known).items() if "/new/" not in key
        }
      if name != bar:
        differ = paired_difference(ranked_RK, bar_RK, requests=requests, k=k, bootstrap=bootstrap)
        found |= _recalls(f"{name}_minus_{bar}", differ)
  return found


def _recalls(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
  return {f"{name}/{key}": value for key, value in metrics.items() if "recall@" in key
          and "value_" not in key}
