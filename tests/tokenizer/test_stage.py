"""The stage that writes semantic IDs: what it replaces, and what it leaves alone."""

import json
import shutil

import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.report.tokenizer_report import findings
from gr4ad_jax.tokenizer import semantic_id, stage
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.judge import judge

CONFIG = TokenizerConfig(codebook_sizes=(4, 4, 8), kmeans_iterations=2)


@pytest.fixture
def data(tiny_data, tmp_path):
  shutil.copytree(tiny_data, tmp_path / "data")
  return tmp_path / "data"


def test_semantic_ids_are_replaced_only_when_asked_for(data):
  before = semantic_id.load(data / "sids")
  with pytest.raises(ConfigError, match="sids: holds semantic IDs already; pass --overwrite"):
    stage.tokenize(data, data / "sids", CONFIG)
  np.testing.assert_array_equal(semantic_id.load(data / "sids").codes_AL, before.codes_AL)
  made = stage.tokenize(data, data / "sids", CONFIG, overwrite=True)
  assert semantic_id.load(data / "sids").codebook_sizes == made.sids.codebook_sizes == (4, 4, 8)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_replaced(data, overwrite):
  with pytest.raises(ConfigError, match="holds other files"):
    stage.tokenize(data, data, CONFIG, overwrite=overwrite)
  assert (data / "logs" / "log.json").exists()


def test_an_interrupted_stage_goes_on_without_being_asked(data, monkeypatch):
  shutil.rmtree(data / "sids")
  (data / "sids").mkdir()
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(semantic_id, "save", interrupt)
    stage.tokenize(data, data / "sids", CONFIG)
  stage.tokenize(data, data / "sids", CONFIG)
  assert {file.name for file in (data / "sids").iterdir()} == {
    "codes.npz", "config.json", "health.json"
  }


def interrupt(*_):
  raise KeyboardInterrupt


def test_the_health_beside_the_codes_is_what_the_report_says(data):
  """Whoever opens the codes judges them as the stage did, which knew the embeddings."""
  made = stage.tokenize(data, data / "sids", CONFIG, overwrite=True)
  sids = semantic_id.load(data / "sids")
  assert sids.health == json.loads((data / "sids" / "health.json").read_text())
  assert judge(sids, sids.health["metrics"]) == list(findings(made).lines) == made.lines
  assert "reconstruction_cosine" in sids.health["metrics"]


@pytest.mark.parametrize("name", ["codes.npz", "config.json", "health.json"])
def test_damaged_semantic_ids_are_named(data, name):
  file = data / "sids" / name
  file.write_bytes(file.read_bytes()[:40])
  with pytest.raises(ValueError, match=f"{name}: not readable .*--overwrite"):
    semantic_id.load(data / "sids")
