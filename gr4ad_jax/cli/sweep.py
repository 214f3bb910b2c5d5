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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gr4ad_jax.cli.sweep_config import Sweep
from gr4ad_jax.config import ConfigError, differences
from gr4ad_jax.gr4ad.run import RunFile, read_run
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.training.metric_log import read_log


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a run; `loss` is of the last validation, NaN where there is none."""

  name: str
  settings: Mapping[str, str]
  status: str  # finished, failed
  loss: float = math.nan
  values: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
  points = [(run_name(settings), settings) for settings in sweep.varied.points()]
  for name, settings in points:
    _check_folder(sweep, name, settings)
  results: dict[str, Result] = {}
  # Left in the other order: processes are told to stop before the pool waits for them.
  with concurrent.futures.ThreadPoolExecutor(sweep.jobs) as pool, _Processes() as processes:
    futures = [
      pool.submit(_run_one, sweep, name, settings, number, processes)
      for number, (name, settings) in enumerate(points)
    ]
    done = concurrent.futures.as_completed(futures)
    for future in track(done, "runs", len(points)):
      result = future.result()
      results[result.name] = result
      _write(sweep, [results[name] for name, _ in points if name in results])
  return [results[name] for name, _ in points]


def _search(sweep: Sweep) -> list[Result]:
  """Optuna proposes; the loss of the last validation is minimised."""
  try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
  except ImportError:
    raise ConfigError("a search needs Optuna: pip install 'gr4ad_jax[search]'") from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  study = optuna.create_study(
    study_name="sweep", direction="minimize", load_if_exists=True,
    storage=JournalStorage(JournalFileBackend(str(sweep.workdir / "search.log"))),
  )
  # A search that goes on draws anew, not what it has drawn at first.
  seed = sweep.config_of({}).train.seed + len(study.trials)
  study.sampler = optuna.samplers.TPESampler(seed=seed)
  choices = [[tuple(point.items()) for point in axis] for axis in sweep.varied.axes]

  def settings_of(trial) -> dict[str, str]:
    settings = {}
    for number, axis in enumerate(choices):
      labels = [" ".join(f"{path}={value}" for path, value in point) for point in axis]
      chosen = trial.suggest_categorical(f"axis {number}", labels)
      settings |= dict(axis[labels.index(chosen)])
    for path, bounds in sweep.varied.ranges.items():
      whole = isinstance(bounds.low, int) and isinstance(bounds.high, int)
      suggest = trial.suggest_int if whole else trial.suggest_float
      settings[path] = str(suggest(path, bounds.low, bounds.high, log=bounds.log))
    return settings

  results: dict[int, Result] = {}
  # Trials that were interrupted keep their proposal, and their run goes on.
  running = [t.number for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]
  for trial in study.trials:
    if trial.state.is_finished():
      settings = dict(trial.user_attrs["settings"])
      results[trial.number] = _result(sweep, f"trial-{trial.number:04d}", settings)
  with _Processes() as processes:
    for _ in track(range(sweep.trials - len(results)), "trials", sweep.trials - len(results)):
      if running:
        number = running.pop(0)
        settings = dict(study.trials[number].user_attrs["settings"])
      else:
        trial = study.ask()
        number, settings = trial.number, settings_of(trial)
        sweep.config_of(settings)
        trial.set_user_attr("settings", settings)
      result = _run_one(sweep, f"trial-{number:04d}", settings, number, processes)
      results[number] = result
      if result.status == "finished" and math.isfinite(result.loss):
        study.tell(number, result.loss)
      else:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
      _write(sweep, [results[n] for n in sorted(results)])
  return [results[n] for n in sorted(results)]


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


def _run_file(sweep: Sweep, settings: Mapping[str, str]) -> RunFile:
  sids = sweep.sids or sweep.data / "sids"
  return RunFile(
    storage.absolute(sweep.data), storage.absolute(sids), sweep.config_of(settings)
  )


def _check_folder(sweep: Sweep, name: str, settings: Mapping[str, str]) -> None:
  folder = sweep.workdir / name
  if not (folder / "run.json").exists():
    return
  there = read_run(folder)
  wanted = dataclasses.replace(_run_file(sweep, settings), fingerprint=there.fingerprint)
  if differing := differences(there, wanted):
    raise ConfigError(f"{folder}: the run there has other settings ({', '.join(differing)})")


def _run_one(
  sweep: Sweep, name: str, settings: Mapping[str, str], number: int, processes: _Processes
) -> Result:
  folder = sweep.workdir / name
  result = _result(sweep, name, settings)
  if result.status == "finished":
    return result
  folder.mkdir(parents=True, exist_ok=True)
  command = [
    *(part.format(name=name, number=number) for part in shlex.split(sweep.launch)),
    # On this machine with this Python; elsewhere with what the launch has installed.
    *(["gr4ad"] if sweep.launch else [sys.executable, "-m", "gr4ad_jax"]),
    "train", "--data", str(sweep.data), "--sids", str(sweep.sids or sweep.data / "sids"),
    "--workdir", str(folder),
    "--preset", sweep.preset, "--resume",
  ]  # fmt: skip
  for path, value in {**sweep.shared, **settings}.items():
    command += _option(path, value)
  code = processes.run(command, folder / "output.log")
  result = _result(sweep, name, settings)
  if result.status != "finished":
    lines = (folder / "output.log").read_text(errors="replace").strip().splitlines()
    console.print(f"{name}: exit code {code}: {lines[-1] if lines else 'no output'}")
  return result


def _option(path: str, value: str) -> list[str]:
  """A setting as `gr4ad train` reads it."""
  if value.lower() in ("true", "false"):
    part, _, field = path.rpartition(".")
    return [f"--{path}" if value.lower() == "true" else f"--{part}.no-{field}"]
  return [f"--{path}", *value.split(",")]


def _result(sweep: Sweep, name: str, settings: Mapping[str, str]) -> Result:
  """What the folder of a run holds."""
  folder, steps = sweep.workdir / name, sweep.config_of(settings).train.num_steps
  if not (folder / "checkpoints" / str(steps)).is_dir():
    return Result(name, settings, "failed")
  rows = {row["kind"]: row for row in read_log(folder) if row["step"] == steps}
  validation = {k: v for k, v in rows.get("validation", {}).items() if k not in ("step", "kind")}
  speed = {
    k: v for k, v in rows.get("train", {}).items() if k in ("examples_per_second", "mfu")
  }
  return Result(
    name, settings, "finished", validation.get("loss", math.nan), validation | speed
  )


def _write(sweep: Sweep, results: Sequence[Result]) -> None:
  write_json(sweep.workdir / "results.json", [_plain(result) for result in results])


def _plain(result: Result) -> dict[str, Any]:
  loss = result.loss if math.isfinite(result.loss) else None
  return dataclasses.asdict(result) | {"loss": loss}
