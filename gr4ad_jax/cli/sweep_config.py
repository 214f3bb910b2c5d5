"""What `gr4ad sweep` varies, and what all of its runs share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gr4ad_jax.config import override_all, require
from gr4ad_jax.gpr import config as gpr
from gr4ad_jax.gr4ad import config as gr4ad
from gr4ad_jax.machine.storage import Place

PRESETS: dict[str, dict[str, gr4ad.Config] | dict[str, gpr.Config]] = {
  "gr4ad": gr4ad.PRESETS,
} | {
  system: {name: gpr.PRESETS[name] for name in gpr.presets_of(system)} for system in gpr.SYSTEMS
}
"""System -> its presets; no two have one of the same name."""
AnyPreset = Literal[tuple(name for of_system in PRESETS.values() for name in of_system)]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class Range:
  """Values between two bounds that a search chooses from; both int = whole numbers."""

  low: float
  high: float
  log: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
  """What varies.

  Attributes:
    axes: groups of settings that vary together; the runs are the product of the groups.
    ranges: what a search varies beside them.
  """

  axes: tuple[tuple[dict[str, str], ...], ...]
  ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)

  def points(self) -> Iterator[dict[str, str]]:
    """The settings of every run."""
    for choice in itertools.product(*self.axes):
      yield {path: value for settings in choice for path, value in settings.items()}


def parse_grid(texts: Sequence[str]) -> Grid:
  """Reads PATH=VALUE,VALUE; PATH+PATH=VALUE+VALUE,...; and PATH=LOW:HIGH[:log].

  Settings joined by + vary together. A value that is itself a tuple is written with spaces:
  search.widths=8 16 32,16 32 64.

  Raises:
    ConfigError: not of these forms.
  """
  axes, ranges = [], {}
  for text in texts:
    path, equals, values = text.partition("=")
    require(bool(equals and path and values), "grid", text, "needs PATH=VALUE,VALUE")
    if ":" in values:
      ranges[path] = _parse_range(text, values)
      continue
    paths, points = path.split("+"), []
    for point in values.split(","):
      parts = point.split("+") if len(paths) > 1 else [point]
      require(len(parts) == len(paths) and all(parts), "grid", text,
              f"each of its values needs {len(paths)} parts")
      points.append(dict(zip(paths, (part.replace(" ", ",") for part in parts), strict=True)))
    axes.append(tuple(points))
  seen = [path for axis in axes for path in axis[0]] + list(ranges)
  require(len(seen) == len(set(seen)), "grid", tuple(texts), "names a setting twice")
  return Grid(tuple(axes), ranges)


def _parse_range(text: str, values: str) -> Range:
  low, high, *scale = values.split(":")
  try:
    numbers = [float(x) if any(c in x for c in ".e") else int(x) for x in (low, high)]
  except ValueError:
    numbers = [0, 0]
  ok = numbers[0] < numbers[1] and scale in ([], ["log"]) and (not scale or numbers[0] > 0)
  require(ok, "grid", text, "a range is LOW:HIGH or LOW:HIGH:log with LOW < HIGH")
  return Range(*numbers, bool(scale))


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A declared sweep."""

  data: Place
  """Folder that `prepare` wrote."""
  workdir: Path
  """Folder of the sweep; each run gets a folder in it, and results.json sums up."""
  grid: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUES ...")]
  """PATH=VALUE,VALUE ...; PATH+PATH=VALUE+VALUE,... vary together; with --trials also
  PATH=LOW:HIGH and PATH=LOW:HIGH:log. As in model.width=32,64 train.seed=0,1."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  preset: AnyPreset = "small"
  """Named settings that all runs start from; they say what is trained, GR4AD or GPR."""
  set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE ...")] = ()
  """Settings that all runs share."""
  jobs: int = 1
  """Runs at once on this machine."""
  launch: str = ""
  """Words before each run's command, such as a launch of a TPU slice; {name} and {number} are
  replaced. All hosts need the folders."""
  trials: int = 0
  """Runs of a search over the grid's ranges (needs Optuna)."""

  def __post_init__(self):
    require(self.jobs >= 1, "jobs", self.jobs, "must be at least 1")
    require(self.trials >= 0, "trials", self.trials, "must not be negative")
    require(bool(self.varied.ranges) == bool(self.trials), "trials", self.trials,
            "a search needs --trials and a range (PATH=LOW:HIGH) in --grid, or neither")
    for settings in self.varied.points():
      self.config_of(settings)  # an unknown setting is told before anything runs

  @property
  def sids_folder(self) -> Place:
    """Where the semantic IDs are."""
    return self.sids or self.data / "sids"

  @functools.cached_property
  def varied(self) -> Grid:
    """What varies."""
    return parse_grid(self.grid)

  @functools.cached_property
  def shared(self) -> dict[str, str]:
    """Path -> value of the settings that all runs share."""
    for text in self.set:
      require("=" in text, "set", text, "needs PATH=VALUE")
    return dict(text.split("=", 1) for text in self.set)

  @property
  def system(self) -> str:
    """What is trained."""
    return next(system for system, presets in PRESETS.items() if self.preset in presets)

  def config_of(self, settings: Mapping[str, str]) -> gr4ad.Config | gpr.Config:
    """All settings of a run with these of its own."""
    return override_all(PRESETS[self.system][self.preset], {**self.shared, **settings})
