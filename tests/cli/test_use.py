"""A trained run on the command line: whole ids in every form, and data that have moved."""

import csv
import io
import json
import shutil
import types

import pandas as pd
import pytest

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.recommend import print_ads
from gr4ad_jax.machine.terminal import Terminal
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.recommend import RankedAd, UserAds
from tests.commands import run

SETTINGS = (
  "--preset", "tiny", "--model.width", 32, "--model.num-layers", 2, "--model.num-lazy-layers", 1,
  "--train.num-steps", 8, "--train.batch-size", 16, "--train.log-every", 4, "--train.eval-every", 8,
  "--train.eval-batches", 1, "--train.checkpoint-every", 8, "--train.data-parallel", 1,
  "--search.widths", "4", "6", "8", "--search.batch-size", 16,
)


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
  """A run and its own copy of the data, and what training said."""
  folder = tmp_path_factory.mktemp("use")
  shutil.copytree(tiny_data, folder / "data")
  assert run("train", "--data", folder / "data", "--workdir", folder / "run", *SETTINGS) == 0
  return folder


def test_training_says_what_it_takes_and_what_comes_next(trained, tiny_data, tmp_path, capsys):
  """The settings are those of `trained`, so that nothing is compiled again."""
  assert run("train", "--data", trained / "data", "--workdir", tmp_path / "a run", *SETTINGS) == 0
  out, err = capsys.readouterr()
  assert out.splitlines()[-1] == f"next: gr4ad evaluate --workdir '{tmp_path}/a run'"
  assert "8 steps of 16 examples" in err and "a step on this machine" in err
  assert "train, steps: 8/8" in err and "loss" in err.split("8/8")[1]
  assert "--preset demo would take about" not in err  # this is smaller


def test_many_users_become_a_file(trained, tmp_path, capsys):
  out = tmp_path / "recs.parquet"
  every = ("recommend", "--workdir", trained / "run", "-k", 12, "--out", out)
  assert run(*every, "--users", "all") == 0
  assert "of 60 users have fewer than 12 ads: the search keeps 8 SIDs" in capsys.readouterr().err
  found = pd.read_parquet(out)
  assert found.user_id.nunique() == 60 and found.groupby("user_id").size().max() <= 12
  for _, ads in found.groupby("user_id"):
    assert ads["rank"].tolist() == list(range(1, len(ads) + 1)) and ads.ad_id.is_unique
    assert ads.score.is_monotonic_decreasing
  assert (found.score == found.logp).all()  # nothing else ranks
  assert run(*every, "--users", "all") == 2
  assert "--overwrite" in capsys.readouterr().err
  # Some of them again, by name, as text.
  (tmp_path / "who.txt").write_text("u7\n\nu3\nu7\n")
  assert run(*every[:-2], "--users", tmp_path / "who.txt", "--format", "csv") == 0
  rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
  expected = pd.concat([found[found.user_id == user] for user in ("u7", "u3")])
  assert [(r["user_id"], r["ad_id"], r["sid"]) for r in rows] == [
    (r.user_id, r.ad_id, "-".join(map(str, r.sid))) for r in expected.itertuples()
  ]


def test_data_that_have_moved_are_named(trained, capsys):
  workdir = trained / "run"
  recommend = ("recommend", "--workdir", workdir, "--user", "u7", "-k", 3, "--format", "json")
  (trained / "data").rename(trained / "moved")
  try:
    assert run(*recommend) == 2
    error = capsys.readouterr().err
    assert f"{trained / 'data'}: the prepared data of {workdir} are gone" in error
    assert "--data" in error and error.count("\n") == 1
    assert run(*recommend, "--data", trained / "moved") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["user_id"] == "u7" and len(answer["ads"]) == 3
    assert answer["currency"] == "EUR" and answer["value_of"] == "engagement"
    # Training goes on with them, and the run remembers where they are.
    assert run("train", "--data", trained / "moved", "--workdir", workdir, "--resume",
               *SETTINGS) == 0
    assert json.loads((workdir / "run.json").read_text())["data"] == str(trained / "moved")
    assert run(*recommend) == 0
  finally:
    (trained / "moved").rename(trained / "data")


def test_a_plan_takes_its_sizes_from_data(trained, capsys):
  devices = ("plan", "--devices", "h100-1", "--preset", "tiny")
  assert run(*devices, "--data", trained / "data") == 0
  ours = capsys.readouterr().out
  assert run(*devices, "--codebook-sizes", 8, 4, 8, "--context-tokens", 200) == 0
  assert "FLOPs of a step" in ours and ours != capsys.readouterr().out
  assert run(*devices, "--data", trained / "data", "--context-tokens", 200) == 2


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "--user or --users"),
    (("--user", "u1", "--users", "all"), "--user or --users"),
    (("--users", "all"), "--out recs.parquet"),
    (("--users", "all", "--out", "recs.xlsx"), "--format"),
    (("--user", "u1", "--format", "parquet"), "--out recs.parquet"),
    (("--users", "nowhere.txt", "--out", "recs.csv"), "nowhere.txt: no such file"),
  ],
)
def test_forms_that_cannot_be_are_refused_at_once(tmp_path, monkeypatch, capsys, words, message):
  monkeypatch.chdir(tmp_path)
  assert run("recommend", "--workdir", "run", *words) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


IDS = [f"7f0c2e{i:02d}-51aa-4d3b-9c1e-0a1b2c3d4e{i:02d}" for i in range(3)]
FOUND = UserAds("u1", [
  RankedAd(ad, f"shop [/{i}]", "[sale] copper pan with a lid " * 3, (12, 3, 7), -1.5, 0.00345, -0.5,
           i == 1)
  for i, ad in enumerate(IDS)
], "")  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 132, 300])
@pytest.mark.parametrize("on_terminal", [True, False])
def test_no_width_cuts_an_id_or_empties_a_column(monkeypatch, width, on_terminal):
  screen = io.StringIO()
  screen.isatty = lambda: on_terminal
  monkeypatch.setattr("sys.stdout", screen)
  monkeypatch.setenv("COLUMNS", str(width))
  monkeypatch.setattr(tables, "console", Terminal())
  opened = types.SimpleNamespace(
    search=SearchConfig(value_exponent=0.5), logs=types.SimpleNamespace(currency="EUR")
  )
  print_ads(FOUND, opened)
  printed = screen.getvalue()
  for i, ad in enumerate(IDS):
    assert ad in printed and f"shop [/{i}]" in printed
  assert printed.count("12-3-7") == printed.count("-0.50") == printed.count("0.00345") == 3
  assert printed.count("[sale]") == 9 and "(EUR)" in printed
