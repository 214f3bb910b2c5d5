"""Likeness of ads and users: by hand, on two kinds of users, and blind to what comes later."""

import dataclasses

import numpy as np

from gr4ad_jax.data.cutting import survey
from gr4ad_jax.data.log_folder import LogParts, write_logs
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.data.taste_tables import UserCounts, count_users, make_tastes, table_times
from gr4ad_jax.data.tastes import Tastes, likeness

DAY = 86_400


def of_one(tastes, now_s, met, counts, asked):
  """The likeness for a single request."""
  return likeness(tastes, np.array([now_s]), met[None], counts[None], asked[None])[0]


def test_the_likeness_by_hand():
  """Ads 0 and 2 are met, thrice and once; the second table holds from 100 seconds on."""
  first_AE = [[0, 1], [0, 1], [0, 1]]
  second_AE = [[1, 0], [0.6, 0.8], [0, 1]]
  tastes = Tastes(
    np.array([50, 100]), np.array([first_AE, second_AE], np.float16),
    np.array([[1, 1, 1], [2, 1, 1]], np.float32),
  )
  met, asked = np.array([0, 2, -1]), np.array([0, 1, 2, 3, -1])  # -1 = none
  counts = np.array([3.0, 1.0, 0.0])
  user = np.array([2 * np.log(4), np.log(2)])  # weight times log (1 + count), along each axis
  expected = [*(np.array(second_AE) @ user / np.linalg.norm(user)), 0, 0]  # ad 3 came later
  # Four requests of the same past; the last one's user met only what is new.
  now_s, met_BP = np.array([100, 99, 49, 100]), np.stack([met, met, met, [3, -1, -1]])
  found = likeness(tastes, now_s, met_BP, np.tile(counts, (4, 1)), np.tile(asked, (4, 1)))
  np.testing.assert_allclose(found[0], expected, atol=1e-3)
  np.testing.assert_allclose(found[1], [1, 1, 1, 0, 0], atol=1e-3)
  assert (found[2:] == 0).all()
  against = tastes._replace(vector_DAE=-tastes.vector_DAE[:, [0, 0, 1]] * [1, -1])
  assert of_one(against, 100, np.array([0]), np.array([1.0]), np.array([2])).min() >= 0


def counts(rng, taken_UA) -> UserCounts:
  user, ad = np.nonzero(taken_UA)
  return UserCounts(np.zeros(len(user), np.int8), user, ad, rng.integers(1, 4, len(user)))


def test_ads_of_the_same_users_are_alike():
  """Two kinds of users, with ten ads each and one that all take."""
  rng = np.random.default_rng(0)
  taken_UA = np.zeros((200, 21), bool)
  for kind in (0, 1):
    taken_UA[kind::2, kind * 10 : kind * 10 + 10] = rng.random((100, 10)) < 0.4
  taken_UA[:, 20] = True
  tastes = make_tastes([counts(rng, taken_UA)], np.array([0]), 22)
  met = np.array([0, 3])
  found = of_one(tastes, 0, met, np.ones(2), np.arange(22))
  others = np.setdiff1d(np.arange(10), met)
  assert found[others].min() > 2 * found[10:20].max()
  assert tastes.weight_DA[0, 20] == 0 and found[21] == 0  # all take it; nobody does
  # What says nothing weighs nothing.
  with_common = of_one(tastes, 0, np.append(met, 20), np.array([1, 1, 9.0]), np.arange(22))
  np.testing.assert_allclose(with_common, found, atol=1e-6)


def test_few_users_and_none_give_no_vectors():
  rng = np.random.default_rng(1)
  taken_UA = np.eye(4, 6, dtype=bool)
  taken_UA[:, 5], taken_UA[:2, 4] = [1, 1, 1, 0], True  # three users take ad 5, two ad 4
  tastes = make_tastes([counts(rng, taken_UA)], np.array([0]), 6)
  assert np.flatnonzero(tastes.weight_DA[0]).tolist() == [5]
  assert (tastes.vector_DAE[0, :5] == 0).all()
  nothing = make_tastes([counts(rng, np.zeros((3, 6), bool))], np.array([0, 9]), 6)
  assert (nothing.vector_DAE == 0).all() and (nothing.weight_DA == 0).all()


def tables_of(logs, folder):
  write_logs(logs, folder)
  config = SequenceConfig(
    validation_start_s=logs.events.time_s.max() - 2 * DAY,
    test_start_s=logs.events.time_s.max() - DAY,
  )
  parts = LogParts(folder)
  made_s_D = table_times(parts.first_s, parts.last_s)
  return make_tastes(survey(parts, config).users, made_s_D, len(logs.ads.ad_id))


def test_a_table_knows_nothing_of_what_comes_after_it(tiny_logs, tmp_path):
  """With other ads in every event from its time on, and the same event times, it is the same."""
  events = tiny_logs.events
  before = tables_of(tiny_logs, tmp_path / "logs")
  made_s = int(before.made_s_D[4])
  assert events.time_s.min() < made_s < events.time_s.max()
  later_E = (events.time_s >= made_s) & (events.ad >= 0)
  other = np.where(later_E, (events.ad + 7) % len(tiny_logs.ads.ad_id), events.ad)
  changed = dataclasses.replace(tiny_logs, events=dataclasses.replace(events, ad=other))
  after = tables_of(changed, tmp_path / "changed")
  for x, y in zip(before[1:], after[1:], strict=True):
    np.testing.assert_array_equal(x[:5], y[:5])
    assert (x[5:] != y[5:]).any()


def test_an_engagement_as_a_table_is_made_is_not_in_it(tiny_logs):
  events = tiny_logs.events
  first = np.argmin(np.where(events.ad >= 0, events.time_s, np.iinfo(np.int64).max))
  found = count_users(tiny_logs, events.time_s[[first]], first_user=0, every=1)
  mine = (found.user_C == events.user[first]) & (found.ad_C == events.ad[first])
  assert found.table_C[mine].tolist() == [1]


def test_parts_of_a_log_add_up_and_some_users_stand_for_all(tiny_logs):
  """All users in one part or in two; every third user alone is that many users fewer."""
  events, num_ads = tiny_logs.events, len(tiny_logs.ads.ad_id)
  made_s_D = table_times(int(events.time_s.min()), int(events.time_s.max()))
  assert len(made_s_D) == 8 and made_s_D[-1] > events.time_s.max()
  whole = count_users(tiny_logs, made_s_D, first_user=0, every=1)
  cut = 20
  halves = []
  for first, mine_E in ((0, events.user < cut), (cut, events.user >= cut)):
    part = dataclasses.replace(
      events, features={name: x[mine_E] for name, x in events.features.items()},
      **{
        field.name: getattr(events, field.name)[mine_E] for field in dataclasses.fields(events)
        if field.name != "features"
      },
    )
    part = dataclasses.replace(part, user=part.user - np.int32(first))
    logs = dataclasses.replace(tiny_logs, events=part)
    halves.append(count_users(logs, made_s_D, first_user=first, every=1))
  for x, y in zip(
    make_tastes([whole], made_s_D, num_ads), make_tastes(halves, made_s_D, num_ads), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  third = count_users(tiny_logs, made_s_D, first_user=0, every=3)
  expected = np.flatnonzero(np.isin(whole.user_C, np.arange(0, 999, 3)))
  for x, y in zip(third, whole, strict=True):
    np.testing.assert_array_equal(x, y[expected])


