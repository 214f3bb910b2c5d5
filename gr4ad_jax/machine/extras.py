"""How to get packages that only some commands need."""

from __future__ import annotations

import re
import shlex
from importlib import metadata


def install(extra: str) -> str:
  """The command that installs what an extra of pyproject.toml names.

  It names the packages themselves: this one is on no index, so that `pip install gr4ad_jax[...]`
  finds nothing, and the checkout need not be where the command is typed.
  """
  try:
    requirements = metadata.requires("gr4ad_jax") or []
  except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    return f"pip install -e '.[{extra}]' in the checkout of gr4ad_jax"
  wanted = re.compile(rf"""\bextra\s*==\s*["']{extra}["']""")
  found = [text.split(";")[0].strip() for text in requirements if wanted.search(text)]
  return shlex.join(["pip", "install", *found])
