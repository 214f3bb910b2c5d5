"""`gr4ad serve --artifact`: an exported search answers contexts that its callers have made.

The artifact knows neither users nor tokenizer: no stored histories, events or new ads. A request
brings a history, whose products it may leave out, or the arrays that the manifest lists, one row of
each; calls are batched, bounded and given up as in the server of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.pipeline import repeat_last
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.serving.batcher import Batcher
from gr4ad_jax.serving.border import make_app
from gr4ad_jax.serving.compiled import Compiled
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.messages import MAX_HISTORY, HistoryItem, Id, Time, Word
from gr4ad_jax.serving.metrics import HttpMetrics

Array = int | list[int] | list[list[int]]


class ContextRequest(BaseModel):
  """A context as the model reads it, or the history and features that it is made of."""

  model_config = ConfigDict(extra="forbid")
  context: dict[str, Array] | None = Field(
    None, description="Name -> one row of the manifest's array."
  )
  history: list[HistoryItem] | None = Field(
    None, max_length=MAX_HISTORY, description="What the user did, instead of a context."
  )
  features: dict[Id, Word] = Field({}, description="Beside a history.", max_length=64)
  user_id: Id | None = Field(None, description="Beside a history; nothing is known of users.")
  time: Time | None = Field(None, description="Unix seconds of the request; default now.")
  exclude_seen: bool = Field(
    False, description="Beside a history: no ad whose product it engages with."
  )
  k: int = Field(10, ge=1, description="Ads wanted.")


class ScoredAd(BaseModel):
  """One ad."""

  ad_id: str
  score: float = Field(description="Of its SID, what ads are ranked by.")


class ContextReply(BaseModel):
  """Ads, best first."""

  ads: list[ScoredAd]
  queue_ms: float


class ContextQuery(NamedTuple):
  """One request."""

  context: dict[str, np.ndarray]  # one row
  k: int
  exclude: Sequence[str] = ()  # ids of ads that must not come


class ArtifactEngine(Compiled):
  """Calls the artifact's program with full batches; its beams are fixed."""

  def __init__(self, folder: Path, config: ServingConfig):
    """Reads the artifact; `compile_all` or `compile_one` must follow.

    Raises:
      ValueError: no artifact there.
    """
    super().__init__(config)
    self.artifact = Artifact(folder)
    self._sample = self.artifact.sample()

  def run_program(self, factor: float, size: int, *, conditions: bool) -> None:
    """Answers the sample so many times; the only conditions are ads that must not come."""
    del factor
    self._answers([ContextQuery(self._sample, 10)] * size, size, conditions=conditions)

  def query(self, request: ContextRequest) -> ContextQuery:
    """A request, checked against the manifest.

    Raises:
      ConfigError: neither or both of context and history, an unknown feature, k is too large, seen
        ads cannot be known or left out, or an array is missing, unknown, of another shape, or holds
        a number out of its range.
    """
    if request.k > self.config.max_k:
      raise ConfigError(f"k={request.k}: must be at most {self.config.max_k}")
    if (request.context is None) == (request.history is None):
      raise ConfigError("exactly one of context and history is needed")
    if request.exclude_seen and request.history is None:
      raise ConfigError("exclude_seen: needs a history; a context does not say what it was made of")
    exclude: Sequence[str] = ()
    try:
      if request.history is not None:
        history = [item.model_dump() for item in request.history]
        context = self.artifact.context(
          history, features=request.features, user_id=request.user_id or "", time=request.time
        )
        if request.exclude_seen:
          if not self.artifact.can_exclude:
            raise ConfigError("exclude_seen: this artifact cannot; export the run again")
          exclude = self.artifact.seen(history, time=request.time)
      else:
        given, known = request.context, self.artifact.manifest["context"]
        if unknown := sorted(set(given) - set(known)):
          raise ConfigError(f"context: {unknown[0]!r} is none of {', '.join(known)}")
        context = {name: [values] for name, values in given.items()}
      return ContextQuery(self.artifact.check(context), request.k, exclude)
    except ValueError as error:
      raise ConfigError(str(error)) from None

  def __call__(
    self, queries: Sequence[ContextQuery], *, factor: float
  ) -> list[list[tuple[str, float]]]:
    """(ad id, score) of each request's ads, best first."""
    del factor
    conditions = not self.is_whole or any(query.exclude for query in queries)
    return self._answers(queries, self.config.call_size(len(queries)), conditions=conditions)

  def _answers(
    self, queries: Sequence[ContextQuery], size: int, *, conditions: bool
  ) -> list[list[tuple[str, float]]]:
    context = {
      name: repeat_last(np.concatenate([query.context[name] for query in queries]), size)
      for name in queries[0].context
    }
    exclude = None
    if conditions and self.artifact.can_exclude:
      exclude = [query.exclude for query in queries] + [()] * (size - len(queries))
    most = max(query.k for query in queries)
    ids, scores = self.artifact.recommend(context, most, exclude=exclude)
    return [
      list(zip(ids[row], scores[row], strict=True))[: query.k] for row, query in enumerate(queries)
    ]


def build_artifact_app(
  engine: ArtifactEngine, *, api_key: str | None = None, hosts: Sequence[str] = ()
) -> FastAPI:
  """The ASGI application of a warm engine; see `border.make_app`."""
  batcher, api = Batcher(engine), APIRouter(prefix="/v1")

  @contextlib.asynccontextmanager
  async def running():
    batcher.start()
    rest = None if engine.is_whole else asyncio.create_task(batcher.compile_rest())
    yield
    engine.stop()
    await batcher.stop()
    if rest is not None:
      await asyncio.gather(rest, return_exceptions=True)

  @api.post("/recommend")
  async def recommend(request: ContextRequest) -> ContextReply:
    """The best ads for a context."""
    found, waited_s = await batcher.submit(engine.query(request))
    return ContextReply(
      ads=[ScoredAd(ad_id=ad_id, score=score) for ad_id, score in found],
      queue_ms=1000 * waited_s,
    )

  @api.get("/about")
  async def about() -> dict[str, Any]:
    """The artifact's manifest: the arrays of a context, beams, versions."""
    return engine.artifact.manifest

  return make_app(
    running, api, config=engine.config, metrics=HttpMetrics(), api_key=api_key,
    hosts=hosts, title="gr4ad_jax, an exported search",
  )
