"""Many training runs from one declaration: `gr4ad sweep`.

    gr4ad sweep --data DATA --workdir SWEEP --preset tiny --grid model.width=32,64 train.seed=0,1

Every combination is a run in a folder of its own, trained by `gr4ad train --resume` in a process of
its own: an interrupted sweep goes on, finished runs are not trained again, and one that fails does
not stop the others. `launch` puts words before that command, one launch a run:

    --launch './launch_tpu.sh --name sweep-{number} --zone ZONE --create --type v6e-8 --delete --'

    SWEEP/RUN/            a run folder; output.log holds what its process printed
    SWEEP/results.json    settings and results of every run
    SWEEP/search.log      trials of a search (Optuna)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gr4ad_jax.cli.sweep_config import Sweep
from gr4ad_jax.config import ConfigError, differences
from gr4ad_jax.gpr import run as gpr
from gr4ad_jax.gr4ad import run as gr4ad
from gr4ad_jax.machine import extras, storage
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.run_folder import require_system
from gr4ad_jax.training.selection import Selection


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a run: the loss of the last validation, and the best by `train.best_by`; NaN where
  there is none."""

  name: str
  settings: Mapping[str, str]
  status: str  # finished, failed
  loss: float = math.nan
  best: float = math.nan
  values: Mapping[str, float] = dataclasses.field(default_factory=dict)


class _Run(NamedTuple):
  number: int
  name: str  # of its folder in that of the sweep
  settings: Mapping[str, str]


def run_sweep(sweep: Sweep) -> list[Result]:
  """Runs what is not finished; SWEEP/results.json holds all results after every run.

  Returns:
    Results in the order of the grid, or of the trials.

  Raises:
    ConfigError: a folder holds a run of other settings, or Optuna is missing.
  """
  sweep.workdir.mkdir(parents=True, exist_ok=True)
  if sweep.trials:
    return _search(sweep)
  points = sweep.varied.points()
  runs = [_Run(number, run_name(point), point) for number, point in enumerate(points)]
  for run in runs:
    _check_folder(sweep, run)
  results: dict[int, Result] = {}
  # Left in the other order: processes are told to stop before the pool waits for them.
  with concurrent.futures.ThreadPoolExecutor(sweep.jobs) as pool, _Processes() as processes:
    numbers = {pool.submit(_run_one, sweep, run, processes): run.number for run in runs}
    for future in track(concurrent.futures.as_completed(numbers), "runs", len(runs)):
      results[numbers[future]] = future.result()
      _write(sweep, results)
  return _in_order(results)


def _search(sweep: Sweep) -> list[Result]:
  """Optuna proposes; what counts of a run is its best validation by `train.best_by`."""
  try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
  except ImportError:
    raise ConfigError(f"a search needs Optuna; {extras.install('search')}") from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  study = optuna.create_study(
    study_name="sweep", load_if_exists=True,
    direction="minimize" if sweep.config_of({}).train.best_by == "loss" else "maximize",
    storage=JournalStorage(JournalFileBackend(str(sweep.workdir / "search.log"))),
  )
  # A search that goes on draws anew, not what it has drawn at first.
  seed = sweep.config_of({}).train.seed + len(study.trials)
  study.sampler = optuna.samplers.TPESampler(seed=seed)
  results: dict[int, Result] = {}
  waiting = []  # trials that were interrupted keep their proposal, and their run goes on
  for trial in study.trials:
    if trial.state.is_finished():
      results[trial.number] = _result(sweep, _run_of(trial))
    elif trial.state == optuna.trial.TrialState.RUNNING:
      waiting.append(_run_of(trial))
  with _Processes() as processes:
    for _ in track(range(sweep.trials - len(results)), "trials"):
      run = waiting.pop(0) if waiting else _proposed(sweep, study.ask())
      result = _run_one(sweep, run, processes)
      results[run.number] = result
      if result.status == "finished" and math.isfinite(result.best):
        study.tell(run.number, result.best)
      else:
        study.tell(run.number, state=optuna.trial.TrialState.FAIL)
      _write(sweep, results)
  return _in_order(results)


def _proposed(sweep: Sweep, trial) -> _Run:
  """What Optuna draws: a group of settings of each axis, and a number of each range."""
  settings = {}
  for number, axis in enumerate(sweep.varied.axes):
    labels = [" ".join(f"{path}={value}" for path, value in group.items()) for group in axis]
    chosen = trial.suggest_categorical(f"axis {number}", labels)
    settings |= axis[labels.index(chosen)]
  for path, bounds in sweep.varied.ranges.items():
    whole = isinstance(bounds.low, int) and isinstance(bounds.high, int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    settings[path] = str(suggest(path, bounds.low, bounds.high, log=bounds.log))
  sweep.config_of(settings)  # what cannot work is told before the trial keeps it
  trial.set_user_attr("settings", settings)
  return _run_of(trial)


def _run_of(trial) -> _Run:
  return _Run(trial.number, f"trial-{trial.number:04d}", dict(trial.user_attrs["settings"]))


class _Processes:
  """Processes of runs; where the sweep is stopped they are asked to save and stop, too."""

  def __init__(self):
    self._lock, self._running, self._stopped = threading.Lock(), set(), False

  def __enter__(self) -> _Processes:
    self._former = signal.signal(signal.SIGTERM, self._stop)
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not None:
      self._stop_all()
    signal.signal(signal.SIGTERM, self._former)

  def _stop(self, *_) -> None:
    self._stop_all()
    sys.exit(143)

  def _stop_all(self) -> None:
    with self._lock:
      self._stopped = True
      running = list(self._running)
    for process in running:
      process.terminate()
    for process in running:
      process.wait()

  def run(self, command: list[str], output: Path) -> int:
    """The exit code; 143 where the sweep was stopped."""
    with output.open("ab") as file:
      with self._lock:
        if self._stopped:
          return 143
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self._running.add(process)
      code = process.wait()
      with self._lock:
        self._running.discard(process)
    return code


def run_name(settings: Mapping[str, str]) -> str:
  """The folder of a run in that of its sweep."""
  return ",".join(f"{path}={value.replace(',', ' ')}" for path, value in settings.items()) or "run"


def _check_folder(sweep: Sweep, run: _Run) -> None:
  folder = sweep.workdir / run.name
  if not (folder / "run.json").exists():
    return
  require_system(folder, sweep.system)
  places = storage.absolute(sweep.data), storage.absolute(sweep.sids_folder)
  config = sweep.config_of(run.settings)
  if sweep.system == "gr4ad":
    there = gr4ad.read_run(folder)
    wanted = gr4ad.RunFile(*places, config, fingerprint=there.fingerprint)
  else:
    there = gpr.read_run(folder)
    wanted = gpr.RunFile(*places, config, sweep.system, fingerprint=there.fingerprint)
  if differing := differences(there, wanted):
    raise ConfigError(f"{folder}: the run there has other settings ({', '.join(differing)})")


def _run_one(sweep: Sweep, run: _Run, processes: _Processes) -> Result:
  folder = sweep.workdir / run.name
  result = _result(sweep, run)
  if result.status == "finished":
    return result
  folder.mkdir(parents=True, exist_ok=True)
  command = [
    *(part.format(name=run.name, number=run.number) for part in shlex.split(sweep.launch)),
    # On this machine with this Python; elsewhere with what the launch has installed.
    *(["gr4ad"] if sweep.launch else [sys.executable, "-m", "gr4ad_jax"]),
    "train", "--data", str(sweep.data), "--sids", str(sweep.sids_folder), "--workdir", str(folder),
    "--system", sweep.system, "--preset", sweep.preset, "--resume",
  ]  # fmt: skip
  for path, value in {**sweep.shared, **run.settings}.items():
    command += _option(path, value)
  code = processes.run(command, folder / "output.log")
  result = _result(sweep, run)
  if result.status != "finished":
    lines = (folder / "output.log").read_text(errors="replace").strip().splitlines()
    console.print(f"{run.name}: exit code {code}: {lines[-1] if lines else 'no output'}")
  return result


def _option(path: str, value: str) -> list[str]:
  """A setting as `gr4ad train` reads it."""
  if value.lower() in ("true", "false"):
    part, _, field = path.rpartition(".")
    return [f"--{path}" if value.lower() == "true" else f"--{part}.no-{field}"]
  return [f"--{path}", *value.split(",")]


def _result(sweep: Sweep, run: _Run) -> Result:
  """What the folder of a run holds."""
  folder, config = sweep.workdir / run.name, sweep.config_of(run.settings).train
  log = read_log(folder)
  selection = Selection(config, log)
  steps = log[-1]["step"] if selection.gives_up else config.num_steps
  if not (folder / "checkpoints" / str(steps)).is_dir():
    return Result(run.name, run.settings, "failed")
  rows = {row["kind"]: row for row in log if row["step"] == steps}
  values = {k: v for k, v in rows.get("validation", {}).items() if k not in ("step", "kind")}
  loss = values.get("loss", math.nan)
  trained = rows.get("train", {})
  values |= {k: trained[k] for k in ("examples_per_second", "mfu") if k in trained}
  best = selection.best[1] if selection.best else math.nan
  return Result(run.name, run.settings, "finished", loss, best, values)


def _in_order(results: Mapping[int, Result]) -> list[Result]:
  return [results[number] for number in sorted(results)]


def _write(sweep: Sweep, results: Mapping[int, Result]) -> None:
  rows = [dataclasses.asdict(result) for result in _in_order(results)]
  for row in rows:  # JSON knows no NaN
    row |= {name: row[name] if math.isfinite(row[name]) else None for name in ("loss", "best")}
  write_json(sweep.workdir / "results.json", rows)
