"""GPR's scaling figure in kind: loss against dense size, .2 to 8 million parameters.

    python -m experiments.run gpr_scaling

A family of GPRs of one depth and of widths 40 to 256, each trained on the same rows of the fitted
market (market/world.py) with learning rates by 1 / sqrt(width). Loss is that of the first head, of
the codes of every engaged ad of held-out test requests, in nats, as the run's best checkpoint has
it. The power law is that of fig5_scaling, N = parameters without the tables of codes and features;
intervals come from a bootstrap over held-out streams and seeds. Finished runs and their losses are
kept in WORKDIR, so that an interrupted experiment goes on.

No figures have been measured yet, nor how long it takes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._figures import plain
from experiments._kept import kept_arrays
from experiments._market import prepared_market
from experiments._runs import of_steps, tokenized
from experiments._scaling import draw_fit, fit_lines, fits, rows_of, sizes_of
from gr4ad_jax.api import open_run
from gr4ad_jax.config import Count, Positive, override_all
from gr4ad_jax.gpr.config import PRESETS, Config
from gr4ad_jax.gpr.run import RunFile, open_inputs, read_run, train_run
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.tokenizer.config import TokenizerConfig

TABLES = re.compile(r"tables/level_\d+|user_features|request_features")
STEPS = {"cpu": 400, "full": 4_000}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change, beside the settings of GPR that all sizes share."""

  widths: tuple[Count, ...] = (40, 64, 96, 128, 192, 256)
  """A head for every 32."""
  seeds: Count = 2
  learning_rate: Positive = 1.5e-3
  """That of width 64; others by 1 / sqrt(width)."""
  rows: Count = 1_000
  """Held-out streams at the most."""
  bootstrap: Count = 500


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(num_users=3_000, days=42)
  gpr: Config = override_all(PRESETS["gpr-small"], {  # width, heads and rate vary
    "stream.groups": 16, "model.num_layers": 2, "model.num_token_layers": 1, "model.dropout": 0.0,
  })


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """r2, exponent, predicted_loss_error, their intervals; sizeI/params, /free_params, /loss."""
  options = override_all(Options(), overrides)
  settings = options.settings
  _, data = prepared_market(workdir, options.market)
  sids = tokenized(data, workdir / "sids", TokenizerConfig(last_level="suffix"))
  losses, params = [], []
  for width in sorted(settings.widths):
    of_width = []
    for seed in range(settings.seeds):
      console.print(f"width {width}, seed {seed}")
      folder = workdir / f"width{width}" / f"seed{seed}"
      config = config_of(options, width, seed, STEPS[size])
      train_run(RunFile(str(data.resolve()), str(sids.resolve()), config), folder, resume=True)
      of_width.append(_losses(folder, settings.rows))
    losses.append([one["loss_R"] for one in of_width])
    params.append(of_width[0]["params"])
  stream_R = of_width[0]["stream_R"]  # the same of all
  num_params_M, free_params_M = np.array(params, float).T
  sizes = free_params_M, num_params_M, np.array(losses)
  return fits(*sizes, stream_R, bootstrap=settings.bootstrap) | sizes_of(*sizes) | {
    "num_labels": float(len(stream_R))
  }


def config_of(options: Options, width: int, seed: int, steps: int) -> Config:
  """The settings of one model of the family."""
  shared = options.gpr
  model = dataclasses.replace(shared.model, width=width, num_heads=max(1, width // 32))
  train = of_steps(
    shared.train, steps, seed=seed, best_by="loss",
    learning_rate=options.settings.learning_rate * (64 / width) ** 0.5,
  )
  return dataclasses.replace(shared, model=model, train=train)


def _losses(folder: Path, most: int) -> dict[str, np.ndarray]:
  """loss_R, nats of each held-out label, stream_R, its row, and params: all, and without tables."""

  def measure() -> dict[str, np.ndarray]:
    opened, run_file = open_run(folder), read_run(folder)
    inputs = open_inputs(run_file, folder)
    rows, batch_size = inputs.rows("test"), run_file.config.train.batch_size
    ask = jax.jit(lambda params, *batch: inputs.model.apply({"params": params}, *batch).logp_BPNL)
    loss_R, stream_R = [], []
    kept = np.arange(min(len(rows), most))
    for at in range(0, len(kept), batch_size):
      mine = kept[at : at + batch_size]
      filled = np.resize(mine, batch_size)  # one shape, one compilation
      batch = inputs.make_batch([rows[row] for row in filled])
      loss_BP = -np.asarray(ask(opened.params, *batch[:4]))[: len(mine), :, 0].sum(axis=-1)
      row_N, label_N = np.nonzero(batch.group_BP[: len(mine)] >= 0)
      loss_R.append(loss_BP[row_N, label_N])
      stream_R.append(mine[row_N])
    return {
      "loss_R": np.concatenate(loss_R), "stream_R": np.concatenate(stream_R),
      "params": np.array(count_params(opened.params)),
    }

  return kept_arrays(folder / "losses.npz", measure)


def count_params(params) -> tuple[int, int]:
  """Numbers in all parameters, and in those that are no table of codes or features."""
  total = free = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    size = math.prod(x.shape)
    total += size
    free += size * (not TABLES.search(jax.tree_util.keystr(path, simple=True, separator="/")))
  return total, free


def table(results: Mapping[str, float]) -> str:
  """Sizes and the fit."""
  lines = ["| parameters | without tables | test SID loss |", "|---:|---:|---:|"]
  for row in rows_of(results, "size"):
    lines.append(
      f"| {row['params'] / 1e6:.2f} M | {row['free_params'] / 1e6:.3f} M | {row['loss']:.4f} |"
    )
  lines += ["", *fit_lines(results), "", f"{results['num_labels']:,.0f} held-out labels."]
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Loss over parameters."""
  figure = Figure(figsize=(5.2, 3.6), layout="constrained")
  ax = figure.subplots()
  draw_fit(ax, results)
  ax.set_xscale("log")
  plain(ax)
  return {"scaling": figure}
