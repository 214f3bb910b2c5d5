"""Records lie in the order of a hash of their keys, however they were gathered."""

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing

from gr4ad_jax.data import array_records
from gr4ad_jax.data.array_records import open_dataset, write_dataset, write_run

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
  return [int(record["number"]) for record in open_dataset(folder / "numbers")["train"]]


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
