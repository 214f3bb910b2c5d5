"""What --set changes in an experiment that has settings of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from gr4ad_jax.config import ConfigT, override_all

SHARED_DATA = str(Path(__file__).resolve().parents[2] / "shared" / "data")
"""Benchmark files beside the checkout."""


def with_overrides(settings: ConfigT, overrides: Mapping[str, str]) -> ConfigT:
  """A copy in which every settings.PATH of `overrides` is replaced.

  Raises:
    ConfigError: an unknown path, or a value that does not fit.
  """
  options = dataclasses.make_dataclass("Options", [("settings", type(settings))], frozen=True)
  return override_all(options(settings), overrides).settings


def own_and_others(
  settings: ConfigT, overrides: Mapping[str, str]
) -> tuple[ConfigT, dict[str, str]]:
  """The experiment's own settings, changed by settings.PATH, and the overrides that are left.

  Raises:
    ConfigError: as `with_overrides`, of its own ones.
  """
  own = {path: value for path, value in overrides.items() if path.startswith("settings.")}
  others = {path: value for path, value in overrides.items() if path not in own}
  return with_overrides(settings, own), others
