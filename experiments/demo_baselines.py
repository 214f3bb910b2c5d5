"""GR4AD against popularity, co-occurrence and own history on real household logs.

    python -m experiments.run demo_baselines --workdir runs/demo_baselines
    python -m experiments.run demo_baselines --workdir runs/demo_baselines_full --size full

Complete Journey, weeks 50-53. Size cpu is `make demo`: training takes what the other stages leave
of 10 minutes. Size full trains for FULL_STEPS steps. `--set` changes the preset "demo"; with one
of the settings in PLANNED, size cpu plans nothing and takes train.num_steps as it is.

Expected numbers on two CPU cores with `--set train.num_steps=2000`: recall@50 .429, value_recall@50
.412, prospecting/recall@50 .169; rule of two terms .408, .378, .174; boosted trees .437, .411,
.178.
Run time on two CPU cores: cpu 10 minutes; full: four steps a second, so about 25 minutes (its
result has not been measured yet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments._figures import plain
from gr4ad_jax.cli import demo
from gr4ad_jax.config import override, override_all
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.gr4ad.run import read_run
from gr4ad_jax.report.verdict import SCOPES, compare_with_baselines, interval_of, methods, verdict
from gr4ad_jax.training.metric_log import read_log

CPU_MINUTES = 10.0
FULL_STEPS = 5_000
PLANNED = {"train.num_steps", "train.eval_every", "train.checkpoint_every"}
COLUMNS = ("recall@10", "ndcg@50", "recall@50", "value_recall@50", "prospecting/recall@50",
           "prospecting/value_recall@50")
PLOTTED = {"recall@50": "Recall@50", "value_recall@50": "Value recall@50"}


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """metrics.json of the demo and `training_minutes`."""
  config = preset("demo")
  if size == "full":
    config = override(config, "train.num_steps", FULL_STEPS)
  config = override_all(config, overrides)
  planned = size == "cpu" and not PLANNED & overrides.keys()
  options = demo.Demo(workdir, minutes=CPU_MINUTES)
  metrics = demo.run_demo(options, config=config, plan=planned)
  minutes = training_minutes(read_log(workdir), read_run(workdir).config.train.batch_size)
  return metrics | {"training_minutes": minutes}


def training_minutes(rows: Sequence[Mapping], batch_size: int) -> float:
  """Minutes spent in optimizer steps, without compilation, validation and checkpoints.

  Args:
    rows: of the training log.
    batch_size: examples per step.
  """
  seconds, last_step = 0.0, 0
  for row in rows:
    if "examples_per_second" in row:
      seconds += (row["step"] - last_step) * batch_size / row["examples_per_second"]
      last_step = row["step"]
  return seconds / 60


def table(results: Mapping[str, float]) -> str:
  """Metrics with their 95% intervals, and what they say in one sentence."""
  lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * len(COLUMNS) + "|"]
  for label, prefix in methods(results, system="GR4AD").items():
    cells = [_cell(results, prefix + column) for column in COLUMNS]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  sentence, _ = verdict(compare_with_baselines(results), system="GR4AD")
  return "\n".join(lines) + (
    f"\n\n{sentence}\n\n{results['training_minutes']:.1f} minutes of training, checkpoint of step "
    f"{results['checkpoint_step']:,.0f}; {results['num_requests']:,.0f} test requests of "
    f"{results['num_users']:,.0f} users, {results['num_ads']:,.0f} ads. Intervals: bootstrap over "
    "users, 95%. prospecting: lists and targets without what the user had before."
  )


def _cell(results: Mapping[str, float], key: str) -> str:
  estimate = interval_of(results, key)
  if estimate is None:
    return "-"
  if estimate.low is None or estimate.high is None:
    return f"{estimate.value:.3f}"
  return f"{estimate.value:.3f} ({estimate.low:.3f}-{estimate.high:.3f})"


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """recall@50 and value_recall@50 of every list, over all targets and in prospecting."""
  labels = methods(results, system="GR4AD")
  figure = Figure(figsize=(9, 0.6 * len(labels) + 1.6), layout="constrained")
  axes = figure.subplots(1, len(PLOTTED), sharey=True)
  looks = (("tab:blue", "o", -0.12), ("tab:orange", "D", 0.12))
  for ax, (metric, title) in zip(axes, PLOTTED.items(), strict=True):
    for (scope, words), (colour, marker, shift) in zip(SCOPES.items(), looks, strict=True):
      for row, prefix in enumerate(labels.values()):
        estimate = interval_of(results, prefix + scope + metric)
        if estimate is None:
          continue
        ax.plot(estimate.value, row + shift, marker, color=colour, label=words if not row else None)
        if estimate.low is not None and estimate.high is not None:
          ax.hlines(row + shift, estimate.low, estimate.high, colors=colour)
    ax.set_title(title, loc="left")
    ax.set_xlim(left=0)
    plain(ax, grid="x")
  axes[0].set_yticks(range(len(labels)), labels)
  axes[0].invert_yaxis()
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                frameon=False)
  return {"recall": figure}
