"""What the folder of checkpoints keeps open: a run of weeks saves thousands of times."""

import threading

import jax.numpy as jnp

from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.train_step import TrainState


def test_nothing_stays_open_of_a_save(tmp_path):
  before = set(threading.enumerate())
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    kept = []
    for step in range(1, 9):
      state = TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {"m": jnp.zeros(2)})
      checkpoints.save(state, data_iterator={}, validation={"loss": 1.0})
      kept.append([t for t in set(threading.enumerate()) - before if "_run_loop" in t.name])
    assert all(len(threads) <= 1 for threads in kept)  # that of the save that is going on
  # Threads of the interpreter's own pool may live on.
  assert not [t for t in set(threading.enumerate()) - before if "_run_loop" in t.name]
