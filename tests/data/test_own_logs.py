"""Own logs as people have them: other names, other files, other types, all without editing them."""

import datetime
import decimal
import gzip
import shlex
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr4ad_jax.cli.options import joined
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.config import Parquet, PrepareConfig
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.parquet_logs import store_parquet_logs
from gr4ad_jax.data.prepare import prepare_logs
from gr4ad_jax.data.segments import append_segment
from gr4ad_jax.data.validation import LogError
from tests.commands import ROOT, run

JANUARY_S = 1_704_067_200  # 2024-01-01T00:00:00Z
DAY_S = 86_400


def ads(ids=("1", "2")) -> pd.DataFrame:
  return pd.DataFrame({
    "ad_id": list(ids), "advertiser_id": "x", "category": "c", "text": "t", "price": 2.5
  })


def events(**columns) -> pd.DataFrame:
  table = {
    "user_id": ["u", "v", "u"], "time": JANUARY_S + np.array([10, 5, 20]),
    "ad_id": ["1", "2", "1"], "action": ["click", "click", "conversion"], "value": [0.5, 0.0, 12.25]
  }
  return pd.DataFrame(table | columns)


def stored(folder, ads_, events_, **options):
  """Logs as `prepare` reads them from files; frames and Arrow tables are written to Parquet."""
  paths = {}
  for name, table in (("ads", ads_), ("events", events_)):
    paths[name] = table
    if isinstance(table, pd.DataFrame):
      table = pa.Table.from_pandas(table)
    if isinstance(table, pa.Table):
      paths[name] = folder / f"{name}.parquet"
      pq.write_table(table, paths[name])
  lines = store_parquet_logs(Parquet(**paths, **options), folder / "stored")
  return read_logs(folder / "stored"), lines


def test_a_log_of_forty_columns_is_read_without_editing_it(tmp_path):
  odd = {f"extra_{n}": n for n in range(30)} | {"value": "in words", "nested": [{"a": 1}] * 3}
  log = events(**odd).rename(columns={"user_id": "uid", "time": "ts", "action": "event"})
  log["revenue"], log["page"] = [0.5, 0.0, 12.25], ["home", "shop", None]
  log["event"] = ["Tap", "click", "order"]
  logs, lines = stored(
    tmp_path, ads().rename(columns={"text": "title"}), log, ignore_columns=("all",),
    map=("user_id=uid", "time=ts", "action=event", "value=revenue", "feature_page=page",
         "ads.text=title"),
    actions=("click=tap", "conversion=order,purchase"),
  )
  assert logs.users.user_id.tolist() == ["u", "v"]
  assert logs.events.value.tolist() == [0.5, 12.25, 0.0]
  assert logs.events.action.tolist() == [1, 2, 1]
  assert logs.events.features == {"page": pytest.approx(np.array(["home", "", "shop"], object))}
  assert logs.ads.text.tolist() == ["t", "t"]
  (line,) = lines  # what was left out is said, a column that gave way too
  assert "extra_29" in line and "nested" in line and " value," in line
  # A segment of the same log is read in the same way.
  log.assign(ts=log["ts"] + 100).to_parquet(tmp_path / "segment.parquet")
  assert append_segment(logs, tmp_path / "segment.parquet").logs.events.value.tolist() == [
    0.5, 12.25, 0.5, 12.25, 0.0, 0.0
  ]


@pytest.mark.parametrize(("options", "message"), [
  ({}, r"columns 'pgae', 'utm_a', 'utm_b' are unknown: .*--ignore-columns pgae \(or all\)"),
  ({"ignore_columns": ("utm_*",)}, "column 'pgae' is unknown"),
  ({"ignore_columns": ("utm_c",)}, "--ignore-columns utm_c: no table .*; is 'utm_"),
  ({"map": ("value=revnue",)}, "--map value=revnue: no table that it is for has such a column"),
  ({"map": ("value=price",)}, "--map value=price: no table .*; 'price' is one of another table"),
  ({"map": ("valeu=value",)}, "--map valeu=value: must be OURS=YOURS"),
  ({"map": ("value",)}, "--map value: must be OURS=YOURS"),
  ({"map": ("value=pgae", "value=utm_a")}, "column 'value' is read from 'pgae' already"),
  ({"ignore_columns": ("all", "action")}, "column 'action' is missing.*--map action=action reads"),
  ({"ignore_columns": ("time", "action")}, "columns 'time', 'action' are missing: required"),
  ({"actions": ("buy=order",)}, "--actions buy=order: must be ACTION=WORD"),
  ({"actions": ("click=a", "conversion=a")}, "'a' is given to two actions"),
])
def test_names_that_do_not_fit_are_refused_in_one_line(tmp_path, options, message):
  log = events(pgae="home", utm_a="x", utm_b="y")
  with pytest.raises((LogError, ConfigError), match=message) as error:
    stored(tmp_path, ads(), log, **options)
  assert "\n" not in str(error.value)


def test_a_column_of_a_type_that_cannot_be_read_can_be_left_out(tmp_path):
  users = pd.DataFrame({"user_id": ["u", "v"], "age": [30, 40], "worth": [0.5, 1.25]})
  users.to_parquet(tmp_path / "users.parquet")
  with pytest.raises(LogError, match=r"'worth', value 0.5: .*; --ignore-columns users.worth leav"):
    stored(tmp_path, ads(), events(), users=tmp_path / "users.parquet")
  for options in ({"ignore_columns": ("users.worth",)}, {"ignore_columns": ("users.*",),
                                                         "map": ("users.age=age",)}):
    logs, lines = stored(tmp_path, ads(), events(), users=tmp_path / "users.parquet", **options)
    assert lines == [f"{tmp_path}/users.parquet: columns left out: worth"]
    assert {name: v.tolist() for name, v in logs.users.features.items()} == {"age": ["30", "40"]}


def test_an_error_names_the_part_and_the_column_as_the_owner_calls_them(tmp_path):
  for number, revenue in enumerate(([1.0, 2.0, 3.0], [4.0, -5.0, 6.0])):
    (tmp_path / "log" / f"day={number}").mkdir(parents=True)
    part = events(revenue=revenue).drop(columns="value")
    part.to_csv(tmp_path / "log" / f"day={number}" / "part.csv", index=False)
  with pytest.raises(LogError) as error:
    stored(tmp_path, ads(), tmp_path / "log", map=("value=revenue",))
  assert str(error.value) == (
    f"{tmp_path}/log/day=1/part.csv: row 1, column 'revenue' (read as 'value'), value -5.0: "
    "must be >= 0"
  )


def test_the_command_of_the_docs_reads_a_log_of_forty_columns(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  page = (ROOT / "docs" / "own_logs.md").read_text()
  begin = page.index("    gr4ad prepare --check parquet --ads creatives.csv")
  command = shlex.split(page[begin:].split("\n\n")[0].replace("\\\n", " "))[1:]
  rng, others = np.random.default_rng(0), {f"other_{n}": n / 7 for n in range(32)}
  for day in range(40):
    folder = tmp_path / "clicks" / f"dt={datetime.date(2026, 1, 1) + datetime.timedelta(day)}"
    folder.mkdir(parents=True)
    pd.DataFrame({
      "visitor": rng.integers(0, 9, 12).astype(float), "ts": 1000 * (JANUARY_S + DAY_S * day),
      "creative": [decimal.Decimal(int(n)) for n in rng.integers(1, 7, 12)],
      "event": rng.permutation(["view", "tap", "order", "Purchase"] * 3), "revenue": 1.5,
      "auction": [f"{day}-{n}" for n in range(12)], "placement": "top", "device": b"phone",
    } | others).to_parquet(folder / "part-0.parquet")
  pd.DataFrame({
    "creative": range(1, 7), "shop": "s", "path": "a > b", "headline": "words",
    "list_price": "2,49", "landing_page": "http://x/",
  }).to_csv("creatives.csv", sep=";", index=False)
  assert len(pq.read_schema(folder / "part-0.parquet").names) == 40
  assert run(*command) == 0
  assert "checked, nothing was written" in capsys.readouterr().out
  assert sorted(path.name for path in tmp_path.iterdir()) == ["clicks", "creatives.csv"]
  command[command.index("--check") : command.index("--check") + 1] = ["--out", "data/mine"]
  assert run(*command) == 0
  logs = read_logs(tmp_path / "data" / "mine" / "logs")
  assert logs.ads.price.tolist() == [np.float32(2.49)] * 6
  assert len(logs.events.user) == 480 and set(logs.events.features) == {"placement", "device"}
  assert np.bincount(logs.events.action).tolist() == [120, 120, 240]
  assert set(logs.users.user_id) == {str(n) for n in range(9)}


def test_options_of_words_may_stand_several_times():
  line = "prepare parquet --map a=b --out x --map=c=d e=f --ignore_columns g --check".split()
  assert joined(line) == (
    "prepare parquet --map a=b c=d e=f --out x --ignore-columns g --check".split()
  )


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv"])
def test_the_separator_is_that_of_the_header(tmp_path, separator, suffix):
  log = events(request_id=["a,b", 'say "x;y"', "c\td"])
  text = log.to_csv(index=False, sep=separator)
  path = tmp_path / f"events{suffix}"
  path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
  logs, _ = stored(tmp_path, ads(), path)
  assert logs.events.value.tolist() == [0.5, 12.25, 0.0]


def test_numbers_between_semicolons_may_have_a_decimal_comma(tmp_path):
  log = events(value=["0,5", "0", "12,25"]).to_csv(index=False, sep=";")
  (tmp_path / "events.csv").write_text("\ufeff" + log.replace("\n", "\r\n"), newline="")
  logs, _ = stored(tmp_path, ads().assign(bid=1.5), tmp_path / "events.csv")
  assert logs.events.value.tolist() == [0.5, 12.25, 0.0]


def test_amounts_in_text_are_numbers_in_parquet_too(tmp_path):
  logs, _ = stored(tmp_path, ads().assign(price=["2.5", None]), events(value=["0.5", "0", "1e1"]))
  np.testing.assert_array_equal(logs.ads.price, np.float32([2.5, np.nan]))
  assert logs.events.value.tolist() == [0.5, 10, 0]
  with pytest.raises(LogError, match=r"row 1, column 'value', value 'much': must be a finite num"):
    stored(tmp_path, ads(), events(value=["0.5", "much", "1"]))


def test_bids_in_text_are_numbers(tmp_path):
  ads().assign(bid=[1.5, None]).to_csv(tmp_path / "ads.csv", index=False)
  logs, _ = stored(tmp_path, tmp_path / "ads.csv", events())
  np.testing.assert_array_equal(logs.ads.bid, np.float32([1.5, np.nan]))


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "csv.gz", ""])
def test_a_folder_of_parts_is_one_table(tmp_path, kind):
  """Partitioned by a column that is none of ours, and by one that is."""
  log = events(feature_page=["home", "shop", None], day=[1, 2, 1])
  for n in range(3):
    page = log["feature_page"].fillna("__HIVE_DEFAULT_PARTITION__")[n]
    folder = tmp_path / "log" / f"day={log['day'][n]}" / f"feature_page={page}"
    folder.mkdir(parents=True, exist_ok=True)
    part = log.iloc[[n]].drop(columns=["day", "feature_page"])
    file = folder / (f"part-{n}.{kind}" if kind else f"part-{n}")
    if kind in ("parquet", ""):
      part.to_parquet(file, index=False)
    else:
      part.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
  (tmp_path / "log" / "_SUCCESS").touch()
  (tmp_path / "log" / "day=1" / ".part-0.crc").write_text("x")
  (tmp_path / "log" / "day=1" / "empty.csv").touch()
  logs, lines = stored(tmp_path, ads(), tmp_path / "log")
  expected, _ = stored(tmp_path, ads(), log.drop(columns="day"))
  for name in ("time_s", "ad", "action", "value"):
    assert sorted(getattr(logs.events, name)) == sorted(getattr(expected.events, name)), name
  by_time = dict(zip(logs.events.time_s.tolist(), logs.events.features["page"], strict=True))
  assert by_time == {JANUARY_S + 10: "home", JANUARY_S + 5: "shop", JANUARY_S + 20: ""}
  assert lines == [f"{tmp_path}/log: columns left out: day"]


def test_a_part_without_a_required_column_is_named(tmp_path):
  (tmp_path / "log").mkdir()
  events().to_parquet(tmp_path / "log" / "a.parquet")
  events().drop(columns="action").to_parquet(tmp_path / "log" / "b.parquet")
  with pytest.raises(LogError, match="log/b.parquet: column 'action' is missing, which other"):
    stored(tmp_path, ads(), tmp_path / "log")
  with pytest.raises(LogError, match="an empty folder"):
    (tmp_path / "none").mkdir()
    stored(tmp_path, ads(), tmp_path / "none")


@pytest.mark.parametrize("index", ["ad_id", ["ad_id", "price"], None])
def test_an_index_of_pandas_is_a_column_where_the_table_knows_it(tmp_path, index):
  table = ads() if index is None else ads().set_index(index)
  table = table.iloc[[1, 0]] if index is None else table  # a shuffled index without a name
  logs, _ = stored(tmp_path, table, events().set_index("user_id"))
  assert sorted(logs.ads.ad_id) == ["1", "2"] and logs.ads.price.tolist() == [2.5, 2.5]
  events().iloc[[2, 0, 1]].to_csv(tmp_path / "events.csv")  # a first column without a name
  logs, _ = stored(tmp_path, table, tmp_path / "events.csv")
  assert logs.events.value.tolist() == [0.5, 12.25, 0.0]


def ids(values, *, kind):
  return pa.array(values, kind)


ID_TYPES = {
  "int8": lambda n: ids(n, kind=pa.int8()),
  "uint64": lambda n: ids(n, kind=pa.uint64()),
  "float32": lambda n: ids([float(i) for i in n], kind=pa.float32()),
  "decimal(38, 0)": lambda n: ids([decimal.Decimal(i) for i in n], kind=pa.decimal128(38, 0)),
  "decimal(50, 10)": lambda n: ids([decimal.Decimal(i) for i in n], kind=pa.decimal256(50, 10)),
  "text": lambda n: ids([str(i) for i in n], kind=pa.string()),
  "text of floats": lambda n: ids([f"{i}.0" for i in n], kind=pa.string()),
  "large_string": lambda n: ids([str(i) for i in n], kind=pa.large_string()),
  "string_view": lambda n: ids([str(i) for i in n], kind=pa.string_view()),
  "binary": lambda n: ids([str(i).encode() for i in n], kind=pa.binary()),
  "large_binary": lambda n: ids([str(i).encode() for i in n], kind=pa.large_binary()),
  "binary(1)": lambda n: ids([str(i).encode() for i in n], kind=pa.binary(1)),
  "dictionary": lambda n: ids([str(i) for i in n], kind=pa.string()).dictionary_encode(),
  "dictionary of bytes": lambda n: ids([str(i).encode() for i in n], kind=pa.binary())
    .dictionary_encode(),
  "dictionary of integers": lambda n: ids(n, kind=pa.int64()).dictionary_encode(),
}


@pytest.mark.parametrize("make", ID_TYPES.values(), ids=ID_TYPES.keys())
def test_ids_of_every_type_are_the_same_ids(tmp_path, make):
  table, catalogue = pa.Table.from_pandas(events()), pa.Table.from_pandas(ads())
  for name in ("ad_id", "user_id"):
    number = table.column_names.index(name)
    table = table.set_column(number, name, make([1, 2, 1]))
  logs, _ = stored(tmp_path, catalogue.set_column(0, "ad_id", make([1, 2])), table)
  assert logs.ads.ad_id.tolist() == logs.users.user_id.tolist() == ["1", "2"]
  assert logs.events.ad.tolist() == [0, 0, 1]
  logs, _ = stored(tmp_path, ads(), table)  # and those of a table with another type
  assert logs.events.ad.tolist() == [0, 0, 1]


def test_uuids_are_ids(tmp_path):
  names = [uuid.UUID(int=n) for n in (7, 8)]
  table = pa.Table.from_pandas(ads()).set_column(
    0, "ad_id", pa.ExtensionArray.from_storage(pa.uuid(), pa.array(
      [name.bytes for name in names], pa.binary(16)))
  )
  log = events(ad_id=[str(names[n]) for n in (0, 1, 0)])
  assert stored(tmp_path, table, log)[0].ads.ad_id.tolist() == [str(name) for name in names]


def test_bytes_that_are_no_text_are_refused(tmp_path):
  table = pa.Table.from_pandas(ads()).set_column(0, "ad_id", pa.array([b"\xff1", b"\xff2"]))
  with pytest.raises(LogError, match="ads.parquet: column 'ad_id': bytes that are not UTF-8"):
    stored(tmp_path, table, events())


@pytest.mark.parametrize(("text", "name"), [
  ("102.0", "102"), ("-3.0", "-3"), ("102.000", "102"), ("1.02E2", "102"), ("1.5e+3", "1500"),
  ("1152921504606846977", "1152921504606846977"), ("007", "007"), ("007.0", "007.0"),
  ("1.1", "1.1"), ("1e5", "1e5"), ("1.5e+0", "1.5e+0"), ("NA", "NA"),
])
def test_integer_ids_that_went_through_a_float_are_integers_again(tmp_path, text, name):
  events(user_id=[text, "u", text]).to_csv(tmp_path / "events.csv", index=False)
  assert stored(tmp_path, ads(), tmp_path / "events.csv")[0].users.user_id.tolist() == [name, "u"]


@pytest.mark.parametrize("text", ["1.152921504606847e+18", "9007199254740994.0", "1e+16"])
def test_ids_that_lost_digits_in_a_float_are_refused(tmp_path, text):
  events(user_id=["u", text, "u"]).to_csv(tmp_path / "events.csv", index=False)
  with pytest.raises(LogError, match=r"row 1, column 'user_id', .*a float above 2\^53 has lost"):
    stored(tmp_path, ads(), tmp_path / "events.csv")


def test_a_check_writes_nothing_and_counts_what_prepare_would(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  days = np.arange(60)
  log = pd.DataFrame({
    "user_id": days % 7, "time": JANUARY_S + days * DAY_S, "ad_id": days % 2 + 1, "action": "click"
  })
  ads().to_parquet("ads.parquet")
  log.to_parquet("events.parquet")
  source = Parquet(tmp_path / "ads.parquet", tmp_path / "events.parquet")
  checked = prepare_logs(source, PrepareConfig(check=True))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["ads.parquet", "events.parquet"]
  made = prepare_logs(source, PrepareConfig(tmp_path / "data"))
  assert checked == {name: n for name, n in made.items() if not name.endswith(" examples")}
  assert checked["test requests"] == 7
  with pytest.raises(ConfigError, match="--out: must be given"):
    prepare_logs(source, PrepareConfig())


@pytest.mark.parametrize(("columns", "bid", "words"), [
  ({"value": 0.0}, None, "no value signal: no ad event has a value"),
  ({}, None, "no value signal: no ad event has a value"),
  ({"value": 0.0, "ecpm": 0.0}, None, "no value signal: no ad event has a value"),
  ({"value": 1.0}, 0.0, "no value signal in the bids: every bid is 0"),
  ({"value": 0.0}, 0.0, "no value signal in the bids: every bid is 0"),
  ({"value": 0.0}, 1.5, ""), ({"value": 1.0}, None, ""), ({"ecpm": 1.0}, None, ""),
])
def test_a_log_without_worth_is_said_to_be_so_in_one_line(tmp_path, capsys, columns, bid, words):
  days = np.arange(60)
  pd.DataFrame({
    "user_id": days % 7, "time": JANUARY_S + days * DAY_S, "ad_id": days % 2 + 1, "action": "click"
  }).assign(**columns).to_parquet(tmp_path / "events.parquet")
  catalogue = ads() if bid is None else ads().assign(bid=[bid, None])
  catalogue.to_parquet(tmp_path / "ads.parquet")
  source = Parquet(tmp_path / "ads.parquet", tmp_path / "events.parquet")
  prepare_logs(source, PrepareConfig(check=True))
  said = [line for line in capsys.readouterr().err.splitlines() if "no value signal" in line]
  assert len(said) == bool(words) and all(words in line for line in said)
