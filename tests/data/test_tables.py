"""Logs: what valid tables become, what is refused in which words, and the round trip to disk."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from gr4ad_jax.data.log_folder import read_logs, write_logs
from gr4ad_jax.data.records import AD_TYPES, Action
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.data.validation import LogError

FILES = {"ads": "ads.csv", "events": "events.csv", "users": "users.csv", "contents": "contents.csv"}


def ads(**columns):
  table = {
    "ad_id": ["a", "b", "c"],
    "advertiser_id": [7, 8, 7],
    "category": ["Food > Snacks", "Food", None],
    "text": ["salted nuts", "bread", None],
    "price": [2.5, None, 1.0],
  }
  return pd.DataFrame(table | columns)


def events(**columns):
  table = {
    "user_id": [2, 1, 1, 1, 2],
    "time": [50, 30, 10, 10, 40],
    "ad_id": ["a", None, "c", "a", None],
    "content_id": [None, 11, None, None, 12],
    "request_id": ["r3", "r2", "r1", "r1", None],
    "action": ["conversion", "click", "impression", "CLICK", 1],
    "value": [3.0, 0.0, 0.0, 0.5, 0.0],
    "ecpm": [1.5, None, None, 2.0, None],
    "feature_store": ["s1", "s1", None, "s2", "s2"],
  }
  return pd.DataFrame(table | columns)


def users(**columns):
  return pd.DataFrame({"user_id": [1, 2], "age": ["young", None], "kids": [0, 2]} | columns)


def contents(**columns):
  table = {
    "content_id": [10, 11, 12],
    "ad_id": [None, "b", None],
    "category": ["x", "y", "z"],
    "text": ["one", "two", None],
  }
  return pd.DataFrame(table | columns)


def build(**tables):
  tables = {"ads": ads(), "events": events()} | tables
  return build_logs(**tables, files=FILES, source="test", currency="EUR")


def test_tables_become_numbered_records_sorted_by_user_and_time():
  logs = build(users=users(), contents=contents())
  assert logs.ads.advertiser_id.tolist() == ["7", "8", "7"]
  assert logs.ads.category.tolist() == ["Food > Snacks", "Food", ""]
  np.testing.assert_array_equal(logs.ads.price, np.float32([2.5, np.nan, 1.0]))
  assert logs.ads.embedding_AD is None
  assert logs.contents.content_id.tolist() == ["10", "11", "12"]
  assert logs.contents.ad.tolist() == [-1, 1, -1]
  assert logs.users.features["age"].tolist() == ["young", ""]
  assert logs.users.features["kids"].tolist() == ["0", "2"]
  # Users 1 and 2 are rows 0 and 1; equal times keep the order of the input.
  events_ = logs.events
  assert events_.user.tolist() == [0, 0, 0, 1, 1]
  assert events_.time_s.tolist() == [10, 10, 30, 40, 50]
  assert events_.ad.tolist() == [2, 0, -1, -1, 0]
  assert events_.content.tolist() == [-1, -1, 1, 2, -1]
  assert events_.request.tolist() == [0, 0, 1, 2, 3]
  assert events_.action.tolist() == [
    Action.IMPRESSION, Action.CLICK, Action.CLICK, Action.CLICK, Action.CONVERSION
  ]
  np.testing.assert_array_equal(events_.value, np.float32([0, 0.5, 0, 0, 3]))
  np.testing.assert_array_equal(events_.ecpm, np.float32([np.nan, 2, np.nan, np.nan, 1.5]))
  assert events_.features["store"].tolist() == ["", "s2", "s1", "s2", "s1"]


def test_dtypes_are_the_documented_ones():
  logs = build()
  dtypes = {"user": "i4", "time_s": "i8", "ad": "i4", "content": "i4", "request": "i4"}
  dtypes |= {"action": "i1", "value": "f4", "ecpm": "f4"}
  assert {name: getattr(logs.events, name).dtype for name in dtypes} == {
    name: np.dtype(dtype) for name, dtype in dtypes.items()
  }
  assert logs.ads.price.dtype == np.float32
  assert logs.contents.ad.dtype == np.int32
  assert logs.ads.ad_id.dtype == logs.users.user_id.dtype == object


def test_users_and_contents_come_from_events_where_no_table_is_given():
  logs = build()
  assert logs.users.user_id.tolist() == ["2", "1"]
  assert logs.users.features == {}
  assert logs.contents.content_id.tolist() == ["11", "12"]
  assert logs.contents.ad.tolist() == [-1, -1]
  assert logs.contents.text.tolist() == ["", ""]


def test_events_without_request_ids_are_requests_of_their_own():
  logs = build(events=events().drop(columns=["request_id"]))
  assert logs.events.request.tolist() == [0, 1, 2, 3, 4]


def test_optional_columns_may_be_absent():
  logs = build(
    ads=ads().drop(columns="price"),
    events=events().loc[[0, 2], ["user_id", "time", "ad_id", "action"]],
  )
  assert np.isnan(logs.ads.price).all()
  assert len(logs.contents.content_id) == 0
  assert logs.events.value.tolist() == [0.0, 0.0]
  assert np.isnan(logs.events.ecpm).all()


def test_ads_without_type_account_and_campaign_are_products_of_unknown_ones():
  logs = build()
  assert logs.ads.ad_type.tolist() == ["product"] * 3
  assert logs.ads.account_id.tolist() == logs.ads.campaign_id.tolist() == [""] * 3
  assert not [rule for rule in logs.cleaning if "ad_type" in rule or "account_id" in rule]


def test_ad_types_are_read_in_any_case_and_null_is_product():
  logs = build(ads=ads(ad_type=["LiveStream", None, "virtual"]))
  assert logs.ads.ad_type.tolist() == ["livestream", "product", "virtual"]
  assert logs.cleaning["ads: ad_type missing, kept as product"] == 1
  assert build(ads=ads(ad_type=[None] * 3)).ads.ad_type.tolist() == ["product"] * 3


@pytest.mark.parametrize("ad_type", AD_TYPES)
def test_every_kind_of_ad_is_accepted(ad_type):
  assert build(ads=ads(ad_type=ad_type.upper())).ads.ad_type.tolist() == [ad_type] * 3


def test_accounts_and_campaigns_are_ids_that_may_be_missing():
  logs = build(ads=ads(account_id=[7.0, None, 9.0], campaign_id=["x", "x", None]))
  assert logs.ads.account_id.tolist() == ["7", "", "9"]
  assert logs.ads.campaign_id.tolist() == ["x", "x", ""]
  assert logs.cleaning["ads: account_id missing, kept as unknown"] == 1
  assert logs.cleaning["ads: campaign_id missing, kept as unknown"] == 1


@pytest.mark.parametrize(
  "time",
  [
    ["1970-01-01 00:00:50", "1970-01-01T00:00:30Z", "1970-01-01T01:00:10+01:00"],
    pd.to_datetime([50, 30, 10], unit="s"),
    pd.to_datetime([50, 30, 10], unit="s", utc=True).tz_convert("+09:00"),
    [50.9, 30.0, 10.2],
    ["50", "30", "10"],
  ],
  ids=["iso8601", "timestamps", "zoned", "fractions", "text"],
)
def test_times_may_be_written_in_several_ways(time):
  table = pd.DataFrame({"user_id": 1, "time": time, "ad_id": "a", "action": 2})
  assert build(events=table).events.time_s.tolist() == [10, 30, 50]


def test_integers_text_and_whole_fractions_are_the_same_id():
  table = pd.DataFrame({
    "user_id": ["1", "1"],
    "time": [1, 2],
    "ad_id": [np.nan, 5.0],
    "content_id": [6.0, np.nan],
    "action": 2,
  })
  logs = build(ads=ads(ad_id=["4", "5", "6"]), events=table, users=users())
  assert logs.events.ad.tolist() == [-1, 1]
  assert logs.contents.content_id.tolist() == ["6"]


def with_cell(table, row, column, value):
  table = table.copy()
  table[column] = table[column].astype(object)
  table.loc[row, column] = value
  return table


# What is wrong, the row of the events table, the column, the value written there, the rule.
BAD_EVENTS = {
  "no user": (3, "user_id", None, "ids must not be missing"),
  "unknown user": (3, "user_id", 99, "must be a user_id of the users table"),
  "no time": (1, "time", None, "must be a timestamp or unix seconds"),
  "time is text": (1, "time", "soon", "must be a timestamp or unix seconds"),
  "time before 1970": (1, "time", -5, "must be a timestamp or unix seconds"),
  "milliseconds": (1, "time", 1_700_000_000_000, "must be a timestamp or unix seconds"),
  "infinite time": (1, "time", np.inf, "must be a timestamp or unix seconds"),
  "both": (0, "content_id", 11, "this one has both"),
  "neither": (0, "ad_id", None, "this one has neither"),
  "unknown ad": (2, "ad_id", "zz", "must be an ad_id of the ads table"),
  "unknown content": (4, "content_id", 99, "must be a content_id of the contents table"),
  "unknown action": (0, "action", "buy", "must be one of impression, click, conversion"),
  "unknown action number": (0, "action", 3, "must be one of impression, click, conversion"),
  "no action": (0, "action", None, "must be one of impression, click, conversion"),
  "value NaN": (0, "value", np.nan, "must be a finite number"),
  "value infinite": (0, "value", np.inf, "must be a finite number"),
  "value too large for float32": (0, "value", 1e39, "must be a finite number"),
  "value is text": (0, "value", "much", "must be a finite number"),
  "value negative": (0, "value", -0.01, "must be >= 0"),
  "ecpm infinite": (3, "ecpm", np.inf, "must be a finite number or null"),
  "ecpm negative": (3, "ecpm", -1, "must be >= 0"),
  "no request": (0, "request_id", None, "an ad event must have a request_id"),
  "two users": (1, "request_id", "r3", "a request must belong to one user"),
}


@pytest.mark.parametrize("row, column, value, rule", BAD_EVENTS.values(), ids=BAD_EVENTS.keys())
def test_an_invalid_event_is_named_in_one_line(row, column, value, rule):
  table = with_cell(events(), row, column, value)
  with pytest.raises(LogError) as error:
    build(events=table, users=users(), contents=contents())
  message = str(error.value)
  assert "\n" not in message
  assert message.startswith(f"events.csv: row {row}, column '")
  assert rule in message
  if value is not None and "this one" not in rule:
    assert f"value {value!r}" in message


@pytest.mark.parametrize("row, column, value, rule", BAD_EVENTS.values(), ids=BAD_EVENTS.keys())
def test_an_invalid_event_can_be_dropped_and_is_counted_once(row, column, value, rule):
  good = build_logs(
    ads=ads(), events=events().drop(index=row), users=users(), contents=contents(),
    source="test", currency="EUR",
  )
  logs = build_logs(
    ads=ads(), events=with_cell(events(), row, column, value), users=users(), contents=contents(),
    source="test", currency="EUR", invalid_rows="drop",
  )
  dropped = {rule: count for rule, count in logs.cleaning.items() if "dropped" in rule}
  assert sum(dropped.values()) == 1
  assert [name for name, count in dropped.items() if count][0].find(rule) >= 0
  for name in ("user", "time_s", "ad", "content", "request", "action", "value", "ecpm"):
    np.testing.assert_array_equal(getattr(logs.events, name), getattr(good.events, name))


def test_cleaning_names_every_rule_even_those_that_touched_nothing():
  valid = build_logs(
    ads=ads(), events=events(), source="s", currency="c", cleaning={"reader: a rule": 4}
  )
  dropping = build_logs(
    ads=ads(), events=with_cell(events(), 0, "value", -1), source="s", currency="c",
    invalid_rows="drop", cleaning={"reader: a rule": 4},
  )
  assert valid.cleaning.keys() == dropping.cleaning.keys()
  assert valid.cleaning["reader: a rule"] == 4
  assert valid.cleaning["events: dropped, value: must be >= 0"] == 0
  assert dropping.cleaning["events: dropped, value: must be >= 0"] == 1
  assert valid.cleaning["ads: price missing, kept as unknown"] == 1
  assert valid.cleaning["events: feature_store missing, kept as unknown"] == 1


def test_dropping_every_event_is_an_error():
  with pytest.raises(LogError, match="events.csv: no valid row is left of 5"):
    build_logs(
      ads=ads(), events=events(value=-1.0), files=FILES, source="s", currency="c",
      invalid_rows="drop",
    )


def test_the_first_of_several_offenders_is_named_and_the_others_counted():
  with pytest.raises(LogError, match=r"row 1, column 'value', value -2: .* \(2 more such rows\)"):
    build(events=events(value=[0, -2, -3, 0, -4]))


BAD_TABLES = {
  "ads without a column": ({"ads": ads().drop(columns="text")}, "ads.csv: column 'text' is miss"),
  "events without a column": (
    {"events": events().drop(columns="action")}, "events.csv: column 'action' is missing"
  ),
  "a misspelt column": (
    {"events": events().rename(columns={"value": "vlaue"})}, "column 'vlaue' is unknown"
  ),
  "no ads": ({"ads": ads().head(0)}, "ads.csv: the table is empty"),
  "no events": ({"events": events().head(0)}, "events.csv: the table is empty"),
  "no users": ({"users": users().head(0)}, "users.csv: the table is empty"),
  "no contents": ({"contents": contents().head(0)}, "contents.csv: the table is empty"),
  "an ad twice": (
    {"ads": ads(ad_id=["a", "b", "a"])}, "ads.csv: row 2, column 'ad_id', value 'a': ids must be un"
  ),
  "an ad twice as number and text": (
    {"ads": ads(ad_id=pd.Series([1, "2", "1"], dtype=object))}, "ads.csv: row 2, column 'ad_id'"
  ),
  "a user twice": ({"users": users(user_id=[1, 1])}, "users.csv: row 1, column 'user_id', value 1"),
  "a content twice": ({"contents": contents(content_id=[10, 11, 11])}, "contents.csv: row 2"),
  "an ad without id": ({"ads": ads(ad_id=["a", None, "c"])}, "ads.csv: row 1, column 'ad_id'"),
  "no advertiser": ({"ads": ads(advertiser_id=[1, None, 2])}, "ads.csv: row 1, column 'advertiser"),
  "negative price": ({"ads": ads(price=[1, -2, 3])}, "row 1, column 'price', value -2: must be >="),
  "infinite price": ({"ads": ads(price=[1, np.inf, 3])}, "row 1, column 'price', value inf: must"),
  "price is text": ({"ads": ads(price=["1", "2", "3"])}, "row 0, column 'price', value '1': must"),
  "text is a number": ({"ads": ads(text=["x", 5, "y"])}, "row 1, column 'text', value 5: must be"),
  "category is a fraction": (
    {"ads": ads(category=[0.5, 1.0, 2.0])}, "row 0, column 'category', value 0.5: must be an int"
  ),
  "unknown ad type": (
    {"ads": ads(ad_type=["product", "banner", None])},
    "ads.csv: row 1, column 'ad_type', value 'banner': must be one of product, livestream, "
    "image_sequence, virtual, lead_in_video, product_video, or null",
  ),
  "ad type is a number": ({"ads": ads(ad_type=[0, 1, 2])}, "row 0, column 'ad_type', value 0"),
  "account is a fraction": (
    {"ads": ads(account_id=[1.0, 1.5, None])}, "row 1, column 'account_id', value 1.5: must be an"
  ),
  "campaign is a boolean": (
    {"ads": ads(campaign_id=True)}, "row 0, column 'campaign_id', value True: must be an integer"
  ),
  "fraction as user feature": (
    {"users": users(age=[1.0, 0.25])}, "users.csv: row 1, column 'age', value 0.25: must be an int"
  ),
  "list as user feature": (
    {"users": users(age=[[1], [2]])}, "users.csv: row 0, column 'age', value [1]: must be an int"
  ),
  "ids are fractions": ({"events": events(user_id=1.5)}, "events.csv: row 0, column 'user_id'"),
  "ids are booleans": ({"events": events(user_id=True)}, "events.csv: row 0, column 'user_id'"),
  "value column is text": ({"events": events(value="3")}, "column 'value', value '3': must be a n"),
  "time column is boolean": ({"events": events(time=True)}, "column 'time', value True: must be"),
  "a content of an unknown ad": (
    {"contents": contents(ad_id=[None, "q", None])}, "contents.csv: row 1, column 'ad_id', value 'q"
  ),
  "ragged embedding": (
    {"ads": ads(embedding=[[1.0, 2.0], [1.0], [3.0, 4.0]])},
    "ads.csv: row 1, column 'embedding', value [1.0]: embeddings must be lists of the same length",
  ),
  "embedding missing": (
    {"ads": ads(embedding=[[1.0, 2.0], None, [3.0, 4.0]])}, "ads.csv: row 1, column 'embedding'"
  ),
  "embedding not finite": (
    {"ads": ads(embedding=[[1.0, 2.0], [1.0, 2.0], [3.0, np.nan]])},
    "ads.csv: row 2, column 'embedding', value [3.0, nan]: embeddings must be finite",
  ),
}


@pytest.mark.parametrize("tables, message", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_an_invalid_table_is_refused_in_one_line(tables, message):
  with pytest.raises(LogError) as error:
    build(**tables)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_rows_of_a_request_may_come_in_any_order_of_time():
  table = pd.DataFrame({
    "user_id": 1, "time": [9, 3, 6, 5], "ad_id": ["a", "b", "c", "a"], "action": 0,
    "request_id": ["x", "y", "x", "x"],
  })
  logs = build(events=table)
  assert logs.events.time_s.tolist() == [3, 5, 6, 9]
  assert logs.events.ad.tolist() == [1, 0, 2, 0]
  assert logs.events.request.tolist() == [0, 1, 1, 1]
  rule = "events: time: before that of an earlier row of its request, sorted"
  assert logs.cleaning[rule] == 2


def test_given_embeddings_are_kept():
  logs = build(ads=ads(embedding=[[1, 2], np.array([3.0, 4.0]), (5, 6)]))
  assert logs.ads.embedding_AD.dtype == np.float32
  np.testing.assert_array_equal(logs.ads.embedding_AD, [[1, 2], [3, 4], [5, 6]])


def assert_same(a, b):
  """Two logs are equal, dtypes included."""
  for table in ("ads", "contents", "users", "events"):
    left, right = vars(getattr(a, table)), vars(getattr(b, table))
    left, right = ({**t, **t.get("features", {})} for t in (left, right))
    assert left.keys() == right.keys()
    for name in left.keys() - {"features"}:
      if left[name] is None:
        assert right[name] is None
        continue
      assert left[name].dtype == right[name].dtype, name
      np.testing.assert_array_equal(left[name], right[name], err_msg=name)
  for name in ("source", "currency", "caveats", "cleaning"):
    assert getattr(a, name) == getattr(b, name)


ADS = {
  "plain": ads(),
  "embedding": ads(embedding=[[1, 2], [3, 4], [5, 6]]),
  "types and accounts": ads(
    ad_type=["livestream", None, "virtual"], account_id=[1, 2, 3], campaign_id=[None, "x", None],
    bid=[1.5, None, 0],
  ),
}


@pytest.mark.parametrize("table", ADS.values(), ids=ADS.keys())
def test_logs_survive_the_disk(tmp_path, table):
  logs = build_logs(
    ads=table, events=events(), users=users(), source="s", currency="EUR", caveats=("one", "two")
  )
  write_logs(logs, tmp_path / "data" / "logs")
  assert_same(read_logs(tmp_path / "data" / "logs"), logs)


def test_logs_written_before_ads_had_types_accounts_and_bids_are_readable(tmp_path):
  logs = build()
  write_logs(logs, tmp_path / "logs")
  file = tmp_path / "logs" / "ads.parquet"
  old = pq.ParquetFile(file).read().drop_columns(["ad_type", "account_id", "campaign_id", "bid"])
  pq.write_table(old, file)
  assert_same(read_logs(tmp_path / "logs"), logs)
  pq.write_table(old.drop_columns(["advertiser_id"]), file)
  with pytest.raises(LogError, match="ads.parquet: not readable"):
    read_logs(tmp_path / "logs")


def test_writing_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
  write_logs(build(), tmp_path / "logs")
  (tmp_path / "logs" / "stale").write_text("")
  second = build(users=users())
  write_logs(second, tmp_path / "logs")
  assert_same(read_logs(tmp_path / "logs"), second)
  assert [path.name for path in tmp_path.iterdir()] == ["logs"]
  assert not (tmp_path / "logs" / "stale").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(LogError, match="holds other files"):
    write_logs(build(), tmp_path)
  assert (tmp_path / "thesis.txt").exists()


def test_a_failed_write_leaves_the_old_logs(tmp_path):
  first = build()
  write_logs(first, tmp_path / "logs")
  broken = build_logs(
    ads=ads(), events=events(), source="s", currency="c", cleaning={"not JSON": {1}}
  )
  with pytest.raises(TypeError):
    write_logs(broken, tmp_path / "logs")
  assert_same(read_logs(tmp_path / "logs"), first)
  assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_folder_without_whole_logs_is_refused(tmp_path):
  with pytest.raises(LogError, match="log.json: not readable"):
    read_logs(tmp_path)
  write_logs(build(), tmp_path / "logs")
  (tmp_path / "logs" / "events.parquet").write_bytes(b"torn")
  with pytest.raises(LogError, match="events.parquet: not readable"):
    read_logs(tmp_path / "logs")
  (tmp_path / "logs" / "log.json").write_text('{"format": 99}')
  with pytest.raises(LogError, match="format 99"):
    read_logs(tmp_path / "logs")
