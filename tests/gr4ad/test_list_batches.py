"""Candidate lists -> a batch, by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from gr4ad_jax.data.list_records import CandidateList
from gr4ad_jax.gr4ad.config import LossConfig
from gr4ad_jax.gr4ad.list_batches import ListBatchMaker
from gr4ad_jax.gr4ad.value import ValueScale
from gr4ad_jax.learning.preference import RewardScale

# Values below 2, up to 5, and from there; a past revenue of 1 is the mean, weights are halved.
SCALE = ValueScale(True, (2.0, 5.0), (1.0, 3.0, 8.0), float(np.log(2)), 2.0)
CODES_AL = np.array([[0, 1], [2, 3], [4, 5]], np.int32)
ROW = CandidateList(
  SimpleNamespace(past_value=1.0), np.array([2, 0, 1], np.int32),
  np.array([5.0, np.nan, 1.0], np.float32),
  np.array([[-1, -2], [-3, -4], [0, 0]], np.float32), np.array([True, True, False]),
  np.array([2, -1, 1], np.int8),
)


def batch(scale, values=SCALE):
  make = SimpleNamespace(
    codes_AL=CODES_AL, scale=values, loss=LossConfig(click_weight=1, conversion_weight=4),
    context=lambda contexts: len(contexts),
  )
  return ListBatchMaker(make, scale, 4)([ROW])


def test_a_list_is_padded_and_carries_what_the_user_did():
  """A conversion weighs 4 / 2, a click 1 / 2; what was not engaged with weighs nothing."""
  got = batch(RewardScale(0.0, float(np.log(11))))
  assert got.context == 1
  assert got.code_BCL.tolist() == [[[4, 5], [0, 1], [2, 3], [-1, -1]]]
  assert got.lists.where_BC.tolist() == [[True, False, True, False]]
  assert got.lists.has_ref_BC.tolist() == [[True, True, False, False]]
  assert got.lists.ref_logp_BCL.tolist() == [[[-1, -2], [-3, -4], [0, 0], [0, 0]]]
  rewards = [5 * np.log(6) / np.log(11), 0, 5 * np.log(2) / np.log(11), 0]
  np.testing.assert_allclose(got.lists.reward_BC, [rewards], rtol=1e-5)
  assert got.weight_BC.tolist() == [[2, 0, 0.5, 0]]
  assert got.ecpm_bin_BC.tolist() == [[2, -1, 0, -1]]


def test_buckets_of_another_unit_are_not_asked_for():
  of_values = dataclasses.replace(SCALE, uses_ecpm=False)
  assert (batch(None, of_values).ecpm_bin_BC == -1).all()


def test_without_a_common_scale_a_list_fills_the_range_by_itself():
  assert batch(None).lists.reward_BC[0, [0, 2]].tolist() == [pytest.approx(5), 0]
