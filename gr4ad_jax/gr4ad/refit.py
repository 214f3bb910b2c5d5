"""A final fit: what a run was tuned to, learned anew from training and validation requests."""

from __future__ import annotations

import dataclasses

from gr4ad_jax.catalog.run_data import own_codes, with_data
from gr4ad_jax.config import ConfigError, read_values
from gr4ad_jax.gr4ad.run import RunFile, gives_newest, read_run
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.refit import refit_config
from gr4ad_jax.training.train_loop import kept_step


def refit_of(tuned: Place, *, data: Place | None = None) -> RunFile:
  """The run that fits a tuned one anew, for `train_run`.

  It has the settings, semantic IDs and beginning of the tuned run, and as many passes through its
  requests as the tuned run had made where it was best. Value buckets and weights stay those of the
  training requests. Nothing is left to validate with: it gives its last parameters.

  Args:
    tuned: folder of a trained run.
    data: where its data lie now; None = where they lay.

  Raises:
    ConfigError: no trained run, or one that has learned from more than training requests.
  """
  run = with_data(read_run(tuned), tuned, data)
  if run.refit or run.segments:
    raise ConfigError(f"{tuned}: has learned from more than training requests; fit the tuned run")
  step = kept_step(tuned, newest=gives_newest(run))
  examples = storage.fetch(storage.place(run.data) / "examples" / "examples.json")
  train = refit_config(
    run.config.train, tuned=tuned, step=step, counts=read_values(examples)["counts"]
  )
  return dataclasses.replace(
    run, config=dataclasses.replace(run.config, train=train), refit=storage.absolute(tuned),
    sids=own_codes(tuned) or run.sids,
  )
