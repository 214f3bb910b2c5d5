"""What --set changes in an experiment that has only settings of its own."""

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
