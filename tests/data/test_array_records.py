"""Records lie in the order of a hash of their keys, however they were gathered."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import hashing

from gr4ad_jax.data import array_records
from gr4ad_jax.data.array_records import open_dataset, write_dataset, write_run
from gr4ad_jax.data.examples import open_examples
from gr4ad_jax.data.pipeline import train_batches
from gr4ad_jax.data.validation import LogError

FEATURES = {"number": np.int32}
KEYS = [f"key{n}" for n in range(40)]


def write(folder, *, num_runs):
  """Forty records in runs."""
  runs = folder / "runs"
  serialize = tfds.features.FeaturesDict(FEATURES).serialize_example
  for run in range(num_runs):
    mine = range(run, len(KEYS), num_runs)
    write_run(runs / str(run), "train", ((KEYS[n], serialize({"number": n})) for n in mine))
  return write_dataset(folder / "numbers", {"train": runs}, FEATURES, description="Numbers.")


def numbers(folder):
  records = open_dataset(folder / "numbers", remedy="again")["train"]
  return [int(record["number"]) for record in records]


def test_the_order_is_that_of_tfds_and_does_not_depend_on_runs_or_shards(tmp_path, monkeypatch):
  hasher = hashing.Hasher("train")
  expected = sorted(range(len(KEYS)), key=lambda n: hasher.hash_key(KEYS[n]))
  assert write(tmp_path / "one", num_runs=1) == {"train": 40}
  assert numbers(tmp_path / "one") == expected
  monkeypatch.setattr(array_records, "SHARD_BYTES", 1_000)
  assert write(tmp_path / "many", num_runs=60) == {"train": 40}  # twenty are empty
  assert numbers(tmp_path / "many") == expected
  assert len(list((tmp_path / "many" / "numbers" / "1.0.0").glob("*.array_record-*"))) > 10


def test_data_that_tfds_itself_wrote_open_as_well(tmp_path):
  class Numbers(tfds.core.GeneratorBasedBuilder):
    """As examples were written before."""

    VERSION = tfds.core.Version(array_records.VERSION)

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from ((key, {"number": n}) for n, key in enumerate(KEYS))

  Numbers(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
  write(tmp_path / "new", num_runs=3)
  assert numbers(tmp_path) == numbers(tmp_path / "new")


def cut(file):
  os.truncate(file, file.stat().st_size // 2)


def end_missing(file):
  os.truncate(file, file.stat().st_size - 100)


def emptied(file):
  os.truncate(file, 0)


def other_bytes(file):
  file.write_bytes(b"\xff" * file.stat().st_size)


def other_records(file):
  writer = ArrayRecordWriter(str(file), "group_size:1")
  writer.write(b"one")
  writer.close()


HARMS = [cut, end_missing, emptied, other_bytes, other_records, Path.unlink]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_shard_is_named_when_the_dataset_is_opened(tmp_path, monkeypatch, harm):
  monkeypatch.setattr(array_records, "SHARD_BYTES", 1_000)
  write(tmp_path, num_runs=60)
  file = sorted((tmp_path / "numbers" / "1.0.0").glob("*.array_record-*"))[3]
  harm(file)
  with pytest.raises(LogError) as error:
    numbers(tmp_path)
  message = str(error.value)
  assert message.startswith(f"{file}: missing or damaged (") and message.endswith("): again")
  assert "\n" not in message


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", [None, "", "{", '{"a": 1}'])
def test_a_dataset_without_its_description_is_refused(tmp_path, name, text):
  write(tmp_path, num_runs=1)
  file = tmp_path / "numbers" / "1.0.0" / name
  file.unlink() if text is None else file.write_text(text)
  with pytest.raises(LogError, match="numbers/1.0.0: missing or damaged"):
    numbers(tmp_path)


def test_a_damaged_record_is_named_by_whoever_reads_it(tmp_path):
  """Training reads in threads of grain."""
  write(tmp_path, num_runs=1)
  (file,) = (tmp_path / "numbers" / "1.0.0").glob("*.array_record-*")
  content = bytearray(file.read_bytes())
  content[200:400] = bytes(255 - byte for byte in content[200:400])
  file.write_bytes(content)
  records = open_dataset(tmp_path / "numbers", remedy="again")["train"]
  batches = train_batches(records, list, batch_size=8, seed=0, parse=lambda record: record)
  for reading in (lambda: list(records), lambda: [next(batches) for _ in range(10)]):
    with pytest.raises(LogError) as error:
      reading()
    assert str(error.value).startswith(f"{file}: missing or damaged (")


@pytest.mark.parametrize(
  "name", ["examples.json", "train_targets.npz", "trending.npz", "tastes.npz"]
)
def test_damaged_files_beside_the_examples_are_named(tiny_data, tmp_path, name):
  shutil.copytree(tiny_data / "examples", tmp_path / "examples")
  file = tmp_path / "examples" / name
  whole = file.read_bytes()
  for content in (whole[: len(whole) // 2], whole[:20], b"{}"):
    file.write_bytes(content)
    with pytest.raises(LogError, match=f"{name}: missing or damaged .*`gr4ad prepare --overwrite`"):
      open_examples(tmp_path / "examples")


def test_examples_of_an_earlier_version_say_how_to_make_them_again(tiny_data, tmp_path):
  shutil.copytree(tiny_data / "examples", tmp_path / "examples")
  file = tmp_path / "examples" / "examples.json"
  about = json.loads(file.read_text())
  del about["config"]["max_met_ads"]
  file.write_text(json.dumps(about))
  with pytest.raises(LogError, match="an earlier version .*`gr4ad prepare --overwrite`"):
    open_examples(tmp_path / "examples")
