"""What README, docs and the demo say is what the results files say."""

import json
from pathlib import Path

import pytest

from experiments import demo_baselines, gpr_table2, gpr_table3, gr4ad_vs_gpr
from gr4ad_jax.cli import demo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results():
  return json.loads((ROOT / "docs" / "results" / "demo_baselines.json").read_text())


def test_readme_shows_the_means_of_the_results_file(results):
  assert demo_baselines.front(results) in (ROOT / "README.md").read_text()


def test_the_results_page_shows_them_with_their_intervals(results):
  page = (ROOT / "docs" / "results.md").read_text()
  first, differences, *_ = demo_baselines.table(results).split("\n\n")
  assert first in page and differences in page


@pytest.mark.parametrize(("name", "experiment"), [
  ("gpr_table2_market", gpr_table2), ("gpr_table2_market_seeds", gpr_table2),
  ("gpr_table2_market_long", gpr_table2), ("gpr_table2_journey", gpr_table2),
  ("gpr_table2_journey_seeds", gpr_table2), ("gpr_table3", gpr_table3),
  ("gr4ad_vs_gpr", gr4ad_vs_gpr),
])
def test_gprs_page_shows_the_tables_of_its_results_files(name, experiment):
  results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
  assert experiment.table(results) in (ROOT / "docs" / "gpr.md").read_text()


def test_the_demo_compares_with_the_results_file(results):
  assert results["num_seeds"] == 3 and results["num_steps"] == demo.REFERENCE_STEPS
  for name, numbers in demo.REFERENCE.items():
    ends = (results[name], results[f"{name}/ci_low"], results[f"{name}/ci_high"])
    assert numbers == pytest.approx(ends, abs=5e-4)


def test_a_run_is_told_where_it_stands():
  metrics = {"recall@50": 0.4, "ndcg@50": 0.25, "checkpoint_step": 600.0}
  line = demo.standing(metrics)
  mean, low, high = demo.REFERENCE["recall@50"]
  assert line.startswith("600 steps here, 2,500 in README's table")
  assert f"recall@50 0.400 against {mean:.3f} ({low:.3f}-{high:.3f})" in line
  assert "prospecting" not in line  # it was not measured


@pytest.mark.parametrize(
  ("seconds", "per_step", "steps"),
  [
    (600, 0.2, 1_300),  # 2,700 steps' time, of which evaluation takes 1,400
    (600, 0.25, 750),  # 2,160 - 1,400 = 760, in fifties
    (600, 1.0, demo.MIN_STEPS),
    (600, 0.01, demo.MAX_STEPS),
  ],
)
def test_steps_leave_time_for_evaluation(seconds, per_step, steps):
  assert demo.steps_within(seconds, per_step) == steps
