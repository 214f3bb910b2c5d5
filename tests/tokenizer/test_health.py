"""The health report's numbers by hand and by brute force, and its verdicts at their edges."""

import itertools
import json
import math

import numpy as np
import pytest

from gr4ad_jax.tokenizer import health_line
from gr4ad_jax.tokenizer.health import measure
from gr4ad_jax.tokenizer.health_line import VERDICTS, Made, grade
from gr4ad_jax.tokenizer.health_verdicts import as_record, verdicts, worst
from gr4ad_jax.tokenizer.retrieval import chance_hits, retrieval_hits

CODES_AL = np.array([[0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [1, 2]], np.int32)

# Four ads, the first two with one text; code 0 stands for the mean of the first three.
EMBEDDING_AD = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], np.float32)
RECONSTRUCTION_AD = np.array([[2 / 3, 1 / 3]] * 3 + [[-1, 0]], np.float32)
ONE_LEVEL = np.array([[0], [0], [0], [1]])


def catalogue(num_ads=300, num_products=30, seed=0):
  """Products far apart, their ads close together; codes: product, ad within the product."""
  rng = np.random.default_rng(seed)
  product_A = np.arange(num_ads) % num_products
  centre_PD = rng.standard_normal((num_products, 16))
  embedding_AD = centre_PD[product_A] + 0.1 * rng.standard_normal((num_ads, 16))
  codes_AL = np.stack([product_A, np.arange(num_ads) // num_products], axis=1)
  return codes_AL, embedding_AD.astype(np.float32), centre_PD[product_A], product_A


def of_catalogue(codes_AL=None, sizes=(30, 10), **changes):
  good_AL, embedding_AD, reconstruction_AD, product_A = catalogue()
  arguments = dict(
    embedding_AD=embedding_AD, reconstruction_AD=reconstruction_AD, product_A=product_A,
    value_A=np.ones(len(good_AL)),
  )  # fmt: skip
  return measure(good_AL if codes_AL is None else codes_AL, sizes, **{**arguments, **changes})


def found(metrics, **arguments):
  return {line.name: line for line in verdicts(metrics, **arguments)}


def test_codes_by_hand():
  entropy = -(1 / 3 * math.log2(1 / 3) + 1 / 6 * math.log2(1 / 6) + 1 / 2 * math.log2(1 / 2))
  expected = {
    "num_ads": 6, "num_sids": 3, "codebook_space": 8, "num_levels": 2, "num_quantised": 1,
    "sid_collision_rate": 5 / 6, "cpr": 2, "col": 2 / 3, "util": 3 / 8, "util_as_printed": 6 / 8,
    "max_ads_per_sid": 3, "prefix_collision_rate": 1, "max_ads_per_prefix": 3,
    "level1/used_share": 1, "level1/entropy_bits": 1, "level1/perplexity": 2,
    "level1/balance": 1, "level1/max_share": 1 / 2, "level1/prefixes": 2,
    "level1/children_mean": 2, "level1/children_max": 2,
    "level2/used_share": 3 / 4, "level2/entropy_bits": entropy, "level2/perplexity": 2**entropy,
    "level2/balance": 2**entropy / 4, "level2/max_share": 1 / 2, "level2/prefixes": 3,
    "level2/children_mean": 3 / 2, "level2/children_max": 2,
    "content_coded_share": 1 / 2,
    "sid_collision_event_share": 18 / 21, "sid_collision_value_share": 1,
  }  # fmt: skip
  result = measure(
    CODES_AL, (2, 4), num_quantised=1, content_codes_OL=np.array([[0, 0], [-1, -1]]),
    events_A=np.array([1, 2, 3, 4, 5, 6]), value_A=np.array([0.5, 0, 0, 0.5, 0, 0]),
  )  # fmt: skip
  assert result == pytest.approx(expected)


def test_embeddings_and_reconstructions_by_hand():
  result = measure(
    ONE_LEVEL, (2,), embedding_AD=EMBEDDING_AD, reconstruction_AD=RECONSTRUCTION_AD
  )
  assert result["distinct_embedding_share"] == 3 / 4
  assert result["twin_ad_share"] == 2 / 4
  assert result["max_ads_per_embedding"] == 2
  assert result["sid_collision_twin_share"] == pytest.approx(2 / 3)  # of the three on code 0
  assert result["pas"] == pytest.approx((1 + 0 + 0) / 3)
  assert result["pas_chance"] == pytest.approx((1 + 0 - 1 + 0 - 1 + 0) / 6)
  # The mean is (1/4, 1/4): squared distances to it 5/8, 5/8, 5/8, 13/8; errors 2/9, 2/9, 8/9, 0.
  assert result["reconstruction_relative_error"] == pytest.approx((12 / 9) / (28 / 8))
  assert result["reconstruction_cosine"] == pytest.approx((5 / math.sqrt(5) + 1) / 4)
  assert result["reconstruction_cosine_of_mean"] == pytest.approx(2 / math.sqrt(2) / 4)


def test_pas_of_a_prefix_is_the_mean_over_its_groups():
  codes_AL = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
  result = measure(codes_AL, (2, 2), embedding_AD=EMBEDDING_AD)
  assert result["level1/pas"] == pytest.approx((1 + 0) / 2)  # the twins; (0, 1) with (-1, 0)
  assert result["pas"] == pytest.approx(0)  # only the last two share an SID


def test_labels_by_hand():
  product_A = np.array(["p", "p", "q", "q", "", ""])  # two unknown: in no pair
  result = measure(CODES_AL, (2, 4), product_A=product_A)
  assert result["label_pair_chance"] == pytest.approx(2 / 6)
  # Of the pairs with one first code (three of ads 0, 1, 2), one has one label.
  assert result["level1/label_pair_share"] == pytest.approx(1 / 3)
  assert result["level1/label_lift"] == pytest.approx(1)
  assert result["level2/label_pair_share"] == 1
  assert result["level2/label_lift"] == pytest.approx(3)
  assert not any(name.startswith("retrieval") for name in result)  # nothing to look up in


def test_retrieval_by_hand():
  # A square: each corner has two neighbours at cosine 0, its opposite at -1.
  square_AD = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
  hits = retrieval_hits(square_AD, np.array([0, 0, 1, 1]))
  assert hits == pytest.approx({1: 1 / 2, 5: 1, 10: 1})  # one of two at equal distance is right
  assert retrieval_hits(square_AD, np.array([0, 1, 0, 1]))[1] == 0
  assert chance_hits(np.array([0, 0, 1, 1])) == pytest.approx({1: 1 / 3, 5: 1, 10: 1})
  assert chance_hits(np.array([0, 0, -1, -1, -1])) == pytest.approx({1: 1 / 4, 5: 1, 10: 1})
  assert retrieval_hits(square_AD, np.array([0, 1, 2, -1])) == {} == chance_hits(np.arange(3))


def brute_force(x_AD, label_A, k):
  """Mean over queries of the share of all orders of equally near ads whose first k hold a hit."""
  unit_AD = x_AD / np.maximum(np.linalg.norm(x_AD, axis=-1, keepdims=True), 1e-9)
  cosine_AA = np.round(unit_AD @ unit_AD.T, 5)
  means = []
  for query, label in enumerate(label_A):
    others = [a for a in range(len(x_AD)) if a != query]
    if label < 0 or not any(label_A[a] == label for a in others):
      continue
    wins = [
      any(label_A[a] == label for a in sorted(order, key=lambda a: -cosine_AA[query, a])[:k])
      for order in itertools.permutations(others)
    ]
    means.append(np.mean(wins))
  return np.mean(means)


@pytest.mark.parametrize("seed", range(6))
def test_retrieval_equals_brute_force_with_ties(seed):
  rng = np.random.default_rng(seed)
  x_AD = rng.integers(-1, 2, (7, 2)).astype(np.float32)  # many equal rows and equal angles, zeros
  label_A = rng.integers(-1, 3, 7)
  label_A[:2] = 0
  hits = retrieval_hits(x_AD, label_A)
  for k in (1, 5):
    assert hits[k] == pytest.approx(brute_force(x_AD, label_A, k), abs=1e-9), k


def test_many_equal_rows_win_nothing_by_their_place():
  x_AD = np.ones((200, 4), np.float32)
  label_A = np.repeat(np.arange(100), 2)  # in order: each ad's partner stands beside it
  assert retrieval_hits(x_AD, label_A) == pytest.approx(chance_hits(label_A))


def test_small_chunks_change_nothing(monkeypatch):
  _, embedding_AD, _, product_A = catalogue()
  expected = retrieval_hits(embedding_AD, product_A)
  monkeypatch.setattr("gr4ad_jax.tokenizer.retrieval.VALUES_PER_CHUNK", 1000)
  assert retrieval_hits(embedding_AD, product_A) == pytest.approx(expected)


@pytest.mark.parametrize("max_queries", [10_000, 50])
def test_the_order_of_rows_changes_nothing(max_queries):
  codes_AL, embedding_AD, reconstruction_AD, product_A = catalogue()
  codes_AL = codes_AL // 2
  embedding_AD[::3] = embedding_AD[0]
  value_A = np.arange(len(codes_AL), dtype=float)
  order = np.random.default_rng(1).permutation(len(codes_AL))
  results = [
    measure(
      codes_AL[rows], (15, 5), num_quantised=1, embedding_AD=embedding_AD[rows],
      reconstruction_AD=reconstruction_AD[rows], product_A=product_A[rows],
      events_A=value_A[rows], value_A=value_A[rows], max_queries=max_queries,
    )
    for rows in (np.arange(len(codes_AL)), order)
  ]  # fmt: skip
  assert results[1] == pytest.approx(results[0])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(codes_AL=np.zeros((0, 2), int)), "codes_AL"),
    (dict(codes_AL=np.zeros((4, 1))), "codes_AL: float64"),
    (dict(codes_AL=np.array([[0], [2], [0], [0]])), r"row 1, level 1 holds 2, must be in \[0, 2\)"),
    (dict(codes_AL=np.array([[0], [-1], [0], [0]])), "row 1, level 1 holds -1"),
    (dict(codebook_sizes=(2, 2)), "codebook_sizes"),
    (dict(num_quantised=2), "num_quantised: 2"),
    (dict(embedding_AD=EMBEDDING_AD[:3]), "embedding_AD: 3 rows for 4 ads"),
    (dict(embedding_AD=EMBEDDING_AD * np.nan), "embedding_AD: row 0"),
    (dict(embedding_AD=EMBEDDING_AD, reconstruction_AD=EMBEDDING_AD[:, :1]), "reconstruction_AD"),
    (dict(reconstruction_AD=EMBEDDING_AD), "reconstruction_AD.*not given"),
    (dict(value_A=np.array([1, 2, 3, np.nan])), "value_A: must be finite"),
    (dict(events_A=np.array([1, 2, 3, -1])), "events_A: must be finite and >= 0"),
    (dict(product_A=["a"]), "product_A: 1 rows"),
  ],
)
def test_bad_arrays_are_named(changes, message):
  arguments = {"codes_AL": ONE_LEVEL, "codebook_sizes": (2,), **changes}
  with pytest.raises(ValueError, match=message):
    measure(arguments.pop("codes_AL"), arguments.pop("codebook_sizes"), **arguments)


@pytest.mark.parametrize(
  "arrays",
  [
    dict(codes_AL=[[0]]),
    dict(codes_AL=[[0]] * 3, embedding_AD=np.zeros((3, 2), np.float32)),
    dict(codes_AL=[[0]] * 3, embedding_AD=np.ones((3, 2), np.float32), product_A=[""] * 3),
    dict(codes_AL=[[0], [1], [2]], embedding_AD=np.eye(3, dtype=np.float32), product_A=[1, 2, 3]),
    dict(codes_AL=[[0], [1], [2]], value_A=np.zeros(3), product_A=[-1, -1, 4]),
    dict(codes_AL=[[0], [1]], embedding_AD=np.eye(2, dtype=np.float32), product_A=["", "a"]),
  ],
)
def test_degenerate_catalogues_give_finite_json(arrays):
  codes_AL = np.array(arrays.pop("codes_AL"))
  if "embedding_AD" in arrays:
    arrays["reconstruction_AD"] = arrays["embedding_AD"]
  metrics = measure(codes_AL, (4,), **arrays)
  record = as_record(metrics, verdicts(metrics))
  assert json.loads(json.dumps(record, allow_nan=False)) == record
  assert record["verdict"] in VERDICTS


def test_grades_at_their_edges():
  assert [grade(x, (0.05, 0.25)) for x in (0, 0.05, 0.051, 0.25, 0.251)] == [
    "fine", "fine", "look", "look", "will hurt",
  ]  # fmt: skip
  assert [grade(x, (0.5, 0.2)) for x in (1, 0.5, 0.499, 0.2, 0.199)] == [
    "fine", "fine", "look", "look", "will hurt",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("name", "limits", "step"),
  [
    ("sid_collision_rate", "COLLISION", 1e-6),
    ("sid_collision_value_share", "COLLISION", 1e-6),
    ("col", "COL", 1e-6),
    ("cpr", "CPR", 1e-6),
    ("util", "UTIL", 1e-6),
    ("max_ads_per_sid", "ADS_PER_SID", 1),
    ("twin_ad_share", "TWINS", 1e-6),
    ("reconstruction_relative_error", "RECONSTRUCTION", 1e-6),
    ("level1/used_share", "USED", -1e-6),
  ],
)
def test_verdicts_at_their_edges(name, limits, step):
  metrics = of_catalogue()
  good, fair = getattr(health_line, limits)
  for value, verdict in (
    (good, "fine"), (good + step, "look"), (fair, "look"), (fair + step, "will hurt")
  ):
    line = found(metrics | {name: value})[name]
    assert (line.value, line.verdict) == (value, verdict)


def test_published_systems_stand_where_the_limits_were_set():
  metrics = of_catalogue()
  ours = metrics | {"cpr": 1.07, "col": 0.1826, "sid_collision_rate": 1 - (1 - 0.1826) / 1.07}
  without_hash = metrics | {
    "cpr": 1.78, "col": 0.5972, "sid_collision_rate": 1 - (1 - 0.5972) / 1.78
  }
  names = ("cpr", "col", "sid_collision_rate")
  assert [found(ours)[name].verdict for name in names] == ["fine", "look", "look"]
  assert [found(without_hash)[name].verdict for name in names] == ["will hurt"] * 3


def test_recall_is_judged_above_chance_and_after_quantisation():
  metrics = of_catalogue() | {"retrieval/chance_r@1": 0.5}
  for value, verdict in ((0.85, "fine"), (0.84, "look"), (0.71, "look"), (0.69, "will hurt")):
    line = found(metrics | {"retrieval/embedding_r@1": value})["retrieval/embedding_r@1"]
    assert line.verdict == verdict
  metrics["retrieval/embedding_r@1"] = 0.9
  for value, verdict in ((0.83, "fine"), (0.81, "look"), (0.69, "will hurt"), (0.4, "will hurt")):
    line = found(metrics | {"retrieval/reconstruction_r@1": value})["retrieval/reconstruction_r@1"]
    assert line.verdict == verdict
  assert "-" not in line.reason.replace("--codebook-sizes", "")  # no negative share is kept
  metrics["retrieval/embedding_r@1"] = 0.5
  assert "no more than chance" in found(metrics)["retrieval/reconstruction_r@1"].reason


def test_good_ids_are_fine():
  metrics = of_catalogue()
  assert {line.name: line.verdict for line in verdicts(metrics) if line.verdict != "fine"} == {
    "util": "will hurt"  # each of the 30 x 10 combinations is taken
  }
  assert worst(verdicts(metrics | {"util": 0.1})).verdict == "fine"
  assert worst(verdicts(metrics)).name == "util"


def test_collapsed_and_random_codes_are_found_out():
  codes_AL, *_ = catalogue()
  collapsed_AL = codes_AL * [0, 1]
  lines = found(of_catalogue(collapsed_AL))
  for name in ("sid_collision_rate", "sid_collision_value_share", "level1/used_share",
               "level1/balance", "level1/max_share", "level1/pas", "level1/label_lift", "pas"):
    assert lines[name].verdict == "will hurt", name
  assert lines["level2/balance"].verdict == "fine"
  random_AL = np.random.default_rng(0).permutation(codes_AL)
  lines = found(of_catalogue(random_AL))
  assert lines["level1/balance"].verdict == lines["sid_collision_rate"].verdict == "fine"
  assert lines["level1/pas"].verdict == lines["level1/label_lift"].verdict == "will hurt"
  assert "check that row by row" in lines["level1/pas"].reason
  assert "for the embedding does" in lines["level1/label_lift"].reason  # not the encoder's fault


def test_few_labels_are_not_blamed_for_a_low_lift():
  metrics = of_catalogue() | {
    "label_pair_chance": 0.5, "level1/label_pair_share": 0.9, "level1/label_lift": 1.8,
  }  # fmt: skip
  assert found(metrics)["level1/label_lift"].verdict == "fine"
  metrics |= {"level1/label_pair_share": 0.6, "level1/label_lift": 1.2}
  assert found(metrics)["level1/label_lift"].verdict == "will hurt"


def test_hash_suffix_and_quantised_levels_are_judged_differently():
  rng = np.random.default_rng(0)
  first_A = np.repeat(np.arange(64), 16)
  hashed = np.stack([first_A, rng.integers(0, 1024, 1024)], axis=1)
  metrics = measure(hashed, (64, 1024), num_quantised=1)
  assert metrics["level2/used_share"] < 0.7  # a third of the codes of an even hash stay unused
  lines = found(metrics)
  assert lines["level2/used_share"].group == "Level 2, hash"
  assert lines["level2/used_share"].verdict == lines["level2/balance"].verdict == "fine"
  assert found(measure(hashed, (64, 1024)))["level2/used_share"].verdict == "will hurt"
  few = np.stack([first_A, rng.integers(0, 8, 1024)], axis=1)  # a column of 8 values
  assert found(measure(few, (64, 1024), num_quantised=1))["level2/used_share"].verdict == (
    "will hurt"
  )
  # Three of four prefixes hold one ad: nearly all suffixes are 0, and that is as it should be.
  suffix = np.array([[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]])
  lines = found(measure(suffix, (4, 64), num_quantised=1), made=Made(last_level="suffix"))
  assert lines["level2/used_share"].verdict == "fine" and "level2/balance" not in lines
  full = np.array([[0, 0], [0, 1], [0, 1], [1, 0]])
  lines = found(measure(full, (2, 2), num_quantised=1), made=Made(last_level="suffix"))
  assert lines["level2/used_share"].verdict == "look"
  assert "enlarge the last codebook size" in lines["sid_collision_rate"].reason


def test_a_tree_wider_than_the_beam_is_named():
  codes_AL = np.stack([np.arange(200) // 100, np.arange(200) % 100], axis=1)
  metrics = measure(codes_AL, (2, 100))
  by_width = {
    width: found(metrics, beam_widths=(width,))["level2/children_max"].verdict
    for width in (100, 99, 10, 9)
  }
  assert by_width == {100: "fine", 99: "look", 10: "look", 9: "will hurt"}
  assert found(metrics, beam_widths=(1, 100))["level1/children_max"].verdict == "fine"  # the root


def test_advice_fits_how_the_ids_were_made():
  codes_AL, embedding_AD, _, _ = catalogue()
  embedding_AD[:] = embedding_AD[0]
  metrics = measure(codes_AL // 4, (8, 3), num_quantised=1, embedding_AD=embedding_AD)
  reason = found(metrics)["sid_collision_rate"].reason
  assert "--hash-columns ad_id" in reason and "100% of them share it" in reason
  made = Made(hash_columns=("ad_id",), quantizer="balanced_kmeans", encoder="uae")
  reason = found(metrics, made=made)["sid_collision_rate"].reason
  assert "--hash-columns" not in reason and "--last-level suffix" in reason
  quantised = found(measure(codes_AL // 4, (8, 3), embedding_AD=embedding_AD))
  assert "--last-level suffix" in quantised["twin_ad_share"].reason
  bad = of_catalogue(codes_AL * [0, 1])
  bad |= dict.fromkeys((f"retrieval/embedding_r@{k}" for k in (1, 5, 10)), 0.1)
  for name, option in (
    ("level1/max_share", "balanced_kmeans"),
    ("level1/label_lift", "uae"),
    ("retrieval/embedding_r@1", "uae"),
  ):
    assert option in found(bad)[name].reason
    assert option not in found(bad, made=Made(quantizer="balanced_kmeans", encoder="uae"))[
      name
    ].reason  # fmt: skip


def test_every_line_says_why():
  for metrics in (of_catalogue(), of_catalogue(catalogue()[0] * [0, 1], num_quantised=1)):
    lines = verdicts(metrics, label_name="category")
    assert len({line.name for line in lines}) == len(lines)
    for line in lines:
      assert line.reason.endswith(".") and line.reason[0].isupper() or line.reason[0].isdigit()
      assert line.value == metrics[line.name] and line.verdict in VERDICTS


def test_settings_that_contradict_the_codes_are_refused():
  metrics = of_catalogue()
  with pytest.raises(ValueError, match="last_level: 'hash', but 2 of 2 levels are quantised"):
    verdicts(metrics, made=Made(last_level="hash"))
  with pytest.raises(ValueError, match="beam_widths"):
    verdicts(metrics, beam_widths=())
  with pytest.raises(ValueError, match="last_level: 'sufix'"):
    Made(last_level="sufix")
