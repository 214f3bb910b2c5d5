"""Streams: what stands in a group, strictly before its request, and what a row is asked for."""

import collections
import dataclasses

import numpy as np
import pytest

from gr4ad_jax.catalog.prepared import open_prepared
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.sequences import ExampleMaker, Past
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.config import Config, StreamConfig
from gr4ad_jax.gpr.groups import gap_bucket, groups_of, requests_of
from gr4ad_jax.gpr.label_rows import LabelRows
from gr4ad_jax.gpr.legal_codes import legal_codes, unpack
from gr4ad_jax.search.generator import named_arrays

DAY = 86_400
MONDAY = 4 * DAY  # 1970-01-05
STREAM = StreamConfig(groups=12, bundle=4, labels=5)


def past_by_hand() -> Past:
  """Request 7 on Monday at 1:00 (ads 3 and 4, the second bought a minute later), 9 the day after.

  Contents 0 to 5, an hour apart from Monday 0:00; the one at 1:00 comes after request 7.
  """
  time_s = np.array([MONDAY + 3600, MONDAY + 3660, MONDAY + DAY + 1800])
  request_s = np.array([MONDAY + 3600, MONDAY + 3600, MONDAY + DAY])
  return Past(
    ads=np.array([3, 4, 5], np.int32), ad_time_s=time_s, ad_value=np.zeros(3),
    ad_action=np.array([1, 2, 1], np.int8), ad_request=np.array([7, 7, 9]),
    ad_request_s=request_s, ad_feature=np.array([[1], [1], [2]], np.int32),
    organics=np.arange(6, dtype=np.int32), organic_time_s=MONDAY + 3600 * np.arange(6),
    organic_ads=np.full(6, -1),
  )


def test_groups_by_hand():
  past = past_by_hand()
  groups = groups_of(past, requests_of(past), last=1, most=8, bundle=3)
  # Request feature, hour, weekday.
  assert groups.request_GF.tolist() == [[1, 1, 0], [2, 0, 1]]
  assert groups.ad_GI.tolist() == [[3, 4, -1], [5, -1, -1]]
  assert groups.action_GI.tolist() == [[1, 2, -1], [1, -1, -1]]
  assert groups.organic_GJ.tolist() == [[0, -1, -1], [3, 4, 5]]  # the latest three of five
  assert groups.count_G.tolist() == [0, 3]  # half octaves of 1 + none, 1 + two
  # 23 hours are 82,800 s, between 2 ** 16 and 2 ** 17.
  assert groups.gap_G.tolist() == [-1, 16]
  assert groups.time_s_G.tolist() == [MONDAY + 3600, MONDAY + DAY]
  assert groups.ad_time_s_G.tolist() == [MONDAY + 3660, MONDAY + DAY + 1800]
  newest = groups_of(past, requests_of(past), last=1, most=1, bundle=3)
  for of_all, of_newest in zip(groups, newest, strict=True):
    np.testing.assert_array_equal(of_newest, of_all[1:])


def test_gap_buckets_are_octaves():
  gap_s = np.array([0, 1, 2, 3, 6, 7, 2**20 - 2, 2**20 - 1, 2**40])
  assert gap_bucket(gap_s).tolist() == [0, 1, 1, 2, 2, 3, 19, 20, 31]


@pytest.fixture(scope="module")
def prepared(tiny_data):
  return open_prepared(str(tiny_data), str(tiny_data / "sids"))


@pytest.fixture(scope="module")
def users(prepared):
  return ExampleMaker(
    prepared.logs, prepared.examples.config, vocabulary=prepared.examples.features
  )


@pytest.fixture(scope="module")
def maker(prepared, users):
  sids = prepared.sids
  return BatchMaker(STREAM, users, sids.codes_AL, sids.content_codes_OL, sids.codebook_sizes)


@pytest.mark.parametrize("split", [0, 1, 2])
def test_every_engaged_ad_of_a_split_is_one_label_at_its_own_request(prepared, users, split):
  events, rows = prepared.logs.events, LabelRows(users, split, stream=STREAM, num_heads=3)
  asked = collections.Counter()
  for row in rows:
    past = users.past(user := _user_of(row, prepared, users))
    time_s_G = row["time_s_G"]
    later = np.unique(past.ad_request_s)
    for group, target_N, worth in zip(
      row["group_P"], row["target_PN"], row["worth_P"], strict=True
    ):
      if group < 0:
        assert (target_N == -1).all() and worth == 0
        continue
      asked[user, int(time_s_G[group]), int(target_N[0])] += 1
      mine = (past.ads == target_N[0]) & (past.ad_request_s == time_s_G[group])
      assert worth == past.ad_value[mine].sum() > 0
      for head in (1, 2):  # an ad of the request after, and of the one after that
        at = np.searchsorted(later, time_s_G[group]) + head
        ads = past.ads[past.ad_request_s == later[at]] if at < len(later) else np.zeros(0)
        in_split = at < len(later) and split == np.searchsorted(
          [prepared.examples.config.validation_start_s, prepared.examples.config.test_start_s],
          later[at], side="right",
        )
        assert target_N[head] in ads if in_split else target_N[head] == -1
  expected = {
    (e.user, e.time_s, int(ad)) for e in read_split(prepared.examples, ("train", "validation",
                                                                        "test")[split])
    for ad in e.target_C
  }
  assert set(asked) == expected and set(asked.values()) == {1}
  assert (events.action == Action.CONVERSION).all()


def test_leave_one_out_asks_for_each_users_own_last_requests(prepared):
  """What examples have as targets, label by label; no head is told of a held-out request."""
  config = SequenceConfig(split="leave_one_out", num_trending=0)
  users = ExampleMaker(prepared.logs, config)
  for split in range(3):
    expected = collections.Counter(
      (e.time_s, int(ad)) for user in range(60) for e in users.user_examples(user, split)
      for ad in e.target_C
    )
    found = collections.Counter()
    for row in LabelRows(users, split, stream=STREAM, num_heads=2):
      for group, target_N in zip(row["group_P"], row["target_PN"], strict=True):
        if group >= 0:
          found[int(row["time_s_G"][group]), int(target_N[0])] += 1
          assert (target_N[1] >= 0) <= (split == 0)
    assert found == expected and len(found) > 50


def _user_of(row, prepared, users) -> int:
  """Found by when each request was made, and with which features."""
  events, last_s = prepared.logs.events, row["time_s_G"][-1]
  found = np.unique(events.user[events.time_s == last_s])
  return next(user for user in found.tolist() if np.isin(row["time_s_G"], users.past(
    user).ad_request_s).all())


def test_a_context_holds_nothing_of_its_request_or_later(prepared, users, maker):
  """All later events changed, and the context is the same."""
  examples = read_split(prepared.examples, "test")[:20]
  expected = maker.context(examples)
  events = prepared.logs.events
  for row, example in enumerate(examples):
    late_E = (events.user != example.user) | (events.time_s >= example.time_s)
    changed = dataclasses.replace(
      events, ad=np.where(late_E & (events.ad >= 0), 39 - events.ad, events.ad),
      content=np.where(late_E & (events.content >= 0), 29 - events.content, events.content),
      action=np.where(late_E, 1, events.action).astype(np.int8),
    )
    other = dataclasses.replace(maker, users=ExampleMaker(
      dataclasses.replace(prepared.logs, events=changed), prepared.examples.config,
      vocabulary=prepared.examples.features,
    ))
    for name, found in named_arrays(other.context([example])).items():
      np.testing.assert_array_equal(found[0], getattr(expected, name)[row], name)


def test_a_context_by_hand(prepared, users, maker):
  """Its last group is the request itself; the ads of the group before are those of its targets."""
  example = read_split(prepared.examples, "test")[-1]
  context, past = maker.context([example]), users.past(example.user)
  before_s = past.ad_request_s[past.ad_request_s < example.time_s].max()
  ad_code_GIL = context.ad_code_BTL.reshape(12, 4, 3)
  assert (ad_code_GIL[-1] == -1).all() and context.ad_age_BG[0, -1] == -1
  latest = past.ads[past.ad_request_s == before_s][-4:]
  np.testing.assert_array_equal(
    ad_code_GIL[-2, : len(latest)], prepared.sids.codes_AL[latest]
  )
  assert context.age_BG[0, -2:].tolist() == [example.time_s - before_s, 0]
  between = past.organics[
    (past.organic_time_s >= before_s) & (past.organic_time_s < example.time_s)
  ]
  found = context.organic_code_BOL.reshape(12, 4, 3)[-1, : len(between)]
  np.testing.assert_array_equal(found, prepared.sids.content_codes_OL[between])
  num_user = len(prepared.examples.features.user)
  assert context.user_BF[0].tolist() == example.feature_F[:num_user].tolist()
  assert context.request_BGF[0, -1, :1].tolist() == example.feature_F[num_user:].tolist()
  hour, weekday = example.time_s // 3600 % 24, (example.time_s // DAY + 3) % 7
  assert context.request_BGF[0, -1, 1:].tolist() == [hour, weekday]


def test_a_request_made_now_reads_what_it_brings_along(users, maker):
  """With its own past, a context does not ask the logs."""
  example = users.latest_context(7)
  whole = maker.context([example])
  from_logs = maker.context([dataclasses.replace(example, past=None)])
  for name, found in whole._asdict().items():
    np.testing.assert_array_equal(found, getattr(from_logs, name), name)
  fresh = dataclasses.replace(example, past=example.past.until(0))
  assert (maker.context([fresh]).ad_code_BTL == -1).all()
  assert (maker.context([fresh]).count_BG[0, :-1] == -1).all()


def test_new_ads_are_read_by_their_codes(users, maker):
  example = users.latest_context(7)
  ad = int(example.past.ads[-1])
  codes = maker.with_ads(np.array([ad]), None, np.array([[7, 3, 7]]))
  assert [7, 3, 7] in codes.context([example]).ad_code_BTL[0].tolist()
  assert [7, 3, 7] not in maker.context([example]).ad_code_BTL[0].tolist()


def test_codes_that_lead_on_by_hand():
  """Bits of the codes that follow each prefix of three SIDs, the fourth ad has none."""
  code_AL = np.array([[0, 1, 33], [0, 1, 2], [4, 0, 0], [-1, -1, -1]])
  legal = legal_codes(code_AL, 34)
  found_NLU = legal.of(np.array([0, 2, 3, -1]))
  assert found_NLU.tolist() == [
    [[1 << 0 | 1 << 4, 0], [1 << 1, 0], [1 << 2, 1 << 1]],
    [[1 << 0 | 1 << 4, 0], [1 << 0, 0], [1 << 0, 0]],
    [[0, 0]] * 3, [[0, 0]] * 3,
  ]
  codes = [np.flatnonzero(row).tolist() for row in np.asarray(unpack(found_NLU[0], 34))]
  assert codes == [[0, 4], [1], [2, 33]]


@pytest.mark.parametrize(("make", "words"), [
  (lambda: StreamConfig(labels=65), "stream.labels=65: must not exceed stream.groups=64"),
  (lambda: StreamConfig(bundle=0), "stream.bundle=0: must be >= 1"),
  (lambda: dataclasses.replace(Config(), search=dataclasses.replace(
    Config().search, precision="int8")), "search.precision='int8'"),
])
def test_settings_that_cannot_work_are_named(make, words):
  with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
    make()
