"""Stage 2: what a label weighs, and what its loss counts."""

import dataclasses

import jax
import numpy as np
import pytest

from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.config import StreamConfig
from gr4ad_jax.gpr.label_rows import LabelRows
from gr4ad_jax.gpr.mtp import weighted_means
from gr4ad_jax.gpr.vaft import label_weights, value_weights

NAN = np.nan


def test_a_label_weighs_by_its_action_and_by_its_value_against_the_actions_mean():
  """By hand: log1p(1) = log 2, log1p(3) = 2 log 2, log1p(7) = 3 log 2, all in units of log 2."""
  mean_A = np.array([2.0, 10.0, 100.0])
  value_N = np.array([2.0, 14.0, 10.0, 30.0, 100.0, 700.0, 0.0, 1e9, NAN])
  action_N = np.array([0, 0, 1, 1, 2, 2, 2, 2, 1])
  found = value_weights(value_N, action_N, mean_A)
  np.testing.assert_allclose(found, [1, 3, 2, 4, 4, 12, 1, 16, 2], rtol=1e-6)
  # An action that nobody has put a value on weighs what actions of its kind do.
  alike = value_weights(value_N, action_N, np.zeros(3))
  np.testing.assert_allclose(alike, [1, 1, 2, 2, 4, 4, 4, 4, 2])


@pytest.fixture(scope="module")
def users(tiny_logs):
  """The tiny log with clicks, some of them with an eCPM, and conversions."""
  rng, events = np.random.default_rng(0), tiny_logs.events
  num = len(events.user)
  action = np.where(events.ad >= 0, rng.integers(0, 3, num), events.action).astype(np.int8)
  logs = dataclasses.replace(tiny_logs, events=dataclasses.replace(
    events, action=action, value=np.where(action == 2, events.value, 0).astype(np.float32),
    ecpm=np.where(rng.random(num) < 0.7, rng.integers(1, 50, num), NAN).astype(np.float32),
  ))
  return ExampleMaker(logs, time_split(logs, validation_days=7, test_days=7))


def by_hand(users):
  """(request, ad) -> weight, event by event."""
  events, told = users.logs.events, {}
  for at in range(len(events.user)):
    if events.ad[at] >= 0 and events.action[at] > 0:
      old = told.get((events.request[at], events.ad[at]), (0, 0.0, NAN))
      told[events.request[at], events.ad[at]] = (
        max(old[0], events.action[at]), old[1] + events.value[at], np.fmax(old[2], events.ecpm[at])
      )
  worth = {key: paid if action == 2 else ecpm for key, (action, paid, ecpm) in told.items()}
  mean = {
    action: np.nanmean([worth[key] for key in told
                        if told[key][0] == action and users.split_R[key[0]] == 0])
    for action in (1, 2)
  }
  weights = {}
  for key, (action, _, _) in told.items():
    share = worth[key] / mean[action]
    scaled = 1.0 if np.isnan(share) else min(max(np.log2(1 + share), 0.25), 4.0)
    weights[key] = scaled * (2 if action == 1 else 4)
  return weights


def test_weights_of_all_labels_of_a_log_by_hand(users):
  weights, expected = label_weights(users), by_hand(users)
  assert len(weights.key_N) == len(expected) > 1000
  found = [weights.of(*key) for key in expected]
  np.testing.assert_allclose(found, list(expected.values()), rtol=1e-5)
  assert len({round(weight, 3) for weight in found}) > 20


def test_each_target_of_a_row_has_the_weight_of_its_own_request(users):
  stream, expected = StreamConfig(groups=12, bundle=4, labels=6), by_hand(users)
  rows = LabelRows(users, 0, stream=stream, num_heads=2, weights=label_weights(users))
  codes_AL = np.stack([np.arange(40)] * 2, axis=1).astype(np.int32)
  maker = BatchMaker(stream, users, codes_AL, codes_AL, (40, 40))
  request_of = {
    (user, int(time_s)): request
    for user in range(60) for request, time_s in zip(
      users.past(user).ad_request, users.past(user).ad_request_s, strict=True
    )
  }
  checked = 0
  for row in [rows[at] for at in range(8)]:
    batch = maker([row])
    np.testing.assert_array_equal(batch.weight_BPN[0] > 0, batch.target_BPNL[0, ..., 0] >= 0)
    user = next(user for user in range(60) if all(
      (user, int(time_s)) in request_of for time_s in row["time_s_G"]
    ))
    for label, group in enumerate(row["group_P"].tolist()):
      if group >= 0:
        request = request_of[user, int(row["time_s_G"][group])]
        key = (request, row["target_PN"][label, 0])
        assert batch.weight_BPN[0, label, 0] == pytest.approx(expected[key], rel=1e-5)
        checked += 1
  assert checked > 20
  assert maker([LabelRows(users, 0, stream=stream, num_heads=2)[0]]).weight_BPN is None


def test_a_mean_is_weighted_and_the_weights_own_size_says_nothing():
  """(1 x 2 + 3 x 4) / 4 for one head, 5 for the other, whose second label is not there."""
  ce_BPN, weight_BPN = np.array([[[2.0, 5.0], [4.0, 9.0]]]), np.array([[[1.0, 2.0], [3.0, 0.0]]])
  for size in (1.0, 7.0):
    np.testing.assert_allclose(weighted_means(ce_BPN, size * weight_BPN), [3.5, 5.0])
  nothing = jax.grad(lambda ce_BPN: weighted_means(ce_BPN, 0 * weight_BPN).sum())(ce_BPN)
  np.testing.assert_array_equal(nothing, np.zeros((1, 2, 2)))
