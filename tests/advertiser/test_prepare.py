"""What is known before a cut and asked behind it, by hand; nothing behind the last cut gets out."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.advertiser.config import PrepareConfig
from gr4ad_jax.advertiser.histories import Rows, from_logs
from gr4ad_jax.advertiser.prepared import open_advertisers, prepare
from gr4ad_jax.advertiser.windows import from_windows, longest
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import open_examples
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.prepare import write_prepared
from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.data.validation import LogError

# Days on which users bought of advertisers a, b, c (by the first letter of the ad).
DAYS = {"u": "a1 b2 a9 c10 b16 a23 b40", "v": "b3 b15", "w": "c20"}
SPLIT = SequenceConfig(
  train_start_s=0, validation_start_s=15 * DAY_S, test_start_s=22 * DAY_S, num_trending=0
)


def _logs(days=DAYS):
  events = pd.DataFrame([
    (user, int(word[1:]) * DAY_S, f"{word[0]}-ad", "conversion")
    for user, words in days.items() for word in words.split()
  ], columns=["user_id", "time", "ad_id", "action"])
  clicks = pd.DataFrame([("w", DAY_S, "a-ad", "click")], columns=events.columns)
  ads = pd.DataFrame({
    "ad_id": ["a-ad", "b-ad", "c-ad"], "advertiser_id": ["A", "B", "C"], "category": "x",
    "text": ["A saw", "B drill", "C nail"],
  })
  return build_logs(ads=ads, events=pd.concat([events, clicks]), source="by hand", currency="EUR")


def _plain(source, rows: Rows):
  """(user, day of the cut, ages and first letters of the history, label) of each row."""
  name_N = source.names.name_A[source.names.advertiser_N]
  return [
    (source.user_id_U[rows.user_R[r]], int(rows.cut_s_R[r]) // DAY_S,
     " ".join(f"{name_N[i]}{age}" for i, age in zip(
       rows.item_E[rows.history(r)], rows.age_E[rows.history(r)], strict=True)),
     "-" if rows.target_R[r] < 0 else source.names.name_A[rows.target_R[r]])
    for r in range(len(rows))
  ]  # fmt: skip


def test_cuts_histories_and_labels_by_hand():
  config = PrepareConfig(max_history=3, cuts=2, label_days=7, popular_days=10)
  source = from_logs(_logs(), SPLIT, config)
  # Cuts of training: days 8 and 1; on day 1 nobody has converted before.
  assert _plain(source, source.splits["train"]) == [("u", 8, "A7 B6", "A")]
  assert _plain(source, source.splits["validation"]) == [
    ("u", 15, "B13 A6 C5", "B"), ("v", 15, "B12", "B"),
  ]
  assert _plain(source, source.splits["test"]) == [
    ("u", 22, "A13 C12 B6", "A"), ("v", 22, "B19 B7", "-"), ("w", 22, "C2", "-"),
  ]
  now = _plain(source, source.splits["now"])
  assert now[0] == ("u", 40, "B24 A17 B0", "-")
  # In pieces of three and what comes behind; of days before validation.
  assert _plain(source, source.streams) == [("u", 0, "A-1 B-1 A-1 C-1", "-")]
  assert source.popularity[15 * DAY_S].tolist() == [1, 0, 1]
  assert source.popularity[22 * DAY_S].tolist() == [0, 2, 1]


def test_last_conversions_by_hand():
  split = SequenceConfig(split="leave_one_out", num_trending=0)
  source = from_logs(_logs(), split, PrepareConfig(max_history=4))
  words = {name: _plain(source, rows) for name, rows in source.splits.items()}
  assert words["train"] == [("u", 0, "A-1 B-1 A-1 C-1", "B")]
  assert words["validation"] == [("u", 0, "B-1 A-1 C-1 B-1", "A")]
  assert words["test"] == [("u", 0, "A-1 C-1 B-1 A-1", "B")]
  assert [row[2] for row in words["now"]] == ["C-1 B-1 A-1 B-1", "B-1 B-1", "C-1"]
  assert _plain(source, source.streams) == [
    ("u", 0, "A-1 B-1 A-1 C-1 B-1", "-"), ("v", 0, "B-1 B-1", "-"),
  ]
  assert source.popularity[0].tolist() == [2, 4, 2]


def test_a_stream_longer_than_a_history_goes_on_in_the_next_piece():
  logs = _logs({"u": "a1 b2 c3 a4 b5 a9 b16 c23"})
  source = from_logs(logs, SPLIT, PrepareConfig(max_history=2))
  assert [row[2] for row in _plain(source, source.streams)] == [
    "A-1 B-1 C-1", "C-1 A-1 B-1", "B-1 A-1",
  ]


@pytest.mark.parametrize("form", ["stream", "prompt"])
def test_no_byte_depends_on_what_happens_behind_the_last_cut(tiny_data, tmp_path, form):
  logs = read_logs(tiny_data / "logs")
  split = open_examples(tiny_data / "examples").config
  later_E = logs.events.time_s >= split.test_start_s
  assert 50 < later_E.sum() < 1000
  moved = dataclasses.replace(
    logs.events, time_s=logs.events.time_s + later_E * 1000,
    ad=np.where(later_E & (logs.events.ad >= 0), (logs.events.ad + 7) % 40, logs.events.ad),
  )
  write_prepared(dataclasses.replace(logs, events=moved), tmp_path / "data", split)
  config = PrepareConfig(form=form, cuts=3)
  for name, data in (("as it was", tiny_data), ("moved", tmp_path / "data")):
    prepare(data, tmp_path / name, config)
  names = sorted(path.name for path in (tmp_path / "as it was").glob("*.parquet"))
  differ = {
    name for name in names
    if (tmp_path / "as it was" / name).read_bytes() != (tmp_path / "moved" / name).read_bytes()
  }
  # Popularity holds that of the last day for `now`, too; labels are what is asked.
  assert differ == {"labels.parquet", "now.parquet", "popularity.parquet"}
  before, after = (open_advertisers(tmp_path / name) for name in ("as it was", "moved"))
  last = int(before.splits["now"].cut_s_R[0])
  for cut, count_A in before.popularity.items():
    if cut != last:
      assert after.popularity[cut].tolist() == count_A.tolist()
  assert after.splits["train"].target_R.tolist() == before.splits["train"].target_R.tolist()
  assert bool(before.prompts) == (form == "prompt")


def test_what_is_written_is_read_again_and_not_replaced_unasked(tiny_data, tmp_path):
  sizes, merged = prepare(tiny_data, tmp_path / "adv", PrepareConfig())
  data = open_advertisers(tmp_path / "adv")
  assert merged == [] and sizes["advertisers"] == len(data.name_A) == 8
  assert sizes["test rows"] == len(data.splits["test"]) == 60
  assert sizes["labels of streams"] == len(data.streams.item_E) - len(data.streams)
  with pytest.raises(ConfigError, match="holds prepared histories already; pass --overwrite"):
    prepare(tiny_data, tmp_path / "adv", PrepareConfig())
  with pytest.raises(ConfigError, match="is no longer what the model was trained on"):
    open_advertisers(tmp_path / "adv", fingerprint="another")
  (tmp_path / "adv" / "test.parquet").write_bytes(b"x")
  with pytest.raises(ConfigError, match="test.parquet: has 1 bytes"):
    open_advertisers(tmp_path / "adv")


def test_a_log_without_conversions_is_refused():
  with pytest.raises(LogError, match="the test split asks nobody for an advertiser"):
    from_logs(_logs({"u": "a1 b2 a9 b16"}), SPLIT, PrepareConfig(cuts=1))


def _windows(folder, test=((("u"), [10, 11], 12),)):
  folder.mkdir()
  pd.DataFrame({
    "item_id": [10, 11, 12, 13, 14], "title": ["Acme saw", "drill", None, "nail", "acme x"],
    "brand": ["Acme", "Bolt", "ACME", None, "Acme"],
  }).to_parquet(folder / "items.parquet")
  train = [("u", [10], 11), ("u", [10, 11], 12), ("u", [11], 11), ("v", [10, 13], 11),
           ("v", [10], 13)]  # fmt: skip
  rows = {"train_small": train, "valid": [("v", [13], 10)], "test": test}
  for name, windows in rows.items():
    frame = pd.DataFrame(windows, columns=["user_id", "history", "target"])
    frame.to_parquet(folder / f"{name}.parquet")
  return folder


def test_windows_by_hand(tmp_path):
  source = from_windows(_windows(tmp_path / "w"), PrepareConfig())
  assert source.names.name_A.tolist() == ["Acme", "Bolt"]
  assert source.names.merged == [["ACME", "Acme"]]
  assert source.title_N.tolist() == ["saw", "drill", "", "nail", "x"]
  rows = {name: [row[::2] + row[3:] for row in _plain(source, of)]
          for name, of in source.splits.items()}  # fmt: skip
  # Of v's window that asks for an item without a brand nothing is asked.
  assert rows["train"] == [
    ("u", "Acme-1", "Bolt"), ("u", "Acme-1 Bolt-1", "Acme"), ("u", "Bolt-1", "Bolt"),
    ("v", "Acme-1", "Bolt"),
  ]
  assert rows["validation"] == [("v", "", "Acme")]
  assert rows["now"] == [("u", "Acme-1 Bolt-1 Acme-1", "-"), ("v", "Acme-1", "-")]
  # u's first window is the beginning of the second.
  assert [row[::2] for row in _plain(source, source.streams)] == [
    ("u", "Acme-1 Bolt-1 Acme-1"), ("u", "Bolt-1 Bolt-1"), ("v", "Acme-1 Bolt-1"),
  ]
  prepare(tmp_path / "w", tmp_path / "out", PrepareConfig())
  written = pd.read_parquet(tmp_path / "out" / "advertisers.parquet")
  assert [list(spellings) for spellings in written["spellings"]] == [["ACME", "Acme"], ["Bolt"]]


def test_of_windows_that_begin_alike_the_longest_stays():
  assert longest([(0, (1, 2)), (0, (1, 2, 3)), (0, (2,)), (1, (1, 2)), (1, (1, 2))]) == [
    (0, (1, 2, 3)), (0, (2,)), (1, (1, 2)),
  ]


def test_a_window_with_an_item_that_is_not_there_is_named(tmp_path):
  folder = _windows(tmp_path / "w", test=[("u", [10, 99], 12)])
  with pytest.raises(LogError, match="test.parquet: item 99 is not in items.parquet"):
    from_windows(folder, PrepareConfig())


def test_a_folder_that_is_neither_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="neither logs that `gr4ad prepare` wrote nor windows"):
    prepare(tmp_path, tmp_path / "out", PrepareConfig())
