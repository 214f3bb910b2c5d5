"""Ads for one user of the logs, as printable rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.catalog.targeting import Targeting
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.gr4ad.run import open_inputs, open_recommender, read_run
from gr4ad_jax.machine.storage import Place


def recommend_for_user(
  workdir: Place, user_id: str, k: int, *, where: Sequence[str] = ()
) -> tuple[list[list[str]], str, str]:
  """The k best ads for a request right after the user's last event.

  Args:
    workdir: a trained run.
    user_id: of the logs.
    k: ads wanted.
    where: "COLUMN=VALUE" of the ads table; only ads that meet all of them are searched.

  Returns:
    Rows (rank, ad, advertiser, text, SID, log-probability, expected value), the currency, and a
    sentence on what is known of the user.

  Raises:
    ConfigError: unknown user, k below 1, a condition that no ad can meet, or no trained run.
  """
  if k < 1:
    raise ConfigError(f"-k {k}: must be at least 1")
  run = read_run(workdir)
  inputs = open_inputs(run)
  logs = inputs.logs
  found = np.flatnonzero(logs.users.user_id == user_id)
  if not len(found):
    known = logs.users.user_id
    examples = ", ".join(known[:: max(1, len(known) // 5)][:5])
    raise ConfigError(
      f"--user {user_id!r}: not in {run.data}/logs/users.parquet; its {len(known):,} ids include "
      f"{examples}"
    )
  maker = ExampleMaker(logs, inputs.examples.config)
  example = maker.latest_context(int(found[0]))
  member_TA = subset_RN = None
  if where:
    targeting = Targeting(logs.ads)
    try:
      member_TA = np.stack([targeting.matches(condition) for condition in where])
    except ConfigError as error:
      raise ConfigError(f"--where {error}") from None
    if not member_TA.all(axis=0).any():
      raise ConfigError(f"--where {' '.join(where)}: no ad meets all of them")
    subset_RN = np.arange(len(where), dtype=np.int32)[None]
  recommender, _, _ = open_recommender(run, workdir, inputs, with_value=True, member_TA=member_TA)
  result = recommender(inputs.make_batch.context([example]), k, subset_RN=subset_RN)
  ads = logs.ads
  rows = [
    [
      str(rank + 1), ads.ad_id[ad], ads.advertiser_id[ad], ads.text[ad],
      "-".join(map(str, result.code_RKL[0, rank])), f"{result.logp_RK[0, rank]:.2f}",
      f"{result.expected_value_RK[0, rank]:.2f}",
    ]
    for rank, ad in enumerate(result.ad_RK[0].tolist()) if ad >= 0
  ]
  about = (
    f"{len(example.ad_T)} distinct ads and {len(example.organic_O)} organic contents in the "
    f"history that the model reads, ad revenue {example.past_value:.2f} {logs.currency}"
  )
  return rows, logs.currency, about
