"""`gr4ad serve --artifact`: an exported search answers contexts that its callers have made.

The artifact knows neither logs nor tokenizer: no histories, events or new ads. A request brings the
arrays that the manifest lists, one row of each; calls are batched, bounded and given up as in the
server of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.pipeline import repeat_last
from gr4ad_jax.machine.progress import track
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.serving.batcher import Batcher
from gr4ad_jax.serving.border import make_app
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.engine import timed
from gr4ad_jax.serving.metrics import HttpMetrics

Array = int | list[int] | list[list[int]]


class ContextRequest(BaseModel):
  """A context as the model reads it."""

  model_config = ConfigDict(extra="forbid")
  context: dict[str, Array] = Field(description="Name -> one row of the manifest's array.")
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


class ArtifactEngine:
  """Calls the artifact's program with full batches; its beams are fixed."""

  def __init__(self, folder: Path, config: ServingConfig):
    """Reads the artifact; `warm` compiles.

    Raises:
      ValueError: no artifact there.
    """
    self.config = config
    self.artifact = Artifact(folder)
    with np.load(folder / "sample.npz") as sample:
      self._sample = dict(sample)
    self.call_s: dict[tuple[float, int], float] = {}
    self.together = 1.0

  def warm(self) -> None:
    """Compiles and times every batch size."""
    programs = [(1.0, size) for size in self.config.batch_sizes]

    def call(factor: float, size: int) -> None:
      self([ContextQuery(self._sample, 10)] * size, factor=factor)

    for program in track(programs, "compile searches"):
      call(*program)
    self.call_s, self.together = timed(call, programs, self.config)

  def query(self, request: ContextRequest) -> ContextQuery:
    """A request, checked against the manifest.

    Raises:
      ConfigError: an array is missing, unknown, of another shape or too large; k is too large.
    """
    if request.k > self.config.max_k:
      raise ConfigError(f"k={request.k}: must be at most {self.config.max_k}")
    known = self.artifact.manifest["context"]
    if unknown := sorted(set(request.context) - set(known)):
      raise ConfigError(f"context: {unknown[0]!r} is none of {', '.join(known)}")
    try:
      rows = {name: np.array([values], np.int32) for name, values in request.context.items()}
      return ContextQuery(self.artifact.check(rows), request.k)
    except (ValueError, OverflowError) as error:
      raise ConfigError(str(error)) from None

  def __call__(
    self, queries: Sequence[ContextQuery], *, factor: float
  ) -> list[list[tuple[str, float]]]:
    """(ad id, score) of each request's ads, best first."""
    del factor
    size = self.config.call_size(len(queries))
    context = {
      name: repeat_last(np.concatenate([query.context[name] for query in queries]), size)
      for name in queries[0].context
    }
    ids, scores = self.artifact.recommend(context, max(query.k for query in queries))
    return [
      list(zip(ids[row], scores[row], strict=True))[: query.k] for row, query in enumerate(queries)
    ]


def build_artifact_app(engine: ArtifactEngine, *, api_key: str | None = None) -> FastAPI:
  """The ASGI application of a warm engine; for the key see `border.make_app`."""
  batcher, api = Batcher(engine), APIRouter(prefix="/v1")

  @contextlib.asynccontextmanager
  async def running():
    batcher.start()
    yield
    await batcher.stop()

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
    title="gr4ad_jax, an exported search",
  )
