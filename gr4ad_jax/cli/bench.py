"""`gr4ad bench decode` and `gr4ad bench serve`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

from tyro.conf import subcommand

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.bench_config import DecodeConfig, LoadConfig
from gr4ad_jax.cli.options import Flat, Preset
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.machine.storage import write_json


@dataclasses.dataclass(frozen=True)
class Decode:
  """Speed of beam search: decoders, batch sizes and beam widths side by side, on random input."""

  preset: Preset = "small"
  """Width, layers and number types of the decoders."""
  config: Flat[DecodeConfig] = DecodeConfig()
  out: Path | None = None
  """JSON file to write."""


def _decode(options: Decode) -> None:
  from gr4ad_jax.cli.bench_decode import run_bench
  from gr4ad_jax.machine.progress import track

  result = run_bench(preset(options.preset).model, options.config, progress=track)
  tables.print_decode_bench(result)
  if options.out:
    write_json(options.out, result)
    tables.console.print(f"written: {options.out}")


@dataclasses.dataclass(frozen=True)
class Serve:
  """A day of traffic on a running server: latency, errors, beams and cache hits over time."""

  url: str = "http://localhost:8000"
  """Address of the server; GR4AD_API_KEY holds its key where it has one."""
  out: Path = Path("runs/load")
  """Folder for load.json and load.png."""
  load: Flat[LoadConfig] = LoadConfig()


def _serve(options: Serve) -> None:
  from gr4ad_jax.cli import bench_serve
  from gr4ad_jax.machine.progress import track

  samples = bench_serve.run_load(
    options.url, options.load, api_key=os.environ.get("GR4AD_API_KEY"), progress=track
  )
  title = f"{options.url}, a day of {options.load.day_s:g} s"
  tables.print_load(bench_serve.summary(samples), title=title)
  bench_serve.write(samples, options.load, options.out)
  tables.console.print(f"written: {options.out}/load.json, {options.out}/load.png")


def bench(
  what: Flat[Annotated[Decode, subcommand("decode")] | Annotated[Serve, subcommand("serve")]],
) -> None:
  """How fast this machine decodes, or a server answers."""
  match what:
    case Decode():
      _decode(what)
    case Serve():
      _serve(what)
