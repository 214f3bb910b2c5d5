"""A run may lie in a folder of any name that the file system takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gr4ad_jax.data.array_records import open_dataset, write_dataset, write_run
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import StorageError
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.metric_log import MetricLog, read_log
from gr4ad_jax.training.train_step import TrainState

# Patterns, escapes, URLs, read instructions, templates, quotes; each broke a library, or could.
NAMES = (
  "r[12]", "r[1:2]", "r*?", "back\\slash", "gs:", "a:b", "%20 #%s", "{SPLIT}", "new\nline\t\x01",
  "'\"`$HOME&;|<>!(~", "-ü 日本 😀", ".hidden,x=1@+^",
)


def a_state(step):
  return TrainState(jnp.array(step, jnp.int32), {"w": jnp.arange(6.0) * step}, {"m": jnp.ones(2)})


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_logs_and_records_are_found_again(tmp_path, name):
  folder = tmp_path / name
  (tmp_path / "r1" / "checkpoints" / "3").mkdir(parents=True)  # what the patterns would find
  on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), a_state(0)
  )
  with Checkpoints(folder / "checkpoints") as checkpoints:
    for step, loss in ((3, 1.0), (5, 2.0)):
      checkpoints.save(a_state(step), data_iterator={"at": step}, validation={"loss": loss})
    checkpoints.wait()
  with Checkpoints(folder / "checkpoints") as checkpoints:
    assert (checkpoints.latest_step, checkpoints.best_step) == (5, 3)
    state, position = checkpoints.restore_newest(abstract)
  np.testing.assert_array_equal(state.params["w"], np.arange(6.0) * 5)
  assert position == {"at": 5}
  assert {"3", "5"} <= {step.name for step in (folder / "checkpoints").iterdir()}
  log = MetricLog(folder, first_step=0)
  log.write(1, "train", {"loss": 1.0})
  log.close()
  assert read_log(folder)[0]["loss"] == 1 and any((folder / "tb").iterdir())
  features = {"x": tfds.features.Tensor(shape=(), dtype=np.int64)}
  serialize = tfds.features.FeaturesDict(features).serialize_example
  write_run(folder / "runs" / "0", "train", [(str(x), serialize({"x": x})) for x in range(5)])
  write_dataset(folder / "set", {"train": folder / "runs"}, features, description="numbers")
  records = open_dataset(folder / "set", remedy="")["train"]
  assert sorted(int(record["x"]) for record in records) == list(range(5))


def test_a_name_that_is_not_utf8_is_refused_before_any_work():
  with pytest.raises(StorageError, match=r"'runs/\\udcff': is not UTF-8"):
    storage.place("runs/\udcff")
