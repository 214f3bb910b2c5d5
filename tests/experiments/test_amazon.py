"""The experiment on Amazon's reviews, on fourteen items where a reader can say what lists hold."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import amazon, run
from gr4ad_jax.gr4ad.run import read_run

ITEMS, USERS, LENGTH, SEEDS = 14, 160, 5, 2
ORDERS = {"": "interactions.parquet", "other_order/": "order_tigercf.parquet"}


def write_reviews(folder):
  """Users that take distinct items, some far more than others; in the other order the two last
  reviews of each user change places."""
  rng = np.random.default_rng(0)  # with which no two items are equally popular
  share_A = np.linspace(1, 5, ITEMS) / np.linspace(1, 5, ITEMS).sum()
  item_UT = np.stack([rng.choice(ITEMS, LENGTH, replace=False, p=share_A) for _ in range(USERS)])
  pd.DataFrame({
    "item_id": np.arange(ITEMS), "asin": [f"B{i}" for i in range(ITEMS)],
    "brand": [f"brand {i % 3}" for i in range(ITEMS)],
    "categories": [f"Hair > kind {i % 5}" for i in range(ITEMS)],
  }).to_parquet(folder / "items.parquet")  # fmt: skip
  orders = {"": item_UT, "other_order/": item_UT[:, [0, 1, 2, 4, 3]]}
  for order, of_order_UT in orders.items():
    pd.DataFrame({
      "user_id": np.repeat(np.arange(USERS), LENGTH), "position": np.tile(range(LENGTH), USERS),
      "item_id": of_order_UT.ravel(),
    }).to_parquet(folder / ORDERS[order])  # fmt: skip
  return orders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Reviews by order, the folder of results, and the arguments that made them."""
  folder, out = (tmp_path_factory.mktemp(name) for name in ("reviews", "amazon"))
  orders = write_reviews(folder)
  argv = [
    "amazon", "--workdir", str(out), "--set", f"settings.folder={folder}",
    f"settings.seeds={SEEDS}", "settings.bootstrap=20", "train.num_steps=4", "train.eval_every=2",
    "train.checkpoint_every=2", "train.batch_size=16", "train.eval_batches=1", "model.width=8",
    "train.rank_requests=32", "train.data_parallel=1", "model.shortlist=8", "model.neighbours=8",
    "search.widths=14,14,14",
  ]
  run.main(argv)
  return orders, out, argv


def popularity(item_UT, *, known, seen, k):
  """recall@k by hand: the first `known` reviews of each user are counted, those before the last
  may be left out, the last is to be found."""
  count_A = np.bincount(item_UT[:, :known].ravel(), minlength=ITEMS)
  assert len(set(count_A)) == ITEMS, "equal counts would leave the order open"
  lists = [[a for a in np.argsort(-count_A) if seen or a not in item_T[:-1]] for item_T in item_UT]
  return np.mean([item_T[-1] in ads[:k] for ads, item_T in zip(lists, item_UT, strict=True)])


def test_lists_hold_what_they_may(made):
  orders, out, _ = made
  results = json.loads((out / "results.json").read_text())
  # Of fourteen items ten are left to a user of four: ten places hold whatever comes next.
  for part in ("", "refit/", "other_order/"):
    assert [results[f"{part}recall@10/seed{seed}"] for seed in range(SEEDS)] == [1, 1]
    assert results[f"{part}recall@10"] == results[f"{part}rival/counter/recall@10"] == 1
    assert 0 < results[f"{part}recall@5"] < 1
  assert results["kept/recall@10"] < 1
  for k in (5, 10):
    name = f"rival/popularity/recall@{k}"
    by_hand = {
      "": popularity(orders[""], known=3, seen=False, k=k),
      "kept/": popularity(orders[""], known=3, seen=True, k=k),
      "refit/": popularity(orders[""], known=4, seen=False, k=k),
      "other_order/": popularity(orders["other_order/"], known=3, seen=False, k=k),
    }
    assert {part: results[part + name] for part in by_hand} == pytest.approx(by_hand)
  assert not any(name.startswith("other_order/kept") for name in results)


def test_spread_is_that_of_the_seeds(made):
  _, out, _ = made
  results = json.loads((out / "results.json").read_text())
  first, second = (results[f"kept/ndcg@10/seed{seed}"] for seed in range(SEEDS))
  half = 12.706 * abs(first - second) / 2  # t of one degree of freedom; std / sqrt(2) = half of it
  assert results["kept/ndcg@10"] == pytest.approx((first + second) / 2)
  assert results["kept/ndcg@10/ci_high"] == pytest.approx((first + second) / 2 + half, rel=1e-3)
  assert results["kept/ndcg@10/seed1/ci_low"] <= second <= results["kept/ndcg@10/seed1/ci_high"]
  assert results["minutes"] > 0
  # As many passes through four reviews a user as through three.
  for seed in range(SEEDS):
    tuned, refit = (results[f"{part}steps/seed{seed}"] for part in ("", "refit/"))
    assert refit == round(tuned * 4 / 3)
    assert read_run(out / f"refit-{seed}").config.train.seed == seed


def test_a_second_call_reads_what_is_there(made, monkeypatch):
  _, out, argv = made
  before = (out / "results.json").read_text()
  for name in ("train_run", "prepare_logs", "find_rivals", "search_split"):
    monkeypatch.delattr(amazon, name)
  run.main(argv)
  assert (out / "results.json").read_text() == before
  page = (out / "results.md").read_text()
  assert "| **GR4AD**, refit | 1.0000 (1.0000-1.0000) |" in page
  assert "Bar of seen removed (recall@10 0.1017, ndcg@10 0.0611): met." in page
  assert "Not there" not in page


def test_without_another_order_its_part_is_absent(made):
  results = json.loads((made[1] / "results.json").read_text())
  here = {name: x for name, x in results.items() if not name.startswith("other_order/")}
  assert "Not there: other_order" in amazon.table(here | {"recall@10": 0.1})
  assert "misses recall@10 by 0.0017. The whole preset found 0.111" in amazon.table(
    here | {"recall@10": 0.1}
  )


def test_a_folder_without_reviews_is_named(tmp_path):
  with pytest.raises(ValueError, match="nowhere: holds no interactions.parquet"):
    run.run_experiment(
      run.Settings("amazon", overrides=(f"settings.folder={tmp_path}/nowhere",)), tmp_path / "out"
    )
