"""The installed command: whole paths at tiny size, and exit codes on users' mistakes."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.cli import main as cli
from gr4ad_jax.data.examples import open_examples
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.gr4ad.config import preset
from tests.commands import run

TRAIN = ["--preset", "tiny", "--train.num-steps", "30", "--train.eval-every", "30",
         "--train.checkpoint-every", "30", "--train.data-parallel", "1"]


def write_logs(folder, **changes):
  """A small valid log as parquet files; `changes` replace columns of its events."""
  rng = np.random.default_rng(0)
  ads = pd.DataFrame({
    "ad_id": range(12), "advertiser_id": [f"b{i % 3}" for i in range(12)], "category": "c",
    "text": [f"thing {i}" for i in range(12)],
  })
  events = pd.DataFrame({
    "user_id": np.repeat(np.arange(6), 20), "time": np.tile(np.arange(20) * 86400, 6),
    "ad_id": rng.integers(0, 12, 120), "action": "click", "value": 1.0, "ecpm": 2.0,
  })
  for name, values in changes.items():
    events[name] = values
  ads.to_parquet(folder / "ads.parquet")
  events.to_parquet(folder / "events.parquet")
  return "--ads", folder / "ads.parquet", "--events", folder / "events.parquet"


def test_amazon_from_files_to_report(shared_data, tmp_path, capsys):
  """The own-logs path on a second data set: prepare, tokenize, train, evaluate, recommend."""
  data, workdir = tmp_path / "beauty", tmp_path / "run"
  source = shared_data / "amazon_beauty"
  assert run("prepare", "amazon", "--folder", source, "--users", 300, "--out", data) == 0
  assert run("tokenize", "--data", data, "--out", data / "sids") == 0
  assert run("train", "--data", data, "--workdir", workdir, *TRAIN) == 0
  assert run("evaluate", "--workdir", workdir) == 0
  assert run("report", "--workdir", workdir) == 0
  capsys.readouterr()
  assert run("recommend", "--workdir", workdir, "--user", 17, "-k", 5) == 0
  table = capsys.readouterr().out
  assert "log p" in table and table.count("│") > 20
  brand = pd.read_parquet(data / "logs" / "ads.parquet")["advertiser_id"].value_counts().index[0]
  recommend = ("recommend", "--workdir", workdir, "--user", 17, "-k", 2)
  assert run(*recommend, "--where", f"advertiser_id={brand}") == 0
  rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
  assert len(rows) == 2 and all(line.split("│")[3].strip() == brand for line in rows)
  assert run(*recommend, "--where", f"advertiser_id={brand}x") == 2
  assert brand in capsys.readouterr().err  # the nearest one is named
  assert run("export", "--workdir", workdir, "--out", tmp_path / "artifact") == 0
  assert (tmp_path / "artifact" / "program.bin").exists()
  assert run("export", "--workdir", workdir, "--out", tmp_path / "artifact") == 2
  assert "exists already" in capsys.readouterr().err
  assert run(*recommend, "--where", "colour=red") == 2
  assert "write COLUMN=VALUE" in capsys.readouterr().err
  metrics = json.loads((workdir / "metrics.json").read_text())
  assert metrics["invalid_sid_rate"] == 0
  assert metrics["num_ads"] == 12101 and metrics["num_requests"] == 300
  for key in ("recall@10", "recall@50", "ndcg@10", "ndcg@50", "value_recall@50",
              "advertiser_coverage@50", "new/recall@50", "decode_requests_per_second",
              "train_examples_per_second", "num_params", "sid_collision_rate",
              "baseline/popularity/recall@50/ci_low", "baseline/cooccurrence/value_recall@50",
              "baseline/own_history/new/ndcg@10", "value_recall@50/ci_high"):
    assert np.isfinite(metrics[key]), key
  assert metrics["recall@50/ci_low"] <= metrics["recall@50"] <= metrics["recall@50/ci_high"]
  assert (workdir / "report.html").stat().st_size > 10_000
  assert "LazyAR decoder, 3 layers" in (workdir / "report.html").read_text()
  # No user has an item twice, so that every target is new.
  assert metrics["recall@50"] == pytest.approx(metrics["new/recall@50"])


def test_a_market_becomes_logs_that_prepare_reads(tmp_path, capsys):
  world = ("--world", "synthetic", "--num-users", 200, "--num-ads", 60, "--days", 16,
           "--num-contents", 30, "--num-advertisers", 8, "--num-categories", 5,
           "--sessions-per-day", 1)
  assert run("market", "--out", tmp_path / "m", *world) == 0
  assert "impressions" in capsys.readouterr().out
  files = [f"--{t}={tmp_path / 'm' / t}.parquet" for t in ("ads", "events", "users", "contents")]
  data = tmp_path / "data"
  assert run("prepare", "parquet", *files, "--validation-days", 3, "--test-days", 3,
             "--out", data) == 0
  assert len(pd.read_parquet(data / "logs" / "ads.parquet")) == 60
  assert run("market", "--out", tmp_path / "m", *world) == 2
  assert run("market", "--out", tmp_path / "n", "--slots", 0) == 2


def test_parquet_logs_are_prepared(tmp_path, capsys):
  files = write_logs(tmp_path)
  out = tmp_path / "data"
  args = ("prepare", "parquet", *files, "--out", out, "--validation-days", 2, "--test-days", 2)
  assert run(*args) == 0
  about = json.loads((out / "examples" / "examples.json").read_text())
  assert about["counts"]["test"]["requests"] == 12  # six users on each of the two last days
  assert run(*args) == 2
  assert "--overwrite" in capsys.readouterr().err
  assert run(*args, "--overwrite") == 0


def test_worker_processes_write_the_same_examples(tmp_path):
  """In a process of its own: a fork beside this one's threads proves nothing about the command."""
  rng = np.random.default_rng(1)
  log = write_logs(tmp_path)
  events = pd.DataFrame({
    "user_id": np.repeat(np.arange(250), 4), "time": np.tile([0, 3, 12, 19], 250) * 86400,
    "ad_id": rng.integers(0, 12, 1000), "action": "click",
  })
  events.to_parquet(tmp_path / "events.parquet")
  made = []
  for workers in (1, 2):
    out = tmp_path / f"by{workers}"
    subprocess.run(
      [sys.executable, "-m", "gr4ad_jax", "prepare", "--out", out, "--workers", str(workers),
       "parquet", *log], check=True, capture_output=True, timeout=600,
    )
    made.append(open_examples(out / "examples"))
  one, two = made
  assert one.counts == two.counts
  for split in SPLITS:
    assert len(one.sources[split]) >= 250  # several tasks a worker
    for a, b in zip(one.sources[split], two.sources[split], strict=True):
      assert a.keys() == b.keys()
      for name in a:
        np.testing.assert_array_equal(a[name], b[name])
  np.testing.assert_array_equal(one.train_past_value_N, two.train_past_value_N)


def test_tokenize_judges_its_codes_and_takes_own_embeddings(tiny_data, tmp_path, capsys):
  out = tmp_path / "sids"
  np.save(tmp_path / "mine.npy", np.random.default_rng(0).standard_normal((40, 6)))
  given = ("tokenize", "--data", tiny_data, "--out", out, "--encoder", "given",
           "--codebook-sizes", 8, 4, 8, "--embeddings", tmp_path / "mine.npy")
  assert run(*given, "--last-level", "suffix", "--report") == 0
  printed = capsys.readouterr().out.replace("\n", "")
  assert "Ads that share their SID" in printed and "report.html" in printed
  assert "<svg" in (out / "report.html").read_text()
  health = json.loads((out / "health.json").read_text())
  assert health["metrics"]["sid_collision_rate"] == 0  # a suffix leaves none
  assert {line["verdict"] for line in health["lines"]} <= {"fine", "look", "will hurt"}
  assert not (tmp_path / ".sids.resume.npz").exists()
  capsys.readouterr()
  np.save(tmp_path / "mine.npy", np.ones((39, 6)))
  assert run(*given) == 2
  assert "holds semantic IDs already; pass --overwrite" in capsys.readouterr().err
  assert run(*given, "--overwrite") == 2
  assert "mine.npy: shape (39, 6), expected [40, D]" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"value": [-1.0] + [1.0] * 119}, ("events.parquet", "row 0", "'value'", "-1.0")),
    ({"ad_id": [99] + [1] * 119}, ("events.parquet", "row 0", "'ad_id'", "99")),
    ({"action": ["buy"] + ["click"] * 119}, ("row 0", "'action'", "buy")),
    ({"valeu": 1.0}, ("events.parquet", "valeu")),
    ({"action": "impression"}, ("clicked or converted",)),
  ],
)
def test_bad_logs_exit_2_with_one_line(tmp_path, capsys, changes, words):
  files = write_logs(tmp_path, **changes)
  capsys.readouterr()
  assert run("prepare", "parquet", *files, "--out", tmp_path / "data", "--validation-days", 2,
             "--test-days", 2) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
  assert len(lines) == 1 and all(word in lines[0] for word in words)


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    (("prepare", "parquet", "--ads", "none.parquet", "--events", "none.parquet", "--out", "x"),
     "none.parquet"),
    (("tokenize", "--data", "nowhere"), "nowhere"),
    (("train", "--data", "nowhere", "--workdir", "w"), "nowhere"),
    (("evaluate", "--workdir", "nowhere"), "nowhere"),
    (("recommend", "--workdir", "nowhere", "--user", "1"), "nowhere"),
    (("report", "--workdir", "nowhere"), "nowhere"),
  ],
)
def test_missing_folders_exit_2(tmp_path, monkeypatch, capsys, argv, words):
  monkeypatch.chdir(tmp_path)
  assert run(*argv) == 2
  error = capsys.readouterr().err
  assert error.startswith("gr4ad: error:") and words in error and error.count("\n") == 1
  assert "Traceback" not in error


@pytest.mark.parametrize(
  "argv",
  [
    ("fly",), ("train",), ("train", "--preset", "huge", "--data", "d", "--workdir", "w"),
    ("train", "--data", "d", "--workdir", "w", "--model.width", "wide"),
    ("train", "--data", "d", "--workdir", "w", "--model.widht", "64"),
    ("train", "--data", "d", "--workdir", "w", "--model.width", "65"),
    ("evaluate", "--workdir", "w", "--split", "train"),
  ],
)
def test_mistyped_commands_exit_2(capsys, argv):
  assert run(*argv) == 2
  assert "Traceback" not in capsys.readouterr().err


def test_options_default_to_the_named_preset():
  options = cli.options_with_preset(
    ["train", "--preset", "tiny", "--data", "d", "--workdir", "w", "--model.width", "32"]
  )
  assert options.config.model.width == 32
  assert options.config.train == preset("tiny").train


def test_help_names_every_command(capsys):
  assert run("--help") == 0
  out = capsys.readouterr().out
  assert all(f"• {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(capsys, name):
  assert run(name, "--help") == 0
  assert cli.COMMANDS[name].__doc__.split()[0] in capsys.readouterr().out


def test_parsing_imports_nothing_large():
  """Help and mistakes are told at once, not after JAX and pandas have been imported."""
  code = (
    "import sys\n"
    "from gr4ad_jax.cli.main import main\n"
    "try:\n"
    "  main(['--help'])\n"
    "finally:\n"
    "  large = {'jax', 'pandas', 'matplotlib', 'aiohttp', 'grain', 'fastapi'}\n"
    "  print('large:', sorted(large & sys.modules.keys()))\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
  assert done.stdout.splitlines()[-1] == "large: []"


def test_a_load_without_a_server_exits_2(tmp_path, capsys):
  assert run("bench", "serve", "--url", "http://localhost:1", "--out", tmp_path) == 2
  error = capsys.readouterr().err
  assert "localhost:1: no server that knows users" in error and error.count("\n") == 1
