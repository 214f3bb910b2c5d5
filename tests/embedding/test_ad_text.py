"""The words an encoder reads of an ad: what is in them, what is hidden; the classes to learn."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gr4ad_jax.data.records import AD_TYPES
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.embedding.ad_text import (
  INPUTS,
  INSTRUCTIONS,
  ad_attributes,
  ad_inputs,
  content_inputs,
  input_of,
  price_bands,
  price_words,
)

PRODUCT = INSTRUCTIONS["product"]


def logs_of(contents=None, **columns):
  """Logs of one ad for each value of the columns given; its other fields are those of a snack."""
  num_ads = max([1, *(len(column) for column in columns.values())])
  table = {
    "ad_id": [f"ad{a}" for a in range(num_ads)],
    "advertiser_id": "Acme",
    "category": "Food > Snacks",
    "text": "salted corn chips",
    "price": 2.2,
    "conversion_type": "purchase",
  }
  events = pd.DataFrame({"user_id": [1], "time": 1, "ad_id": "ad0", "action": "click"})
  return build_logs(
    ads=pd.DataFrame(table | columns, index=range(num_ads)), events=events, contents=contents,
    source="test", currency="EUR",
  )


def ads_of(**columns):
  return logs_of(**columns).ads


def input_with(*hidden, **fields):
  """The input of one ad with the fields given and the inputs named left out."""
  ads = ads_of(**{name: [value] for name, value in fields.items()})
  return ad_inputs(ads, masked={name: np.array([True]) for name in hidden})[0]


def test_the_fields_follow_the_instruction_and_the_text_comes_last():
  assert input_with() == (
    f"{PRODUCT} category: Food > Snacks. advertiser: Acme. price about 2. conversion: purchase."
    " text: salted corn chips"
  )


def test_every_kind_of_ad_has_an_instruction_of_its_own_of_at_most_eight_words():
  inputs = ad_inputs(ads_of(ad_type=list(AD_TYPES)))
  assert len(set(inputs)) == len(AD_TYPES)
  for ad_type, text in zip(AD_TYPES, inputs, strict=True):
    assert text.startswith(INSTRUCTIONS[ad_type] + " category")
    assert len(INSTRUCTIONS[ad_type].split()) <= 8
  assert INSTRUCTIONS.keys() == set(AD_TYPES)


def test_unknown_fields_are_left_out():
  assert input_with(category=None, price=None, conversion_type=None) == (
    f"{PRODUCT} advertiser: Acme. text: salted corn chips"
  )
  assert input_with(text="  ", advertiser_id="unknown") == (
    f"{PRODUCT} category: Food > Snacks. price about 2. conversion: purchase"
  )


def test_an_ad_of_which_nothing_is_known_has_an_input():
  blank = {"category": None, "text": None, "price": None, "conversion_type": None}
  assert input_with(**blank) == f"{PRODUCT} advertiser: Acme"
  assert input_with("advertiser_id", **blank) == f"{PRODUCT} unknown"


@pytest.mark.parametrize(
  "hidden, gone",
  [
    ("category", "category: Food > Snacks. "),
    ("advertiser_id", "advertiser: Acme. "),
    ("price", "price about 2. "),
    ("conversion_type", "conversion: purchase. "),
  ],
)
def test_a_hidden_input_is_left_out(hidden, gone):
  assert gone in input_with()
  assert input_with(hidden) == input_with().replace(gone, "")


def test_inputs_are_hidden_row_by_row():
  ads = ads_of(price=[1.0, 1.0, 1.0])
  whole = ad_inputs(ads)
  masked = {
    "price": np.array([True, False, False]), "category": np.array([False, True, False])
  }
  inputs = ad_inputs(ads, masked=masked)
  assert "price" not in inputs[0] and "category:" in inputs[0]
  assert "price" in inputs[1] and "category:" not in inputs[1]
  assert inputs[2] == whole[2]


def test_rows_choose_ads_in_any_order_and_masks_follow_the_rows():
  ads = ads_of(text=["a", "b", "c"])
  whole = ad_inputs(ads)
  assert ad_inputs(ads, rows=np.array([2, 0, 2])).tolist() == [whole[2], whole[0], whole[2]]
  masked = {"price": np.array([True, False])}
  inputs = ad_inputs(ads, rows=np.array([1, 1]), masked=masked)
  assert "price" not in inputs[0] and inputs[1] == whole[1]


def test_a_text_does_not_give_away_what_is_hidden():
  # As Complete Journey and Amazon write their texts.
  journey = {"category": "GROCERY > FROZEN PIZZA", "text": "grocery, frozen pizza, 10.8 oz"}
  assert input_with("category", **journey).endswith("text: 10.8 oz")
  amazon = {
    "advertiser_id": "OPI", "category": "Makeup > Nails > Nail Polish",
    "text": "OPI, Makeup > Nails > Nail Polish",
  }
  assert input_with("category", **amazon).endswith("text: OPI")
  hidden = input_with("category", "advertiser_id", **amazon)
  assert hidden == f"{PRODUCT} price about 2. conversion: purchase"
  # In running text: whole words in any case, the longest part first.
  prose = {"category": "Shoes > Running Shoes", "text": "Red running shoes; the shoes, by ACME"}
  assert input_with("category", "advertiser_id", **prose).endswith("text: Red, the, by")
  assert "Acmeist" in input_with("advertiser_id", text="Acmeist poems")


def test_a_number_in_a_text_is_not_taken_for_the_advertiser():
  assert input_with("advertiser_id", advertiser_id="7", text="7 days").endswith("text: 7 days")


def test_a_copy_of_the_category_path_in_the_text_is_said_once():
  path = "Makeup > Nails > Nail Polish"
  given = input_with(category=path, text="OPI, Makeup > Nails > Nail Polish, red")
  assert given.endswith("text: OPI, red") and given.count("Nail Polish") == 1
  given = input_with(category="GROCERY > CHEESE", text="grocery, cheese")
  assert "text:" not in given and "category: GROCERY > CHEESE" in given
  # Only the whole path is a copy.
  assert input_with(category=path, text="Nail polish, red").endswith("text: Nail polish, red")


@settings(max_examples=60, deadline=None)
@given(
  text=st.text(max_size=40), category=st.text(max_size=20), advertiser=st.text(min_size=1),
  hidden=st.sets(st.sampled_from(INPUTS)),
)
@example(text="", category="A", advertiser="A\r", hidden={"category"})
def test_any_strings_give_more_than_the_instruction(text, category, advertiser, hidden):
  texts = input_with(
    *hidden, text=f"{text} {advertiser}", category=category, advertiser_id=advertiser
  )
  assert texts.startswith(PRODUCT + " ") and texts.strip() == texts != PRODUCT


def test_wrong_masks_are_refused():
  ads = ads_of(price=[1.0, 2.0])
  with pytest.raises(ValueError, match="masked: 'text' is none of category, advertiser_id"):
    ad_inputs(ads, masked={"text": np.array([True, False])})
  with pytest.raises(ValueError, match=r"masked: 'price' is bool \(3,\), must be bool \(2,\)"):
    ad_inputs(ads, masked={"price": np.ones(3, bool)})
  with pytest.raises(ValueError, match="masked: 'price' is int64"):
    ad_inputs(ads, masked={"price": np.array([0, 1])})


def test_a_content_reads_as_an_ad_of_the_same_product_does():
  contents = pd.DataFrame({
    "content_id": [1, 2, 3], "category": ["Food > Snacks", None, "Food > Snacks"],
    "text": ["salted corn chips", None, "food, snacks, 200 g"],
  })
  logs = logs_of(contents, text=["salted corn chips", "food, snacks, 200 g"])
  inputs = content_inputs(logs.contents)
  beside = {name: np.ones(2, bool) for name in ("advertiser_id", "price", "conversion_type")}
  ads = ad_inputs(logs.ads, masked=beside)
  assert inputs.tolist() == [ads[0], f"{PRODUCT} unknown", ads[1]]
  assert content_inputs(logs.contents, rows=np.array([2])).tolist() == [ads[1]]
  assert not len(content_inputs(logs_of().contents))


@pytest.mark.parametrize(
  "price, words",
  [
    (0, "free"), (np.nan, ""), (0.01, "price about 0.01"), (0.99, "price about 1"),
    (1.9, "price about 2"), (4.5, "price about 5"), (12, "price about 10"),
    (49_990, "price about 50000"), (2e9, "price about 2000000000"),
  ],
)
def test_prices_are_three_bands_a_decade(price, words):
  assert price_words(int(price_bands(np.float32([price]))[0])) == words


@given(st.lists(st.floats(0, 2.0**99, width=32, allow_subnormal=False), min_size=1))
def test_price_bands_rise_with_the_price_and_are_never_far_off(prices):
  price_N = np.sort(np.float32(prices))
  band_N = price_bands(price_N)
  assert (np.diff(band_N) >= 0).all() and band_N.dtype == np.int32
  for price, band in zip(price_N, band_N, strict=True):
    words = price_words(int(band))
    assert (words == "free") == (price == 0)
    if price > 1e-30:
      assert 0.6 < float(words.removeprefix("price about ")) / price < 1.7


def test_attributes_are_classes_of_known_and_frequent_values():
  ads = ads_of(
    category=["B > X", "B > X", "A > X", "A > X", "A > Y", None],
    advertiser_id=["q", "q", "p", "p", "unknown", "r"],
    price=[1.0, 1.1, 30, np.nan, 20, 0],
    conversion_type=["purchase"] * 6,
  )
  attributes = ad_attributes(ads, min_count=2)
  assert {name: classes.tolist() for name, classes in attributes.items()} == {
    "category_1": [1, 1, 0, 0, 0, -1],
    "category_2": [1, 1, 0, 0, -1, -1],  # X of B is not X of A; one Y is too rare
    "advertiser": [1, 1, 0, 0, -1, -1],
    "price": [0, 0, 1, -1, 1, -1],  # 20 and 30 are both about 20
  }  # one conversion type tells nothing
  assert all(classes.dtype == np.int32 for classes in attributes.values())
  assert ad_attributes(ads, min_count=1)["price"].tolist() == [1, 1, 2, -1, 2, 0]
  assert ad_attributes(ads, min_count=4) == {}
  with pytest.raises(ValueError, match="min_count: 0"):
    ad_attributes(ads, min_count=0)


def test_a_path_that_ends_early_has_no_class_further_down():
  ads = ads_of(category=["A", "A > X", "A > Y", "B"])
  attributes = ad_attributes(ads, min_count=1)
  assert attributes["category_1"].tolist() == [0, 0, 0, 1]
  assert attributes["category_2"].tolist() == [-1, 0, 1, -1]


def test_classes_follow_the_names_not_the_order_of_the_ads(tiny_logs):
  category_A = tiny_logs.ads.category
  back = ads_of(category=category_A[::-1].tolist())
  forth = ads_of(category=category_A.tolist())
  left, right = (ad_attributes(ads, min_count=2) for ads in (forth, back))
  assert left.keys() == right.keys() == {"category_1", "category_2"}
  for name, classes in left.items():
    np.testing.assert_array_equal(classes, right[name][::-1])


def test_hiding_the_input_of_an_attribute_makes_ads_of_its_classes_read_alike():
  ads = ads_of(
    category=["A > X", "A > Y", "B > Z", "A > X"], advertiser_id=["p", "p", "p", "q"],
    text=["a, x", "a, y", "b, z", "by p and q"], conversion_type=["call", "buy", "buy", "buy"],
    price=[1.0, 1.0, 1.0, 90.0],
  )
  attributes = ad_attributes(ads, min_count=1)
  assert [input_of(name) for name in attributes] == [
    "category", "category", "advertiser_id", "price", "conversion_type"
  ]
  everything = {input_of(name): np.ones(4, bool) for name in attributes}
  assert len(set(ad_inputs(ads, masked=everything)[:3])) == 1
  with pytest.raises(ValueError, match="attribute: 'text' is none of"):
    input_of("text")
