"""The HTTP API of a run's server: one route for each thing that a `Service` does, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from gr4ad_jax.catalog.targeting import COLUMNS
from gr4ad_jax.config import ConfigError
from gr4ad_jax.serving.border import make_app
from gr4ad_jax.serving.messages import (
  AdsReply,
  AdsRequest,
  EventsReply,
  EventsRequest,
  RecommendReply,
  RecommendRequest,
  RefusedAd,
  ReloadReply,
  RemovedReply,
)
from gr4ad_jax.serving.service import Service

_ERRORS = {
  422: {"description": "The request breaks a rule; `detail` says which."},
  429: {"description": "More requests than the server can answer; Retry-After says when."},
  503: {"description": "Not answered in time, or going down; Retry-After says when."},
}
Words = Annotated[str, Query(max_length=256)]


def build_app(
  service: Service, *, api_key: str | None = None, hosts: Sequence[str] = ()
) -> FastAPI:
  """The ASGI application of a service that is not started; see `border.make_app`."""
  app = make_app(
    service.running, _api(service), config=service.config, metrics=service.metrics.http,
    api_key=api_key, hosts=hosts, title="gr4ad_jax",
    description="Generative ad recommendation: semantic IDs, lazy decoding, dynamic beams.",
  )
  page = (resources.files("gr4ad_jax.serving") / "web" / "index.html").read_text(encoding="utf-8")

  @app.get("/", response_class=HTMLResponse, include_in_schema=False)
  async def index() -> str:
    return page

  return app


def _api(service: Service) -> APIRouter:
  api = APIRouter(prefix="/v1")

  @api.post("/recommend", response_model=RecommendReply, responses=_ERRORS)
  async def recommend(
    request: RecommendRequest, cache_control: Annotated[str, Header()] = ""
  ) -> Response:
    """The best ads for a user right now; `Cache-Control: no-cache` asks for a search."""
    fresh = "no-cache" in cache_control.lower()
    return JSONResponse(await service.recommend(request, use_cache=not fresh))

  @api.post("/events", responses={422: _ERRORS[422]})
  async def add_events(request: EventsRequest) -> EventsReply:
    """Keeps what users did: on disk when this answers, seen by the users' next requests.

    A call that is sent again with the same `event_id`s counts once.
    """
    kept = await service.events.add(request.events)
    return EventsReply(
      accepted=len(kept.events), repeated=len(request.events) - len(kept.events),
      unknown_contents=sum(
        not service.users.has_content(event.content_id) for event in kept.events if not event.ad_id
      ),
      last_event=kept.last_seq,
    )

  @api.post("/ads", responses={422: _ERRORS[422], 503: {"description": "No room in the index."}})
  async def put_ads(request: AdsRequest) -> AdsReply:
    """Adds or changes ads; those in `sids` can be recommended when this answers.

    Ads that cannot come are `refused`, each with a reason; where none can, this is an error.
    """
    changed = await service.ads.put(request.ads)
    return AdsReply(
      sids={ad: code_L.tolist() for ad, code_L in changed.code_of.items()},
      refused=[RefusedAd(ad_id=ad, reason=str(why)) for ad, why in changed.refused.items()],
      index_version=service.catalog.now.snapshot.version,
    )

  @api.delete("/ads/{ad_id:path}", responses={404: {"description": "No such ad."}})
  async def remove_ad(ad_id: str) -> RemovedReply:
    """Takes an ad out; no later answer holds it."""
    await service.ads.remove(ad_id)
    return RemovedReply(ad_id=ad_id, index_version=service.catalog.now.snapshot.version)

  @api.post("/reload", responses={503: {"description": "The parameters cannot be read."}})
  async def reload() -> ReloadReply:
    """Takes the newest published parameters over now."""
    changed = await service.parameters.reload()
    return ReloadReply(step=service.engine.step, changed=changed)

  @api.get("/about")
  async def about() -> dict[str, Any]:
    """What this server serves."""
    return service.about()

  @api.get("/users")
  async def users(
    query: Words = "", limit: Annotated[int, Query(ge=1, le=100_000)] = 20
  ) -> list[str]:
    """Ids of the log's users that begin with `query`."""
    return service.users.starting_with(query, limit)

  @api.get("/ads")
  async def ads(
    query: Words = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
  ) -> list[dict[str, Any]]:
    """Live ads whose text, category, advertiser or id holds all words of `query`."""
    return await service.ads.find(query, limit)

  @api.get("/targeting/{column}", responses={422: _ERRORS[422]})
  async def targeting(column: str) -> list[str]:
    """Values that conditions on this column may name."""
    if column not in COLUMNS:
      raise ConfigError(f"column={column!r}: must be one of {', '.join(COLUMNS)}")
    return service.catalog.now.targeting.values(column)[:5_000]

  return api
