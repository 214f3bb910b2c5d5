"""`gr4ad advertiser grpo`: a supervised run learns on, from the reward of lists.

    WORKDIR    as of any run; run.json names the run it began with
"""

from __future__ import annotations

import dataclasses
import functools

from gr4ad_jax import config as config_lib
from gr4ad_jax.advertiser import head_run
from gr4ad_jax.advertiser.config import GrpoSettings
from gr4ad_jax.advertiser.grpo import head_grpo_task
from gr4ad_jax.advertiser.prepared import open_advertisers
from gr4ad_jax.advertiser.run import GrpoRunFile, read_run, version_of
from gr4ad_jax.advertiser.weights import load_model
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import distributed, lock, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.run_folder import going_on, is_taken
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.train_step import TrainState


def train_grpo(
  start: Place, workdir: Place, settings: GrpoSettings, *, data: Place | None = None,
  resume: bool = False,
) -> TrainState:
  """Trains in `workdir` from the parameters that the run in `start` gives.

  Args:
    start: folder of a supervised run.
    workdir: a new folder, or with `resume` that of an earlier training of the same settings.
    settings: of GRPO; weights, layers and tuning are the supervised run's.
    data: where its data lie now; None = where they lay when it was trained.
    resume: continue an earlier training, to the same bits.

  Raises:
    ConfigError: no such run, one that GRPO cannot tune, or as of `run.train_run`.
    DivergedError: see `train_loop.train`.
  """
  began = read_run(start)
  if isinstance(began, GrpoRunFile):
    raise ConfigError(f"{start}: GRPO has made it; begin with the supervised run, {began.start}")
  if began.config.tuning != "head":
    raise ConfigError(
      f"{start}: tuning={began.config.tuning!r}: GRPO tunes a head; train one with --tuning head"
    )
  with lock.held(workdir, "a training"):
    taken = is_taken(workdir, resume=resume)
    place = storage.place(began.data) if data is None else data
    prepared = open_advertisers(place, fingerprint=began.fingerprint)
    model = load_model(began.weights)
    supervised = head_run.open_head(began.config, start, prepared, model)
    run = GrpoRunFile(
      storage.absolute(place), began.weights,
      dataclasses.replace(began.config, train=settings.train), fingerprint=began.fingerprint,
      start=storage.absolute(start), start_version=version_of(began, supervised.step),
      grpo=settings.grpo,
    )
    if taken:
      run = going_on(run, read_run(workdir), workdir)
    if distributed.is_first():
      storage.write_text(workdir / "run.json", config_lib.to_json(run))
      head_run.copy_readings(start, workdir)
    distributed.wait_for_all("copied what was read")
    state = head_run.train_head(
      run.config, workdir, prepared, model, start_params=supervised.params,
      make_task=functools.partial(
        head_grpo_task, config=settings.grpo, supervised=supervised.params
      ),
    )
  if distributed.is_first():
    console.print(f"{workdir}: {Selection(run.config.train, read_log(workdir))}")
  return state
