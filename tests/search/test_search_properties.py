"""Beam search with real decoders against enumeration; subsets, sampling, refilled trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree, refill
from gr4ad_jax.catalog.subsets import combine, count_before, holds, pack_subsets
from gr4ad_jax.gr4ad.build import build_decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.search.beam_search import (
  Sampling,
  beam_search,
  compile_search,
  global_top_k,
  pre_cut_top_k,
)
from tests.support import VOCABULARY, random_context, shaken_params, showing

SIZES = VOCABULARY.codebook_sizes
EVERY_SID = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), 1).astype(np.int32)
ROOM = build_prefix_tree(EVERY_SID)  # any set of SIDs fits, so programs are compiled once
BIN_VALUES = np.array([1.0, 2.0, 3.0, 5.0], np.float32)


@functools.cache
def model(kind: str):
  """A decoder far from its start, and all of its log-probs by teacher forcing."""
  config = ModelConfig(decoder=kind, width=16, num_heads=2, num_layers=3, num_lazy_layers=1,
                       copy_path=True)
  decoder = build_decoder(config, VOCABULARY)
  return decoder, shaken_params(decoder)


@functools.cache
def search_program(kind: str, widths):
  decoder, _ = model(kind)
  return compile_search(start_fn(decoder), step_fn(decoder), ROOM, widths)


@functools.cache
def forced_program(kind: str):
  return jax.jit(model(kind)[0].apply)


def scored(kind: str, context):
  """log p of every level of every SID [B, 210, 3], expected value [B, 210]."""
  every = np.broadcast_to(EVERY_SID, (len(context.feature_BF), *EVERY_SID.shape))
  forced = forced_program(kind)({"params": model(kind)[1]}, context, every)
  return np.asarray(forced.sid_BCL), np.exp(np.asarray(forced.ecpm_BCV)) @ BIN_VALUES


@pytest.mark.parametrize("kind", ["lazy", "autoregressive", "multi_token"])
@settings(deadline=None, max_examples=8)
@given(
  chosen=st.sets(st.integers(0, len(EVERY_SID) - 1), min_size=1),
  subset=st.none() | st.sets(st.integers(0, len(EVERY_SID) - 1)),
  beams=st.sampled_from([5, 210]), batch=st.just(3),
)
def test_equals_enumeration(kind, chosen, subset, beams, batch):
  """Any catalogue, any subset of it (none left, too), fewer SIDs than beams, every decoder.

  Nothing is copied that may not be found: as if it did not stand on the shortlist.
  """
  rows = np.array(sorted(chosen))
  tree = refill(ROOM, EVERY_SID[rows])
  member = np.zeros((2, len(rows)), bool)
  member[0] = [subset is None or row in subset for row in rows]
  member[1] = True
  word_TU = pack_subsets(member, tree.capacity)
  program = search_program(kind, (210, 210, beams))
  # What is copied takes part in half of the cases.
  context = random_context(np.random.default_rng(batch), batch)
  context.short_code_BML[:, :4] = EVERY_SID[rows[np.arange(4) * 7 % len(rows)]]
  subset_BN = np.tile(np.array([[0, 1, -1]], np.int32), (batch, 1))
  found = program(model(kind)[1], context, tree.arrays, BIN_VALUES, word_TU, subset_BN)
  allowed = rows[member[0]]
  level_logp, value = scored(kind, showing(context, [EVERY_SID[allowed]] * batch))
  for b in range(batch):
    logp = level_logp[b, allowed].sum(-1)
    best = allowed[np.argsort(-logp, kind="stable")][:beams]
    count = len(best)
    assert (np.asarray(found.sid_BW[b]) >= 0).sum() == count
    np.testing.assert_allclose(found.logp_BW[b, :count], level_logp[b, best].sum(-1), atol=2e-4)
    at = rows[np.asarray(found.sid_BW[b, :count])]  # equal up to ties within rounding
    assert len(set(at.tolist())) == count and set(at.tolist()) <= set(allowed.tolist())
    np.testing.assert_array_equal(EVERY_SID[at], found.code_BWL[b, :count])
    np.testing.assert_allclose(found.level_logp_BWL[b, :count], level_logp[b, at], atol=2e-4)
    np.testing.assert_allclose(found.expected_value_BW[b, :count], value[b, at], atol=2e-3)
    assert (found.code_BWL[b, count:] == -1).all() and (found.logp_BW[b, count:] == NEG_INF).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 9), st.integers(1, 20))
def test_pre_cut_equals_the_global_selection(seed, beams, extensions, width):
  """Ties, too: scores take few values."""
  width = min(width, beams * extensions)
  score = np.random.default_rng(seed).integers(0, 4, (2, beams, extensions)).astype(np.float32)
  first, second = (f(jnp.asarray(score), width) for f in (global_top_k, pre_cut_top_k))
  np.testing.assert_array_equal(first[0], second[0])
  np.testing.assert_array_equal(first[1], second[1])
  flat = score.reshape(2, -1)
  expected = np.argsort(-flat, axis=1, kind="stable")[:, :width]
  np.testing.assert_array_equal(first[1], expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), st.integers(0, 2**31))
def test_ranks_in_combined_bitmaps(num_sids, seed):
  rng = np.random.default_rng(seed)
  member = rng.random((3, num_sids)) < 0.6
  subset_BN = np.array([[0, 2], [-1, 1], [-1, -1]], np.int32)
  allowed = combine(jnp.asarray(pack_subsets(member, num_sids + 5)), subset_BN)
  expected = np.stack([member[0] & member[2], member[1], np.ones(num_sids, bool)])
  rows = np.tile(np.arange(num_sids + 1), (3, 1))
  before = np.concatenate([np.zeros((3, 1), int), np.cumsum(expected, 1)], 1)
  np.testing.assert_array_equal(count_before(allowed, rows), before)
  np.testing.assert_array_equal(holds(allowed, rows[:, :-1]), expected)


class Table:
  """p(code | prefix) from a table; a prefix is a flat number."""

  def __init__(self, rows: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    cells = [int(np.prod(SIZES[:level])) for level in range(3)]
    self.logp = [
      np.asarray(jax.nn.log_softmax(1.5 * rng.normal(size=(n, v)), axis=-1), np.float32)
      for n, v in zip(cells, SIZES, strict=True)
    ]
    self.rows = rows

  def start(self, context, may_get):
    first = jnp.broadcast_to(self.logp[0], (self.rows, 1, SIZES[0]))
    return None, jnp.zeros((self.rows, 1), jnp.int32), first

  def step(self, shared, state, code_BW, level):
    padded = jnp.stack([
      jnp.pad(x, ((0, 35 - x.shape[0]), (0, max(SIZES) - x.shape[1]))) for x in self.logp
    ])
    state = state * jnp.array(SIZES)[level - 1] + code_BW
    return state, padded[level][state]

  def sid_logp(self) -> np.ndarray:
    first, second, third = self.logp
    return (first[0][:, None, None] + second[:, :, None] + third.reshape(*SIZES)).reshape(-1)


@pytest.mark.parametrize(
  ("temperature", "widths"), [(1.0, (3, 3, 3)), (2.0, (7, 20, 2))]  # one scan; single levels
)
def test_sampling_draws_without_replacement_from_the_model(temperature, widths):
  """First draws follow p; second draws follow p given the first; nothing comes twice."""
  rows, table = 20_000, Table(20_000)
  logp = table.logp
  found = jax.jit(
    lambda arrays, key: beam_search(
      None, arrays, tree=ROOM, widths=widths, start=table.start, step=table.step,
      sampling=Sampling(key, temperature),
    )
  )(ROOM.arrays, jax.random.key(1))
  first, second = np.asarray(found.sid_BW[:, 0]), np.asarray(found.sid_BW[:, 1])
  table.logp = [np.asarray(jax.nn.log_softmax(x / temperature, axis=-1)) for x in logp]
  p = np.exp(table.sid_logp())
  assert p.sum() == pytest.approx(1, abs=1e-4)
  chosen = np.argsort(-p)[:12]
  for sid in chosen:
    error = np.sqrt(p[sid] * (1 - p[sid]) / rows)
    assert abs((first == sid).mean() - p[sid]) < 5 * error
  second_p = np.array([(p * p[sid] / (1 - p))[np.arange(len(p)) != sid].sum() for sid in chosen])
  for sid, expected in zip(chosen, second_p, strict=True):
    assert abs((second == sid).mean() - expected) < 5 * np.sqrt(expected / rows)
  assert (first != second).all()
  assert (np.diff(found.perturbed_BW, axis=1) <= 0).all()  # best first
  # What is reported is the model's own log-prob, whatever the temperature.
  exact = Table(1).sid_logp()
  np.testing.assert_allclose(found.logp_BW[:100, 0], exact[first[:100]], atol=1e-5)


def test_sampling_is_seeded_and_stays_in_the_subset():
  table, rng = Table(4), np.random.default_rng(0)
  member = rng.random((1, len(EVERY_SID))) < 0.1
  word_TU = jnp.asarray(pack_subsets(member, ROOM.capacity))

  def draw(seed):
    return beam_search(
      None, ROOM.arrays, tree=ROOM, widths=(8, 30, 30), start=table.start, step=table.step,
      allowed=combine(word_TU, np.zeros((4, 1), np.int32)), sampling=Sampling(jax.random.key(seed)),
    )

  first, again, other = draw(0), draw(0), draw(1)
  np.testing.assert_array_equal(first.sid_BW, again.sid_BW)
  assert not np.array_equal(first.sid_BW, other.sid_BW)
  for row in np.asarray(first.sid_BW):
    filled = row[row >= 0]
    assert len(set(filled.tolist())) == len(filled) == min(30, member.sum())
    assert member[0, filled].all()
  assert len({tuple(row) for row in np.asarray(first.sid_BW).tolist()}) > 1  # rows differ


def test_refill_keeps_the_program_and_says_what_has_no_room():
  sids = EVERY_SID[::3]
  tree = build_prefix_tree(sids, spare=0.2)
  assert tree.capacity == 84 and tree.num_sids == 70
  moved = refill(tree, EVERY_SID[2::3])
  assert [x.shape for x in moved.arrays] == [x.shape for x in tree.arrays]
  with pytest.raises(ValueError, match="105 SIDs, the tree has room for 84"):
    refill(tree, EVERY_SID[::2])
  with pytest.raises(ValueError, match="6 codes follow one prefix at level 3"):
    refill(tree, EVERY_SID[:60])
  with pytest.raises(ValueError, match="2 levels, the tree has 3"):
    refill(tree, np.array([[0, 1]], np.int32))
  with pytest.raises(ValueError, match="spare"):
    build_prefix_tree(sids, spare=-1)


def test_bad_subsets_are_named():
  with pytest.raises(ValueError, match="bool"):
    pack_subsets(np.zeros((2, 3)), 3)
  with pytest.raises(ValueError, match="4 SIDs, the tree has room for 3"):
    pack_subsets(np.zeros((2, 4), bool), 3)
