"""What --set changes in an experiment that has only settings of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gr4ad_jax.config import ConfigT, override_all


def with_overrides(settings: ConfigT, overrides: Mapping[str, str]) -> ConfigT:
  """A copy in which every settings.PATH of `overrides` is replaced.

  Raises:
    ConfigError: an unknown path, or a value that does not fit.
  """
  options = dataclasses.make_dataclass("Options", [("settings", type(settings))], frozen=True)
  return override_all(options(settings), overrides).settings
