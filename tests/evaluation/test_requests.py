"""Held-out requests and the interactions that baselines count, by hand."""

import dataclasses

import pandas as pd

from gr4ad_jax.data.interactions import Interactions
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.search.held_out import eval_requests, group_requests

CONVERSION, CLICK, IMPRESSION = "conversion", "click", "impression"


def logs():
  """One user; a1's product is content c0, c1 is of no ad."""
  rows = [
    ("u", 10, "a0", None, "r0", CONVERSION, 2.0),
    ("u", 20, None, "c0", "r1", CLICK, 0.0),
    ("u", 21, None, "c1", "r1", CLICK, 0.0),
    ("u", 30, "a2", None, "r2", IMPRESSION, 0.0),
    ("u", 30, "a1", None, "r2", CLICK, 3.0),
    ("u", 30, "a0", None, "r2", CONVERSION, 4.0),
    ("u", 30, "a3", None, "r2", CONVERSION, 5.0),
    ("u", 40, "a2", None, "r3", CONVERSION, 6.0),
  ]
  names = ["user_id", "time", "ad_id", "content_id", "request_id", "action", "value"]
  ads = pd.DataFrame({
    "ad_id": [f"a{i}" for i in range(4)], "advertiser_id": "x", "category": "c", "text": "t"
  })
  contents = pd.DataFrame({
    "content_id": ["c0", "c1"], "ad_id": ["a1", None], "category": "", "text": ""
  })
  return build_logs(
    ads=ads, events=pd.DataFrame(rows, columns=names), contents=contents, source="hand",
    currency="EUR",
  )


def test_parts_of_a_request_are_judged_together():
  config = SequenceConfig(
    validation_start_s=25, test_start_s=35, num_trending=0, max_targets=2
  )
  maker = ExampleMaker(logs(), config)
  examples = [*maker.user_examples(0, 1), *maker.user_examples(0, 2)]
  assert len(examples) == 3  # the three targets of r2 in two parts, r3
  found = eval_requests(group_requests(examples))
  assert found.target_RC.tolist() == [[0, 1, 3], [2, -1, -1]]
  assert found.value_RC.tolist() == [[4, 3, 5], [6, 0, 0]]
  assert found.new_RC.tolist() == [[False, False, True], [True, False, False]]
  assert (found.user_R.tolist(), found.time_s_R.tolist()) == ([0, 0], [30, 40])


def test_baselines_see_engagements_with_products_of_ads():
  """Clicks and conversions of ads, and organic events of a product that an ad promotes."""
  found = dataclasses.astuple(Interactions.of(logs()))
  rows = sorted(zip(*(column.tolist() for column in found), strict=True))
  assert rows == [
    (0, 0, 10, True), (0, 0, 30, True), (0, 1, 20, False), (0, 1, 30, True), (0, 2, 40, True),
    (0, 3, 30, True),
  ]
