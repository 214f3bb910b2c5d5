"""The user's own files: parquet and CSV give the same logs, and faults name the file."""

import gzip

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.config import Parquet
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.parquet_logs import store_parquet_logs
from gr4ad_jax.data.validation import LogError

ADS = """ad_id,advertiser_id,category,text,price
007,NA,Food > Snacks,"nuts, ""salted""
and roasted",2.5
008,acme,Food,,
"""
EVENTS = """user_id,time,ad_id,content_id,request_id,action,value,feature_page
1,2024-01-01T00:00:10Z,007,,r1,click,0.5,home
2,2024-01-01T00:00:05Z,,55,,click,0,
1,2024-01-01T00:00:20Z,008,,r1,conversion,12.25,home
"""
USERS = "user_id,age\n1,30-39\n2,\n"
CONTENTS = "content_id,ad_id,category,text\n55,008,Video,a film\n"
JANUARY_S = 1_704_067_200  # 2024-01-01T00:00:00Z


def write(folder, **texts):
  paths = {name: folder / f"{name}.csv" for name in texts}
  for name, text in texts.items():
    paths[name].write_text(text)
  return paths


@pytest.fixture
def csv_files(tmp_path):
  return write(tmp_path, ads=ADS, events=EVENTS, users=USERS, contents=CONTENTS)


def parquet_files(folder):
  """The same logs with native types: timestamps, floats, null strings."""
  frames = {
    "ads": pd.DataFrame({
      "ad_id": ["007", "008"],
      "advertiser_id": ["NA", "acme"],
      "category": ["Food > Snacks", "Food"],
      "text": ['nuts, "salted"\nand roasted', None],
      "price": [2.5, np.nan],
    }),
    "events": pd.DataFrame({
      "user_id": [1, 2, 1],
      "time": pd.to_datetime(JANUARY_S + np.array([10, 5, 20]), unit="s"),
      "ad_id": ["007", None, "008"],
      "content_id": pd.array([None, 55, None], dtype="Int64"),
      "request_id": ["r1", None, "r1"],
      "action": pd.Categorical(["click", "click", "conversion"]),
      "value": np.float32([0.5, 0, 12.25]),
      "feature_page": ["home", None, "home"],
    }),
    "users": pd.DataFrame({"user_id": [1, 2], "age": ["30-39", None]}),
    "contents": pd.DataFrame({
      "content_id": [55], "ad_id": ["008"], "category": ["Video"], "text": ["a film"]
    }),
  }
  paths = {name: folder / f"{name}.parquet" for name in frames}
  for name, frame in frames.items():
    frame.to_parquet(paths[name])
  return paths


def read(paths, **options):
  """What is stored of the files."""
  stored = paths["ads"].parent / "stored"
  store_parquet_logs(Parquet(**paths, **options), stored)
  return read_logs(stored)


def test_csv_cells_arrive_as_written(csv_files):
  logs = read(csv_files, currency="EUR")
  assert logs.ads.ad_id.tolist() == ["007", "008"]
  assert logs.ads.advertiser_id.tolist() == ["NA", "acme"]
  assert logs.ads.text.tolist() == ['nuts, "salted"\nand roasted', ""]
  np.testing.assert_array_equal(logs.ads.price, np.float32([2.5, np.nan]))
  assert logs.events.time_s.tolist() == [JANUARY_S + 10, JANUARY_S + 20, JANUARY_S + 5]
  assert logs.events.ad.tolist() == [0, 1, -1]
  assert logs.contents.ad.tolist() == [1]
  assert logs.events.features["page"].tolist() == ["home", "home", ""]
  assert logs.users.features["age"].tolist() == ["30-39", ""]
  assert logs.currency == "EUR"


def test_parquet_and_csv_give_the_same_logs(tmp_path, csv_files):
  left, right = read(csv_files), read(parquet_files(tmp_path))
  for table in ("ads", "contents", "users", "events"):
    for name, values in vars(getattr(left, table)).items():
      other = getattr(getattr(right, table), name)
      if name != "embedding_AD":
        np.testing.assert_equal(other, values, err_msg=f"{table}.{name}")
  assert left.cleaning == right.cleaning


def test_compressed_csv_is_read(tmp_path, csv_files):
  packed = tmp_path / "ads.csv.gz"
  packed.write_bytes(gzip.compress(csv_files["ads"].read_bytes()))
  assert read(csv_files | {"ads": packed}).ads.ad_id.tolist() == ["007", "008"]


def test_large_integer_ids_with_nulls_keep_every_digit(tmp_path):
  paths = parquet_files(tmp_path)
  large = 2**60 + 1
  events = pd.read_parquet(paths["events"])
  events["content_id"] = pd.array([None, large, None], dtype="Int64")
  events.to_parquet(paths["events"])
  del paths["contents"]
  assert read(paths).contents.content_id.tolist() == [str(large)]


def test_given_embeddings_come_from_parquet(tmp_path):
  paths = parquet_files(tmp_path)
  ads = pd.read_parquet(paths["ads"])
  ads["embedding"] = [[0.5, 1.0], [2.0, -1.0]]
  ads.to_parquet(paths["ads"])
  np.testing.assert_array_equal(read(paths).ads.embedding_AD, np.float32([[0.5, 1], [2, -1]]))


def test_unix_seconds_in_csv(tmp_path, csv_files):
  paths = write(tmp_path, events="user_id,time,ad_id,action\n1,100,007,0\n2,90,008,2\n")
  logs = read({"ads": csv_files["ads"], "events": paths["events"]})
  assert logs.events.time_s.tolist() == [100, 90]


def test_a_bad_cell_is_named_with_file_row_column_value_and_rule(tmp_path, csv_files):
  write(tmp_path, events=EVENTS.replace("12.25", "12,25").replace("12,25", '"12,25"'))
  with pytest.raises(LogError) as error:
    read(csv_files)
  path = csv_files["events"]
  expected = f"{path}: row 2, column 'value', value '12,25': must be a finite number"
  assert str(error.value) == expected


def test_bad_cells_can_be_dropped_and_counted(tmp_path, csv_files):
  write(tmp_path, events=EVENTS.replace("12.25", "much"))
  logs = read(csv_files, invalid_rows="drop")
  assert logs.cleaning["events: dropped, value: must be a finite number"] == 1
  assert logs.events.ad.tolist() == [0, -1]


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("events.csv", "", "events.csv: not readable as csv"),
    ("events.csv", EVENTS.split("\n")[0] + "\n", "events.csv: the table is empty"),
    ("events.csv", "a,b\n1,2\n1,2,3\n", "events.csv: not readable as csv: CSV parse error"),
    ("events.csv", "user_id,time\n1,2\n", "events.csv: columns 'ad_id', 'action' are missing"),
    ("events.csv", "user_id,user_id,time,ad_id,action\n1,1,2,007,0\n", "occurs twice"),
    ("events.parquet", "no parquet", "events.parquet: not readable as parquet"),
    ("events.json", "{}", "events.json: suffix '.json': must be .parquet, .csv, "),
  ],
)
def test_an_unreadable_file_is_refused_in_one_line(tmp_path, csv_files, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(LogError) as error:
    read(csv_files | {"events": tmp_path / name})
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path, csv_files):
  with pytest.raises(LogError, match="none.parquet: no such file"):
    read(csv_files | {"users": tmp_path / "none.parquet"})
