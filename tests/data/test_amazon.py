"""Review sequences: every item an ad, order kept, ids opaque."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.amazon import read_amazon
from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.validation import LogError

BEAUTY = Path(__file__).parents[3] / "shared" / "data" / "amazon_beauty"
needs_beauty = pytest.mark.skipif(
  not BEAUTY.is_dir(), reason="the public files are not at ../shared/data/amazon_beauty"
)


def write(folder, *, items=None, interactions=None):
  table = {
    "item_id": [2, 0, 1],
    "asin": ["B2", "B0", "B1"],
    "brand": ["Acme", None, None],
    "categories": ["Hair > Wigs", "Nails", None],
  }
  pd.DataFrame(table | (items or {})).to_parquet(folder / "items.parquet")
  table = {"user_id": [5, 5, 3, 3], "position": [0, 1, 1, 0], "item_id": [1, 2, 0, 1]}
  pd.DataFrame(table | (interactions or {})).to_parquet(folder / "interactions.parquet")


def test_items_become_ads_and_positions_days(tmp_path):
  write(tmp_path)
  logs = read_amazon(tmp_path)
  assert logs.ads.ad_id.tolist() == ["2", "0", "1"]
  assert logs.ads.advertiser_id.tolist() == ["Acme", "unknown", "unknown"]
  assert logs.ads.text.tolist() == ["Acme, Hair > Wigs", "Nails", ""]
  assert logs.ads.category.tolist() == ["Hair > Wigs", "Nails", ""]
  assert np.isnan(logs.ads.price).all()
  assert logs.users.user_id.tolist() == ["5", "3"]
  assert logs.events.user.tolist() == [0, 0, 1, 1]
  assert logs.events.time_s.tolist() == [0, DAY_S, 0, DAY_S]
  assert logs.events.ad.tolist() == [2, 0, 2, 1]
  assert logs.events.request.tolist() == [0, 1, 2, 3]
  assert logs.events.value.tolist() == [1.0] * 4
  assert len(logs.contents.content_id) == 0
  assert logs.cleaning["items: brand missing, advertiser 'unknown'"] == 2


@pytest.mark.parametrize(
  "tables, message",
  [
    ({"interactions": {"position": [0, 0, 1, 0]}}, "row 1, column 'position', value 0: must dif"),
    ({"interactions": {"position": [0, -1, 1, 0]}}, "row 1, column 'position', value -1: must be"),
    ({"interactions": {"position": [0, 0.5, 1, 0]}}, "column 'position' has dtype float64"),
    ({"interactions": {"item_id": [1, 2, 0, 9]}}, "row 3, column 'ad_id', value 9: must be an ad"),
    ({"items": {"item_id": [1, 1, 0]}}, "row 1, column 'ad_id', value 1: ids must be unique"),
  ],
)
def test_faults_are_named(tmp_path, tables, message):
  write(tmp_path, **tables)
  with pytest.raises(LogError) as error:
    read_amazon(tmp_path)
  assert message in str(error.value)


def test_a_missing_column_or_file_is_named(tmp_path):
  with pytest.raises(LogError, match="items.parquet: not readable"):
    read_amazon(tmp_path)
  write(tmp_path)
  pd.DataFrame({"item_id": [1]}).to_parquet(tmp_path / "items.parquet")
  with pytest.raises(LogError, match="items.parquet: column 'brand' is missing"):
    read_amazon(tmp_path)


@needs_beauty
def test_beauty_has_the_published_counts_and_sequences():
  logs = read_amazon(BEAUTY)
  assert len(logs.users.user_id) == 22_363
  assert len(logs.ads.ad_id) == 12_101
  assert len(logs.events.user) == 198_502
  assert len(set(logs.ads.advertiser_id) - {"unknown"}) == 435
  interactions = pd.read_parquet(BEAUTY / "interactions.parquet")
  for row in (0, 777, 22_362):
    user_id = logs.users.user_id[row]
    sequence = interactions[interactions.user_id == int(user_id)].sort_values("position").item_id
    mine = logs.ads.ad_id[logs.events.ad[logs.events.user == row]]
    assert mine.tolist() == sequence.astype(str).tolist()


@needs_beauty
def test_no_asin_reaches_the_logs():
  logs = read_amazon(BEAUTY)
  asins = set(pd.read_parquet(BEAUTY / "items.parquet").asin)
  assert asins.isdisjoint(logs.ads.ad_id)
  words = {word for text in logs.ads.text for word in text.replace(",", " ").split()}
  assert asins.isdisjoint(words)
