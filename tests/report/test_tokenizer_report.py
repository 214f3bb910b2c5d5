"""The tokenizer's report: a table that fits a terminal, a page that is safe and complete."""

import re

import numpy as np
import pytest

from gr4ad_jax.cli import tables
from gr4ad_jax.machine.terminal import Terminal
from gr4ad_jax.report.embedding_map import NUM_COLOURS, code_centres, two_dimensions
from gr4ad_jax.report.health_lines import headline
from gr4ad_jax.report.plots import bar_plot, map_plot, rank_plot
from gr4ad_jax.report.tokenizer_report import Findings, write_tokenizer_report
from gr4ad_jax.tokenizer.health import measure
from gr4ad_jax.tokenizer.health_verdicts import verdicts
from tests.support import HOSTILE, Page

NUM_ADS = 60
SIZES = (6, 40)


@pytest.fixture(scope="module")
def measured():
  """Sixty ads in six groups, first codes that follow the groups, ten ads on one SID."""
  rng = np.random.default_rng(0)
  group_A = np.arange(NUM_ADS) % 6
  embedding_AD = rng.standard_normal((6, 8))[group_A] + 0.1 * rng.standard_normal((NUM_ADS, 8))
  codes_AL = np.stack([group_A, np.arange(NUM_ADS) // 6 * (group_A > 0)], axis=1)
  metrics = measure(
    codes_AL, SIZES, num_quantised=1, embedding_AD=embedding_AD, product_A=group_A,
    value_A=np.ones(NUM_ADS),
  )  # fmt: skip
  return {
    "metrics": metrics, "lines": verdicts(metrics), "codes_AL": codes_AL, "codebook_sizes": SIZES,
    "embedding_AD": embedding_AD, "group_A": np.array([f"group {g}" for g in group_A]),
  }  # fmt: skip


def write(folder, measured, **changes):
  found = Findings(**{"title": "Test shop", **measured, **changes})
  path = write_tokenizer_report(folder, found)
  return Page(path.read_text(encoding="utf-8"))


def test_page_holds_every_line_and_number(tmp_path, measured):
  page = write(tmp_path, measured)
  assert measured["metrics"]["sid_collision_rate"] == pytest.approx(10 / 60)
  for line in measured["lines"]:
    for text in (line.label, line.reason, line.verdict):
      assert " ".join(text.split()) in re.sub(r" (?=[.,;])", "", page.text), text
  for name in measured["metrics"]:
    assert name in page.text
  for text in ("16.7% of the ads share their SID", "6 × 40", "83.3%, 50 SIDs", "6 to 10", "group 5",
               "t-SNE of 60 of 60 different embeddings"):
    assert text in page.text
  assert [a["class"] for name, a in page.tags if name == "i"] == [f"c{i}" for i in range(1, 7)]


def test_page_refers_to_nothing_but_itself(tmp_path, measured):
  page = write(tmp_path / "new" / "folder", measured)
  assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["report.html"]
  page.assert_refers_to_itself("#lines")
  text = (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8")
  assert not re.search(r"url\(|@import|://|\bnan\b|\binf\b", text)


def test_hostile_text_stays_text(tmp_path, measured):
  clean = write(tmp_path / "clean", measured)
  group_A = measured["group_A"].astype(object)
  group_A[measured["group_A"] == "group 0"] = HOSTILE + "\ud83d"  # and half a surrogate pair
  lines = verdicts(measured["metrics"], label_name=HOSTILE)
  page = write(
    tmp_path, measured, title=HOSTILE, group_A=group_A, group_name=HOSTILE, lines=lines
  )
  assert {name for name, _ in page.tags} == {name for name, _ in clean.tags}
  assert page.text.count("<script>alert(1)</script>") > 8


def test_page_without_embeddings_or_with_too_few_says_so(tmp_path, measured):
  page = write(tmp_path, measured, embedding_AD=None)
  assert "No embeddings were given" in page.text
  page = write(tmp_path, measured, embedding_AD=np.ones((NUM_ADS, 3), np.float32))
  assert "1 different embeddings are too few for a map" in page.text
  page = write(tmp_path, measured, group_A=None)
  assert "tied to the middle of its first code" in page.text and "group 5" not in page.text


def test_groups_beyond_the_palette_and_unknown_ones_share_a_colour(tmp_path, measured):
  group_A = np.array([f"kind {a % 12}" if a % 12 else "" for a in range(NUM_ADS)])
  page = write(tmp_path, measured, group_A=group_A)
  legend = [a["class"] for name, a in page.tags if name == "i"]
  assert legend == [f"c{i}" for i in range(1, 8)] + ["c0"]
  assert "others" in page.text


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal(measured, width, monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", str(width))
  monkeypatch.setattr(tables, "console", Terminal())
  tables.print_health(measured["lines"], title="Health")
  printed = capsys.readouterr().out
  assert max(map(len, printed.splitlines())) <= width
  words = " ".join(printed.split())
  for line in measured["lines"]:
    assert f"{line.label} {line.reason}" in words  # folded at spaces only
    assert re.search(rf"{line.verdict} +\S+ +{re.escape(line.label)}", printed)
  tables.print_health(measured["lines"], title="Health", reasons=False)
  short = " ".join(capsys.readouterr().out.split())
  for line in measured["lines"]:
    assert (f"{line.label} {line.reason}" in short) == (line.verdict != "fine")


def test_headline_names_the_worst_line(measured):
  by_verdict = {"fine": [], "look": [], "will hurt": []}
  for line in measured["lines"]:
    by_verdict[line.verdict].append(line)
  fine, look, (hurt,) = by_verdict.values()
  assert hurt.name == "level2/used_share"  # ten of forty codes
  sentence, verdict = headline(measured["lines"])
  assert verdict == "will hurt"
  assert sentence == (
    f"Of {len(measured['lines'])} lines, 1 will hurt and {len(look)} ask for a look. "
    f"Level 2, Codes in use: 25.0%. {hurt.reason}"
  )
  sentence, verdict = headline(fine + look)
  assert verdict == "look"
  assert sentence == (
    f"Of {len(fine + look)} lines, {len(look)} ask for a look. "
    f"Ads that share their SID: 16.7%. {look[0].reason}"
  )
  assert headline(fine) == (f"All {len(fine)} lines are fine.", "fine")


@pytest.mark.parametrize(
  "drawn",
  [
    rank_plot(np.array([1]), title="t", x_name="codes"),
    rank_plot(np.array([0, 0]), title="t", x_name="codes", even=0.0),
    rank_plot(np.arange(5000)[::-1], title="t", x_name="codes", even=7000.0),
    bar_plot([("1", 1.0, "all"), ("2", 0.0, "none")], title="t"),
    bar_plot([("1", 0.0, "none")], title="t"),
    map_plot(np.zeros((1, 2)), np.array([0]), title="t", centre_N2=np.zeros((1, 2))),
    map_plot(np.array([[0, 5], [1e6, -5]]), np.array([1, 8]), title="t"),
  ],
)
def test_plots_stay_inside_their_picture(drawn):
  width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
  for name, value in re.findall(r' ([xy][12]?)="([^"]+)"', drawn):
    assert -1e-6 <= float(value) <= (width if "x" in name else height), (name, value)
  for path in re.findall(r' d="([^"]+)"', drawn):
    for point in re.findall(r"[ML](\S+) ([^\sMLhZ]+)", path):
      assert 0 <= float(point[0]) <= width and 0 <= float(point[1]) <= height
  assert "nan" not in drawn and "inf" not in drawn


def test_a_long_rank_plot_keeps_its_peak_and_stays_small():
  count_N = np.zeros(100_000, int)
  count_N[:3] = 50, 40, 30
  drawn = rank_plot(count_N, title="t", x_name="codes")
  assert len(drawn) < 20_000 and ">50<" in drawn and ">100,000<" in drawn


def test_codes_that_lie_close_get_different_colours():
  rng = np.random.default_rng(0)
  code_N = np.repeat(np.arange(20), 11)
  middle_C2 = np.stack([np.arange(20.0), np.zeros(20)], axis=1)
  point_N2 = middle_C2[code_N] + 0.01 * rng.standard_normal((220, 2))
  point_N2[0] += 100  # one stray
  centre_N2, colour_N = code_centres(point_N2, code_N)
  np.testing.assert_allclose(centre_N2, middle_C2[code_N], atol=0.02)  # not moved by the stray
  colour_C = colour_N[::11]
  assert set(colour_C) <= set(range(1, NUM_COLOURS + 1))
  assert (colour_C[1:] != colour_C[:-1]).all()


def test_the_map_is_the_same_each_time_and_keeps_groups_together():
  rng = np.random.default_rng(0)
  group_N = np.arange(60) % 3
  x_ND = np.eye(3)[group_N] * 5 + 0.1 * rng.standard_normal((60, 3))
  point_N2 = two_dimensions(x_ND, seed=1)
  np.testing.assert_array_equal(point_N2, two_dimensions(x_ND, seed=1))
  distance_NN = np.linalg.norm(point_N2[:, None] - point_N2[None], axis=-1)
  np.fill_diagonal(distance_NN, np.inf)
  assert (group_N[distance_NN.argmin(1)] == group_N).mean() > 0.95
  assert two_dimensions(x_ND[:4], seed=0) is None
  assert np.isfinite(two_dimensions(np.arange(1.0, 8)[:, None], seed=0)).all()  # one direction
