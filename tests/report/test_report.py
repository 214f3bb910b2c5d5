"""The report: one safe file whose numbers and verdict are those of metrics.json."""

import copy
import json

import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.report.run_report import write_report
from gr4ad_jax.report.verdict import compare_with_baselines, verdict
from gr4ad_jax.tokenizer import health, health_verdicts
from tests.support import HOSTILE, Page

HALF_WIDTH = 0.01
BASELINES = ("popularity", "cooccurrence", "own_history")


def ranking(prefix, scope, recall, value_recall):
  """The ranking metrics of one method, with intervals around the two main ones."""
  metrics = {
    f"{prefix}{scope}recall@10": recall / 2,
    f"{prefix}{scope}ndcg@10": recall / 3,
    f"{prefix}{scope}ndcg@50": recall / 2.5,
    f"{prefix}{scope}advertiser_coverage@50": 0.25,
  }
  for name, value in (("recall@50", recall), ("value_recall@50", value_recall)):
    metrics[f"{prefix}{scope}{name}"] = value
    metrics[f"{prefix}{scope}{name}/ci_low"] = value - HALF_WIDTH
    metrics[f"{prefix}{scope}{name}/ci_high"] = value + HALF_WIDTH
  return metrics


def metrics_of(ours, theirs):
  """Metrics of a run: (recall, value recall) of ours and of each baseline, in prospecting half."""
  metrics = {
    "invalid_sid_rate": 0.0, "decode_requests_per_second": 148.3, "num_params": 2431616.0,
    "train_examples_per_second": 1523.4, "sid_collision_rate": 0.05, "num_requests": 1234.0,
    "num_users": 567.0, "num_ads": 89.0, "checkpoint_step": 200.0,
  }  # fmt: skip
  for scope, scale in (("", 1.0), ("prospecting/", 0.5)):
    metrics |= ranking("", scope, ours[0] * scale, ours[1] * scale)
    for name, (recall, value_recall) in theirs.items():
      metrics |= ranking(f"baseline/{name}/", scope, recall * scale, value_recall * scale)
  return metrics


WON = metrics_of((0.5, 0.45), dict.fromkeys(BASELINES, (0.3, 0.25)))

ABOUT = {
  "source": "Test shop", "currency": "EUR",
  "caveats": ["Nobody bought this, see https://example.org/why"],
  "cleaning": {"events: dropped, value: must be >= 0": 12345, "ads: price missing": 0},
  "counts": {"train": {"requests": 7000, "examples": 9000}, "test": {"requests": 1234,
                                                                     "examples": 1500}},
  "num_users": 600, "num_ads": 89, "num_advertisers": 7, "num_events": 98765, "split": "time",
  "baseline_settings": {"popularity": {"half_life_s": 2419200, "organic_weight": 0.0}},
  "evaluated_split": "test", "model": "A decoder of 3 layers.",
}  # fmt: skip

# Ads a and a + 32 share their SID, but for 16 to 31.
CODES = np.array([[a % 8, a // 8 % 4, a // 48] for a in range(64)])
HEALTH_METRICS = health.measure(CODES, (8, 16, 32), num_quantised=2)
HEALTH = health_verdicts.as_record(HEALTH_METRICS, health_verdicts.verdicts(HEALTH_METRICS))

SAMPLES = [{
  "user_id": "u1", "features": {"age_band": "25-34"},
  "history": [
    {"kind": "ad", "id": "a1", "text": "oat milk", "advertiser": "m1", "count": 3, "age_days": 5.0},
    {"kind": "organic", "id": "c1", "text": "", "advertiser": "", "count": 1, "age_days": 0.0},
  ],
  "generated": [
    {"rank": 1, "ad_id": "a2", "advertiser_id": "m2", "text": "rye bread", "category": "Food",
     "sid": [3, 1, 2], "logp": -1.25, "expected_value": 2.5, "hit": False, "in_history": False},
    {"rank": 2, "ad_id": "a1", "advertiser_id": "m1", "text": "oat milk", "category": "Food",
     "sid": [3, 1, 4], "logp": -2.5, "expected_value": 1.75, "hit": True, "in_history": True},
  ],
  "targets": [
    {"ad_id": "a1", "text": "oat milk", "advertiser": "m1", "value": 3.2, "new": False, "rank": 2},
    {"ad_id": "a9", "text": "soap", "advertiser": "m9", "value": 1.0, "new": True, "rank": None},
  ],
}]  # fmt: skip

RUN = {
  "data": "data/shop", "sids": "data/shop/sids",
  "config": {
    "model": {"decoder": "lazy", "num_layers": 3, "num_lazy_layers": 2, "width": 64,
              "copy_path": True},
    "loss": {}, "train": {"learning_rate": 0.001}, "search": {"widths": [32, 48, 64]},
  },
}  # fmt: skip

LOG = [
  {"step": 100, "kind": "train", "loss": 9.0, "sid_loss": 8.0, "ecpm_loss": float("nan"),
   "mtp_loss": 0.0, "grad_norm": 1.0, "learning_rate": 1e-3},
  {"step": 100, "kind": "validation", "loss": 9.5, "sid_loss": 8.5, "ecpm_loss": 1.0},
  {"step": 200, "kind": "train", "loss": 7.0, "sid_loss": 6.0, "ecpm_loss": 1.0, "mtp_loss": 0.0,
   "grad_norm": 1.0, "learning_rate": 1e-3, "examples_per_second": 1500.0},
  {"step": 200, "kind": "validation", "loss": 8.0, "sid_loss": 7.0, "ecpm_loss": 1.0},
]  # fmt: skip


def write_run(folder, **changes):
  """A run folder; a file given as None is left out."""
  files = {
    "metrics.json": WON, "about.json": ABOUT, "sid_health.json": HEALTH, "samples.json": SAMPLES,
    "run.json": RUN, "train_log.jsonl": LOG,
  }  # fmt: skip
  files |= {name.replace("__", "."): content for name, content in changes.items()}
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    if content is None:
      continue
    rows = content if name.endswith("jsonl") else [content]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def report(folder, **changes):
  return Page(write_report(write_run(folder, **changes)).read_text(encoding="utf-8"))


def test_page_refers_to_nothing_but_itself(tmp_path):
  path = write_report(write_run(tmp_path / "run"))
  assert path == tmp_path / "run" / "report.html"
  assert [p.name for p in path.parent.iterdir() if "report" in p.name] == ["report.html"]
  text = path.read_text(encoding="utf-8")
  Page(text).assert_refers_to_itself("#metrics")
  assert "url(" not in text and "@import" not in text
  assert text.count("://") == 1  # the address that a caveat cites, as text


def test_hostile_text_stays_text(tmp_path):
  def poison(value):
    if isinstance(value, dict):
      return {k: poison(v) for k, v in value.items()}
    if isinstance(value, list):
      return [poison(v) for v in value]
    return HOSTILE if isinstance(value, str) and value not in ("ad", "organic", "lazy") else value

  about = poison(ABOUT)
  about["cleaning"] = {HOSTILE: 3, HOSTILE + "0": 0}
  about["counts"] = {HOSTILE: {"requests": 1, "examples": 2}}
  samples = poison(SAMPLES)
  samples[0]["features"] = {HOSTILE: HOSTILE}
  metrics = WON | {f"baseline/{HOSTILE.replace('/', '')}/recall@50": 0.1}
  clean = report(tmp_path / "clean")
  page = report(
    tmp_path / "run", about__json=about, samples__json=samples, metrics__json=metrics,
    run__json=poison(RUN),
  )
  assert {name for name, _ in page.tags} == {name for name, _ in clean.tags}
  assert page.text.count("<script>alert(1)</script>") > 15


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
  samples = copy.deepcopy(SAMPLES)
  samples[0]["history"][0]["text"] = "milk \ud83d"
  assert "milk ?" in report(tmp_path / "run", samples__json=samples).text


def test_cells_hold_the_numbers_of_the_metrics_file(tmp_path):
  page = report(tmp_path / "run")
  shown = {}
  for attributes, chunks in page.cells:
    if "=" in (attributes.get("title") or ""):
      key, value = attributes["title"].split(" = ")
      assert float(value) == pytest.approx(WON[key], rel=1e-5)
      shown[key] = chunks, attributes.get("class")
  ranked = ("recall@10", "recall@50", "ndcg@10", "ndcg@50", "value_recall@50",
            "advertiser_coverage@50")  # fmt: skip
  prefixes = ["", *(f"baseline/{name}/" for name in BASELINES)]
  scopes = ("", "prospecting/")
  assert set(shown) == {p + s + m for p in prefixes for s in scopes for m in ranked}
  assert shown["recall@50"] == (["50.0%", "49.0–51.0%"], "best")
  theirs = shown["baseline/own_history/prospecting/value_recall@50"]
  assert theirs == (["12.5%", "11.5–13.5%"], None)
  assert shown["ndcg@10"] == (["0.167"], "best")
  assert shown["advertiser_coverage@50"][1] == "best"  # all are equal: all are best
  assert shown["baseline/popularity/advertiser_coverage@50"][1] == "best"
  for text in ("1,234 test requests evaluated", "2.43M parameters", "148 requests per second"):
    assert text in page.text


def test_every_number_stands_in_the_settings(tmp_path):
  page = report(tmp_path / "run")
  cells = {" ".join(chunks) for _, chunks in page.cells}
  for value in WON.values():
    assert f"{value:,.6g}" in cells
  assert "2,419,200 (28 days)" in cells and "[32, 48, 64]" in cells


@pytest.mark.parametrize(
  ("name", "command"),
  [
    ("run.json", "train"), ("train_log.jsonl", "train"), ("about.json", "evaluate"),
    ("sid_health.json", "evaluate"), ("samples.json", "evaluate"),
  ],
)  # fmt: skip
def test_absent_file_is_named_with_the_command_that_makes_it(tmp_path, name, command):
  folder = tmp_path / "run"
  page = report(folder, **{name.replace(".", "__"): None})
  made = f"This run has no {name}; gr4ad {command} --workdir {folder} writes it."
  assert made in page.text
  assert page.text.count("This run has no") == 1


def test_metrics_alone_make_a_page(tmp_path):
  page = report(
    tmp_path / "run", metrics__json={"recall@50": 0.5}, run__json=None, about__json=None,
    sid_health__json=None, samples__json=None, train_log__jsonl=None,
  )
  assert page.text.count("This run has no") == 5
  assert "There is no baseline to compare with" in page.text
  assert "50.0%" in page.text


def test_unusable_run_is_an_error_that_says_what_to_do(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere: no such folder; `gr4ad train --workdir"):
    write_report(tmp_path / "nowhere")
  folder = write_run(tmp_path / "run", metrics__json=None)
  with pytest.raises(ValueError, match=r"no metrics\.json to report; run `gr4ad evaluate"):
    write_report(folder)
  (folder / "metrics.json").write_text('{"recall@50": 0.')
  with pytest.raises(ValueError, match=r"metrics\.json: not JSON"):
    write_report(folder)
  (folder / "metrics.json").write_text('{"recall@50": "high"}')
  with pytest.raises(ValueError, match=r"recall@50 is 'high', must be a number"):
    write_report(folder)
  (folder / "metrics.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"metrics\.json: holds a list, must be a dict"):
    write_report(folder)
  assert not (folder / "report.html").exists()


def test_verdict_of_a_won_run(tmp_path):
  sentence, grade = verdict(compare_with_baselines(WON), system="GR4AD")
  assert sentence == (
    "GR4AD is clearly above every baseline (popularity, co-occurrence and own history) in "
    "recall@50 and value recall@50, over all targets and in prospecting."
  )
  assert grade == "good"
  assert sentence in report(tmp_path / "run").text


def test_verdict_of_a_lost_run(tmp_path):
  lost = metrics_of((0.2, 0.15), dict.fromkeys(BASELINES, (0.3, 0.25)))
  sentence, grade = verdict(compare_with_baselines(lost), system="GR4AD")
  names = "popularity, co-occurrence and own history"
  assert sentence == (
    f"In recall@50 and value recall@50, GR4AD is, over all targets, clearly below {names}; "
    f"in prospecting, clearly below {names}."
  )
  assert grade == "poor"
  assert sentence in report(tmp_path / "run", metrics__json=lost).text


def test_verdict_tells_baselines_and_scopes_apart():
  theirs = {"popularity": (0.1, 0.1), "cooccurrence": (0.31, 0.1), "own_history": (0.4, 0.4)}
  metrics = metrics_of((0.3, 0.3), theirs)
  for prefix in ("", "baseline/own_history/"):
    metrics |= ranking(prefix, "prospecting/", 0.1, 0.1)
  sentence, grade = verdict(compare_with_baselines(metrics), system="GR4AD")
  assert sentence == (
    "In recall@50 and value recall@50, GR4AD is, over all targets, clearly above popularity, above "
    "co-occurrence in value recall@50 only, clearly below own history; in prospecting, clearly "
    "above popularity, below co-occurrence in recall@50 but above in value recall@50, not clearly "
    "different from own history."
  )
  assert grade == "fair"


def test_verdict_says_what_was_not_measured():
  only_all = {
    key: value for key, value in WON.items() if "prospecting/" not in key and "value_" not in key
  }
  sentence, grade = verdict(compare_with_baselines(only_all), system="GR4AD")
  assert sentence == (
    "GR4AD is clearly above every baseline (popularity, co-occurrence and own history) in "
    "recall@50, over all targets. Nothing was measured in prospecting."
  )
  assert grade == "good"


def test_a_run_of_another_system_has_its_own_name_and_losses(tmp_path):
  run = {"system": "bigram", "config": {"model": {"smoothing": 0.5}}}
  log = [{"step": s, "kind": "train", "loss": 2.0, "pair_loss": 1.0} for s in (1, 2)]
  page = report(tmp_path / "run", run__json=run, train_log__jsonl=log)
  assert "BIGRAM on Test shop" in page.text and "BIGRAM is clearly above" in page.text
  assert "BIGRAM minus baseline" in page.text and "GR4AD" not in page.text
  labels = [a["aria-label"] for name, a in page.tags if name == "svg" and "aria-label" in a]
  assert "Pair loss" in labels and "smoothing 0.5" in page.text


def test_comparison_table_shows_difference_and_outcome(tmp_path):
  metrics = WON | {
    "difference/popularity/recall@50": 0.2, "difference/popularity/recall@50/ci_low": 0.18,
    "difference/popularity/recall@50/ci_high": 0.2211,
  }  # fmt: skip
  lost = metrics_of((0.2, 0.15), dict.fromkeys(BASELINES, (0.3, 0.25)))
  cells = [chunks for _, chunks in report(tmp_path / "won", metrics__json=metrics).cells]
  assert ["+20.0", "+18.0 to +22.1", "above"] in cells
  cells = [chunks for _, chunks in report(tmp_path / "lost", metrics__json=lost).cells]
  assert cells.count(["−10.0", "below"]) == 6


def test_validation_numbers_carry_a_warning(tmp_path):
  assert "These are validation requests" not in report(tmp_path / "test").text
  about = ABOUT | {"evaluated_split": "validation"}
  assert "These are validation requests" in report(tmp_path / "run", about__json=about).text


def test_data_card_shows_source_caveats_splits_and_cleaning(tmp_path):
  text = report(tmp_path / "run").text
  for part in (
    "GR4AD on Test shop", "98,765 events of 600 users with 89 ads. A decoder of 3 layers.",
    "Nobody bought this",
    "training ends before validation begins", "train 7,000 9,000",
    "events: dropped, value: must be >= 0 12,345",
    "Rules that touched no row: 1 ads: price missing",
  ):  # fmt: skip
    assert part in text
  older = {key: value for key, value in ABOUT.items() if key != "model"}
  text = report(tmp_path / "other", about__json=older | {"split": "leave_one_out"}).text
  assert "each user's last request tests" in text and "A decoder" not in text


def test_tokenizer_lines_have_a_verdict(tmp_path):
  text = report(tmp_path / "run").text
  for part in ("Ads that share their SID", "50.0% will hurt", "Level 1, quantised", "100% fine"):
    assert part in text
  assert "Organic contents" not in text  # these logs have none
  (tmp_path / "run" / "sid_health.json").write_text(json.dumps(HEALTH_METRICS))
  with pytest.raises(ConfigError, match="run `gr4ad evaluate` again"):
    write_report(tmp_path / "run")


def test_samples_mark_what_was_found(tmp_path):
  text = report(tmp_path / "run").text
  for part in (
    "User u1: 1 of 2 next ads found in the top 50", "age band 25-34",
    "oat milk ad a1 · advertiser m1 · 3× · 5 days ago", "(no text) organic c1 · just before",
    "1 rye bread ad a2 · advertiser m2 ID 3-1-2 · log p −1.25 · expected value EUR 2.50",
    "✓ oat milk ad a1 · advertiser m1 · in the history ID 3-1-4",
    "✓ oat milk ad a1 · advertiser m1 · EUR 3.20 found at rank 2 · engaged with before",
    "– soap ad a9 · advertiser m9 · EUR 1.00 not in the top 50 · new to the user",
  ):  # fmt: skip
    assert part in text


def test_training_reports_the_lowest_validation_loss(tmp_path):
  page = report(tmp_path / "run")
  assert (
    "Trained to step 200. The validation loss was lowest at step 200 (8.000), the last one "
    "measured: more steps may still help."
  ) in page.text
  rising = [*LOG, {"step": 300, "kind": "validation", "loss": 8.75, "recall@50": 0.25}]
  searched = report(tmp_path / "rising", train_log__jsonl=rising)
  assert "lowest at step 200 (8.000) and 8.750 at the end" in searched.text
  assert "Recall@50" in [a.get("aria-label") for name, a in searched.tags if name == "svg"]
  # No curve for the auxiliary loss, 0 throughout; no point for a loss that is not a number.
  labels = [a["aria-label"] for name, a in page.tags if name == "svg" and "aria-label" in a]
  assert "Value loss" in labels and "Auxiliary loss" not in labels
