"""External knowledge: which thoughts a request sees, what they do to it, and to it alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.catalog.prepared import open_prepared
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.embedding.text_encoder import encode_texts
from gr4ad_jax.gpr.batch import SeenThoughts
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.config import StreamConfig
from gr4ad_jax.gpr.generator import generator_of
from gr4ad_jax.gpr.label_rows import LabelRows
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.thoughts import Thoughts, read_thoughts
from gr4ad_jax.search.generator import whatever
from tests.gpr.support import SMALL, VOCABULARY, random_batch, shaken

USERS = np.array(["anna", "ben", "cleo"], object)
DAY = 86_400


def written(path, **columns):
  pd.DataFrame(columns).to_parquet(path)
  return path


def test_a_file_is_read_by_user_then_by_time_and_strangers_are_counted(tmp_path):
  found = read_thoughts(written(
    tmp_path / "thoughts.parquet", user_id=["cleo", "zoe", "anna", "cleo", "cleo"],
    timestamp=pd.to_datetime([3, 1, 7, 2, 3], unit="s"),
    embedding=[[3, 4], [1, 0], [0, 2], [-5, 0], [0, -1]],
  ), USERS)
  assert found.left_out == 1
  assert found.thoughts.user_N.tolist() == [0, 2, 2, 2]
  assert found.thoughts.time_s_N.tolist() == [7, 2, 3, 3]
  np.testing.assert_allclose(
    found.thoughts.embedding_NE, [[0, 1], [-1, 0], [0.6, 0.8], [0, -1]], atol=1e-6
  )
  texts = written(
    tmp_path / "texts.parquet", user_id=["ben", "ben"], timestamp=[9, 5], text=["tea", "red wine"]
  )
  thoughts = read_thoughts(texts, USERS).thoughts
  assert thoughts.user_N.tolist() == [1, 1] and thoughts.time_s_N.tolist() == [5, 9]
  expected_NE = encode_texts(["red wine", "tea"], "wordllama")
  np.testing.assert_array_equal(thoughts.embedding_NE, expected_NE)


GOOD = {"user_id": ["anna", "ben"], "timestamp": [1, 2], "embedding": [[1.0, 2], [3, 4]]}


@pytest.mark.parametrize(("changes", "message"), [
  ({"timestamp": None}, "column 'timestamp' is missing"),
  ({"embedding": None}, "needs one of the columns 'embedding' and 'text', has neither"),
  ({"text": ["a", "b"]}, "needs one of the columns 'embedding' and 'text', has both"),
  ({"mood": ["a", "b"]}, "column 'mood' is unknown"),
  ({"embedding": [[1.0, 2], [3]]}, "row 1, column 'embedding', value array([3.]): embeddings must "
   "be lists of the same length, row 0 has 2 numbers"),
  ({"embedding": [[1.0, 2], [3, np.nan]]}, "row 1, column 'embedding', value array([ 3., nan]): "
   "embeddings must be finite"),
  ({"embedding": [[1.0, 2], [0, 0]]}, "row 1, column 'embedding', is all zeros"),
  ({"embedding": None, "text": ["a", " "]}, "row 1, column 'text', value ' ': must not be empty"),
  ({"timestamp": [1, -2]}, "row 1, column 'timestamp', value -2: must be a timestamp or unix"),
  ({"user_id": ["anna", None]}, "row 1, column 'user_id', value nan: must not be empty"),
  ({"user_id": ["zoe", "yan"]}, "no row is on a user of the logs, such as 'anna'"),
])
def test_what_is_wrong_with_a_file_is_told_in_a_line(tmp_path, changes, message):
  columns = {name: x for name, x in (GOOD | changes).items() if x is not None}
  with pytest.raises(LogError) as error:
    read_thoughts(written(tmp_path / "thoughts.parquet", **columns), USERS)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_parquet_is_told(tmp_path):
  with pytest.raises(LogError, match="not readable as parquet"):
    read_thoughts(tmp_path / "nothing.parquet", USERS)


def test_the_newest_thoughts_before_each_request_by_hand():
  """User 0 has thoughts at 10, 20, 20, 30, 40, user 2 at 5; requests see two at the most."""
  thoughts = Thoughts(
    np.array([0, 0, 0, 0, 0, 2], np.int32), np.array([10, 20, 20, 30, 40, 5]),
    np.arange(1, 7, dtype=np.float32)[:, None],
  )
  assert thoughts.size == 1
  seen = thoughts.seen([
    (0, np.array([1, 2, 3]), np.array([10, 20, 40])),  # none; 10; the second one of 20, and 30
    (2, np.array([3]), np.array([6])), (-1, np.array([3]), np.array([50])),
    (1, np.array([3]), np.array([50])),
  ], num_groups=4, most=2, most_asked=3)
  assert seen.embedding_BXE.shape == (4, 5, 1)  # no user has six
  assert seen.embedding_BXE[..., 0].tolist() == [
    [1, 3, 4, 0, 0], [6, 0, 0, 0, 0], [0] * 5, [0] * 5
  ]
  assert seen.first_BG.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4]
  assert seen.end_BG.tolist() == [[0, 0, 1, 3], [0, 0, 0, 1], [0] * 4, [0] * 4]


def weekly(users: ExampleMaker) -> Thoughts:
  """On all users but every fifth, every four days and at the very seconds of requests."""
  rng, user_N, time_s_N = np.random.default_rng(0), [], []
  for user in range(len(users.logs.users.user_id)):
    if user % 5:
      asked = users.past(user).ad_request_s
      time_s = np.append(np.arange(asked.min() + 4 * DAY, asked.max(), 4 * DAY), asked[::3])
      user_N += [user] * len(time_s)
      time_s_N += np.sort(time_s).tolist()
  embedding_NE = rng.normal(size=(len(user_N), 4)).astype(np.float32)
  embedding_NE /= np.linalg.norm(embedding_NE, axis=1, keepdims=True)
  return Thoughts(np.array(user_N, np.int32), np.array(time_s_N), embedding_NE)


def test_each_label_of_a_row_sees_what_its_request_sees_alone(tiny_data):
  """By brute force: the newest three that are strictly older than the label's own request."""
  prepared = open_prepared(str(tiny_data), str(tiny_data / "sids"))
  users = ExampleMaker(
    prepared.logs, prepared.examples.config, vocabulary=prepared.examples.features
  )
  stream, sids = StreamConfig(groups=12, bundle=2, labels=6, thoughts=3), prepared.sids
  plain = BatchMaker(stream, users, sids.codes_AL, sids.content_codes_OL, sids.codebook_sizes)
  thoughts = weekly(users)
  maker = dataclasses.replace(plain, thoughts=thoughts)
  assert maker.vocabulary == dataclasses.replace(plain.vocabulary, thought_size=4)

  def expected(user: int, time_s: int) -> np.ndarray:
    mine = (thoughts.user_N == user) & (thoughts.time_s_N < time_s)
    return thoughts.embedding_NE[mine][-3:]

  def told(seen: SeenThoughts, row: int, group: int) -> np.ndarray:
    return seen.embedding_BXE[row, seen.first_BG[row, group] : seen.end_BG[row, group]]

  rows = list(LabelRows(users, 0, stream=stream, num_heads=2))
  batch, widths = maker(rows), set()
  for row, of_row in enumerate(rows):
    for label, group in enumerate(of_row["group_P"]):
      if group >= 0:
        found_NE = told(batch.context.thoughts, row, batch.group_BP[row, label])
        np.testing.assert_array_equal(
          found_NE, expected(int(of_row["user"]), int(of_row["time_s_G"][group]))
        )
        widths.add(len(found_NE))
  assert widths == {0, 1, 2, 3}
  # All else is as without thoughts.
  without = plain(rows)
  assert without.context.thoughts is None
  for a, b in zip(
    jax.tree.leaves(batch._replace(context=batch.context._replace(thoughts=None))),
    jax.tree.leaves(without), strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  examples = read_split(prepared.examples, "test")[:20]
  seen = maker.context(examples).thoughts
  assert seen.embedding_BXE.shape == (20, 3, 4)
  for row, example in enumerate(examples):
    np.testing.assert_array_equal(told(seen, row, 11), expected(example.user, example.time_s))
    assert not seen.end_BG[row, :11].any()


TOLD = dataclasses.replace(VOCABULARY, thought_size=5)


def seen_thoughts(rows: int) -> SeenThoughts:
  """Four groups, of which the last three see none, thoughts 0 to 1, thoughts 1 to 3."""
  embedding_BXE = np.random.default_rng(1).normal(size=(rows, 4, 5)).astype(np.float32)
  first_BG, end_BG = (
    np.tile(np.array(edge, np.int32), (rows, 1)) for edge in ([0, 0, 0, 1], [0, 0, 2, 4])
  )
  return SeenThoughts(embedding_BXE, first_BG, end_BG)


@pytest.fixture(scope="module")
def told():
  """A model that reads thoughts, its parameters, what it says of labels, and 24 rows of them."""
  model = Gpr(dataclasses.replace(SMALL, recursions=1, num_token_layers=1, predictions=1), TOLD)
  batch = random_batch(rows=24, heads=1)
  batch = batch._replace(context=batch.context._replace(thoughts=seen_thoughts(24)))
  ask = jax.jit(
    lambda params, context, key: model.apply(
      {"params": params}, context, *batch[1:4], deterministic=key is None,
      rngs=None if key is None else {"dropout": key},
    ).logp_BPNL
  )
  return model, shaken(model), ask, batch


def test_a_label_hears_of_the_thoughts_that_its_request_sees_and_of_no_others(told):
  """By every gradient: label 0 sees none, label 1 thoughts 0 and 1, label 2 thoughts 1 to 3."""
  model, params, _, batch = told
  context, asked = jax.tree.map(lambda x: x[:1], batch.context), [x[:1] for x in batch[1:4]]

  def total(embedding_BXE):
    thoughts = context.thoughts._replace(embedding_BXE=embedding_BXE)
    told = context._replace(thoughts=thoughts)
    return jnp.sum(model.apply({"params": params}, told, *asked).logp_BPNL, axis=(0, 2, 3))

  slope_PXE = jax.jit(jax.jacrev(total))(context.thoughts.embedding_BXE)[:, 0]
  np.testing.assert_array_equal(
    np.any(slope_PXE != 0, axis=-1), [[0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]]
  )


def test_what_a_request_does_not_see_moves_no_bit_of_it(told):
  _, params, ask, batch = told
  thoughts = batch.context.thoughts
  expected = ask(params, batch.context, None)
  later_BXE = thoughts.embedding_BXE.copy()
  later_BXE[:, 2:] += 3
  later = batch.context._replace(thoughts=thoughts._replace(embedding_BXE=later_BXE))
  found = ask(params, later, None)
  np.testing.assert_array_equal(found[:, :2], expected[:, :2])
  assert np.abs(found[:, 2] - expected[:, 2]).min() > 0


def test_who_has_no_thoughts_is_answered_as_if_the_part_was_not_there(told):
  """To the last bit whatever stands in the padding; sums of other lengths are other programs."""
  _, params, ask, batch = told
  some = batch.context.thoughts
  none = some._replace(end_BG=np.zeros_like(some.end_BG))
  empty = none._replace(embedding_BXE=np.zeros_like(some.embedding_BXE))
  found, of_empty, absent = (
    np.asarray(ask(params, batch.context._replace(thoughts=thoughts), None))
    for thoughts in (none, empty, None)
  )
  np.testing.assert_array_equal(found, of_empty)
  np.testing.assert_allclose(found, absent, rtol=1e-5, atol=1e-5)
  assert np.abs(found[:, 1:] - ask(params, batch.context, None)[:, 1:]).mean() > 0.05


def test_thoughts_of_some_rows_are_left_out_in_training_alone(told):
  """A tenth of them, by the step's key; the others are told all (there is no other dropout)."""
  _, params, ask, batch = told
  whole = np.asarray(ask(params, batch.context, None))
  none = np.asarray(ask(params, batch.context._replace(thoughts=None), None))
  without = []
  for seed in range(12):
    found = np.asarray(ask(params, batch.context, jax.random.key(seed)))
    far_B2 = [np.abs(found - x).max(axis=(1, 2, 3)) for x in (whole, none)]
    assert (np.min(far_B2, axis=0) < 1e-4).all()
    without.append(np.argmin(far_B2, axis=0))
  # 288 draws of probability .1: 28.8, and five deviations of 5.1.
  assert 3 < np.sum(without) < 55
  assert len({tuple(row) for row in without}) > 1
  again = np.asarray(ask(params, batch.context, jax.random.key(11)))
  np.testing.assert_array_equal(again, found)


def test_a_thoughts_token_by_hand(told):
  """LN(W e + t), behind the intents."""
  model, params, _, batch = told
  thoughts, group_B1 = batch.context.thoughts, np.full((24, 1), 3, np.int32)
  intent_BSD, mask_B1S = jnp.ones((24, 2, 16)), jnp.ones((24, 1, 2), bool)
  memory_BSD, mask = model.apply(
    {"params": params}, thoughts, group_B1, intent_BSD, mask_B1S, method="with_thoughts"
  )
  tokens = jax.tree.map(np.asarray, params["thought_tokens"])
  sum_BXD = thoughts.embedding_BXE @ tokens["thought_projection"]["kernel"] + tokens["type"]
  sum_BXD -= sum_BXD.mean(axis=-1, keepdims=True)
  expected = sum_BXD / np.sqrt((sum_BXD**2).mean(axis=-1, keepdims=True)) * tokens["norm"]["scale"]
  np.testing.assert_allclose(memory_BSD[:, 2:], expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(memory_BSD[:, :2], intent_BSD)
  assert mask[0, 0].tolist() == [True, True, False, True, True, True]


def test_a_search_is_told_what_training_is_told(told):
  model, params, ask, batch = told
  expected_BL = np.asarray(ask(params, batch.context, None))[:, 2, 0]
  generator, target_BL = generator_of(model), batch.target_BPNL[:, 2, 0]

  @jax.jit
  def search(params, context):
    shared, state, logp_BWV = generator.start(params, context, whatever)
    found = [logp_BWV]
    for level in (1, 2):
      code_BW = target_BL[:, level - 1 : level]
      state, logp_BWV = generator.step(params, shared, state, code_BW, level)
      found.append(logp_BWV)
    return found

  for level, logp_BWV in enumerate(search(params, batch.context)):
    picked_B = np.asarray(logp_BWV)[np.arange(24), 0, target_BL[:, level]]
    np.testing.assert_allclose(picked_B, expected_BL[:, level], rtol=2e-4, atol=2e-5)
