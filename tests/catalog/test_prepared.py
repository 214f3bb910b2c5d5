"""A run opens with the logs, examples and codes that it was trained on, and with no others."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

from gr4ad_jax.catalog.prepared import open_prepared
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import prepare_examples
from gr4ad_jax.data.log_folder import LogParts, read_logs, write_logs
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.tokenizer import semantic_id


def as_prepared(logs, folder):
  """What `gr4ad prepare` leaves, as the tiny data were made."""
  write_logs(logs, folder / "logs")
  cut = time_split(logs, validation_days=10, test_days=10)
  prepare_examples(LogParts(folder / "logs"), folder / "examples", cut)


def with_ads(logs, **columns):
  return dataclasses.replace(logs, ads=dataclasses.replace(logs.ads, **columns))


def reversed_ads(logs):
  """The same catalogue from its end, events following their ads."""
  ads = {n: None if x is None else x[::-1] for n, x in vars(logs.ads).items()}
  last = len(logs.ads.ad_id) - 1
  events, contents = (
    dataclasses.replace(t, ad=np.where(t.ad < 0, -1, last - t.ad).astype(t.ad.dtype))
    for t in (logs.events, logs.contents)
  )
  return dataclasses.replace(with_ads(logs, **ads), events=events, contents=contents)


def shuffled_events(logs):
  """Other ads met at the same times by the same users, each as often as before."""
  events = logs.events
  paid = np.flatnonzero(events.ad >= 0)
  ad = events.ad.copy()
  ad[paid] = ad[np.random.default_rng(0).permutation(paid)]
  return dataclasses.replace(logs, events=dataclasses.replace(events, ad=ad))


def replaced_texts(logs):
  return with_ads(logs, text=logs.ads.text[::-1])


@pytest.fixture
def data(tiny_data, tmp_path):
  shutil.copytree(tiny_data, tmp_path / "data")
  return tmp_path / "data"


def open_data(data, **how):
  return open_prepared(str(data), str(data / "sids"), **how)


def test_data_prepared_anew_from_the_same_logs_are_the_same(data, tiny_logs, tmp_path):
  shutil.copytree(data / "sids", tmp_path / "again" / "sids")
  as_prepared(tiny_logs, tmp_path / "again")
  opened = open_data(tmp_path / "again", fingerprint=open_data(data).fingerprint)
  assert opened.fingerprint == open_data(data).fingerprint


@pytest.mark.parametrize(("change", "message"), [
  (reversed_ads, "made for other ads or contents, or another order of them"),
  (replaced_texts, "logs have changed since the run was trained"),
  (shuffled_events, "logs and examples have changed since the run was trained"),
])
def test_a_run_is_not_opened_with_other_logs(data, tiny_logs, change, message):
  fingerprint = open_data(data).fingerprint
  as_prepared(change(tiny_logs), data)
  with pytest.raises(ConfigError, match=message):
    open_data(data, fingerprint=fingerprint)


def test_other_codes_are_not_those_of_the_run(data):
  fingerprint = open_data(data).fingerprint
  sids = semantic_id.load(data / "sids")
  semantic_id.save(dataclasses.replace(sids, codes_AL=sids.codes_AL[::-1]), data / "sids")
  with pytest.raises(ConfigError, match="semantic IDs have changed"):
    open_data(data, fingerprint=fingerprint)
  assert open_data(data).fingerprint != fingerprint


@pytest.mark.parametrize("change", [reversed_ads, replaced_texts, shuffled_events])
def test_tables_that_are_exchanged_in_their_folder_are_named(data, tiny_logs, change, tmp_path):
  write_logs(change(tiny_logs), tmp_path / "other")
  for name in ("ads", "events"):
    shutil.copy(tmp_path / "other" / f"{name}.parquet", data / "logs" / f"{name}.parquet")
  read_logs(data / "logs")  # which sees nothing wrong
  with pytest.raises(ConfigError, match=r"logs/(ads|events)\.parquet: .*`gr4ad prepare` again"):
    open_data(data)


def test_examples_that_were_cut_short_are_named(data):
  (file,) = data.glob("examples/ad_requests/*/*test.array_record*")
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(ConfigError, match=f"{file.name}: has .* bytes"):
    open_data(data)


@pytest.mark.parametrize(
  "name", ["logs/log.json", "examples/examples.json", "sids/config.json", "sids/codes.npz"]
)
def test_a_file_that_is_cut_is_named_in_one_line(data, name):
  file = data / name
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(ValueError) as told:
    open_data(data)
  assert str(file) in str(told.value) and "\n" not in str(told.value)


def test_a_run_of_an_earlier_version_opens_with_a_line(data, capsys):
  """Those knew their data by examples.json and the codes; prepare kept no digests."""
  for file in (data / "logs" / "log.json", data / "examples" / "examples.json"):
    about = json.loads(file.read_text())
    del about["digests"]
    file.write_text(json.dumps(about))
  sids = semantic_id.load(data / "sids")
  digest = hashlib.blake2b((data / "examples" / "examples.json").read_bytes(), digest_size=8)
  digest.update(sids.codes_AL.tobytes() + sids.content_codes_OL.tobytes())
  opened = open_data(data, fingerprint=digest.hexdigest())
  assert opened.are(digest.hexdigest()) and opened.are(opened.fingerprint)
  assert "this run is of an earlier version" in " ".join(capsys.readouterr().err.split())
  with pytest.raises(ConfigError, match="data have changed.*train again"):
    open_data(data, fingerprint="0" * 16)
