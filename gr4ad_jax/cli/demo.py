"""The main job on the embedded dataset, stage by stage; what is finished is not done again."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.data.config import CompleteJourney, PrepareConfig
from gr4ad_jax.gr4ad.config import Config, preset
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.progress import console
from gr4ad_jax.tokenizer.config import TokenizerConfig

if TYPE_CHECKING:  # it imports JAX
  from gr4ad_jax.gr4ad.run import RunFile

TINY_HOUSEHOLDS = 250
# Searches, baselines and report last as long as so many steps. Steps, so that a machine that is
# slow, or that others use, is slow in the plan as well.
EVALUATION_STEPS = 1_400
MIN_STEPS, MAX_STEPS = 300, 6000
REFERENCE_STEPS = 2_500
REFERENCE = {  # docs/results/demo_baselines.json: mean of three seeds, 95% interval over users
  "recall@50": (0.451, 0.440, 0.463), "ndcg@50": (0.276, 0.267, 0.285),
  "value_recall@50": (0.430, 0.418, 0.441), "prospecting/recall@50": (0.206, 0.196, 0.216),
}


@dataclasses.dataclass(frozen=True)
class Demo:
  """Where, at which size, in what time."""

  workdir: Path = Path("runs/demo")
  """Folder of the run (--system gpr: of its three runs); finished stages in it are reused."""
  system: Literal["gr4ad", "gpr"] = "gr4ad"
  """GR4AD on real household logs, or GPR with its three stages on a simulated market, whose number
  of steps is fixed."""
  size: Literal["cpu", "tiny"] = "cpu"
  """The demonstration, or a small end-to-end check of a minute or two."""
  minutes: float = 10.0
  """Time for all stages; training gets what the others leave (only when training is planned)."""
  fresh: bool = False
  """Start over: removes WORKDIR first."""


def demo(options: Flat[Demo]) -> None:
  """The whole path: prepare, tokenize, train, evaluate, report."""
  keep_freed_memory()
  if options.system == "gpr":
    from gr4ad_jax.cli.demo_gpr import run_demo_gpr

    start_over(options)
    run_demo_gpr(options.workdir, options.size)
  else:
    run_demo(options)


def start_over(options: Demo) -> None:
  """Removes the folder of an earlier demo where that is asked for.

  Raises:
    ConfigError: the folder holds something else.
  """
  workdir = options.workdir
  if options.fresh and workdir.exists():
    if not (workdir / "run.json").exists() and not (workdir / "data").exists():
      raise ConfigError(f"{workdir}: does not look like a demo; not removing it")
    shutil.rmtree(workdir)


def run_demo(
  options: Demo, *, config: Config | None = None, plan: bool = True
) -> dict[str, float]:
  """Prepares, tokenizes, trains, evaluates and reports in WORKDIR.

  The number of training steps is planned once, from the measured speed and the time left, and
  stored; a run that is interrupted continues with the same plan.

  Args:
    options: as of the command.
    config: settings instead of the preset's.
    plan: with size "cpu", replace their number of steps.

  Returns:
    The metrics.

  Raises:
    LogError, ConfigError: see the stages.
    DivergedError: training became useless.
  """
  from gr4ad_jax.api import open_run
  from gr4ad_jax.data.prepare import prepare_logs
  from gr4ad_jax.evaluation.evaluate import evaluate
  from gr4ad_jax.gr4ad.run import RunFile, read_run
  from gr4ad_jax.gr4ad.train_run import train_run
  from gr4ad_jax.report.run_report import write_report
  from gr4ad_jax.tokenizer.stage import tokenize

  start, workdir, size = time.monotonic(), options.workdir, options.size
  start_over(options)
  data = workdir / "data"
  if not (data / "examples" / "examples.json").exists():
    tables.say("1/5 prepare: real household logs -> ads, users, events -> examples")
    source = CompleteJourney(households=TINY_HOUSEHOLDS if size == "tiny" else None)
    counts = prepare_logs(source, PrepareConfig(data))
    tables.print_summary(counts, title="prepared")
  if not (data / "sids" / "config.json").exists():
    tables.say("2/5 tokenize: ads -> semantic IDs")
    # Ads that share an SID share its place in every list, which costs more than a hash brings.
    made = tokenize(data, data / "sids", TokenizerConfig(last_level="suffix"))
    tables.print_health(made.lines, title="semantic IDs", reasons=False)
  if (workdir / "run.json").exists():
    run = read_run(workdir)
  else:
    chosen = config or preset("tiny" if size == "tiny" else "demo")
    run = RunFile(str(data.resolve()), str((data / "sids").resolve()), chosen)
    if plan and size == "cpu":
      tables.say("3/5 train: measuring the speed of this machine")
      seconds = options.minutes * 60 - (time.monotonic() - start)
      run = plan_steps(run, seconds)
  steps, rows = run.config.train.num_steps, run.config.train.batch_size
  tables.say(f"3/5 train: {steps:,} steps of {rows} requests")
  train_run(run, workdir, resume=True)
  tables.say("4/5 evaluate: beam search for every test request, and the baselines")
  metrics = evaluate(open_run(workdir))
  tables.say("5/5 report")
  report = write_report(workdir)
  tables.print_metrics(
    metrics, system="GR4AD", title="test split, recall over the full catalogue"
  )
  if size == "cpu":
    console.print(standing(metrics))
  console.print(f"metrics: {workdir / 'metrics.json'}")
  console.print(f"report:  {report.resolve().as_uri()}")
  return metrics


def standing(metrics: Mapping[str, float]) -> str:
  """Where a run on the whole dataset stands relative to the runs that README.md shows."""
  parts = [
    f"{name.replace('prospecting/', 'prospecting ')} {metrics[name]:.3f} against {mean:.3f} "
    f"({low:.3f}-{high:.3f})"
    for name, (mean, low, high) in REFERENCE.items() if name in metrics
  ]
  return (
    f"{metrics['checkpoint_step']:,.0f} steps here, {REFERENCE_STEPS:,} in README's table (mean of "
    f"three seeds): {'; '.join(parts)}"
  )


def plan_steps(run: RunFile, seconds: float) -> RunFile:
  """The run with as many training steps as fit into `seconds` on this machine, beside evaluation.

  Measured on a throw-away state after compilation.
  """
  import jax

  from gr4ad_jax.data.pipeline import train_batches
  from gr4ad_jax.gr4ad.build import build_decoder
  from gr4ad_jax.gr4ad.run import open_inputs
  from gr4ad_jax.gr4ad.vsl_task import vsl_task
  from gr4ad_jax.machine import sharding
  from gr4ad_jax.training.train_step import compile_programs

  inputs = open_inputs(run)
  config = run.config.train
  mesh = sharding.build_mesh()
  task = vsl_task(build_decoder(run.config.model, inputs.vocabulary), run.config.loss)
  programs = compile_programs(task, config, mesh)
  state = programs.init(jax.random.key(0))
  batches = train_batches(
    inputs.examples.sources["train"], inputs.make_batch, batch_size=config.batch_size, seed=0
  )
  begin = time.monotonic()
  state, _ = programs.step(state, programs.to_devices(next(batches)))
  jax.block_until_ready(state)
  compiled = time.monotonic()
  for _ in range(20):
    state, _ = programs.step(state, programs.to_devices(next(batches)))
  jax.block_until_ready(state)
  per_step = (time.monotonic() - compiled) / 20
  left = seconds - (time.monotonic() - begin) - (compiled - begin)
  num_steps = steps_within(left, per_step)
  every = max(100, num_steps // 5 // 50 * 50)
  return dataclasses.replace(run, config=override_all(run.config, {
    "train.num_steps": num_steps, "train.eval_every": every, "train.checkpoint_every": every,
  }))


def steps_within(seconds: float, per_step: float) -> int:
  """Training steps that end in time, in fifties: logging and validation are left a tenth."""
  steps = 0.9 * seconds / per_step - EVALUATION_STEPS
  return int(min(max(steps, MIN_STEPS), MAX_STEPS)) // 50 * 50
