"""What every HTTP server of ours has around its routes: life, errors, health, limits, the key."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.trustedhost import TrustedHostMiddleware

from gr4ad_jax.catalog.rooms import NoRoom
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.serving.ads import UnknownAd
from gr4ad_jax.serving.batcher import DeadlineExceeded, GoingDown, Overloaded
from gr4ad_jax.serving.compiled import NotCompiled
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.connections import BACKLOG, BoundedConnection
from gr4ad_jax.serving.limits import API_KEY, BoundedBody, Measured, NeedsKey
from gr4ad_jax.serving.metrics import HttpMetrics
from gr4ad_jax.version import __version__

DRAIN_S = 10.0  # that connections may take to end
MOST_FAULTS = 10  # that a 422 names


def make_app(
  running: Callable[[], contextlib.AbstractAsyncContextManager],
  api: APIRouter,
  *,
  config: ServingConfig,
  metrics: HttpMetrics,
  api_key: str | None,
  hosts: Sequence[str],
  title: str,
  description: str = "",
) -> FastAPI:
  """The ASGI application.

  Args:
    running: what answers behind the routes, entered before the first request.
    api: routes below /v1.
    config: limits.
    metrics: count requests, and are shown at /metrics.
    api_key: that calls below /v1 must bring, as X-API-Key or a bearer token; None = none.
    hosts: names that a request may call the server by in its Host header, () = any.
    title, description: for /docs.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI):
    async with running():
      app.state.ready = True
      yield
      app.state.ready = False

  app = FastAPI(title=title, version=__version__, lifespan=lifespan, description=description)
  _add_errors(app)
  app.state.ready = False
  _add_health(app, metrics)
  # Named here so that /docs asks for the key; `NeedsKey` checks it.
  app.include_router(api, dependencies=[Security(API_KEY)] if api_key else [])
  # The last one added is the first to see a request.
  app.add_middleware(
    BoundedBody, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s
  )
  if api_key:
    app.add_middleware(NeedsKey, api_key=api_key)
  if hosts:
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False)
  app.add_middleware(Measured, metrics=metrics)
  return app


def serve(app: FastAPI, *, host: str, port: int) -> None:
  """Answers until SIGTERM or SIGINT; then takes nothing new and ends what was begun."""
  config = uvicorn.Config(
    app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
    timeout_graceful_shutdown=DRAIN_S, timeout_keep_alive=30, ws="none", http=BoundedConnection,
    backlog=BACKLOG,
  )
  uvicorn.Server(config).run()


def _add_health(app: FastAPI, metrics: HttpMetrics) -> None:
  @app.get("/healthz")
  async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}

  @app.get("/readyz", responses={503: {"description": "Starting or going down."}})
  async def readyz() -> Response:
    """Requests are answered."""
    return JSONResponse({"ready": app.state.ready}, 200 if app.state.ready else 503)

  @app.get("/metrics")
  async def show_metrics() -> Response:
    """Counters and gauges for Prometheus."""
    return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
  """What exceptions become."""

  def becomes(
    kind: type[Exception], status: int, retry_after_s: Callable[[Exception], int] | None = None
  ) -> None:
    async def handler(request: Request, error: Exception) -> Response:
      headers = {"Retry-After": str(retry_after_s(error))} if retry_after_s else None
      return JSONResponse({"detail": str(error)}, status, headers)

    app.add_exception_handler(kind, handler)

  becomes(LogError, 422)
  becomes(ConfigError, 422)
  becomes(UnknownAd, 404)
  becomes(NoRoom, 503, lambda error: 60)
  becomes(Overloaded, 429, lambda error: error.retry_after_s)
  becomes(NotCompiled, 503, lambda error: 10)
  for kind in (DeadlineExceeded, GoingDown, OSError, sqlite3.Error):  # the last two: a full disk
    becomes(kind, 503, lambda error: 1)

  @app.exception_handler(RequestValidationError)
  async def broken_rules(request: Request, error: RequestValidationError) -> Response:
    # The first few, without what was sent: neither may be larger or deeper than a reply should be.
    detail = [
      {"loc": [str(part)[:100] for part in e["loc"]], "msg": e["msg"], "type": e["type"]}
      for e in error.errors()[:MOST_FAULTS]
    ]
    return JSONResponse({"detail": detail}, 422)
