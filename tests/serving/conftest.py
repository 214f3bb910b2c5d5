"""A trained run to serve, as small as can be."""

import dataclasses

import pytest

from gr4ad_jax.gr4ad.config import ModelConfig, preset
from gr4ad_jax.gr4ad.run import RunFile
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.training.config import TrainConfig


@pytest.fixture(scope="session")
def served_run(tiny_data, tmp_path_factory):
  """The folder of a run of two steps."""
  workdir = tmp_path_factory.mktemp("served") / "run"
  config = dataclasses.replace(
    preset("tiny"),
    model=ModelConfig(width=16, num_heads=2, num_layers=2, num_lazy_layers=1),
    train=TrainConfig(num_steps=2, batch_size=8, eval_every=2, eval_batches=1, checkpoint_every=2,
                      data_parallel=1),
    search=SearchConfig(widths=(8, 12, 16), batch_size=4, value_exponent=0.5),
  )
  train_run(RunFile(str(tiny_data), str(tiny_data / "sids"), config), workdir)
  return workdir
