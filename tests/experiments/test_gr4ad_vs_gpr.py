"""Systems beside each other: one budget for all, and what each row of the table is made of."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import gr4ad_vs_gpr
from gr4ad_jax.gpr.config import check_system
from gr4ad_jax.search.ranking import EvalRequests

TARGETS = EvalRequests(
  np.array([0, 1], np.int32), np.zeros(2, np.int64), np.array([[4], [3]], np.int32),
  np.ones((2, 1), np.float32), np.zeros((2, 1), bool),
)


def test_all_that_write_codes_search_alike_and_know_their_system():
  options = gr4ad_vs_gpr.Options()
  configs = {name: gr4ad_vs_gpr.config_of(name, options) for name in gr4ad_vs_gpr.SYSTEMS}
  searches = {configs[name].search.widths for name in ("gr4ad", "gpr", "hstu")}
  assert searches == {options.search.widths}
  exponents = {name: configs[name].search.value_exponent for name in ("gr4ad", "gpr", "hstu")}
  assert exponents == {"gr4ad": 0.5, "gpr": 0.5, "hstu": 0}
  check_system("hstu", configs["hstu"].model)


def test_a_row_is_the_mean_of_its_seeds_and_training_counts_labels(tmp_path, monkeypatch):
  """The log has 30 labels; GPR's rows hold three each. Steps: two passes by batches of four."""
  trained = {}

  def train(run, folder, *, resume):
    trained[folder.relative_to(tmp_path).as_posix()] = run.config.train
    return SimpleNamespace(params={"a": np.zeros((2, 3)), "b": np.zeros(4)})

  def open_baseline(folder, data, *, place):
    def rank(examples, k, seen):
      ranked_RK = np.full((len(examples), k), -1, np.int32)
      if folder.name == "seed1":
        ranked_RK[:, 0] = examples
      return ranked_RK

    return SimpleNamespace(rank=rank)

  test = SimpleNamespace(
    contexts=[1, 2], held_out=[4, 0], targets=TARGETS,
    arm_revenue=lambda ranked_RK: float(ranked_RK[0, 0] + 2),
  )
  stubs = {
    "prepared_market": lambda workdir, config: (
      SimpleNamespace(advertiser_A=np.arange(5)), Path("data")),
    "tokenized": lambda data, sids, config: sids,
    "open_examples": lambda folder: SimpleNamespace(counts={"train": {"examples": 30}}),
    "open_gpr_inputs": lambda run: SimpleNamespace(rows=lambda split: range(10)),
    "train_gr4ad": train, "train_gpr": train, "train_baseline": train,
    "read_log": lambda folder: [{"examples_per_second": 8.0}],
    "open_market_test": lambda *args, **kwargs: test,
    "open_logs": lambda data: None, "open_baseline": open_baseline,
  }
  for name, stub in stubs.items():
    monkeypatch.setattr(gr4ad_vs_gpr, name, stub)
  overrides = {f"{name}.train.batch_size": "4" for name in gr4ad_vs_gpr.SYSTEMS}
  overrides |= {"settings.seeds": "2", "settings.passes": "2", "settings.bootstrap": "5"}
  results = gr4ad_vs_gpr.run(tmp_path, size="cpu", overrides=overrides)
  steps = {name: train.num_steps for name, train in trained.items()}
  assert steps == {f"{name}/seed{seed}": 5 if name in ("gpr", "hstu") else 15
                   for name in gr4ad_vs_gpr.SYSTEMS for seed in (0, 1)}
  assert trained["gpr/seed1"].seed == 1 and trained["sasrec/seed0"].best_by == "ndcg@50"
  for name in gr4ad_vs_gpr.SYSTEMS:
    assert results[f"{name}/recall@50"] == pytest.approx(1 / 4)  # seed 1 finds one of two
    assert results[f"{name}/revenue"] == pytest.approx((1 + 3) / 2)
    assert results[f"{name}/num_params"] == 10 and results[f"{name}/requests_per_second"] > 0
    labels = 24 if name in ("gpr", "hstu") else 8
    assert results[f"{name}/train_examples_per_second"] == labels
  page = gr4ad_vs_gpr.table(results)
  assert "| GR4AD | 0.250 (" in page and "| 2.0000 (1.0000 to 3.0000) |" in page
  assert gr4ad_vs_gpr.plots(results)
  trained.clear()
  monkeypatch.setattr(gr4ad_vs_gpr, "open_baseline", None)  # lists are kept
  again = gr4ad_vs_gpr.run(tmp_path, size="cpu", overrides=overrides)
  assert again == results
