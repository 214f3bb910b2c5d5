"""Table 2 of GPR in kind: each of its parts alone on HSTU, the whole, and OneRec, in HitR@100.

    python -m experiments.run gpr_table2
    python -m experiments.run gpr_table2 --set settings.data=journey

Every row is trained on the same labels by the same steps, of the same width, depth and stream, and
differs from HSTU in what its name says; the labels, the codes and the token decoder are the same.
A hit: the list of 100 ads holds the ad that was engaged with next; every engaged ad of a request is
a question of its own. The checkpoint of a run is the best by NDCG of a search on validation
requests; test requests are searched when all rows are trained. What stands in the results are means
over seeds; intervals are a bootstrap over users, who bring what every seed found for them, and
differences to HSTU are paired. Beside the rows stand simple rules, whose settings are chosen on
validation requests. Finished runs and their lists are kept in WORKDIR, so that an interrupted
experiment goes on.

Rows that are not what the paper has: refining comes with one thinking token, of which it is made;
hte ranks by log P + .1 log V, for values pass no gradient on and would change no list otherwise.
The thoughts of external_knowledge are written by a rule, not by a language model: weekly, what a
user has done most in the whole past, of which a stream holds the latest requests alone (see
_thoughts.py). External knowledge is not in the row gpr. OneRec has one label a row, so that a step
encodes a stream for each label, and as many rows as another's step has labels at the most.

Size cpu: width 64, two blocks, 16 requests; size full: the presets gpr-small and hstu-small. What
was found stands in docs/gpr.md. A run takes one to three minutes of a core that does other work as
well, OneRec ten to seventeen; so all rows of one seed take half an hour to an hour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._kept import kept_arrays
from experiments._market import prepared_market
from experiments._runs import found_ads, prepared_journey, split_groups, tokenized, training_minutes
from experiments._thoughts import kept_thoughts
from experiments.demo_baselines import repeated
from gr4ad_jax.catalog.prepared import PreparedLogs, open_logs
from gr4ad_jax.config import ConfigError, Count, nearest, override_all
from gr4ad_jax.evaluation.rivals import find_simple
from gr4ad_jax.gpr.config import (
  BASES,
  PRESETS,
  Config,
  GuidedSearchConfig,
  ModelConfig,
  StreamConfig,
  System,
)
from gr4ad_jax.gpr.run import RunFile, train_run
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.report.verdict import baseline_label
from gr4ad_jax.search.held_out import eval_requests
from gr4ad_jax.search.ranking import EvalRequests, mean_metrics, paired_difference, ranking_metrics
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.metric_log import read_log

K = 100
METRIC = f"hitr@{K}"
BASE = "hstu"
KNOWLEDGE = "external_knowledge"
ROWS: dict[str, dict[str, str]] = {
  BASE: {},
  "onerec": {"stream.labels": "1", "model.attention": "bidirectional"},
  "hybrid_attention": {"model.attention": "hybrid"},
  "token_ffn": {"model.token_ffn": "true"},
  "token_norm": {"model.token_norm": "true"},
  "mor": {"model.recursions": "2"},
  "thinking": {"model.thinking": "4"},
  "refining": {"model.thinking": "1", "model.refining": "10"},
  "hte": {"model.values": "true", "search.value_exponent": "0.1"},
  "mtp": {"model.predictions": "4"},
  KNOWLEDGE: {"stream.thoughts": "8"},
  "gpr": {
    "model.attention": "hybrid", "model.token_ffn": "true", "model.token_norm": "true",
    "model.recursions": "2", "model.thinking": "4", "model.refining": "10",
    "model.values": "true", "model.predictions": "4",
  },
}
PAPER = {  # HitR@100, percent
  BASE: 18.98, "onerec": 19.85, "hybrid_attention": 20.56, "token_ffn": 21.98, "token_norm": 20.76,
  "mor": 20.09, "thinking": 21.75, "refining": 19.61, "hte": 19.91, "mtp": 22.38,
  KNOWLEDGE: 20.13, "gpr": 27.32,
}
RULES = ("rule", "own_history", "trending")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change, beside the settings of HSTU."""

  data: Literal["market", "journey"] = "market"
  """The fitted market, or Complete Journey."""
  rows: tuple[str, ...] = ()
  """Rows beside the first; () = all."""
  seeds: Count = 3
  """Training runs of each row."""
  requests: Count = 2_000
  """Test requests that judge, evenly spread."""
  bootstrap: Count = 1_000
  """Resamples of users for the intervals."""


@dataclasses.dataclass(frozen=True)
class Options(Config):
  """Everything that --set may change: the settings of HSTU, which all rows share, and these."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(num_users=3_000, days=42)


SIZES = {
  "cpu": Options(
    stream=StreamConfig(groups=16),
    model=ModelConfig(width=64, num_heads=2, num_layers=2, num_token_layers=1, **BASES[BASE]),
    train=TrainConfig(num_steps=600, batch_size=16, learning_rate=2e-3, eval_every=200,
                      eval_batches=4, checkpoint_every=200, best_by="ndcg@50", rank_requests=256),
    search=GuidedSearchConfig(widths=(32, 64, 128)),
  ),
  "full": Options(**vars(PRESETS["hstu-small"])),
}


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ROW/hitr@100 with its interval, ROW/hitr@100/seedN, ROW/minutes, difference/ROW/hitr@100."""
  options = override_all(SIZES[size], overrides)
  settings, names = options.settings, _names(options.settings)
  data, sids = _prepared(workdir, options)
  thoughts = kept_thoughts(data, workdir / "thoughts.parquet") if KNOWLEDGE in names else None
  folders = {
    name: [workdir / name / f"seed{seed}" for seed in range(settings.seeds)] for name in names
  }
  minutes: dict[str, float] = {}
  for name, of_row in folders.items():
    for seed, folder in enumerate(of_row):
      console.print(f"row: {name}, seed {seed}")
      run_file = run_of_row(name, options, data, sids, seed=seed, thoughts=thoughts)
      train_run(run_file, folder, resume=True)
      taken = training_minutes(read_log(folder), run_file.config.train.batch_size)
      minutes[f"{name}/minutes"] = minutes.get(f"{name}/minutes", 0) + taken / settings.seeds
  opened = open_logs(data)
  requests = eval_requests(split_groups(opened.examples, "test", settings.requests))
  lists = {
    name: np.stack([found_ads(f, "test", k=K, limit=settings.requests) for f in of_row])
    for name, of_row in folders.items()
  }
  lists |= {
    name: np.repeat(ranked_RK[None], settings.seeds, axis=0)
    for name, ranked_RK in _rules(workdir / "rules.npz", opened, requests).items()
  }
  advertiser_A = np.unique(opened.logs.ads.advertiser_id, return_inverse=True)[1]
  results = compared(lists, requests, advertiser_A=advertiser_A, bootstrap=settings.bootstrap)
  return results | minutes | {
    "num_requests": float(len(requests.user_R)), "num_ads": float(len(advertiser_A)),
    "num_steps": float(options.train.num_steps), "num_seeds": float(settings.seeds),
  }


def _names(settings: Settings) -> list[str]:
  """The rows that are wanted, the first among them.

  Raises:
    ConfigError: an unknown row.
  """
  for name in settings.rows:
    if name not in ROWS:
      raise ConfigError(f"settings.rows: {name!r}: {nearest(name, ROWS)}")
  return [name for name in ROWS if name == BASE or not settings.rows or name in settings.rows]


def _prepared(workdir: Path, options: Options) -> tuple[Path, Path]:
  """Folders of the data and of their semantic IDs, one ad each."""
  if options.settings.data == "market":
    _, data = prepared_market(workdir, options.market)
  else:
    data = prepared_journey(workdir)
  config = TokenizerConfig(last_level="suffix", quantizer="rq_kmeans_plus")
  return data, tokenized(data, workdir / "sids", config)


def run_of_row(
  name: str, options: Options, data: Path, sids: Path, *, seed: int, thoughts: Path | None = None
) -> RunFile:
  """What is trained for a row; external knowledge alone is told thoughts."""
  changes = ROWS[name] | {"train.seed": str(seed)}
  if name == "onerec":
    rows = options.train.batch_size * options.stream.labels
    changes |= {"train.batch_size": str(rows)}
  shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(Config)}
  config = override_all(Config(**shared), changes)
  system: System = name if name in BASES else "gpr"
  told = str(thoughts.resolve()) if name == KNOWLEDGE and thoughts is not None else ""
  return RunFile(str(data.resolve()), str(sids.resolve()), config, system, thoughts=told)


def _rules(file: Path, opened: PreparedLogs, requests: EvalRequests) -> dict[str, np.ndarray]:
  """Name -> lists of the simple rules, int32 [R, K]; kept in a file."""

  def find() -> dict[str, np.ndarray]:
    found = find_simple(opened.logs, opened.examples, requests, k=K)
    return {name: found[name] for name in RULES if name in found}

  return kept_arrays(file, find)


def compared(
  lists: Mapping[str, np.ndarray], requests: EvalRequests, *, advertiser_A: np.ndarray,
  bootstrap: int,
) -> dict[str, float]:
  """ROW/hitr@100 and difference/ROW/hitr@100 with intervals, and of each seed.

  Args:
    lists: of every row, int32 [seeds, R, K]; the first is what others are compared to.
    requests: R requests with their targets.
    advertiser_A: advertiser of every ad.
    bootstrap: resamples of users.
  """
  request_N, place_N = np.nonzero(requests.target_RC >= 0)
  single = one_target_each(requests, request_N, place_N)
  first_SNK = next(iter(lists.values()))[:, request_N]
  asked, results = repeated(single, len(first_SNK)), {}
  for name, ranked_SRK in lists.items():
    ranked_SNK = ranked_SRK[:, request_N]
    flat_NK = np.concatenate(ranked_SNK)
    found = ranking_metrics(
      flat_NK, asked, advertiser_A=advertiser_A, ks=(K,), bootstrap=bootstrap
    )
    more = paired_difference(
      flat_NK, np.concatenate(first_SNK), requests=asked, k=K, bootstrap=bootstrap
    )
    for end in ("", "/ci_low", "/ci_high"):
      results[f"{name}/{METRIC}{end}"] = found[f"recall@{K}{end}"]
      results[f"difference/{name}/{METRIC}{end}"] = more[f"recall@{K}{end}"]
    for seed, ranked_NK in enumerate(ranked_SNK):
      hit = mean_metrics(ranked_NK, single, k=K)[f"recall@{K}"]
      results[f"{name}/{METRIC}/seed{seed}"] = hit
  return {name: float(value) for name, value in results.items()}


def one_target_each(
  requests: EvalRequests, request_N: np.ndarray, place_N: np.ndarray
) -> EvalRequests:
  """A request for every target: recall is then the share of hits."""
  rows = requests.rows(request_N)
  return dataclasses.replace(rows, **{
    name: np.take_along_axis(getattr(rows, name), place_N[:, None], axis=1)
    for name in ("target_RC", "value_RC", "new_RC")
  })


def _rows(results: Mapping[str, float]) -> list[str]:
  return [name for name in (*ROWS, *RULES) if f"{name}/{METRIC}" in results]


def _label(name: str) -> str:
  return {"gpr": "GPR, all of these"}.get(name) or (
    baseline_label(name) if name in BASES or name in RULES else "+ " + name.replace("_", " ")
  )


def table(results: Mapping[str, float]) -> str:
  """Every row, what it finds more than HSTU, and the paper's number."""
  lines = ["| | HitR@100 | less HSTU's | over HSTU's | paper | minutes a run |",
           "|---|---:|---:|---:|---:|---:|"]
  base = results[f"{BASE}/{METRIC}"]
  for name in _rows(results):
    over, paper, minutes = "-", "-", results.get(f"{name}/minutes")
    if name != BASE and base:
      over = f"{results[f'{name}/{METRIC}'] / base - 1:+.1%}"
    if name in PAPER:
      paper = f"{PAPER[name]:.2f}%" + (f" ({PAPER[name] / PAPER[BASE] - 1:+.1%})" * (name != BASE))
    more = cell(results, f"difference/{name}/{METRIC}", sign="+", digits=4, between=" to ")
    lines.append(
      f"| {_label(name)} | {cell(results, f'{name}/{METRIC}', digits=4, between=' to ')} | "
      f"{more if name != BASE else '-'} | {over} | {paper} | "
      f"{'-' if minutes is None else f'{minutes:.1f}'} |"
    )
  return "\n".join(lines) + (
    f"\n\n{results['num_seeds']:.0f} seeds, {results['num_steps']:,.0f} steps each, "
    f"{results['num_requests']:,.0f} test requests, {results['num_ads']:,.0f} ads. Intervals: "
    "bootstrap over users, 95%; differences are paired."
  )


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """What each row finds, less what HSTU finds."""
  names = [name for name in _rows(results) if name != BASE]
  figure = Figure(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
  ax = figure.subplots()
  for place, name in enumerate(names):
    colour = "tab:gray" if name in RULES else "tab:blue"
    dot(ax, results, f"difference/{name}/{METRIC}", place, colour)
  ax.axvline(0, color="black", lw=0.8)
  ax.set_title("HitR@100, less HSTU's", loc="left")
  ax.set_yticks(range(len(names)), [_label(name) for name in names])
  ax.invert_yaxis()
  plain(ax, grid="x")
  return {"hits": figure}
