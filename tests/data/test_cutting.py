"""Examples cut part by part are those of the whole log, however they are cut."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import array_records, log_folder
from gr4ad_jax.data.examples import (
  open_examples,
  prepare_examples,
  read_split,
  training_events,
)
from gr4ad_jax.data.log_folder import LogParts, write_logs
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SPLITS, SequenceConfig, time_split
from gr4ad_jax.data.trending import build_trending
from gr4ad_jax.data.validation import LogError


@pytest.fixture(scope="module")
def logs_in_parts(tiny_logs, tmp_path_factory):
  """The logs of sixty users in parts of about four."""
  folder = tmp_path_factory.mktemp("parts") / "logs"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(log_folder, "PART_EVENTS", 200)
    write_logs(tiny_logs, folder)
  assert len(LogParts(folder)) > 10
  return folder


def assert_those_of(maker, examples):
  """Examples, targets and counts are what the whole log gives."""
  users = range(len(maker.logs.users.user_id))
  for number, split in enumerate(SPLITS):
    made = [e for user in users for e in maker.user_examples(user, number)]
    stored = read_split(examples, split)
    assert len(made) == len(stored) == examples.counts[split]["examples"] > 0
    for a, b in zip(made, stored, strict=True):
      for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    assert examples.counts[split]["requests"] == len({e.request for e in made})
    if split == "train":
      np.testing.assert_array_equal(
        examples.train_value_N, np.concatenate([e.value_C for e in made])
      )
      np.testing.assert_array_equal(
        examples.train_action_N, np.concatenate([e.action_C for e in made])
      )
      assert np.isnan(examples.train_ecpm_N).all()
      np.testing.assert_array_equal(
        examples.train_past_value_N,
        np.repeat(np.float32([e.past_value for e in made]), [len(e.target_C) for e in made]),
      )
      np.testing.assert_array_equal(
        examples.train_of_request_N,
        np.concatenate([np.full(len(e.target_C), e.num_targets) for e in made]),
      )
  assert examples.features == maker.vocabulary


def test_parts_give_the_examples_of_the_whole_log(
  tiny_logs, logs_in_parts, tmp_path, monkeypatch
):
  """In many shards by two processes here and in one shard there, both in the same order."""
  config = time_split(tiny_logs, validation_days=10, test_days=10, train_days=30)
  write_logs(tiny_logs, tmp_path / "logs")
  assert len(LogParts(tmp_path / "logs")) == 1
  prepare_examples(LogParts(tmp_path / "logs"), tmp_path / "whole", config)
  monkeypatch.setattr(array_records, "SHARD_BYTES", 10_000)
  prepare_examples(LogParts(logs_in_parts), tmp_path / "parts", config, workers=2)
  whole, parts = open_examples(tmp_path / "whole"), open_examples(tmp_path / "parts")
  assert_those_of(ExampleMaker(tiny_logs, config), parts)
  for split in SPLITS:
    for a, b in zip(whole.sources[split], parts.sources[split], strict=True):
      assert (a["request"], a["target_C"].tolist()) == (b["request"], b["target_C"].tolist())
  assert_nothing_held_out_is_learned_from(tiny_logs, whole)
  late = tiny_logs.events.time_s >= config.validation_start_s
  assert not training_events(tiny_logs, whole)[late].any()  # of whatever request
  expected = build_trending(tiny_logs)
  np.testing.assert_array_equal(parts.trending.ad_DN, expected.ad_DN)
  np.testing.assert_array_equal(parts.trending.bucket_DN, expected.bucket_DN)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "parts", "whole"]
  assert not list(tmp_path.rglob("*.tmp"))


def test_parts_give_each_user_the_same_last_requests(tiny_logs, logs_in_parts, tmp_path):
  config = SequenceConfig(split="leave_one_out", num_trending=0)
  prepare_examples(LogParts(logs_in_parts), tmp_path / "examples", config)
  examples = open_examples(tmp_path / "examples")
  assert_those_of(ExampleMaker(tiny_logs, config), examples)
  assert_nothing_held_out_is_learned_from(tiny_logs, examples)


def assert_nothing_held_out_is_learned_from(logs, examples):
  """Of ad events those of training requests, all of them."""
  learned, request = training_events(logs, examples), logs.events.request
  on_ads = logs.events.ad >= 0
  for split in SPLITS:
    mine = np.isin(request, [e.request for e in read_split(examples, split)])
    assert mine.any()
    if split == "train":
      assert learned[mine & on_ads].all()
    else:
      assert not learned[mine].any()


def test_a_log_without_a_split_leaves_the_earlier_examples(tiny_logs, logs_in_parts, tmp_path):
  config = time_split(tiny_logs, validation_days=10, test_days=10)
  prepare_examples(LogParts(logs_in_parts), tmp_path / "examples", config)
  empty = SequenceConfig(validation_start_s=9e9, test_start_s=9e9)
  with pytest.raises(LogError, match="the validation split holds no request"):
    prepare_examples(LogParts(logs_in_parts), tmp_path / "examples", empty)
  assert open_examples(tmp_path / "examples").config == config


def test_a_beam_pipeline_gives_the_same_examples(tiny_logs, logs_in_parts, tmp_path):
  pytest.importorskip("apache_beam", reason="Apache Beam (extra `beam`) is not installed")
  config = time_split(tiny_logs, validation_days=10, test_days=10)
  prepare_examples(LogParts(logs_in_parts), tmp_path / "examples", config, beam_options=[])
  assert_those_of(ExampleMaker(tiny_logs, config), open_examples(tmp_path / "examples"))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_beam_that_is_not_installed_is_named(tiny_logs, logs_in_parts, tmp_path):
  config = time_split(tiny_logs, validation_days=10, test_days=10)
  with pytest.raises(ConfigError, match="needs Apache Beam; pip install "):
    prepare_examples(LogParts(logs_in_parts), tmp_path / "examples", config, beam_options=[])
