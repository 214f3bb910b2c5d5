"""What every request passes before it reaches a route: counted, with the key, of bounded size.

These are plain ASGI layers, as they must act before a body has been read whole, which FastAPI does
before it looks at anything else.
"""

from __future__ import annotations

import asyncio
import hmac
import time

from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from starlette.requests import ClientDisconnect, Request

from gr4ad_jax.serving.metrics import HttpMetrics

API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)


class Measured:
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


class NeedsKey:
  """Refuses calls below /v1 that lack the key; nothing of their bodies is read."""

  def __init__(self, app, api_key: str):
    self._app, self._key = app, api_key.encode()

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] == "http" and scope["path"].startswith("/v1/"):
      request = Request(scope)
      given = await API_KEY(request)
      if given is None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
      # In a time that does not tell how much of it was right.
      if not hmac.compare_digest(given.encode("latin-1"), self._key):
        refusal = JSONResponse({"detail": "an API key is needed, as X-API-Key"}, 401)
        await refusal(scope, receive, send)
        return
    await self._app(scope, receive, send)


class BoundedBody:
  """Refuses bodies that are too large or come too slowly."""

  def __init__(self, app, max_bytes: int, timeout_s: float):
    self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
      await self._app(scope, receive, send)
      return
    body, status, fault = None, 413, f"the body is larger than {self._max_bytes} bytes"
    try:
      async with asyncio.timeout(self._timeout_s):
        body = await self._read(Request(scope, receive))
    except TimeoutError:
      status, fault = 408, "the body came too slowly"
    except ClientDisconnect:
      return
    if body is None:
      refusal = JSONResponse({"detail": fault}, status, {"Connection": "close"})
      await refusal(scope, receive, send)
      return
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
      return messages.pop() if messages else await receive()

    await self._app(scope, replay, send)

  async def _read(self, request: Request) -> bytes | None:
    """The body; None where it is too large, said or shown."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > self._max_bytes:
      return None
    body = bytearray()
    async for part in request.stream():
      body += part
      if len(body) > self._max_bytes:
        return None
    return bytes(body)
