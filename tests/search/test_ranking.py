"""Ranking metrics: by hand, against plain loops and metrax, and what intervals must obey."""

import math

import numpy as np
import pytest

from gr4ad_jax.search.ranking import (
  EvalRequests,
  paired_difference,
  ranking_metrics,
  recall_per_request,
)

SECOND = 1 / math.log2(3)  # gain of a hit in second place
INTERVALS = [
  prefix + name + bound
  for prefix in ("", "new/")
  for name in ("recall@50", "value_recall@50")
  for bound in ("/ci_low", "/ci_high")
]


def random_case(seed, *, requests=60, users=20, ads=90, targets=5, depth=50):
  """Requests with 1 to `targets` targets, and lists that put some of them near the top."""
  rng = np.random.default_rng(seed)
  target_RC = np.full((requests, targets), -1, np.int32)
  score_RA = rng.random((requests, ads))
  for row in range(requests):
    chosen = rng.choice(ads, rng.integers(1, targets + 1), replace=False)
    target_RC[row, : len(chosen)] = chosen
    score_RA[row, chosen] += rng.random(len(chosen))
  case = EvalRequests(
    rng.integers(users, size=requests).astype(np.int32),
    np.arange(requests),
    target_RC,
    rng.integers(0, 9, target_RC.shape).astype(np.float32),
    rng.random(target_RC.shape) < 0.5,
  )
  return np.argsort(-score_RA, axis=1)[:, :depth].astype(np.int32), case


def subset(requests, rows):
  return EvalRequests(
    requests.user_R[rows], requests.time_s_R[rows], requests.target_RC[rows],
    requests.value_RC[rows], requests.new_RC[rows],
  )  # fmt: skip


def test_by_hand():
  requests = EvalRequests(
    user_R=np.array([0, 0, 1]),
    time_s_R=np.array([5, 9, 7]),
    target_RC=np.array([[1, 4], [2, -1], [3, -1]]),
    value_RC=np.array([[2, 6], [2, 99], [10, 99]], np.float32),
    new_RC=np.array([[False, True], [False, True], [True, True]]),
  )
  ranked = np.array([[1, 0, 3], [0, 2, 5], [5, 3, -1]])
  advertiser = np.array([0, 0, 1, 1, 2, 2, 3])  # ad 6, of advertiser 3, is never shown
  metrics = ranking_metrics(ranked, requests, advertiser_A=advertiser, ks=(1, 3), bootstrap=50)
  expected = {
    "recall@1": (1 / 2 + 0 + 0) / 3,
    "recall@3": (1 / 2 + 1 + 1) / 3,
    "ndcg@1": (1 + 0 + 0) / 3,
    "ndcg@3": (1 / (1 + SECOND) + SECOND + SECOND) / 3,
    "value_recall@3": (2 + 2 + 10) / (2 + 6 + 2 + 10),
    "advertiser_coverage@3": 3 / 4,
    # New: ad 4 of the first request (not found), ad 3 of the last one.
    "new/recall@1": 0,
    "new/recall@3": (0 + 1) / 2,
    "new/ndcg@3": (0 + SECOND) / 2,
    "new/value_recall@3": 10 / 16,
    "new/advertiser_coverage@3": 3 / 4,
  }
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value), name
  assert recall_per_request(ranked, requests, k=3).tolist() == [0.5, 1, 1]


def loop_metrics(ranked, requests, k):
  recalls, ndcgs, captured, held_out = [], [], 0.0, 0.0
  for row, targets in enumerate(requests.target_RC):
    value = {int(t): requests.value_RC[row, c] for c, t in enumerate(targets) if t >= 0}
    top = ranked[row, :k].tolist()
    recalls.append(sum(t in top for t in value) / len(value))
    gain = sum(1 / math.log2(rank + 2) for rank, ad in enumerate(top) if ad in value)
    ndcgs.append(gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(value)))))
    captured += sum(v for t, v in value.items() if t in top)
    held_out += sum(value.values())
  return {
    f"recall@{k}": np.mean(recalls),
    f"ndcg@{k}": np.mean(ndcgs),
    f"value_recall@{k}": captured / held_out,
  }


@pytest.mark.parametrize("seed", range(4))
def test_plain_loops(seed):
  ranked, requests = random_case(seed)
  metrics = ranking_metrics(ranked, requests, advertiser_A=np.arange(90), bootstrap=1)
  for k in (10, 50):
    for name, value in loop_metrics(ranked, requests, k).items():
      if name in metrics:
        assert metrics[name] == pytest.approx(value), name


def test_metrax():
  metrax = pytest.importorskip("metrax")
  ranked, requests = random_case(7)
  score = np.zeros((60, 90), np.float32)
  np.put_along_axis(score, ranked, np.arange(50, 0, -1, dtype=np.float32)[None], axis=1)
  label = np.zeros_like(score)
  rows, columns = np.nonzero(requests.target_RC >= 0)
  label[rows, requests.target_RC[rows, columns]] = 1
  metrics = ranking_metrics(ranked, requests, advertiser_A=np.arange(90), bootstrap=1)
  for name, oracle in (("recall", metrax.RecallAtK), ("ndcg", metrax.NDCGAtK)):
    value = oracle.from_model_output(score, label, np.array([10, 50])).compute()
    ours = [metrics[f"{name}@10"], metrics[f"{name}@50"]]
    np.testing.assert_allclose(ours, value, rtol=1e-5, err_msg=name)


def test_order_of_requests_and_targets_changes_nothing():
  ranked, requests = random_case(1)
  rng = np.random.default_rng(0)
  rows, columns = rng.permutation(60), rng.permutation(5)
  moved = subset(requests, rows)
  moved = EvalRequests(
    moved.user_R, moved.time_s_R, moved.target_RC[:, columns],
    moved.value_RC[:, columns], moved.new_RC[:, columns],
  )  # fmt: skip
  advertiser = np.arange(90) % 30
  before = ranking_metrics(ranked, requests, advertiser_A=advertiser)
  after = ranking_metrics(ranked[rows], moved, advertiser_A=advertiser)
  assert before == pytest.approx(after)


def test_padding_changes_nothing():
  ranked, requests = random_case(2)
  wide = EvalRequests(
    requests.user_R, requests.time_s_R,
    np.pad(requests.target_RC, ((0, 0), (0, 3)), constant_values=-1),
    np.pad(requests.value_RC, ((0, 0), (0, 3)), constant_values=np.nan),
    np.pad(requests.new_RC, ((0, 0), (0, 3)), constant_values=True),
  )  # fmt: skip
  longer = np.pad(ranked, ((0, 0), (0, 9)), constant_values=-1)
  advertiser = np.arange(90)
  assert ranking_metrics(ranked, requests, advertiser_A=advertiser) == pytest.approx(
    ranking_metrics(longer, wide, advertiser_A=advertiser)
  )


def test_a_repeated_ad_counts_once():
  requests = EvalRequests(
    np.array([0]), np.array([0]), np.array([[1, 2]]), np.ones((1, 2)), np.ones((1, 2), bool)
  )
  metrics = ranking_metrics(
    np.array([[1, 1, 1]]), requests, advertiser_A=np.zeros(3, int), ks=(3,), bootstrap=1
  )
  assert metrics["recall@3"] == 0.5
  assert metrics["ndcg@3"] == pytest.approx(1 / (1 + SECOND))


def test_one_user_has_an_interval_without_width():
  ranked, requests = random_case(3, users=1)
  metrics = ranking_metrics(ranked, requests, advertiser_A=np.arange(90))
  for name in INTERVALS:
    assert metrics[name] == pytest.approx(metrics[name.rsplit("/", 1)[0]]), name


def test_equal_users_have_an_interval_without_width():
  ranked, requests = random_case(4, requests=10)
  rows = np.tile(np.arange(10), 7)
  copies = subset(requests, rows)
  copies = EvalRequests(
    np.repeat(np.arange(7), 10), copies.time_s_R, copies.target_RC, copies.value_RC, copies.new_RC
  )
  metrics = ranking_metrics(ranked[rows], copies, advertiser_A=np.arange(90))
  for name in INTERVALS:
    assert metrics[name] == pytest.approx(metrics[name.rsplit("/", 1)[0]]), name


def test_requests_of_a_user_stay_together():
  # Every request four times by the same user: no new information, so the same intervals.
  ranked, requests = random_case(5)
  rows = np.repeat(np.arange(60), 4)
  once = ranking_metrics(ranked, requests, advertiser_A=np.arange(90))
  again = ranking_metrics(ranked[rows], subset(requests, rows), advertiser_A=np.arange(90))
  assert once == pytest.approx(again)


def test_interval_of_single_requests_is_that_of_a_mean():
  # Users with one request each: the bootstrap tends to mean +- 1.96 standard errors.
  ranked, requests = random_case(6, requests=2000)
  requests = EvalRequests(
    np.arange(2000), requests.time_s_R, requests.target_RC, requests.value_RC, requests.new_RC
  )
  metrics = ranking_metrics(ranked, requests, advertiser_A=np.arange(90), bootstrap=4000)
  recall = recall_per_request(ranked, requests, k=50)
  half = 1.96 * recall.std() / math.sqrt(2000)
  assert metrics["recall@50/ci_low"] == pytest.approx(recall.mean() - half, abs=0.1 * half)
  assert metrics["recall@50/ci_high"] == pytest.approx(recall.mean() + half, abs=0.1 * half)
  # NDCG of each request, from lists of one request each.
  ndcg = np.array([
    ranking_metrics(ranked[r : r + 1], requests.rows(np.array([r])), advertiser_A=np.arange(90),
                    bootstrap=1)["ndcg@50"]
    for r in range(0, 2000, 4)
  ])
  half = 1.96 * ndcg.std() / math.sqrt(2000)
  for end, sign in ("low", -1), ("high", 1):
    expected = metrics["ndcg@50"] + sign * half
    assert metrics[f"ndcg@50/ci_{end}"] == pytest.approx(expected, abs=0.15 * half)


def test_paired_difference_is_the_difference_of_the_metrics():
  a, requests = random_case(8)
  b = np.roll(a, 1, axis=0)
  metrics_a, metrics_b = (
    ranking_metrics(x, requests, advertiser_A=np.arange(90), ks=(10,)) for x in (a, b)
  )
  there = paired_difference(a, b, requests=requests, k=10)
  back = paired_difference(b, a, requests=requests, k=10)
  for name in ("recall@10", "ndcg@10", "value_recall@10", "new/recall@10", "new/ndcg@10"):
    assert there[name] == pytest.approx(metrics_a[name] - metrics_b[name])
    assert there[f"{name}/ci_low"] <= there[name] <= there[f"{name}/ci_high"]
    assert there[f"{name}/ci_low"] == pytest.approx(-back[f"{name}/ci_high"])
  assert set(paired_difference(a, a, requests=requests).values()) == {0.0}


def test_paired_difference_sees_what_intervals_apart_do_not():
  # b misses one target in ten that a finds; users differ far more than a and b do.
  rng = np.random.default_rng(0)
  found = rng.random(400) < 0.5
  a = np.where(found, 0, 1)[:, None]
  b = np.where(found & (rng.random(400) > 0.1), 0, 1)[:, None]
  requests = EvalRequests(
    np.arange(400), np.arange(400), np.zeros((400, 1), int), np.ones((400, 1)),
    np.ones((400, 1), bool),
  )  # fmt: skip
  apart = [ranking_metrics(x, requests, advertiser_A=np.zeros(2, int), ks=(1,)) for x in (a, b)]
  assert apart[0]["recall@1/ci_low"] < apart[1]["recall@1/ci_high"]
  assert paired_difference(a, b, requests=requests, k=1)["recall@1/ci_low"] > 0


def test_nothing_held_out_is_nan():
  requests = EvalRequests(
    np.array([0]), np.array([0]), np.array([[1]]), np.zeros((1, 1)), np.zeros((1, 1), bool)
  )
  metrics = ranking_metrics(np.array([[1]]), requests, advertiser_A=np.zeros(2, int), bootstrap=5)
  assert metrics["recall@50"] == 1
  assert math.isnan(metrics["value_recall@50"])  # no value
  assert math.isnan(metrics["new/recall@50"])  # no new target
  assert math.isnan(metrics["new/recall@50/ci_low"])
  assert metrics["new/advertiser_coverage@50"] == 0


def test_empty_lists_find_nothing():
  _, requests = random_case(9)
  metrics = ranking_metrics(np.zeros((60, 0), int), requests, advertiser_A=np.arange(90))
  assert metrics["recall@50"] == metrics["ndcg@50"] == metrics["advertiser_coverage@50"] == 0


GOOD = {
  "user_R": np.zeros(2, int), "time_s_R": np.zeros(2, int),
  "target_RC": np.array([[1, 2], [3, -1]]), "value_RC": np.ones((2, 2)),
  "new_RC": np.ones((2, 2), bool),
}  # fmt: skip


@pytest.mark.parametrize(
  "change, rule",
  [
    ({name: values[:0] for name, values in GOOD.items()}, "no request"),
    ({"time_s_R": np.zeros(3, int)}, "time_s_R has shape"),
    ({"value_RC": np.ones((2, 3))}, "value_RC has shape"),
    ({"target_RC": np.array([[1, 2], [-1, -1]])}, "request 1 has no target"),
    ({"target_RC": np.array([[1, 2], [3, 3]])}, "request 1 has the same target twice"),
    ({"value_RC": np.array([[1, 2], [-3, 0]])}, "value_RC holds -3"),
    ({"value_RC": np.array([[1, np.inf], [3, 0]])}, "value_RC holds inf"),
  ],
)
def test_bad_requests(change, rule):
  with pytest.raises(ValueError, match=rule):
    EvalRequests(**(GOOD | change))


def test_bad_lists():
  requests = EvalRequests(**GOOD)
  advertiser = np.zeros(4, int)
  with pytest.raises(ValueError, match="for 2 requests"):
    ranking_metrics(np.zeros((3, 5), int), requests, advertiser_A=advertiser)
  with pytest.raises(ValueError, match="outside the catalogue of 4 ads"):
    ranking_metrics(np.full((2, 5), 4), requests, advertiser_A=advertiser)
  with pytest.raises(ValueError, match="at least 1"):
    ranking_metrics(np.zeros((2, 5), int), requests, advertiser_A=advertiser, ks=(0,))
