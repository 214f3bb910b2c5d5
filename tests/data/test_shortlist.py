"""Shortlists and their numbers by hand."""

import numpy as np

from gr4ad_jax.data.shortlist import (
  BELOW,
  NUMBERS,
  SCALE,
  AdFacts,
  ShareTable,
  met_ads,
  share_key,
  shares_at,
  shortlists,
)

DAY = 86_400
NOW_S = 1_700_000_000
# Ads 0 and 1 are of one advertiser, 1 and 2 of one category, 0, 1 and 2 of one parent category; all
# have texts of their own.
FACTS = AdFacts(
  np.array([[7, 1, 5, 10], [7, 2, 5, 11], [8, 2, 5, 12], [9, 3, 6, 13]], np.int32),
  np.array([0, 3, 5, 7], np.float32),
)


def before(*days):
  return NOW_S - DAY * np.array(days, np.int64)


def plain(number_MF, column):
  """A column as it was before it was stored, where its unit is one."""
  return np.expm1(number_MF[:, NUMBERS.index(column)] / SCALE)


def test_engagements_are_counted_at_every_half_life():
  """Ad 1: promoted 28 days ago and organic 7 days ago; ad 2: promoted now; content without ad."""
  ad_P, count_PH = met_ads(
    np.array([1, 2]), before(28, 0), np.array([1, -1]), before(7, 1), now_s=NOW_S, limit=9
  )
  assert ad_P.tolist() == [1, 2]  # .84 + .3 * .96 against 1
  promoted = [2**-4, 2**-1, 2**-0.25, 2**-0.07]
  organic = [2**-1, 2**-0.25, 2**-0.0625, 2**-0.0175]
  np.testing.assert_allclose(count_PH[0], promoted + organic, rtol=1e-3)
  np.testing.assert_allclose(count_PH[1], [1, 1, 1, 1, 0, 0, 0, 0])


def test_the_ads_that_count_most_are_kept():
  ad_P, count_PH = met_ads(
    np.array([0, 2, 2, 3]), before(1, 1, 1, 300), np.array([0]), before(1), now_s=NOW_S, limit=2
  )
  assert ad_P.tolist() == [2, 0] and count_PH.shape == (2, 8)
  ad_P, count_PH = met_ads(*(np.zeros(0, np.int64),) * 4, now_s=NOW_S, limit=2)
  assert ad_P.shape == (0,) and count_PH.shape == (0, 8)


def test_a_list_holds_what_is_known_of_own_and_of_trending_ads():
  """Ad 1 is met and trending: it stands there once, with both. The likeliest come first."""
  share_AH = np.zeros((4, 7), np.float32)  # at 3 h, 12 h, 1.5 d, 7 d, 28 d; of the day, the week
  share_AH[2] = 0, 0.5, 0.01, 0.02, 0.03, 0, 0
  share_AH[1] = 0, 0, 0.1, 0.2, 0.3, 0.4, 0.6
  share_AH[3, 2] = 0.05
  count_PH = np.zeros((2, 8), np.float16)
  count_PH[0, 2], count_PH[1, 6] = 2, 1  # at 112 days: ad 1 promoted twice, ad 0 organic once
  # A request of another user, with a longer past and other trending ads, stands beside it.
  other = np.array([3, 1, 0, 2]), np.ones((4, 8), np.float16)
  (ad_M, _), (number_MF, _) = shortlists(
    [(np.array([1, 0]), count_PH), other], np.array([[2, 1, 3], [1, -1, -1]]),
    lambda ad: share_AH[ad], FACTS, 6,
  )
  # 1.1 + 160 * .1 + 40 * .2 + .07; 160 * .05; 160 * .01 + 40 * .02 + .07; .7 + .07
  assert ad_M.tolist() == [1, 3, 2, 0, -1, -1]
  assert (number_MF[4:] == -1).all() and (number_MF[:4] >= 0).all() and (number_MF < BELOW).all()
  real = number_MF[:4]
  half = "engagements, half-life 112 d"
  np.testing.assert_allclose(plain(real, f"promoted {half}"), [2, 0, 0, 0], atol=2e-3)
  np.testing.assert_allclose(plain(real, f"organic {half}"), [0, 0, 0, 1], atol=2e-3)
  for days, expected in (("1.5", [0.1, 0.05, 0.01, 0]), ("28", [0.3, 0, 0.03, 0])):
    share = plain(real, f"share of all engagements, half-life {days} d") / 1e6
    np.testing.assert_allclose(share, expected, rtol=1e-3)
  for column, expected in ("share of the day's engagements so far", 0.4), ("of the week's", 0.6):
    np.testing.assert_allclose(plain(real, column)[0] / 1e6, expected, rtol=1e-3)
  # The user's engagements, promoted and organic, with what an ad shares with the ads met.
  for column, expected in {
    "engagements with the advertiser": [3, 0, 0, 3], "with the category": [2, 0, 2, 1],
    "with the parent category": [3, 0, 3, 3], "with the text": [2, 0, 0, 1],
    "price": [3, 7, 5, 0],
  }.items():
    np.testing.assert_allclose(plain(real, column), expected, atol=8e-3, err_msg=column)
  np.testing.assert_allclose(plain(real, "engagements of the user"), [3, 3, 3, 3], atol=4e-3)


def test_a_shorter_list_is_the_beginning_of_a_longer_one():
  met = [(np.array([2, 1, 0]), np.ones((3, 8), np.float16))]
  known = met, np.array([[3]]), lambda ad: 0.5, FACTS
  long, short = shortlists(*known, 5), shortlists(*known, 2)
  for x, y in zip(long, short, strict=True):
    np.testing.assert_array_equal(x[:, :2], y)


def test_nothing_known_is_an_empty_list():
  nothing = np.zeros(0, np.int32), np.zeros((0, 8), np.float16)
  for listed_BN in np.zeros((1, 0), np.int32), np.full((1, 2), -1):
    ad_BM, number_BMF = shortlists([nothing], listed_BN, lambda ad: 0.0, FACTS, 3)
    assert ad_BM.tolist() == [[-1, -1, -1]] and (number_BMF == -1).all()
    assert number_BMF.shape == (1, 3, len(NUMBERS))


def test_neighbours_stand_behind_the_ads_that_were_met_without_a_gap():
  """Users of one and of two ads met, with two neighbours and one; K = 2 numbers of each."""
  one, two = np.ones((1, 8), np.float16), np.ones((2, 8), np.float16)
  near = [
    (np.array([3, 2]), np.array([[1, 2], [3, 4], [5, 6]], np.int16)),
    (np.array([3, -1]), np.array([[7, 8], [9, 10], [11, 12], [0, 0]], np.int16)),
  ]
  ad_BM, number_BMF = shortlists(
    [(np.array([0]), one), (np.array([0, 1]), two)], np.zeros((2, 0), np.int32), lambda ad: 0.0,
    FACTS, 2, near=near,
  )
  assert ad_BM[0].tolist() == [0, 3, 2, -1]
  assert number_BMF[0, :, -2:].tolist() == [[1, 2], [3, 4], [5, 6], [-1, -1]]
  numbers = dict(zip(ad_BM[1].tolist(), number_BMF[1, :, -2:].tolist(), strict=True))
  assert numbers == {0: [7, 8], 1: [9, 10], 3: [11, 12], -1: [-1, -1]}
  assert ad_BM[1, 2:].tolist() == [3, -1]


def test_shares_count_what_came_before_the_hour():
  """Ad 4 thrice on a Sunday from 22:00, ad 9 once an hour later and twice on Monday from 00:00."""
  monday = 19_730 * 24 - 19_730 * 24 % 168 + 96  # the fifth day of 1970 was one
  first = monday - 2
  score = np.exp2(-1 / np.array([3.0, 12, 36, 168, 672]))  # of one an hour ago
  table = ShareTable(
    np.array(first), share_key(np.array([4, 9, 9]), first + np.array([0, 1, 2])),
    np.array([[3] * 7, [1] * 7, [*(score + 2), 2, 3]]),  # the day began, the week as well
    np.array([[0] * 7, [*(3 * score), 3, 3], [*(3 * score**2 + score), 0, 0],
              [*(3 * score**3 + score**2 + 2 * score), 2, 2]], np.float32),
  )
  table = table._replace(score_NH=np.where(np.arange(7) < 6, table.score_NH, [[3], [1], [2]]))
  ads = np.array([9, 4, 5, 0])
  assert not shares_at(table, 0, ads).any()
  np.testing.assert_allclose(shares_at(table, 1, ads), [[0] * 7, [1] * 7, [0] * 7, [0] * 7])
  of_9 = score / (3 * score**2 + score)
  np.testing.assert_allclose(shares_at(table, 2, ads)[0], [*of_9, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(shares_at(table, 2, ads)[1], [*(1 - of_9), 0, 0], rtol=1e-6)
  of_4 = 3 * score**3 / (3 * score**3 + score**2 + 2 * score)
  np.testing.assert_allclose(shares_at(table, 3, ads)[0], [*(1 - of_4), 1, 1], rtol=1e-6)
  np.testing.assert_allclose(shares_at(table, 3, ads)[1], [*of_4, 0, 0], rtol=1e-6)
