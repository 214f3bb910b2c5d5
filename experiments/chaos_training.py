"""Training that is killed again and again ends with the same bits as training left alone.

    python -m experiments.run chaos_training

`gr4ad train --resume` on a few households of Complete Journey, in a process of its own that meets,
at random moments, one after another: SIGKILL; SIGTERM; a disk that is full from then on (a limit on
the size of its files stands in for it, so Linux is needed); SIGKILL and then half of the newest
checkpoint's largest file. After the last one the run finishes. Parameters, optimizer state and the
log of every step are compared with those of a run that nothing disturbed.

Expected (docs/architecture.md): kills 20, identical 1; steps_done_twice was 146. Run time on two
busy CPU cores: 16 minutes.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._settings import with_overrides
from gr4ad_jax.config import override_all, require
from gr4ad_jax.data import prepare
from gr4ad_jax.data.config import CompleteJourney, PrepareConfig
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import Config, ModelConfig
from gr4ad_jax.gr4ad.run import open_inputs, read_run
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.machine import sharding
from gr4ad_jax.machine.progress import console
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.train_step import TrainState, abstract_state

KINDS = ("truncated", "disk_full", "sigkill", "sigterm")
CONFIG = Config(
  model=ModelConfig(
    width=32, num_heads=2, num_layers=2, num_lazy_layers=1, copy_path=True, dropout=0.1
  ),
  train=TrainConfig(
    num_steps=600, batch_size=16, learning_rate=3e-3, log_every=1, eval_every=50, eval_batches=2,
    checkpoint_every=7, data_parallel=1,
  ),
  search=SearchConfig(widths=(8, 16, 32)),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  kills: int = 20
  num_steps: int = 600
  """Enough to outlast the kills; each life does up to 20."""
  households: int = 150
  seed: int = 0
  """Draws the moments and their order."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """kills, identical (1 or 0), how many kills of each kind, steps done twice."""
  del size
  settings = with_overrides(Settings(), overrides)
  require(settings.num_steps >= 25 * settings.kills, "settings.num_steps", settings.num_steps,
          f"needs 25 for each of the {settings.kills} kills")
  data = workdir / "data"
  if not (data / "sids" / "health.json").exists():
    source = CompleteJourney(min_ad_events=3, households=settings.households)
    prepare.prepare_logs(source, PrepareConfig(data, overwrite=True))
    tokenize(data, data / "sids", TokenizerConfig())
  calm, wild = workdir / "calm", workdir / "wild"
  shutil.rmtree(wild, ignore_errors=True)
  console.print("undisturbed")
  process = _start(data, calm, settings)
  if code := process.wait():
    raise RuntimeError(f"the undisturbed run failed with {code}; see {calm}.log")
  rng = np.random.default_rng(settings.seed)
  kinds = [KINDS[i % len(KINDS)] for i in range(settings.kills)]
  rng.shuffle(kinds)
  counts, repeated = dict.fromkeys(KINDS, 0), 0
  for number, kind in enumerate(kinds, 1):
    done = _last_step(wild)
    process = _start(data, wild, settings)
    _disturb(process, wild, kind, rng)
    reached = _last_step(wild)
    kept = max(_steps(wild), default=0)
    repeated += max(0, reached - kept)
    counts[kind] += 1
    console.print(
      f"{number} of {settings.kills}: {kind} after step {reached} (began after {done}), exit code "
      f"{process.returncode}, goes on from {kept}"
    )
  process = _start(data, wild, settings)
  if code := process.wait():
    raise RuntimeError(f"the last life failed with {code}; see {wild}.log")
  results = {"kills": float(sum(counts.values())), "identical": float(_identical(calm, wild))}
  return results | {name: float(count) for name, count in counts.items()} | {
    "steps_done_twice": float(repeated)
  }


def _start(data: Path, folder: Path, settings: Settings) -> subprocess.Popen:
  """`gr4ad train --resume` with CONFIG; what it prints goes to FOLDER.log."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "gr4ad_jax", "train", "--data", str(data), "--workdir",
             str(folder), "--preset", "tiny", "--resume"]  # fmt: skip
  config = override_all(CONFIG, {"train.num_steps": settings.num_steps})
  for part in ("model", "train", "search"):
    for name, value in dataclasses.asdict(getattr(config, part)).items():
      if isinstance(value, bool):
        command.append(f"--{part}.{name}" if value else f"--{part}.no-{name}")
      else:
        command += [f"--{part}.{name}", *map(str, value if isinstance(value, tuple) else (value,))]
  with folder.with_suffix(".log").open("ab") as log:
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)


def _disturb(process: subprocess.Popen, folder: Path, kind: str, rng: np.random.Generator) -> None:
  """Waits until the life has done a step or two, then for a random moment, and strikes."""
  began = _last_step(folder)
  target = began + int(rng.integers(1, 20))
  # A damaged checkpoint needs another one before it; early lives of that kind live longer.
  needed = 2 if kind == "truncated" else 0
  _wait(
    lambda: _last_step(folder) >= target and len(_steps(folder)) >= needed, process, folder
  )
  time.sleep(rng.uniform(0, 0.05))
  if kind == "disk_full":
    # Either nothing can be written, or small files still can.
    limit = int(rng.choice([2**12, 2**18]))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  else:
    process.send_signal(signal.SIGTERM if kind == "sigterm" else signal.SIGKILL)
  process.wait(timeout=120)
  expected = {"sigterm": (143,), "disk_full": (1, 2)}.get(kind, (-signal.SIGKILL,))
  if process.returncode not in expected:
    raise RuntimeError(f"{kind}: exit code {process.returncode}, not {expected}; see {folder}.log")
  if kind == "truncated" and len(_steps(folder)) >= 2:
    files = [f for f in (folder / "checkpoints" / str(max(_steps(folder)))).rglob("*")
             if f.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _wait(ready, process: subprocess.Popen, folder: Path) -> None:
  deadline = time.monotonic() + 240
  while not ready():
    if process.poll() is not None or time.monotonic() > deadline:
      raise RuntimeError(f"the run ended or hangs before its kill; see {folder}.log")
    time.sleep(0.005)


def _last_step(folder: Path) -> int:
  rows = read_log(folder)
  return rows[-1]["step"] if rows else 0


def _steps(folder: Path) -> list[int]:
  """Whole checkpoints."""
  place = folder / "checkpoints"
  return [int(f.name) for f in place.iterdir() if f.name.isdigit()] if place.is_dir() else []


def _identical(calm: Path, wild: Path) -> bool:
  """Every bit of the final states, and every logged loss."""
  logs = [
    [(row["step"], row["kind"], row["loss"]) for row in read_log(folder)]
    for folder in (calm, wild)
  ]
  states = [jax.tree.leaves(_final(folder)) for folder in (calm, wild)]
  return logs[0] == logs[1] and all(
    np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*states, strict=True)
  )


def _final(folder: Path) -> TrainState:
  run_file = read_run(folder)
  config = run_file.config
  inputs = open_inputs(run_file)
  task = vsl_task(build_decoder(config.model, inputs.vocabulary), config.loss)
  abstract = abstract_state(task, config.train, sharding.build_mesh(data_parallel=1))
  with Checkpoints(folder / "checkpoints") as checkpoints:
    return checkpoints.restore(abstract, config.train.num_steps)[0]


def table(results: Mapping[str, float]) -> str:
  """One line."""
  kinds = ", ".join(f"{results[name]:.0f} {name.replace('_', ' ')}" for name in KINDS)
  verdict = "identical to" if results["identical"] else "NOT the same as"
  return (
    f"{results['kills']:.0f} kills ({kinds}); {results['steps_done_twice']:.0f} steps done twice. "
    f"Final parameters, optimizer state and log: {verdict} the undisturbed run's."
  )


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """None."""
  del results
  return {}
