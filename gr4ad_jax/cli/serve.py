"""`gr4ad serve`: a trained run, or what `export` wrote, answers over HTTP."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Literal

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.serving.config import ServingConfig


@dataclasses.dataclass(frozen=True)
class Serve:
  """What answers, where, and how."""

  workdir: Place | None = None
  """Folder of a trained run."""
  artifact: Place | None = None
  """Folder that `export` wrote, instead of a run: answers contexts alone (docs/serving.md)."""
  host: str = "127.0.0.1"
  """Address to listen on; 0.0.0.0 = all of this machine's."""
  port: int = 8000
  """Port to listen on."""
  store: Path | None = None
  """Folder for accepted events and ads; default WORKDIR/serving where that is no bucket."""
  segments: Path | None = None
  """Folder for log segments, which `online --segments` reads; default STORE/segments."""
  published: Path | None = None
  """Folder of parameters to follow, `published` below the --out of `online`."""
  redis: str | None = None
  """URL of a Redis that servers share for users' events and answers, redis://HOST:PORT/0."""
  clock: Literal["real", "log", "replay"] = "real"
  """What time it is for the model: "log" begins right after the log's last event (old logs),
  "replay" stands there and moves with the times of accepted events (simulations)."""
  serving: ServingConfig = ServingConfig()


def serve(options: Flat[Serve]) -> None:
  """A trained run answers over HTTP: recommendations, new ads, events; a page at /."""
  from gr4ad_jax.serving.border import serve

  if (options.workdir is None) == (options.artifact is None):
    raise ConfigError("serve: needs --workdir or --artifact, one of them")
  with socket.socket() as probe:  # before minutes of compilation
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((options.host, options.port))
  app = _run_app(options) if options.workdir else _artifact_app(options)
  where = "localhost" if options.host in ("0.0.0.0", "127.0.0.1") else options.host
  tables.console.print(
    f"serving http://{where}:{options.port}  (API: /docs, metrics: /metrics)"
  )
  serve(app, host=options.host, port=options.port)


def _artifact_app(options: Serve):
  from gr4ad_jax.serving.artifact_server import ArtifactEngine, build_artifact_app

  # The beam widths of an artifact are part of its program.
  config = dataclasses.replace(options.serving, beam_factors=(1.0,))
  engine = ArtifactEngine(storage.fetch(options.artifact), config)
  engine.warm()
  return build_artifact_app(engine, api_key=os.environ.get("GR4AD_API_KEY"))


def _run_app(options: Serve):
  from gr4ad_jax.api import open_run
  from gr4ad_jax.serving.server import build_app
  from gr4ad_jax.serving.service import Service

  store = options.store
  if store is None:
    if isinstance(options.workdir, storage.Url):
      raise ConfigError(
        f"serve: {options.workdir} is in a bucket; name a folder of this machine with --store"
      )
    store = options.workdir / "serving"
  service = Service(
    open_run(options.workdir), config=options.serving, store=store,
    segments=options.segments or store / "segments", published=options.published,
    redis=options.redis, clock=options.clock,
  )
  if service.log_age_days > 30:
    tables.console.print(
      f"the log ended {service.log_age_days:.0f} days ago, which the model sees as idle users; "
      "`--clock log` serves as of the log's end"
    )
  return build_app(service, api_key=os.environ.get("GR4AD_API_KEY"))
