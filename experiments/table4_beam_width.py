"""GR4AD's Table 4 in kind: beam widths per level, quality and speed.

    python -m experiments.run table4_beam_width

A trained run (the preset "demo" on Complete Journey, 500 steps; `--set settings.run=FOLDER` takes
another), requests of the test weeks; recall and value recall at 50 with the difference to
512-512-512, requests/s with schedules taking turns.

Expected (docs/decoding.md, beside the paper's): recall@50 .380 with every schedule; requests/s of
128-256-512 49% above those of 512-512-512. Run time on two CPU cores: 10 minutes with a trained
run. `--set settings.requests=200` shortens it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import plain
from experiments._runs import OfTrainedRun, open_trained
from experiments._settings import with_overrides
from gr4ad_jax.cli.bench_decode import time_in_turns
from gr4ad_jax.gr4ad.build import start_fn, step_fn
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.search.beam_search import compile_search

SCHEDULES = {  # widths -> the paper's revenue and QPS against 512-512-512
  "512-512-512": ("-", "-"),
  "128-512-512": ("-0.10%", "+27%"),
  "512-128-512": ("-0.23%", "+27%"),
  "512-512-128": ("-0.85%", "+5%"),
  "128-256-512": ("-0.15%", "+45%"),
}
METRICS = ("recall@50", "value_recall@50")


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """WIDTHS/requests_per_s, WIDTHS/recall@50, WIDTHS/value_recall@50."""
  del size
  settings = with_overrides(OfTrainedRun(), overrides)
  trained = open_trained(workdir, settings.run)
  context = trained.context(settings.batch)
  start, step = start_fn(trained.decoder), step_fn(trained.decoder)
  calls = {}
  for name in SCHEDULES:
    search = compile_search(start, step, trained.tree, _widths(name))
    calls[name] = lambda search=search: search(trained.opened.params, context, *trained.fixed)
  seconds = time_in_turns(calls, repeats=settings.repeats, progress=track)
  results = {}
  for name in SCHEDULES:
    console.print(f"quality: {name}")
    search = dataclasses.replace(trained.opened.search, widths=_widths(name))
    metrics = trained.score(search, settings.requests)
    results[f"{name}/requests_per_s"] = settings.batch / float(np.median(seconds[name]))
    results |= {f"{name}/{metric}": metrics[metric] for metric in METRICS}
  return results


def _widths(name: str) -> tuple[int, ...]:
  return tuple(int(width) for width in name.split("-"))


def table(results: Mapping[str, float]) -> str:
  """One row a schedule."""
  lines = [
    "| beams | requests/s | QPS | recall@50 | value_recall@50 | paper: revenue | paper: QPS |",
    "|---|---:|---:|---:|---:|---:|---:|",
  ]
  base = {key: results[f"512-512-512/{key}"] for key in ("requests_per_s", *METRICS)}
  for name, (revenue, qps) in SCHEDULES.items():
    speed = results[f"{name}/requests_per_s"]
    cells = [
      f"{results[f'{name}/{metric}']:.4f} ({results[f'{name}/{metric}'] / base[metric] - 1:+.2%})"
      for metric in METRICS
    ]
    gain = speed / base["requests_per_s"] - 1
    lines.append(
      f"| {name} | {speed:.1f} | {gain:+.0%} | " + " | ".join(cells) + f" | {revenue} | {qps} |"
    )
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Value recall over speed."""
  figure = Figure(figsize=(6, 3.4), layout="constrained")
  ax = figure.subplots()
  for name in SCHEDULES:
    x, y = results[f"{name}/requests_per_s"], results[f"{name}/value_recall@50"]
    ax.plot(x, y, "o")
    ax.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
  ax.set_xlabel("requests/s")
  ax.set_title("Value recall@50 of beam schedules", loc="left")
  ax.margins(0.15)
  plain(ax)
  return {"table4": figure}
