"""Events read part by part against the rules applied row by row in plain Python."""

import errno

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data import event_stream, prepare
from gr4ad_jax.data.config import Parquet, PrepareConfig
from gr4ad_jax.data.log_folder import LogParts, read_logs
from gr4ad_jax.data.parquet_logs import store_parquet_logs
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.validation import LogError

NUM_ADS, NUM_CONTENTS, NUM_USERS = 6, 5, 12
ADS = pd.DataFrame({
  "ad_id": [f"a{i}" for i in range(NUM_ADS)], "advertiser_id": "x", "category": "c", "text": "t"
})
CONTENTS = pd.DataFrame({
  "content_id": [f"c{i}" for i in range(NUM_CONTENTS)], "category": "c", "text": "t"
})
USERS = pd.DataFrame({"user_id": range(NUM_USERS), "age": ["old", "young", None] * 4})
ONE_USER = "request_id: a request must belong to one user"
SORTED = "time: before that of an earlier row of its request, sorted"


def random_events(seed: int, rows: int = 300) -> pd.DataFrame:
  """Mostly valid rows; some break a rule of a row, more a rule of their request."""
  rng = np.random.default_rng(seed)
  organic = rng.random(rows) < 0.4
  ads, contents, users = (
    rng.integers(0, n + 1, rows) for n in (NUM_ADS, NUM_CONTENTS, NUM_USERS)  # the last is unknown
  )
  visit = np.arange(rows) // 3
  wrong = rng.random(rows)
  user = np.where(wrong < 0.05, users, (visit * 7) % NUM_USERS)
  time_s = 1000 + 40 * visit - rng.integers(0, 600, rows // 3 + 1)[visit] + rng.integers(0, 3, rows)
  no_request = (rng.random(rows) < 0.3) & (organic | (wrong > 0.97))
  return pd.DataFrame({
    "user_id": [str(u) for u in user],
    "time": time_s,
    "ad_id": [None if o else f"a{i}" for i, o in zip(ads, organic, strict=True)],
    "content_id": [f"c{i}" if o else None for i, o in zip(contents, organic, strict=True)],
    "request_id": [None if n else f"r{v}" for n, v in zip(no_request, visit, strict=True)],
    "action": np.where(wrong > 0.95, "buy", np.array(["click", "conversion"])[organic.astype(int)]),
    "value": np.where(wrong < 0.02, -1.0, rng.integers(0, 9, rows)),
    "feature_page": np.array(["home", "shop", None], object)[rng.integers(0, 3, rows)],
  })


def by_hand(events: pd.DataFrame, *, with_tables: bool) -> tuple[list[dict], dict[str, int]]:
  """Valid rows in their final order with numbers, and how many rows each rule has dropped."""
  known_ads = ADS["ad_id"].tolist()
  rules = {
    "user_id: must be a user_id of the users table":
      lambda r: not with_tables or int(r["user_id"]) < NUM_USERS,
    "ad_id: must be an ad_id of the ads table": lambda r: r["ad_id"] in (None, *known_ads),
    "content_id: must be a content_id of the contents table":
      lambda r: not with_tables or r["content_id"] in (None, *CONTENTS["content_id"]),
    "action: must be one of impression, click, conversion": lambda r: r["action"] != "buy",
    "value: must be >= 0": lambda r: r["value"] >= 0,
    "request_id: an ad event must have a request_id":
      lambda r: r["ad_id"] is None or r["request_id"] is not None,
  }
  dropped = dict.fromkeys((*rules, ONE_USER), 0)
  backwards = 0
  first_user, rows = {}, []
  cells = events.astype(object).where(events.notna(), None)
  for number, row in enumerate(cells.to_dict("records")):
    row["row"] = number
    row["request"] = row["request_id"] or f"row {number}"
    broken = next((rule for rule, keeps in rules.items() if not keeps(row)), None)
    if not broken and first_user.setdefault(row["request"], row["user_id"]) != row["user_id"]:
      broken = ONE_USER
    if broken:
      dropped[broken] += 1
    else:
      rows.append(row)
  latest = {}
  for row in rows:
    latest[row["request"]] = max(row["time"], latest.get(row["request"], 0))
    backwards += row["time"] < latest[row["request"]]
  users, contents = {}, {}
  if with_tables:
    users = {str(u): i for i, u in enumerate(USERS["user_id"])}
    contents = {c: i for i, c in enumerate(CONTENTS["content_id"])}
  for row in rows:
    row["user"] = users.setdefault(row["user_id"], len(users))
    row["content"] = (
      -1 if row["content_id"] is None else contents.setdefault(row["content_id"], len(contents))
    )
    row["ad"] = -1 if row["ad_id"] is None else known_ads.index(row["ad_id"])
    row["action"] = Action[row["action"].upper()]
  rows.sort(key=lambda row: (row["user"], row["time"], row["row"]))
  requests = {}
  for row in rows:
    row["request"] = requests.setdefault(row["request"], len(requests))
  return rows, {**{f"dropped, {rule}": n for rule, n in dropped.items()}, SORTED: backwards}


def store(folder, events, *, kind, with_tables, **options):
  tables = {"ads": ADS, "events": events}
  if with_tables:
    tables |= {"users": USERS, "contents": CONTENTS}
  paths = {name: folder / f"{name}.{kind}" for name in tables}
  for name, table in tables.items():
    table.to_parquet(paths[name]) if kind == "parquet" else table.to_csv(paths[name], index=False)
  reading = {name: options.pop(name) for name in ("read_rows", "part_events") if name in options}
  store_parquet_logs(Parquet(**paths, **options), folder / "logs", **reading)
  return folder / "logs"


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("with_tables", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_of_a_file_give_what_the_rules_say(tmp_path, kind, with_tables, seed):
  """Parts of seven rows, so that requests lie across them, and 30 events of a user's range."""
  events = random_events(seed)
  folder = store(
    tmp_path, events, kind=kind, with_tables=with_tables, invalid_rows="drop", read_rows=7,
    part_events=30,
  )
  expected, dropped = by_hand(events, with_tables=with_tables)
  logs = read_logs(folder)
  for name in ("user", "ad", "content", "request", "action", "value"):
    assert getattr(logs.events, name).tolist() == [row[name] for row in expected], name
  assert logs.events.time_s.tolist() == [row["time"] for row in expected]
  assert logs.events.features["page"].tolist() == [r["feature_page"] or "" for r in expected]
  found = {rule: logs.cleaning.get(f"events: {rule}", 0) for rule in dropped}
  assert found == dropped
  assert dropped[f"dropped, {ONE_USER}"] and dropped[SORTED]
  missing = int(events["feature_page"].isna().sum())
  assert logs.cleaning["events: feature_page missing, kept as unknown"] == missing
  if not with_tables:
    ids = dict.fromkeys(row["user_id"] for row in sorted(expected, key=lambda row: row["row"]))
    assert logs.users.user_id.tolist() == list(ids)
  parts = LogParts(folder)
  assert len(parts) > 4
  for number in range(len(parts)):
    part = parts.read(number)
    rows = np.flatnonzero(np.isin(logs.events.user, part.first_user + part.logs.events.user))
    np.testing.assert_array_equal(part.logs.events.ad, logs.events.ad[rows])
    np.testing.assert_array_equal(
      part.logs.events.request + part.first_request, logs.events.request[rows]
    )


@pytest.mark.parametrize(
  ("row", "column", "value", "rule"),
  [
    (200, "value", -1.0, "must be >= 0"),
    (200, "request_id", "r3", "a request must belong to one user"),
    (221, "time", -5, "must be a timestamp or unix seconds, years 1970 to 5138"),
  ],
)
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_fault_far_down_the_file_is_named_by_its_row_there(
  tmp_path, kind, row, column, value, rule
):
  events = pd.DataFrame({
    "user_id": np.arange(300) // 3, "time": 9, "ad_id": "a1", "action": 1, "value": 1.0,
    "request_id": [f"r{v}" for v in np.arange(300) // 3],
  })
  events.loc[row, column] = value
  with pytest.raises(LogError) as error:
    store(tmp_path, events, kind=kind, with_tables=False, read_rows=7, part_events=30)
  shown = str(value) if kind == "csv" and column == "time" else value
  assert str(error.value).endswith(
    f"events.{kind}: row {row}, column '{column}', value {shown!r}: {rule}"
  )
  assert not (tmp_path / "logs").exists()


def test_text_that_is_no_number_is_dropped_wherever_it_stands(tmp_path):
  """The last part holds no number at all, which in a whole column would be a wrong type."""
  events = pd.DataFrame({
    "user_id": "u", "time": ["2024-01-01T00:00:00Z"] * 8 + ["20240102", "x"],
    "ad_id": "a1", "action": 1, "value": ["1"] * 7 + ["much", "more", "1"],
  })
  folder = store(
    tmp_path, events, kind="csv", with_tables=False, invalid_rows="drop", read_rows=1
  )
  logs = read_logs(folder)
  assert len(logs.events.user) == 7
  assert logs.cleaning["events: dropped, value: must be a finite number"] == 2


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  ADS.to_parquet(tmp_path / "ads.parquet")
  random_events(0).to_parquet(tmp_path / "events.parquet")
  monkeypatch.setattr(event_stream.SortedRuns, "add", full)
  with pytest.raises(LogError, match="data: the disk is full"):
    source = Parquet(tmp_path / "ads.parquet", tmp_path / "events.parquet", invalid_rows="drop")
    prepare.prepare_logs(source, PrepareConfig(tmp_path / "data"))
  assert not (tmp_path / "data").exists()
