"""The HTTP API: routes, limits and errors around a `Service`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import sqlite3
import time
from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gr4ad_jax import __version__
from gr4ad_jax.catalog.targeting import COLUMNS
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.serving.batcher import DeadlineExceeded, GoingDown, Overloaded
from gr4ad_jax.serving.catalog import NoRoom
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.messages import (
  AdsReply,
  AdsRequest,
  EventsReply,
  EventsRequest,
  RecommendReply,
  RecommendRequest,
  ReloadReply,
  RemovedReply,
)
from gr4ad_jax.serving.metrics import HttpMetrics
from gr4ad_jax.serving.service import Service, UnknownAd

MOST_CONNECTIONS = 2_000  # more get 503
MOST_FAULTS = 10  # that a 422 names
_ERRORS = {
  422: {"description": "The request breaks a rule; `detail` says which."},
  429: {"description": "More requests than the server can answer; Retry-After says when."},
  503: {"description": "Not answered in time, or going down; Retry-After says when."},
}


def build_app(service: Service, *, api_key: str | None = None) -> FastAPI:
  """The ASGI application.

  Args:
    service: made, not started.
    api_key: that calls below /v1 must bring, as X-API-Key or a bearer token; None = none.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI):
    await service.start()
    yield
    await service.stop()

  app = FastAPI(
    title="gr4ad_jax", version=__version__, lifespan=lifespan,
    description="Generative ad recommendation: semantic IDs, lazy decoding, dynamic beams.",
  )
  add_errors(app)
  _add_page(app)
  add_health(app, ready=lambda: service.ready, metrics=service.metrics.http.text)
  _add_api(app, service)
  add_limits(app, service.config, metrics=service.metrics.http, api_key=api_key)
  return app


def add_limits(
  app: FastAPI, config: ServingConfig, *, metrics: HttpMetrics, api_key: str | None
) -> None:
  """Bounds on bodies, the API key, and counting; call it when all routes are there."""
  # The last one added is the first to see a request.
  app.add_middleware(_Limits, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
  app.add_middleware(_ApiKey, api_key=api_key)
  app.add_middleware(_Measured, metrics=metrics)


def serve(app: FastAPI, *, host: str, port: int, drain_s: float = 10.0) -> None:
  """Answers until SIGTERM or SIGINT; then takes nothing new and ends what was begun.

  Args:
    app: of `build_app`.
    host, port: where to listen.
    drain_s: how long connections may take to end.
  """
  config = uvicorn.Config(
    app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
    timeout_graceful_shutdown=drain_s, timeout_keep_alive=30, limit_concurrency=MOST_CONNECTIONS,
  )
  uvicorn.Server(config).run()


def _add_api(app: FastAPI, service: Service) -> None:
  @app.post("/v1/recommend", response_model=RecommendReply, responses=_ERRORS)
  async def recommend(
    request: RecommendRequest, cache_control: Annotated[str, Header()] = ""
  ) -> Response:
    """The best ads for a user right now; `Cache-Control: no-cache` asks for a search."""
    fresh = "no-cache" in cache_control.lower()
    return JSONResponse(await service.recommend(request, use_cache=not fresh))

  @app.post("/v1/events", responses={422: _ERRORS[422]})
  async def add_events(request: EventsRequest) -> EventsReply:
    """Keeps what users did: on disk when this answers, seen by the users' next requests."""
    last = await service.add_events(request.events)
    return EventsReply(accepted=len(request.events), last_event=last)

  @app.post("/v1/ads", responses={422: _ERRORS[422], 503: {"description": "No room in the index."}})
  async def put_ads(request: AdsRequest) -> AdsReply:
    """Adds or changes ads; they can be recommended when this answers."""
    sids = await service.put_ads(request.ads)
    return AdsReply(sids=sids, index_version=service.catalog.now.snapshot.version)

  @app.delete("/v1/ads/{ad_id:path}", responses={404: {"description": "No such ad."}})
  async def remove_ad(ad_id: str) -> RemovedReply:
    """Takes an ad out; no later answer holds it."""
    await service.remove_ad(ad_id)
    return RemovedReply(ad_id=ad_id, index_version=service.catalog.now.snapshot.version)

  @app.post("/v1/reload", responses={503: {"description": "The parameters cannot be read."}})
  async def reload() -> ReloadReply:
    """Takes the newest published parameters over now."""
    changed = await service.reload()
    return ReloadReply(step=service.engine.step, changed=changed)

  @app.get("/v1/about")
  async def about() -> dict[str, Any]:
    """What this server serves."""
    engine, now = service.engine, service.catalog.now
    return {
      "version": __version__, "source": service.inputs.logs.source, "step": engine.step,
      "index_version": now.snapshot.version, "live_ads": len(now.snapshot.index.ads_A),
      "currency": service.inputs.logs.currency,
      "schedules": [
        {"factor": factor, "widths": list(widths), "call_ms": 1000 * engine.call_s[factor, 1]}
        for factor, widths in engine.widths.items() if (factor, 1) in engine.call_s
      ],
      "parts_ms": service.parts_ms,
      "max_k": service.config.max_k, "targeting": list(COLUMNS),
      "features": {name: values[:200] for name, values in service.users.features.items()},
    }

  @app.get("/v1/users")
  async def users(
    query: str = Query("", max_length=256), limit: int = Query(20, ge=1, le=100_000)
  ) -> list[str]:
    """Ids of the log's users that begin with `query`."""
    return service.users.starting_with(query, limit)

  @app.get("/v1/ads")
  async def ads(
    query: str = Query("", max_length=256), limit: int = Query(20, ge=1, le=100)
  ) -> list[dict[str, Any]]:
    """Live ads whose text, category, advertiser or id holds all words of `query`."""
    return await service.find_ads(query, limit)

  @app.get("/v1/targeting/{column}", responses={422: _ERRORS[422]})
  async def targeting(column: str) -> list[str]:
    """Values that conditions on this column may name."""
    if column not in COLUMNS:
      raise ConfigError(f"column={column!r}: must be one of {', '.join(COLUMNS)}")
    return service.catalog.now.targeting.values(column)[:5_000]


def _add_page(app: FastAPI) -> None:
  page = (resources.files("gr4ad_jax.serving") / "web" / "index.html").read_text()

  @app.get("/", response_class=HTMLResponse, include_in_schema=False)
  async def index() -> str:
    return page


def add_health(
  app: FastAPI, *, ready: Callable[[], bool], metrics: Callable[[], bytes]
) -> None:
  """/healthz, /readyz and /metrics."""

  @app.get("/healthz")
  async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}

  @app.get("/readyz", responses={503: {"description": "Starting or going down."}})
  async def readyz() -> Response:
    """Requests are answered."""
    is_ready = ready()
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

  @app.get("/metrics")
  async def show_metrics() -> Response:
    """Counters and gauges for Prometheus."""
    return Response(metrics(), media_type=CONTENT_TYPE_LATEST)


def add_errors(app: FastAPI) -> None:
  """What exceptions become."""

  def answers(kind: type[Exception], status: int, headers: Callable = lambda error: None) -> None:
    async def handler(request: Request, error: Exception) -> Response:
      return JSONResponse({"detail": str(error)}, status, headers(error))

    app.add_exception_handler(kind, handler)

  async def broken_rules(request: Request, error: RequestValidationError) -> Response:
    # The first few, without what was sent: neither may be larger or deeper than a reply should be.
    detail = [
      {"loc": [str(part)[:100] for part in e["loc"]], "msg": e["msg"], "type": e["type"]}
      for e in error.errors()[:MOST_FAULTS]
    ]
    return JSONResponse({"detail": detail}, 422)

  app.add_exception_handler(RequestValidationError, broken_rules)
  answers(LogError, 422)
  answers(ConfigError, 422)
  answers(UnknownAd, 404)
  answers(NoRoom, 503, lambda error: {"Retry-After": "60"})
  answers(Overloaded, 429, lambda error: {"Retry-After": str(error.retry_after_s)})
  for kind in (DeadlineExceeded, GoingDown, OSError, sqlite3.Error):  # the last two: a full disk
    answers(kind, 503, lambda error: {"Retry-After": "1"})


class _Measured:
  """Counts and times requests by route."""

  def __init__(self, app, metrics: HttpMetrics):
    self._app, self._metrics = app, metrics

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    began, status = time.perf_counter(), None

    async def noted(message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      await self._app(scope, receive, noted)
    except Exception:
      status = 500
      raise
    finally:
      route = scope.get("route")  # names of routes alone, lest every URL becomes a series
      self._metrics.answered(
        getattr(route, "path", "other"), str(status or "gone"),  # gone: the client hung up
        time.perf_counter() - began,
      )


class _ApiKey:
  """Refuses calls of the API that lack the key."""

  def __init__(self, app, api_key: str | None):
    self._app, self._key = app, api_key.encode() if api_key else None

  async def __call__(self, scope, receive, send) -> None:
    if self._key is None or scope["type"] != "http" or not scope["path"].startswith("/v1/"):
      await self._app(scope, receive, send)
      return
    headers = dict(scope["headers"])
    given = headers.get(b"x-api-key", headers.get(b"authorization", b"").removeprefix(b"Bearer "))
    if hmac.compare_digest(given, self._key):
      await self._app(scope, receive, send)
    else:
      reply = JSONResponse({"detail": "an API key is needed, as X-API-Key"}, 401)
      await reply(scope, receive, send)


class _Limits:
  """Refuses bodies that are too large or come too slowly."""

  def __init__(self, app, max_bytes: int, timeout_s: float):
    self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
      await self._app(scope, receive, send)
      return
    refusal = None
    try:
      async with asyncio.timeout(self._timeout_s):
        body = await self._read(scope, receive)
    except TimeoutError:
      refusal = JSONResponse({"detail": "the body came too slowly"}, 408)
    except _TooLarge:
      refusal = JSONResponse({"detail": f"the body is larger than {self._max_bytes} bytes"}, 413)
    except _Gone:
      return
    if refusal is not None:
      refusal.headers["Connection"] = "close"
      await refusal(scope, receive, send)
      return
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
      return messages.pop() if messages else await receive()

    await self._app(scope, replay, send)

  async def _read(self, scope, receive) -> bytes:
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and int(declared) > self._max_bytes:
      raise _TooLarge
    parts, size = [], 0
    while True:
      message = await receive()
      if message["type"] == "http.disconnect":
        raise _Gone
      parts.append(message.get("body", b""))
      size += len(parts[-1])
      if size > self._max_bytes:
        raise _TooLarge
      if not message.get("more_body"):
        return b"".join(parts)


class _TooLarge(Exception):
  pass


class _Gone(Exception):
  pass
