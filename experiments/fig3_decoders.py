"""Figure 3 in numbers: ordinary AR, multi-token prediction, and LazyAR over K.

    python -m experiments.run fig3_decoders

Complete Journey as in `make demo`, the preset "demo" (4 layers); decoders of the same width and
depth, same semantic IDs, same training. Validation SID loss, recall and value recall at 50 on test
weeks 50 to 53, requests/s of the search at the preset's beams. Three seeds for AR, MTP and LazyAR
with K = 2, with the difference to AR paired by seed and its t interval; one seed for other K.

Finished runs are reused, so an interrupted experiment goes on. Size cpu trains for 500 steps,
full for 1,500; `--set train.num_steps=...` and other settings of the preset may be changed.

Expected of size cpu (docs/decoding.md): differences of recall@50 to AR of -.0014 for MTP (95%
-.0041 to +.0014) and -.0011 for lazy2 (-.0073 to +.0052); requests/s 1.75 (MTP) and 1.69 (lazy2)
times AR's. Size full was not measured. Run time on two CPU cores: cpu about an hour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import plain
from experiments._runs import (
  demo_config,
  paired_interval,
  prepared_journey,
  tokenized,
  trained_metrics,
)
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.cli.bench_decode import compile_decode, measure, random_sids
from gr4ad_jax.config import override
from gr4ad_jax.gr4ad.batch import random_vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.machine.progress import track
from gr4ad_jax.tokenizer.config import TokenizerConfig

DECODERS = {
  "ar": ("autoregressive AR", {"decoder": "autoregressive"}, (0, 1, 2)),
  "mtp": ("multi-token (DeepSeek)", {"decoder": "multi_token", "num_lazy_layers": 2}, (0, 1, 2)),
  "lazy0": ("LazyAR, K = 0", {"num_lazy_layers": 0}, (0,)),
  "lazy1": ("LazyAR, K = 1", {"num_lazy_layers": 1}, (0,)),
  "lazy2": ("LazyAR, K = 2", {"num_lazy_layers": 2}, (0, 1, 2)),
  "lazy3": ("LazyAR, K = 3", {"num_lazy_layers": 3}, (0,)),
}
METRICS = ("validation_sid_loss", "recall@50", "value_recall@50")
SIZES, NUM_SIDS, CONTEXT_TOKENS, BATCH = (256, 64, 256), 7_000, 256, 8  # as the demo's


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """DECODER/METRIC/seedN and .../mean; DECODER/minus_ar/METRIC/...; DECODER/requests_per_s."""
  config = demo_config(size, overrides)
  data = prepared_journey(workdir)
  sids = tokenized(data, workdir / "sids", TokenizerConfig())
  results: dict[str, float] = {}
  models = {
    name: dataclasses.replace(config.model, **changes) for name, (_, changes, _) in DECODERS.items()
  }
  # Seeds of the decoders with three come first, so that an interrupted run has the most.
  order = sorted(
    ((seed, -len(seeds), name) for name, (_, _, seeds) in DECODERS.items() for seed in seeds),
    key=lambda item: (item[1], item[0]),
  )
  for seed, _, name in order:
    seeded = override(dataclasses.replace(config, model=models[name]), "train.seed", seed)
    metrics = trained_metrics(workdir / f"{name}-{seed}", data, sids, seeded)
    results |= {f"{name}/{metric}/seed{seed}": metrics[metric] for metric in METRICS}
  for name, (_, _, seeds) in DECODERS.items():
    for metric in METRICS:
      values = np.array([results[f"{name}/{metric}/seed{seed}"] for seed in seeds])
      results[f"{name}/{metric}/mean"] = float(values.mean())
      if name != "ar" and len(seeds) > 1:
        ar = np.array([results[f"ar/{metric}/seed{seed}"] for seed in seeds])
        results |= paired_interval(f"{name}/minus_ar/{metric}", values - ar)
  return results | _speed(models, config.search.widths)


def _speed(models: Mapping[str, ModelConfig], widths: tuple[int, ...]) -> dict[str, float]:
  vocabulary = random_vocabulary(SIZES)
  tree = build_prefix_tree(random_sids(SIZES, NUM_SIDS))
  programs = {
    name: compile_decode(
      model, vocabulary, tree, batch=BATCH, widths=widths, context_tokens=CONTEXT_TOKENS,
      with_value=True,
    )
    for name, model in models.items()
  }
  timings, _ = measure(programs, batch=BATCH, dtype="float32", repeats=30, progress=track)
  return {f"{name}/requests_per_s": timing.requests_per_s for name, timing in timings.items()}


def table(results: Mapping[str, float]) -> str:
  """One row a decoder, differences below."""
  lines = [
    "| | SID loss | recall@50 | value_recall@50 | requests/s | over AR |",
    "|---|---:|---:|---:|---:|---:|",
  ]
  for name, (label, _, seeds) in DECODERS.items():
    cells = [f"{results[f'{name}/{metric}/mean']:.4f}" for metric in METRICS[:3]]
    speed = results[f"{name}/requests_per_s"]
    lines.append(
      f"| {label} ({len(seeds)} seed{'s' * (len(seeds) > 1)}) | " + " | ".join(cells)
      + f" | {speed:.1f} | {speed / results['ar/requests_per_s']:.2f} |"
    )
  lines += ["", "Difference to AR, paired by seed, with 95% t intervals over seeds:", "",
            "| | " + " | ".join(METRICS) + " |", "|---" + "|---:" * len(METRICS) + "|"]
  for name, (label, _, seeds) in DECODERS.items():
    if name == "ar" or len(seeds) == 1:
      continue
    cells = []
    for metric in METRICS:
      mean, low, high = (
        results[f"{name}/minus_ar/{metric}/{key}"] for key in ("mean", "ci_low", "ci_high")
      )
      relative = mean / results[f"ar/{metric}/mean"]
      cells.append(f"{mean:+.4f} ({low:+.4f} to {high:+.4f}), {relative:+.1%}")
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Recall over speed."""
  figure = Figure(figsize=(6.5, 3.6), layout="constrained")
  ax = figure.subplots()
  for name, (label, _, seeds) in DECODERS.items():
    speed = results[f"{name}/requests_per_s"]
    values = [results[f"{name}/recall@50/seed{seed}"] for seed in seeds]
    ax.plot([speed] * len(values), values, "o", alpha=0.7, label=label)
  ax.set_xlabel("requests/s")
  ax.set_title("Recall@50 of each seed", loc="left")
  ax.set_xlim(left=0)
  plain(ax)
  ax.legend(frameon=False, fontsize=8)
  return {"fig3": figure}
