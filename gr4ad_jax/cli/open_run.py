"""Opens a run folder of any system; the one place that names them all."""

from __future__ import annotations

import json

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.opened import Opened


def open_run(workdir: Place) -> Opened:
  """A trained run with its data and parameters.

  Raises:
    ConfigError: no trained run, of an unknown system, or its data have changed.
  """
  if not storage.exists(workdir / "run.json"):
    raise ConfigError(f"{workdir}: holds no run; `gr4ad train --workdir {workdir}` makes one")
  system = json.loads(storage.fetch(workdir / "run.json").read_text()).get("system", "gr4ad")
  match system:
    case "gr4ad":
      from gr4ad_jax.gr4ad.run import open_run as open_gr4ad
      return open_gr4ad(workdir)
  raise ConfigError(f"{workdir}: a run of the system {system!r}, which this version does not know")
