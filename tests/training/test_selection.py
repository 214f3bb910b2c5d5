"""Which checkpoint a run keeps by a number that grows, and when it ends early; a made-up judge."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.preemption import PreemptedError
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params, train

CONFIG = TrainConfig(
  num_steps=8, batch_size=2, learning_rate=0.1, log_every=1, eval_every=1, checkpoint_every=3,
  data_parallel=1, best_by="recall@50",
)
# The recall of each step; the loss falls at every one of them.
RECALLS = [0.25, 0.5, 0.75, 0.5, 0.75, 0.625, 0.5, 0.25]


class Batches:
  """The same batch for ever; its position is the number of batches that were read."""

  def __init__(self):
    self.position = 0

  def __next__(self):
    self.position += 1
    return np.ones((2, 1), np.float32)

  def get_state(self):
    return self.position

  def set_state(self, position):
    self.position = position


def learn(folder, **settings):
  """Loss 2 - mean of w x, which falls as w grows; the judge goes by its calls."""
  def loss(params, batch, key):
    return {"loss": (jnp.sum(2 - batch @ params["w"]), jnp.float32(len(batch)))}

  judged = []

  def judge(params):
    judged.append(float(params["w"][0]))
    step = len(judged) + begun
    return {"recall@50": RECALLS[step - 1], "ndcg@50": 0.5}

  rows = [row for row in read_log(folder) if row["kind"] == "validation"]
  begun, config = len(rows), dataclasses.replace(CONFIG, **settings)
  task = Task(lambda key: {"w": jnp.zeros(1)}, loss)
  state = train(
    task, config, batches=Batches(), validation=[np.ones((2, 1), np.float32)], folder=folder,
    judge=judge,
  )
  params, step = read_params(task, config, folder)
  return int(state.step), step, params, judged


def test_the_checkpoint_with_the_best_recall_is_kept_and_given(tmp_path):
  last, best, params, judged = learn(tmp_path)
  assert (last, best) == (8, 5)  # the later of two equal ones
  assert float(params["w"][0]) == judged[4] < judged[7]
  rows = [row for row in read_log(tmp_path) if row["kind"] == "validation"]
  assert [row["recall@50"] for row in rows] == RECALLS and rows[0]["ndcg@50"] == 0.5
  losses = [row["loss"] for row in rows]
  assert losses == sorted(losses, reverse=True)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step == 8
  assert str(Selection(CONFIG, rows)) == "best by recall@50: step 5 (0.7500)"
  assert learn(tmp_path / "by_loss", best_by="loss")[1] == 8
  # With an average of the parameters, that is what is judged and given.
  _, best, params, averaged = learn(tmp_path / "averaged", ema=0.9)
  assert float(params["w"][0]) == averaged[best - 1] < judged[best - 1]


def test_patience_ends_a_run_which_then_is_complete(tmp_path, capsys):
  """Steps 4 and 5 are no better than 3: an equal number is not a better one."""
  last, best, _, judged = learn(tmp_path, patience=2)
  assert (last, best, len(judged)) == (5, 5, 5)
  assert "step 5: 2 validations in a row were no better; training ends here" in (
    capsys.readouterr().err
  )
  assert learn(tmp_path, patience=2)[0] == 5 and len(read_log(tmp_path)) == 10
  assert learn(tmp_path / "longer", patience=5)[0] == 8
  assert learn(tmp_path / "by_loss", patience=1, best_by="loss")[0] == 8


def test_patience_goes_on_counting_where_a_run_was_stopped(tmp_path, monkeypatch):
  from gr4ad_jax.training.preemption import Preemption

  monkeypatch.setattr(Preemption, "reached", lambda self, step: step == 4)
  with pytest.raises(PreemptedError):
    learn(tmp_path, patience=2)
  monkeypatch.undo()
  assert learn(tmp_path, patience=2)[0] == 5


def test_what_nobody_measures_cannot_decide(tmp_path):
  with pytest.raises(ConfigError, match="train.best_by='ndcg@50': nothing is searched here"):
    train(
      Task(lambda key: {}, lambda *_: {}), dataclasses.replace(CONFIG, best_by="ndcg@50"),
      batches=Batches(), validation=[], folder=tmp_path,
    )
