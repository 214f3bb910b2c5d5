"""What --set changes in an experiment that has only settings of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from gr4ad_jax.config import override_all

SettingsT = TypeVar("SettingsT")


def with_overrides(settings: SettingsT, overrides: Mapping[str, str]) -> SettingsT:
  """A copy in which every settings.PATH of `overrides` is replaced.

  Raises:
    ConfigError: an unknown path, or a value that does not fit.
  """
  options = dataclasses.make_dataclass("Options", [("settings", type(settings))], frozen=True)
  return override_all(options(settings), overrides).settings
