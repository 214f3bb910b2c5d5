"""Examples of one hand-written user, and both kinds of split."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.examples import open_examples, training_events
from gr4ad_jax.data.prepare import write_prepared
from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.sequences import ExampleMaker, age_bucket, count_bucket
from gr4ad_jax.data.splits import SequenceConfig, split_by_time, time_split
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.data.validation import LogError

HOUR = 3600
CONVERSION, CLICK, IMPRESSION = "conversion", "click", "impression"


def logs_of(events, num_ads: int = 4):
  names = ["user_id", "time", "ad_id", "content_id", "request_id", "action", "value"]
  ads = pd.DataFrame({
    "ad_id": [f"a{i}" for i in range(num_ads)], "advertiser_id": "x", "category": "c", "text": "t"
  })
  contents = pd.DataFrame({
    "content_id": ["c0", "c1"], "ad_id": ["a3", None], "category": "", "text": ""
  })
  frame = pd.DataFrame(events, columns=names)
  frame["feature_scene"] = [f"s{i % 2}" for i in range(len(frame))]
  return build_logs(ads=ads, events=frame, contents=contents, source="hand", currency="EUR")


@pytest.fixture(scope="module")
def hand_logs():
  return logs_of([
    ("u", 0 * HOUR, "a0", None, "r0", CONVERSION, 2.0),
    ("u", 0 * HOUR, "a1", None, "r0", CLICK, 0.0),
    ("u", 1 * HOUR, None, "c0", "r1", CONVERSION, 5.0),
    ("u", 2 * HOUR, "a0", None, "r2", CONVERSION, 3.0),
    ("u", 2 * HOUR, "a2", None, "r2", IMPRESSION, 0.0),
    ("u", 5 * HOUR, "a3", None, "r3", CONVERSION, 1.0),
    ("u", 5 * HOUR, "a2", None, "r3", CONVERSION, 4.0),
    ("u", 5 * HOUR, "a2", None, "r3", CLICK, 0.5),
    ("u", 9 * HOUR, "a1", None, "r4", CONVERSION, 7.0),
  ])


@pytest.fixture(scope="module")
def hand_maker(hand_logs):
  config = SequenceConfig(validation_start_s=4 * HOUR, test_start_s=8 * HOUR, num_trending=0)
  return ExampleMaker(hand_logs, config)


def test_history_holds_distinct_items_before_the_request(hand_maker):
  first, second = hand_maker.user_examples(0, 0)
  assert first.ad_T.tolist() == [] and first.organic_O.tolist() == []
  assert second.target_C.tolist() == [0]  # the impression of a2 is no target
  assert second.ad_T.tolist() == [1, 0]  # equal times: the later row counts as more recent
  assert second.organic_O.tolist() == [0]
  assert second.past_value == 2.0
  (third,) = hand_maker.user_examples(0, 1)
  assert third.ad_T.tolist() == [0, 1]  # a0 was met again at hour 2; a2 was only shown
  assert third.ad_count_T.tolist() == count_bucket(np.array([2, 1])).tolist()
  assert third.ad_age_T.tolist() == age_bucket(np.array([3, 5]) * HOUR).tolist()
  assert third.past_value == 5.0
  # a0 twice, a1 clicked, and a3, whose product was met as content; a2 was only shown.
  assert third.met_P.tolist() == [0, 1, 3]
  promoted, organic = [2, 1, 0], [0, 0, 1]
  assert third.met_count_PH[:, :4].round().T.tolist() == [promoted] * 4
  assert third.met_count_PH[:, 4:].round().T.tolist() == [organic] * 4


def test_targets_are_merged_and_marked_new(hand_maker):
  (third,) = hand_maker.user_examples(0, 1)
  assert third.target_C.tolist() == [2, 3]
  assert third.value_C.tolist() == [4.5, 1.0]
  assert third.action_C.tolist() == [2, 2]
  assert third.new_C.tolist() == [True, False]  # a3's product was met as content c0
  (fourth,) = hand_maker.user_examples(0, 2)
  assert fourth.target_C.tolist() == [1] and fourth.new_C.tolist() == [False]


def test_later_events_change_nothing(hand_logs, hand_maker):
  cut = logs_of([
    ("u", 0 * HOUR, "a0", None, "r0", CONVERSION, 2.0),
    ("u", 0 * HOUR, "a1", None, "r0", CLICK, 0.0),
    ("u", 1 * HOUR, None, "c0", "r1", CONVERSION, 5.0),
    ("u", 2 * HOUR, "a0", None, "r2", CONVERSION, 3.0),
    ("u", 6 * HOUR, "a1", None, "r3", CONVERSION, 9.0),
    ("u", 9 * HOUR, "a2", None, "r4", CONVERSION, 9.0),
  ])
  shorter = ExampleMaker(cut, hand_maker.config)
  for a, b in zip(shorter.user_examples(0, 0), hand_maker.user_examples(0, 0), strict=True):
    names = ("ad_T", "ad_count_T", "ad_age_T", "organic_O", "target_C", "value_C", "new_C")
    for name in (*names, "met_P", "met_count_PH"):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_limits_cut_histories_and_split_targets(hand_logs):
  config = SequenceConfig(
    validation_start_s=4 * HOUR, test_start_s=8 * HOUR, num_trending=0, max_ad_history=1,
    max_targets=1,
  )
  first, second = ExampleMaker(hand_logs, config).user_examples(0, 1)
  assert (first.target_C.tolist(), second.target_C.tolist()) == ([2], [3])
  assert first.request == second.request and first.ad_T.tolist() == [0]
  assert first.num_targets == second.num_targets == 2


def test_latest_context_sees_everything(hand_maker):
  example = hand_maker.latest_context(0)
  assert example.ad_T.tolist() == [1, 2, 3, 0]
  assert example.past_value == 17.5
  assert example.target_C.size == 0


def test_leave_one_out_holds_out_the_last_two_requests():
  events = [("u", h * HOUR, f"a{h}", None, f"r{h}", CONVERSION, 1.0) for h in range(4)]
  events += [("v", h * HOUR, f"a{h}", None, f"q{h}", CONVERSION, 1.0) for h in range(2)]
  config = SequenceConfig(split="leave_one_out", num_trending=0)
  maker = ExampleMaker(logs_of(events), config)
  targets = {
    (user, split): [e.target_C.tolist() for e in maker.user_examples(user, split)]
    for user in range(2) for split in range(3)
  }
  assert targets == {
    (0, 0): [[0], [1]], (0, 1): [[2]], (0, 2): [[3]],
    (1, 0): [[0], [1]], (1, 1): [], (1, 2): [],  # too short to hold anything out
  }


def test_what_follows_a_held_out_request_is_not_learned_from(tmp_path):
  """The wide rule counts organic purchases of an ad's product, so that they give targets away."""
  logs = logs_of([
    ("u", 0 * HOUR, "a0", None, "r0", CONVERSION, 1.0),
    ("u", 1 * HOUR, None, "c0", None, CONVERSION, 1.0),
    ("u", 2 * HOUR, "a2", None, "r1", CONVERSION, 1.0),  # validates
    ("u", 2 * HOUR, None, "c0", None, CONVERSION, 1.0),
    ("u", 3 * HOUR, "a3", None, "r2", CONVERSION, 1.0),  # tests; c0 is the product of a3
    ("u", 4 * HOUR, None, "c0", None, CONVERSION, 1.0),
    ("u", 5 * HOUR, "a1", None, "r3", IMPRESSION, 0.0),
    ("v", 0 * HOUR, "a0", None, "q0", CONVERSION, 1.0),
    ("v", 1 * HOUR, "a3", None, "q1", CONVERSION, 1.0),
    ("v", 9 * HOUR, None, "c0", None, CONVERSION, 1.0),  # nothing of v is held out
  ])
  config = SequenceConfig(split="leave_one_out", num_trending=0)
  write_prepared(logs, tmp_path, config)
  learned_E = training_events(logs, open_examples(tmp_path / "examples"))
  assert learned_E.tolist() == [True] * 2 + [False] * 5 + [True] * 3
  maker = ExampleMaker(logs, config)
  assert [len(list(maker.impressions(0, split))) for split in range(3)] == [1, 1, 1]


def test_the_end_of_an_earlier_request_is_not_learned_from_either(tmp_path):
  """A request that began before the validating one, and in which more was bought after it."""
  logs = logs_of([
    ("u", 0 * HOUR, "a0", None, "r0", CONVERSION, 1.0),
    ("u", 1 * HOUR, "a1", None, "r1", IMPRESSION, 0.0),
    ("u", 2 * HOUR, "a2", None, "r2", CONVERSION, 1.0),  # validates
    ("u", 2 * HOUR + 60, None, "c0", "r1", CONVERSION, 1.0),
    ("u", 3 * HOUR, "a3", None, "r3", CONVERSION, 1.0),  # tests; c0 is the product of a3
  ])
  write_prepared(logs, tmp_path, SequenceConfig(split="leave_one_out", num_trending=0))
  learned_E = training_events(logs, open_examples(tmp_path / "examples"))
  assert learned_E.tolist() == [True, True, False, False, False]


def test_a_request_in_the_second_of_a_cut_belongs_to_what_begins_there():
  times = [9, 10, 19, 20, 29, 30]
  events = [("u", t, "a0", None, f"r{t}", CONVERSION, 1.0) for t in times]
  config = SequenceConfig(
    train_start_s=10, validation_start_s=20, test_start_s=30, num_trending=0
  )
  maker = ExampleMaker(logs_of(events), config)
  assert [[e.time_s for e in maker.user_examples(0, split)] for split in range(3)] == [
    [10, 19], [20, 29], [30]
  ]


def test_a_request_is_as_old_as_its_first_event():
  rows = [("u", 3, "a0"), ("u", 7, "a1"), ("u", 12, "a2"), ("u", 22, "a3")]
  events = [(*row, None, f"r{max(row[1], 7)}", CONVERSION, 1.0) for row in rows]  # 3 and 7 are one
  config = SequenceConfig(validation_start_s=5, test_start_s=20, num_trending=0)
  maker = ExampleMaker(logs_of(events), config)
  assert [e.time_s for split in range(3) for e in maker.user_examples(0, split)] == [3, 12, 22]
  (first,) = maker.user_examples(0, 0)
  assert first.target_C.tolist() == [0, 1] and first.ad_T.tolist() == []


def test_what_is_met_in_the_second_of_a_request_is_no_history():
  events = [("u", t, None, "c0", f"q{t}", CLICK, 0.0) for t in (4, 5)]
  events += [("u", t, "a0", None, f"r{t}", CONVERSION, 1.0) for t in (5, 9, 19)]
  config = SequenceConfig(validation_start_s=8, test_start_s=18, num_trending=0)
  maker = ExampleMaker(logs_of(events), config)
  (first,), (second,) = (list(maker.user_examples(0, split)) for split in range(2))
  assert first.organic_count_O.tolist() == [0]  # once, at 4
  assert second.organic_count_O.tolist() == [2]  # twice


def test_days_are_counted_back_from_the_end_of_the_last_second():
  config = split_by_time(
    0, 30 * DAY_S - 1, source="log", validation_days=3, test_days=2, train_days=10
  )
  days = (config.train_start_s, config.validation_start_s, config.test_start_s)
  assert [day / DAY_S for day in days] == [15, 25, 28]


def test_a_target_has_the_largest_ecpm_of_its_request(hand_logs):
  events = hand_logs.events
  ecpm = np.full(len(events.ad), np.nan, np.float32)
  ecpm[(events.ad == 2) & (events.time_s == 5 * HOUR)] = [5, 3]
  logs = dataclasses.replace(hand_logs, events=dataclasses.replace(events, ecpm=ecpm))
  config = SequenceConfig(validation_start_s=4 * HOUR, test_start_s=8 * HOUR, num_trending=0)
  (third,) = ExampleMaker(logs, config).user_examples(0, 1)
  np.testing.assert_array_equal(third.ecpm_C, [5, np.nan])


def test_values_that_only_held_out_requests_have_are_unknown(hand_logs):
  events = hand_logs.events
  late = np.where(events.time_s >= 4 * HOUR, "late", "early").astype(object)
  logs = dataclasses.replace(hand_logs, events=dataclasses.replace(events, features={"at": late}))
  config = SequenceConfig(validation_start_s=4 * HOUR, test_start_s=8 * HOUR, num_trending=0)
  maker = ExampleMaker(logs, config)
  assert maker.vocabulary.request == {"at": ["early"]}
  assert [e.feature_F.tolist() for split in range(3) for e in maker.user_examples(0, split)] == [
    [1], [1], [0], [0]
  ]


def test_features_are_those_of_users_then_of_requests(tiny_logs):
  config = time_split(tiny_logs, validation_days=10, test_days=10)
  maker = ExampleMaker(tiny_logs, config)
  assert maker.vocabulary.names == ("city", "scene")
  assert maker.vocabulary.sizes == (4, 3)
  values = np.stack([e.feature_F for u in range(60) for e in maker.user_examples(u, 0)])
  assert values.min() >= 1 and values.max(axis=0).tolist() == [3, 2]


@pytest.mark.parametrize(
  ("call", "rule"),
  [
    (lambda logs: time_split(logs, validation_days=40, test_days=40), "nothing to train on"),
    (lambda logs: SequenceConfig(split="leave_one_out"), "num_trending"),
    (lambda logs: SequenceConfig(max_targets=0), "max_targets"),
    (lambda logs: SequenceConfig(validation_start_s=2, test_start_s=1), "test_start_s"),
    (lambda logs: ExampleMaker(logs, SequenceConfig(test_start_s=9e9, validation_start_s=9e9)),
     "holds no request"),
  ],
)
def test_impossible_settings_are_refused(tiny_logs, call, rule):
  with pytest.raises(ValueError, match=rule):
    call(tiny_logs)


def test_a_log_without_engagement_is_refused():
  logs = logs_of([("u", h * HOUR, "a0", None, f"r{h}", IMPRESSION, 0.0) for h in range(4)])
  with pytest.raises(LogError, match="clicked or converted"):
    ExampleMaker(logs, SequenceConfig(split="leave_one_out", num_trending=0))


def test_buckets_are_half_octaves():
  assert count_bucket(np.array([1, 2, 3, 4, 6, 8, 10**9])).tolist() == [0, 2, 3, 4, 5, 6, 15]
  hours = np.array([0, 1, 3, 7, 10**9])
  assert age_bucket(hours * HOUR).tolist() == [0, 2, 4, 6, 31]
