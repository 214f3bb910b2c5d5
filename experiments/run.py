"""`python -m experiments.run NAME`: the one way to run an experiment.

An experiment is a file of this folder. Its docstring names the command, the expected numbers and
the run time; its three functions are

    run(workdir, *, size, overrides) -> dict[str, float]   flat name -> number
    table(results) -> str                                  Markdown
    plots(results) -> dict[str, Figure]                    file name without .png -> figure

WORKDIR/results.json, results.md and one PNG per plot are written here, for all of them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import experiments
from gr4ad_jax.config import ConfigError, read_json
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.training.train_loop import DivergedError


@dataclasses.dataclass(frozen=True)
class Command:
  """What the command line holds."""

  name: tyro.conf.Positional[str]
  """One of the experiments above."""
  workdir: Path | None = None
  """Folder for everything that the experiment writes; an interrupted one continues there. Default
  runs/NAME."""
  size: Literal["cpu", "full"] = "cpu"
  """Minutes on two CPU cores, or the size that the expected numbers ask for."""
  overrides: Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(name="set", metavar="PATH=VALUE ..."),
  ] = ()
  """Settings that replace the experiment's own, such as train.num_steps=500."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a folder of results was made with; experiment.json in it."""

  name: str
  size: str = "cpu"
  overrides: tuple[str, ...] = ()


def main(argv: list[str] | None = None) -> None:
  """Entry point. Exits 0 on success, 2 on bad input (one line), 1 where training diverged."""
  description = "Runs an experiment and writes its numbers, table and plots.\n\n" + listing()
  command = tyro.cli(Command, args=argv, prog="python -m experiments.run", description=description)
  overrides = tuple(text for texts in command.overrides for text in texts)
  try:
    settings = Settings(command.name, command.size, overrides)
    run_experiment(settings, command.workdir or Path("runs") / command.name)
  except (ValueError, OSError, DivergedError) as error:
    print(f"experiments.run: error: {error}", file=sys.stderr)
    sys.exit(1 if isinstance(error, DivergedError) else 2)


def names() -> dict[str, str]:
  """Every experiment with the first line of its docstring."""
  found = {}
  for module in pkgutil.iter_modules(experiments.__path__):
    if module.name != "run" and not module.name.startswith("_"):
      source = Path(module.module_finder.find_spec(module.name).origin).read_text()
      found[module.name] = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
  return found


def listing() -> str:
  """`names` for people."""
  return "Experiments:\n" + "\n".join(f"  {name}: {line}" for name, line in names().items())


def run_experiment(settings: Settings, workdir: Path) -> dict[str, float]:
  """Runs one experiment and writes its results.

  Args:
    settings: name, size, and overrides as path=value.
    workdir: a new folder, or one of the same settings.

  Returns:
    The results.

  Raises:
    ConfigError: unknown name or setting, or a folder that other settings have written.
  """
  if settings.name not in names():
    raise ConfigError(f"unknown experiment {settings.name!r}\n{listing()}")
  overrides = dict(_split(text) for text in settings.overrides)
  record = workdir / "experiment.json"
  is_new = not record.exists()
  if not is_new and read_json(Settings, record) != settings:
    raise ConfigError(f"{workdir}: holds results of other settings; pass another --workdir")
  experiment = importlib.import_module(f"experiments.{settings.name}")
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(record, dataclasses.asdict(settings))
  try:
    results = experiment.run(workdir, size=settings.size, overrides=overrides)
  except ConfigError:
    if is_new:  # refused settings must not keep the corrected ones out
      record.unlink()
    raise
  write_json(workdir / "results.json", results)
  changed = f" --set {' '.join(settings.overrides)}" if overrides else ""
  table = experiment.table(results)
  lines = [f"`python -m experiments.run {settings.name} --size {settings.size}{changed}`", table]
  for name, figure in experiment.plots(results).items():
    figure.savefig(workdir / f"{name}.png", dpi=150, bbox_inches="tight")
    lines.append(f"![{name}]({name}.png)")
  (workdir / "results.md").write_text("\n\n".join(lines) + "\n")
  print(f"{table}\n\nresults: {workdir / 'results.md'}")
  return results


def _split(text: str) -> tuple[str, str]:
  path, equals, value = text.partition("=")
  if not equals:
    raise ConfigError(f"--set {text!r}: must be path=value")
  return path, value


if __name__ == "__main__":
  main()
