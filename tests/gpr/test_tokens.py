"""The unified input: each token by hand, and what is padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.gpr.model import Gpr
from tests.gpr.support import SMALL, VOCABULARY, random_batch, shaken


@pytest.fixture(scope="module")
def read():
  """A context with gaps: its stream, its parameters, and itself."""
  model, context = Gpr(SMALL, VOCABULARY), random_batch().context
  context.ad_code_BTL[0, 1] = -1  # one ad in the first group of the first row
  context.ad_action_BT[0, 1] = -1
  context.organic_code_BOL[0, 1] = -1  # one content there, and none in the second group
  context.organic_code_BOL[0, 2:4] = -1
  context.gap_BG[0, 0] = -1
  for name in ("request_BGF", "count_BG", "gap_BG", "age_BG", "ad_age_BG"):
    getattr(context, name)[1, 0] = -1  # padding before the second row
  context.ad_code_BTL[1, :2], context.organic_code_BOL[1, :2] = -1, -1
  context.ad_action_BT[1, :2] = -1
  params = shaken(model)
  stream = model.apply(
    {"params": params}, context, method=lambda module, context: module.unified_input(context)
  )
  return stream, params, context


def test_every_token_by_hand(read):
  stream, params, context = read
  tree = {name: np.asarray(x) for name, x in params["unified_input"].items()
          if not isinstance(x, dict)}

  def linear(name, x_D):
    return x_D @ np.asarray(params["unified_input"][f"{name}_projection"]["kernel"])

  def item(code_L):  # inputs are the root of the width, 4, times a row
    return sum(4 * np.asarray(params["tables"][f"level_{level}"])[code]
               for level, code in enumerate(code_L))

  def mean_of(rows):
    return np.mean(rows, axis=0) if len(rows) else np.zeros(16)

  for row, group in np.ndindex(2, 4):
    if (row, group) == (1, 0):
      continue
    part = slice(2 * group, 2 * group + 2)
    contents = [item(code) for code in context.organic_code_BOL[row, part] if code[0] >= 0]
    ads = [item(code) for code in context.ad_code_BTL[row, part] if code[0] >= 0]
    actions = [tree["action"][a] for a in context.ad_action_BT[row, part] if a >= 0]
    scene, hour, weekday = context.request_BGF[row, group]
    offsets = scene, 3 + hour, 3 + 24 + weekday
    expected_YD = np.stack([
      linear("user", tree["user_features"][context.user_BF[row, 0]]
             + tree["count"][context.count_BG[row, group]]),
      linear("organic", mean_of(contents)) if contents else tree["no_organic"],
      linear("request", sum(tree["request_features"][at] for at in offsets)),
      linear("ad", mean_of(ads)) + mean_of(actions),
    ]) + tree["type"]
    if (gap := context.gap_BG[row, group]) >= 0:
      expected_YD += tree["gap"][gap]
    if not ads:
      assert group == 3
      expected_YD[3] = 0  # no token
    np.testing.assert_allclose(
      stream.token_BGYD[row, group], expected_YD, rtol=1e-4, atol=1e-5
    )


def test_padding_is_no_token_and_a_request_without_an_ad_has_three(read):
  stream, _, context = read
  there_BGY = np.ones((2, 4, 4), bool)
  there_BGY[:, 3, 3] = False
  there_BGY[1, 0] = False
  np.testing.assert_array_equal(stream.there_BGY, there_BGY)
  assert not np.any(np.asarray(stream.token_BGYD)[~there_BGY])
  np.testing.assert_array_equal(stream.age_BGY[0, :, 0], context.age_BG[0])
  np.testing.assert_array_equal(stream.age_BGY[0, :3, 3], context.ad_age_BG[0, :3])
  assert jnp.all(stream.age_BGY >= 0)
