"""Requests -> replies: the rules of a request, the user's events, the result cache, the search."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from gr4ad_jax.catalog.catalog import LiveCatalog
from gr4ad_jax.config import ConfigError
from gr4ad_jax.serving.answers import ads_of, levels_of, still_there
from gr4ad_jax.serving.batcher import Batcher
from gr4ad_jax.serving.clock import Clock
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.engine import Query
from gr4ad_jax.serving.events import Trends, event_of
from gr4ad_jax.serving.histories import Histories, Latest
from gr4ad_jax.serving.messages import RecommendRequest, Schedule
from gr4ad_jax.serving.metrics import Metrics
from gr4ad_jax.serving.parameters import Parameters
from gr4ad_jax.serving.result_cache import ResultCache, cache_key
from gr4ad_jax.serving.users import Users


@dataclasses.dataclass(frozen=True)
class Searches:
  """Replies that are searched for; the parts that a request goes through are the fields."""

  users: Users
  catalog: LiveCatalog
  trends: Trends
  clock: Clock
  batcher: Batcher
  metrics: Metrics
  currency: str
  exclude_seen: bool  # where a request does not say

  async def __call__(self, request: RecommendRequest, latest: Latest) -> dict[str, Any]:
    """What a reply says of a search, as JSON values.

    Args:
      request: by the rules.
      latest: the user's events since the log.

    Raises:
      ConfigError: an unknown feature, a condition that no ad meets.
      Overloaded, GoingDown, DeadlineExceeded: see `Batcher.submit`.
    """
    now_s = int(self.clock.now_s if request.time is None else request.time)
    self.trends.show()
    history = request.history
    if history is not None:
      history = [event_of(item, "", now_s - 1) for item in history]
    profile = self.users.profile(
      request.user_id, latest, self.catalog.now, now_s=now_s + 1, features=request.features,
      history=history,
    )
    exclude_N = profile.seen_N if self.excludes_seen(request) and len(profile.seen_N) else None
    query = Query(
      profile.example, request.user_id or "", request.k, tuple(request.where), exclude_N
    )
    answer, waited_s = await self.batcher.submit(query, factor=request.beam_factor)
    self.metrics.answered(answer)
    seconds = {"queue": waited_s} | answer.seconds
    return {
      "ads": ads_of(answer),
      "schedule": Schedule(factor=answer.factor, widths=list(answer.widths)).model_dump(),
      "step": answer.step,
      "index_version": answer.catalog.snapshot.version,
      "known_user": profile.known,
      "unknown_items": profile.unknown_items,
      "currency": self.currency,
      "latency_ms": {name: 1000 * value for name, value in seconds.items()},
      "levels": levels_of(answer) if request.explain else None,
    }


  def excludes_seen(self, request: RecommendRequest) -> bool:
    """Whether a request is one of prospecting."""
    return self.exclude_seen if request.exclude_seen is None else request.exclude_seen


@dataclasses.dataclass(frozen=True)
class Replies:
  """Replies to requests, earlier ones where they may be given again.

  Attributes:
    searches: for the others.
    histories: events of users since the log.
    cache: earlier replies; None = every request is searched for.
    parameters: that are served; replies of others are not given.
    fingerprint: of the data and SIDs, the same for a cache that servers share.
    config: limits.
  """

  searches: Searches
  histories: Histories
  cache: ResultCache | None
  parameters: Parameters
  fingerprint: str
  config: ServingConfig

  async def __call__(
    self, request: RecommendRequest, *, use_cache: bool = True
  ) -> dict[str, Any]:
    """The reply to a request, as JSON values; `use_cache` allows an earlier one.

    Raises:
      ConfigError: k or the history is too long, an unknown feature, factor or condition.
      Overloaded, GoingDown, DeadlineExceeded: see `Batcher.submit`.
    """
    began = time.perf_counter()
    self._check(request)
    latest = Latest([], "", False)
    if request.user_id is not None and request.history is None:
      latest = await self.histories.latest(
        request.user_id, whole=self.searches.excludes_seen(request)
      )
    histories_ms = 1000 * (time.perf_counter() - began)
    cached = False
    if self.cache and use_cache and request.user_id is not None and not request.explain:
      reply, cached = await self._cached(request, latest)
    else:
      reply = await self.searches(request, latest)
    latency_ms = {} if cached else reply["latency_ms"]
    total_ms = 1000 * (time.perf_counter() - began)
    return reply | {
      "request_id": uuid.uuid4().hex, "cached": cached,
      "degraded": ["user_events"] if latest.degraded else [],
      "latency_ms": latency_ms | {"histories": histories_ms, "total": total_ms},
    }

  async def _cached(self, request: RecommendRequest, latest: Latest) -> tuple[dict[str, Any], bool]:
    """A reply, and whether it was searched for by an earlier request."""
    key = cache_key(
      request.model_dump(), latest.version, self.fingerprint, self.parameters.name
    )
    catalog, where = self.searches.catalog, tuple(request.where)
    reply, how = await self.cache.get(
      key, lambda: self.searches(request, latest),
      usable=lambda reply: still_there(reply["ads"], where, catalog.now),
    )
    self.searches.metrics.cache.labels(how).inc()
    return reply, how != "miss"

  def _check(self, request: RecommendRequest) -> None:
    config = self.config
    if request.k > config.max_k:
      raise ConfigError(f"k={request.k}: must be at most {config.max_k}")
    if request.history is not None and len(request.history) > config.max_history:
      raise ConfigError(
        f"history: {len(request.history)} events, must be at most {config.max_history}"
      )
    if request.beam_factor is not None and request.beam_factor not in config.beam_factors:
      known = ", ".join(f"{factor:g}" for factor in config.beam_factors)
      raise ConfigError(f"beam_factor={request.beam_factor:g}: must be one of {known}")
    if request.where:  # a condition that no ad meets must not reach the others' call
      self.searches.catalog.now.allowed(tuple(request.where))
