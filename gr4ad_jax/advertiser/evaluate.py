"""`gr4ad advertiser evaluate`: recall of the next advertiser, rivals beside each other."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from gr4ad_jax.advertiser.histories import Rows, drawn
from gr4ad_jax.advertiser.name_search import Told
from gr4ad_jax.advertiser.prepared import Prepared
from gr4ad_jax.advertiser.rivals import Rivals, fit_logit, ranked, rivals
from gr4ad_jax.advertiser.run import AdvertiserRun
from gr4ad_jax.config import ConfigError
from gr4ad_jax.search.ranking import EvalRequests, paired_difference, ranking_metrics

DEPTHS = (1, 5, 20)


def asked_rows(data: Prepared, split: str, rows: int = 0) -> np.ndarray:
  """int64, the numbers of a split's rows that have a label; so many of them, 0 = all.

  Raises:
    ConfigError: none has.
  """
  asked = np.flatnonzero(data.splits[split].target_R >= 0)
  if not len(asked):
    raise ConfigError(f"split={split!r}: no row of it has a label")
  if 0 < rows < len(asked):
    asked = drawn(asked, rows)
  return asked


def requests_of(data: Prepared, rows: Rows) -> EvalRequests:
  """Rows as requests with one target each; new = not in the history that the row tells."""
  new_R = np.ones(len(rows), bool)
  row_E = rows.row_E()
  new_R[row_E[data.advertiser_N[rows.item_E] == rows.target_R[row_E]]] = False
  return EvalRequests(
    rows.user_R, rows.cut_s_R, rows.target_R[:, None], np.ones((len(rows), 1), np.float32),
    new_R[:, None],
  )


def evaluate_rivals(
  data: Prepared, split: str, *, rows: int = 0, bootstrap: int = 1000
) -> dict[str, float]:
  """`compare` of the rivals that need no language model.

  Args:
    data: prepared.
    split: validation or test.
    rows: only so many, drawn with a fixed seed; 0 = all.
    bootstrap: resamples of users.

  Raises:
    ConfigError: the split has no labels.
  """
  asked = asked_rows(data, split, rows)
  of = data.splits[split].take(asked)
  return compare(data, of, lists_of(rivals(data, of)), bar="linear", bootstrap=bootstrap)


def lists_of(found: Rivals) -> dict[str, np.ndarray]:
  """The first advertisers of each rival, int32 [R, 20]."""
  return {name: ranked(score_RA, max(DEPTHS)) for name, score_RA in found.score_RA.items()}


# Six parameters: what is asked of whom, under which name, and how.
def evaluate_model(
  opened: AdvertiserRun, split: str, *, name: str, rows: int = 0, combine: bool = False,
  bootstrap: int = 1000,
) -> dict[str, float]:
  """`compare` of a language model and all rivals.

  Args:
    opened: a run, or published weights.
    split: validation or test.
    name: of the model's row.
    rows: as of `evaluate_rivals`.
    combine: two rows more, NAME_linear and noise_linear: the linear logit with the model's log p
      as one feature more, and with that of rows drawn at random instead. Both are fitted on
      validation rows, which the model has to tell, too.
    bootstrap: resamples of users.

  Raises:
    ConfigError: the split has no labels, or `combine` is asked on the split it is fitted on.
  """
  if combine and split == "validation":
    raise ConfigError("combine: is fitted on the validation split; evaluate the test split")
  data, most = opened.data, max(DEPTHS)
  asked = asked_rows(data, split, rows)
  of = data.splits[split].take(asked)
  told, found = opened.tell(split, asked, most), rivals(data, of)
  lists = {**lists_of(found), name: told.advertiser_RK}
  if not combine:
    return compare(data, of, lists, bar="linear", bootstrap=bootstrap)
  fitted_on = asked_rows(data, "validation", rows)
  with_model, with_noise = combined(
    found, data.splits["validation"].take(fitted_on), opened.tell("validation", fitted_on, most),
    told,
  )
  both = {f"{name}_linear": with_model, "noise_linear": with_noise}
  return compare(data, of, lists | both, bar="linear", bootstrap=bootstrap) | differences(
    compare(data, of, both, bar="noise_linear", bootstrap=bootstrap)
  )


def combined(
  found: Rivals, learned: Rows, told_then: Told, told: Told
) -> tuple[np.ndarray, np.ndarray]:
  """Lists of the linear logit with a model's log p as one feature more, and with noise instead.

  The noise is log p of rows drawn at random. Both are fitted on the same rows.

  Args:
    found: rivals on R rows.
    learned: rows to fit on, others than those.
    told_then: names that the model told of these.
    told: of the R rows.

  Returns:
    Two lists, int32 [R, 20].
  """
  x_then_RAF, rng, lists = found.features_of(learned), np.random.default_rng(0), []
  for shuffled in (False, True):
    columns = []
    for x, of in ((x_then_RAF, told_then), (found.x_RAF, told)):
      logp_RA = dense(of, x.shape[1])
      logp_RA = logp_RA[rng.permutation(len(logp_RA))] if shuffled else logp_RA
      columns.append(np.concatenate([x, logp_RA[..., None]], axis=-1))
    logit = fit_logit(columns[0], learned.target_R)
    lists.append(ranked(logit(columns[1]), max(DEPTHS)))
  return lists[0], lists[1]


def differences(numbers: Mapping[str, float]) -> dict[str, float]:
  """The paired ones among the numbers of `compare`."""
  return {key: value for key, value in numbers.items() if "_minus_" in key}


def dense(told: Told, num_names: int) -> np.ndarray:
  """float32 [R, A], log p; of names that are not told the least one of their row."""
  least_R1 = np.where(told.advertiser_RK >= 0, told.logp_RK, np.inf).min(axis=1, keepdims=True)
  logp_RA = np.repeat(least_R1, num_names, axis=1).astype(np.float32)
  row_R1 = np.arange(len(logp_RA))[:, None]
  kept = told.advertiser_RK >= 0
  rows = np.broadcast_to(row_R1, kept.shape)[kept]
  logp_RA[rows, told.advertiser_RK[kept]] = told.logp_RK[kept]
  return logp_RA


def compare(
  data: Prepared, rows: Rows, lists: Mapping[str, np.ndarray], *, bar: str,
  bootstrap: int = 1000,
) -> dict[str, float]:
  """recall@1, @5 and @20 of several lists for the same rows.

  Args:
    data: prepared.
    rows: with labels.
    lists: name -> int32 [R, 20], advertisers, best first; -1 = nothing.
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
