"""Figure 5 at CPU size: loss and revenue against parameters, FLOPs and beam width.

    python -m experiments.run fig5_scaling

A family of LazyAR decoders with the paper's depth (L = 9, K = 6) and widths 16 to 224, 0.2 to 8
million parameters, each trained on the same requests of the fitted market (market/world.py) by a
`gr4ad sweep`. Loss is the SID loss (nats) of held-out test requests; revenue is what four ads in
the model's own order earn, computed from the market's truth.

    L(N) = E + A N^-alpha

is fitted to the means over seeds, N = parameters without embedding tables; intervals come from a
bootstrap over held-out users and seeds. The largest model's loss is predicted from the others.
Beam widths are those of the largest model. Finished runs are reused.

Expected (docs/scaling.md): exponent .502 (95% .423 to .589), floor 4.573 nats, the largest model's
loss predicted within .7%. Run time on two CPU cores: 20 minutes a seed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._figures import plain
from experiments._market import MarketTest, open_market_test, prepared_market, recommend_all
from experiments._runs import run_of, tokenized
from experiments._scaling import draw_fit, fit_lines, fits, rows_of, sizes_of
from gr4ad_jax.cli.sweep import run_name, run_sweep
from gr4ad_jax.cli.sweep_config import Sweep
from gr4ad_jax.config import override_all
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import Config, LossConfig, ModelConfig, preset
from gr4ad_jax.gr4ad.cost import num_params, num_table_params
from gr4ad_jax.gr4ad.run import Inputs, example_flops, open_inputs, open_run
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.config import TrainConfig

WIDTHS = (16, 32, 64, 96, 144, 224)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  widths: tuple[int, ...] = WIDTHS
  seeds: int = 2
  learning_rate: float = 3e-3
  """That of width 64; others by 1 / sqrt(width)."""
  beams: tuple[int, ...] = (4, 16, 64, 128)
  """Beams on every level, for the largest model; the others have search.widths."""
  revenue_requests: int = 2_000
  bootstrap: int = 500


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(num_users=6_000, days=42)
  model: ModelConfig = ModelConfig(num_layers=9, num_lazy_layers=6)  # width and heads vary
  loss: LossConfig = LossConfig()
  train: TrainConfig = TrainConfig(num_steps=1_000, batch_size=64, eval_every=500)
  search: SearchConfig = SearchConfig(widths=(64, 64, 64))


class Family(NamedTuple):
  """Models of all sizes, S seeds each, smallest first. M sizes, R held-out requests."""

  num_params_M: np.ndarray
  free_params_M: np.ndarray  # without tables
  train_flops_M: np.ndarray  # of the whole training
  loss_MSR: np.ndarray  # nats, of each held-out request
  user_R: np.ndarray
  revenue_MS: np.ndarray  # currency a request


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """r2, exponent, predicted_loss_error, their intervals; sizeI/..., beamI/...."""
  keep_freed_memory()
  options = override_all(Options(), overrides)
  if size == "full":
    options = override_all(options, {"settings.seeds": 3, "train.num_steps": 6_000})
  market, data = prepared_market(workdir, options.market)
  sids = tokenized(data, workdir / "sids", TokenizerConfig())
  sweep = _sweep(workdir, data, sids, options)
  for result in run_sweep(sweep):
    if result.status != "finished":
      raise RuntimeError(f"{workdir / 'sweep' / result.name}: failed; see output.log there")
  test = open_market_test(
    market, data, "test", num_revenue=options.settings.revenue_requests, num_recall=1
  )
  family, beams = _judged(workdir, sweep, test, options)
  sizes = family.free_params_M, family.num_params_M, family.loss_MSR
  results = fits(*sizes, family.user_R, bootstrap=options.settings.bootstrap) | beams
  results |= sizes_of(*sizes)
  for row, (flops, revenue_S) in enumerate(
    zip(family.train_flops_M, family.revenue_MS, strict=True)
  ):
    results |= {
      f"size{row}/train_flops": float(flops), f"size{row}/revenue": float(revenue_S.mean()),
    }
  return results


def _sweep(workdir: Path, data: Path, sids: Path, options: Options) -> Sweep:
  settings = options.settings
  sizes = ",".join(
    f"{width}+{max(1, width // 32)}+{settings.learning_rate * (64 / width) ** 0.5:.3g}"
    for width in sorted(settings.widths)
  )
  start, shared = preset("tiny"), []
  for part in ("model", "loss", "train", "search"):
    wanted = dataclasses.asdict(getattr(options, part))
    there = dataclasses.asdict(getattr(start, part))
    for name, value in wanted.items():
      if value != there[name] and name not in ("width", "num_heads", "learning_rate", "seed"):
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shared.append(f"{part}.{name}={text}")
  grid = (
    f"train.seed={','.join(map(str, range(settings.seeds)))}",
    f"model.width+model.num_heads+train.learning_rate={sizes}",
  )
  return Sweep(data, workdir / "sweep", grid, sids=sids, preset="tiny", set=tuple(shared))


def _judged(
  workdir: Path, sweep: Sweep, test: MarketTest, options: Options
) -> tuple[Family, dict[str, float]]:
  """Losses and revenue of all models, and of the largest by beam width; kept in WORKDIR."""
  settings, inputs, examples = options.settings, None, None
  sizes: dict[int, list[tuple[np.ndarray, float]]] = {}
  about: dict[int, tuple[int, int, float]] = {}
  beams: dict[str, float] = {}
  for point in sweep.varied.points():
    config = sweep.config_of(point)
    run_file = run_of(sweep.data, sweep.sids, config)
    if inputs is None:
      inputs = open_inputs(run_file)
      examples = read_split(inputs.examples, "test")
    name = f"{config.model.width}-{config.train.seed}"
    folder = sweep.workdir / run_name(point)
    opened = open_run(folder)
    file = workdir / "judged" / f"{name}.npz"
    if not file.exists():
      console.print(f"judge: width {config.model.width}, seed {config.train.seed}")
      loss_R = _losses(config, opened.params, inputs, examples)
      revenue, _ = _revenue(opened, test, config.search)
      file.parent.mkdir(parents=True, exist_ok=True)
      np.savez(file, loss_R=loss_R, revenue=revenue)
    stored = np.load(file)
    sizes.setdefault(config.model.width, []).append((stored["loss_R"], float(stored["revenue"])))
    total = num_params(config.model, inputs.vocabulary)
    about[config.model.width] = (
      total, total - num_table_params(config.model, inputs.vocabulary),
      example_flops(config.model, inputs) * config.train.batch_size * config.train.num_steps,
    )
    if config.model.width == max(settings.widths) and config.train.seed == 0:
      beams = _by_beams(workdir / "judged" / "beams.json", opened, test, options)
  widths = sorted(sizes)
  family = Family(
    *(np.array([about[width][i] for width in widths], float) for i in range(3)),
    np.stack([np.stack([loss_R for loss_R, _ in sizes[width]]) for width in widths]),
    np.array([example.user for example in examples]),
    np.array([[revenue for _, revenue in sizes[width]] for width in widths]),
  )
  return family, beams


def _losses(config: Config, params, inputs: Inputs, examples: Sequence) -> np.ndarray:
  """float32 [R] SID loss (nats) of each held-out example's first target."""

  decoder = build_decoder(config.model, inputs.vocabulary)

  @jax.jit
  def losses(params, batch):
    log_probs = decoder.apply({"params": params}, batch.context, batch.target_BCL)
    return -log_probs.sid_BCL[:, 0].sum(axis=-1)

  size = 128
  padded = list(examples) + [examples[-1]] * (-len(examples) % size)
  found = [
    np.asarray(losses(params, inputs.make_batch(padded[at : at + size])))
    for at in range(0, len(padded), size)
  ]
  return np.concatenate(found)[: len(examples)]


def _revenue(opened: Opened, test: MarketTest, search: SearchConfig) -> tuple[float, float]:
  """Currency a request in the model's own order, and requests/s of the search."""
  recommender, maker = opened.recommender(search), opened.contexts
  recommend_all(recommender, maker, test.contexts[: search.batch_size], search)  # compiles
  start = time.perf_counter()
  ad_RK = recommend_all(recommender, maker, test.contexts, search).ad_RK
  rate = len(test.contexts) / (time.perf_counter() - start)
  return test.arm_revenue(ad_RK), rate


def _by_beams(
  file: Path, opened: Opened, test: MarketTest, options: Options
) -> dict[str, float]:
  if not file.exists():
    found: dict[str, float] = {}
    for row, beams in enumerate(options.settings.beams):
      console.print(f"judge: {beams} beams")
      widths = (beams,) * len(opened.sids.codebook_sizes)
      search = dataclasses.replace(options.search, widths=widths)
      revenue, rate = _revenue(opened, test, search)
      found |= {
        f"beam{row}/width": float(beams), f"beam{row}/revenue": revenue,
        f"beam{row}/requests_per_s": rate,
      }
    write_json(file, found)
  return json.loads(file.read_text())


def table(results: Mapping[str, float]) -> str:
  """Sizes, the fit, beams."""
  lines = [
    "| parameters | without tables | training FLOPs | test SID loss | revenue |",
    "|---:|---:|---:|---:|---:|",
  ]
  for row in rows_of(results, "size"):
    lines.append(
      f"| {row['params'] / 1e6:.2f} M | {row['free_params'] / 1e6:.3f} M | "
      f"{row['train_flops']:.2e} | {row['loss']:.4f} | {row['revenue']:.4f} |"
    )
  lines += [
    "", *fit_lines(results),
    "", "| beams, largest model | revenue | requests/s |", "|---:|---:|---:|",
  ]
  for row in rows_of(results, "beam"):
    lines.append(
      f"| {row['width']:.0f} | {row['revenue']:.4f} | {row['requests_per_s']:,.0f} |"
    )
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Loss over parameters and FLOPs, revenue over parameters and beams."""
  sizes, beams = rows_of(results, "size"), rows_of(results, "beam")
  figure = Figure(figsize=(9.5, 6.4), layout="constrained")
  (loss_ax, flops_ax), (revenue_ax, beam_ax) = figure.subplots(2, 2)
  free, loss = ([row[name] for row in sizes] for name in ("free_params", "loss"))
  draw_fit(loss_ax, results)
  flops_ax.plot([row["train_flops"] for row in sizes], loss, "o-", color="#2f5f8f")
  flops_ax.set_title("Test SID loss (nats)", loc="left")
  flops_ax.set_xlabel("training FLOPs")
  revenue_ax.plot(free, [row["revenue"] for row in sizes], "o-", color="#2f5f8f")
  revenue_ax.set_title("Revenue of a request", loc="left")
  revenue_ax.set_xlabel("parameters without tables")
  beam_ax.plot([row["width"] for row in beams], [row["revenue"] for row in beams], "o-",
               color="#2f5f8f")
  beam_ax.set_title("Revenue of a request, largest model", loc="left")
  beam_ax.set_xlabel("beams")
  plain(loss_ax, flops_ax, revenue_ax, beam_ax)
  for ax in (loss_ax, flops_ax, revenue_ax, beam_ax):
    ax.set_xscale("log")
  for ax in (revenue_ax, beam_ax):
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])  # the values lie close together, far above 0
  widths = [int(row["width"]) for row in beams]
  beam_ax.set_xticks(widths, widths)
  beam_ax.minorticks_off()
  return {"fig5": figure}
