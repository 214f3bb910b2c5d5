"""Ads for one user of the logs, as printable rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.catalog.targeting import Targeting
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.search.opened import Opened


class RankedAd(NamedTuple):
  """An ad of a list."""

  ad_id: str
  advertiser_id: str
  text: str
  sid: tuple[int, ...]
  logp: float  # log p(SID | X), nats
  expected_value: float  # in the log's currency (or eCPM)


class UserAds(NamedTuple):
  """What a user would be shown."""

  ads: list[RankedAd]  # best first
  currency: str
  about: str  # a sentence on what is known of the user


def recommend_for_user(
  opened: Opened, user_id: str, k: int, *, where: Sequence[str] = ()
) -> UserAds:
  """The k best ads for a request right after the last event of a user of the logs.

  `where` holds "COLUMN=VALUE" of the ads table; only ads that meet all of them are searched.

  Raises:
    ConfigError: unknown user, k below 1, or a condition that no ad can meet.
  """
  if k < 1:
    raise ConfigError(f"-k {k}: must be at least 1")
  logs = opened.logs
  found = np.flatnonzero(logs.users.user_id == user_id)
  if not len(found):
    known = logs.users.user_id
    examples = ", ".join(known[:: max(1, len(known) // 5)][:5])
    raise ConfigError(
      f"--user {user_id!r}: not in {opened.data}/logs/users.parquet; its {len(known):,} ids "
      f"include {examples}"
    )
  maker = ExampleMaker(logs, opened.examples.config)
  example = maker.latest_context(int(found[0]))
  recommender, allowed = opened.recommender(with_value=True), None
  if where:
    targeting = Targeting(logs.ads)
    try:
      keep_A = np.all([targeting.matches(condition) for condition in where], axis=0)
    except ConfigError as error:
      raise ConfigError(f"--where {error}") from None
    if not keep_A.any():
      raise ConfigError(f"--where {' '.join(where)}: no ad meets all of them")
    allowed = [recommender.allow(keep_A)]
  result = recommender(opened.contexts.context([example]), k, allowed=allowed)
  ads = [
    RankedAd(
      logs.ads.ad_id[ad], logs.ads.advertiser_id[ad], logs.ads.text[ad],
      tuple(result.code_RKL[0, rank].tolist()), float(result.logp_RK[0, rank]),
      float(result.expected_value_RK[0, rank]),
    )
    for rank, ad in enumerate(result.ad_RK[0].tolist()) if ad >= 0
  ]
  about = (
    f"{len(example.ad_T)} distinct ads and {len(example.organic_O)} organic contents in the "
    f"history that the model reads, ad revenue {example.past_value:.2f} {logs.currency}"
  )
  return UserAds(ads, logs.currency, about)
