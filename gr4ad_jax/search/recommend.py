"""Ads for users of the logs, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gr4ad_jax.catalog.targeting import Targeting
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.recommender import Recommendations


class RankedAd(NamedTuple):
  """An ad of a list."""

  ad_id: str
  advertiser_id: str
  text: str
  sid: tuple[int, ...]
  logp: float  # log p(SID | X), nats
  expected_value: float  # currency, of one `Opened.value_of`
  score: float  # what ads are ranked by: logp, and what value adds
  new: bool  # its SID is not in the history that the model reads


class UserAds(NamedTuple):
  """What a user would be shown."""

  user_id: str
  ads: list[RankedAd]  # best first
  about: str  # a sentence on what is known of the user

  def rows(self) -> list[dict[str, Any]]:
    """Column -> value of each ad, as files and frames hold them."""
    return [
      {"user_id": self.user_id, "rank": rank, **ad._asdict()} for rank, ad in enumerate(self.ads, 1)
    ]


class UserSearch:
  """A run's search for users of its logs: a request right after the last event of each."""

  def __init__(
    self, opened: Opened, k: int, *, where: Sequence[str] = (), exclude_seen: bool | None = None
  ):
    """Prepares the search; it compiles with the first batch.

    Args:
      opened: the run.
      k: ads for a user; no more than there are.
      where: "COLUMN=VALUE" of the ads table; only ads that meet all of them are searched.
      exclude_seen: leave out every ad whose product the user has ever engaged with; None = as the
        run is set.

    Raises:
      ConfigError: k below 1, or a condition that no ad can meet.
    """
    if k < 1:
      raise ConfigError(f"-k {k}: must be at least 1")
    self._opened, self._k, self.allowed_A = opened, k, None
    self._maker = ExampleMaker(opened.logs, opened.examples.config)
    self._recommender, self._allowed = opened.recommender(with_value=True), None
    exclude_seen = opened.search.exclude_seen if exclude_seen is None else exclude_seen
    self._seen = SeenAds(opened.logs) if exclude_seen else None
    if where:
      targeting = Targeting(opened.logs.ads)
      try:
        keep_A = np.all([targeting.matches(condition) for condition in where], axis=0)
      except ConfigError as error:
        raise ConfigError(f"--where {error}") from None
      if not keep_A.any():
        raise ConfigError(f"--where {' '.join(where)}: no ad meets all of them")
      self.allowed_A, self._allowed = keep_A, self._recommender.allow(keep_A)

  def users(self, user_ids: Sequence[str] | None = None) -> np.ndarray:
    """Their numbers, each once, in the order given; None = all users.

    Raises:
      ConfigError: one is not in the logs.
    """
    known_U = self._opened.logs.users.user_id
    if user_ids is None:
      return np.arange(len(known_U))
    number_N = pd.Index(known_U).get_indexer(pd.Index(list(user_ids), dtype=object))
    if (unknown := np.flatnonzero(number_N < 0)).size:
      examples = ", ".join(known_U[:: max(1, len(known_U) // 5)][:5])
      more = f" and {unknown.size - 1:,} more" if unknown.size > 1 else ""
      raise ConfigError(
        f"user {user_ids[unknown[0]]!r}{more}: not in {self._opened.data}/logs/users.parquet; its "
        f"{len(known_U):,} ids include {examples}"
      )
    return pd.unique(number_N)

  def batches(self, user_N: np.ndarray) -> Iterator[list[UserAds]]:
    """The ads of these users, as many users at a time as the search takes."""
    size, k = self._opened.search.batch_size, min(self._k, len(self._opened.logs.ads.ad_id))
    for start in range(0, len(user_N), size):
      users = user_N[start : start + size].tolist()
      examples = [self._maker.latest_context(user) for user in users]
      allowed = None
      if self._seen is not None:
        seen = [self._seen.before(example.user, example.time_s) for example in examples]
        allowed = [self._recommender.without(ads, self._allowed) for ads in seen]
      elif self._allowed is not None:
        allowed = [self._allowed] * len(examples)
      found = self._recommender(self._opened.contexts.context(examples), k, allowed=allowed)
      yield [self._of(row, user, examples[row], found) for row, user in enumerate(users)]

  def _of(self, row: int, user: int, example: Example, found: Recommendations) -> UserAds:
    logs = self._opened.logs
    ads = [
      RankedAd(
        logs.ads.ad_id[ad], logs.ads.advertiser_id[ad], logs.ads.text[ad],
        tuple(found.code_RKL[row, k].tolist()), float(found.logp_RK[row, k]),
        float(found.expected_value_RK[row, k]), float(found.score_RK[row, k]),
        bool(found.new_RK[row, k]),
      )
      for k, ad in enumerate(found.ad_RK[row].tolist()) if ad >= 0
    ]
    return UserAds(logs.users.user_id[user], ads, (
      f"{len(example.ad_T)} distinct ads and {len(example.organic_O)} organic contents in the "
      f"history that the model reads, ad revenue {example.past_value:.2f} {logs.currency}".rstrip()
    ))

  def why_fewer(self) -> str:
    """Why a list can be shorter than was asked for."""
    ads = len(self._opened.logs.ads.ad_id)
    if self.allowed_A is not None and (meet := int(self.allowed_A.sum())) < self._k:
      return f"{meet:,} of {ads:,} ads meet the conditions"
    if ads < self._k:
      return f"the catalogue has {ads:,} ads"
    widths, seen = self._opened.search.widths, ", less what was seen" if self._seen else ""
    return (
      f"the search keeps {widths[-1]:,} SIDs (search.widths of the run) and finds their ads{seen}"
    )


def recommend_for_user(
  opened: Opened, user_id: str, k: int, *, where: Sequence[str] = (),
  exclude_seen: bool | None = None,
) -> UserAds:
  """The k best ads for a request right after the last event of a user; errors as `UserSearch`."""
  search = UserSearch(opened, k, where=where, exclude_seen=exclude_seen)
  return next(search.batches(search.users([user_id])))[0]
