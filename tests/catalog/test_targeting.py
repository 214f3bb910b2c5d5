"""Conditions on ads, before and after the catalogue has changed."""

import dataclasses

import numpy as np
import pytest

from gr4ad_jax.catalog.targeting import Targeting
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.records import AdTable


def ads(**columns) -> AdTable:
  rows = len(next(iter(columns.values())))
  blank = np.full(rows, "", object)
  filled = {
    field.name: np.array(columns.get(field.name, blank), object)
    for field in dataclasses.fields(AdTable)
  }
  return AdTable(**filled)


CATALOGUE = ads(
  advertiser_id=["a", "b", "a"], category=["Food", "Food > Snacks", "Foodstuff"]
)


def test_a_category_holds_those_below_it():
  targeting = Targeting(CATALOGUE)
  assert targeting.matches("category=Food").tolist() == [True, True, False]
  assert targeting.matches("category=Food > Snacks").tolist() == [False, True, False]
  assert targeting.matches("advertiser_id=a").tolist() == [True, False, True]
  assert targeting.values("category") == ["Food", "Food > Snacks", "Foodstuff"]


def test_changed_and_new_rows():
  old = Targeting(CATALOGUE)
  changed = ads(advertiser_id=["c", "a"], category=["Toys", "Food > Tea"])
  new = old.updated(np.array([1, 3]), changed)
  assert new.matches("advertiser_id=a").tolist() == [True, False, True, True]
  assert new.matches("category=Food").tolist() == [True, False, False, True]
  assert new.matches("advertiser_id=c").tolist() == [False, True, False, False]
  assert old.matches("category=Food").tolist() == [True, True, False]  # as it was


@pytest.mark.parametrize("condition, words", [
  ("category=Foot", "'Food'"), ("category=", "no ad has it"), ("colour=red", "COLUMN=VALUE"),
  ("category", "COLUMN=VALUE"), ("account_id=7", "the column is empty"),
])
def test_conditions_that_no_ad_can_meet(condition, words):
  with pytest.raises(ConfigError, match=words):
    Targeting(CATALOGUE).matches(condition)
