"""Beam search against enumeration and against a plain Python beam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.catalog.ad_index import build_ad_index
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.catalog.subsets import pack_subsets
from gr4ad_jax.gr4ad.build import build_decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.search.beam_search import beam_search, compile_search
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.generator import ValueGuide
from gr4ad_jax.search.recommender import Recommender
from tests.support import VOCABULARY, random_context, shaken_params, showing

SIZES = VOCABULARY.codebook_sizes
ROWS = 3


def random_sids(rng, count: int) -> np.ndarray:
  flat = rng.choice(np.prod(SIZES), count, replace=False)
  return np.stack(np.unravel_index(np.sort(flat), SIZES), axis=1).astype(np.int32)


class TableModel:
  """log p(s_l | prefix) read from a table per level; the state is the prefix's flat number."""

  def __init__(self, rng):
    cells = [int(np.prod(SIZES[:level])) for level in range(3)]
    logits = [rng.normal(size=(ROWS, n, v)) for n, v in zip(cells, SIZES, strict=True)]
    self.logp = [np.asarray(jax.nn.log_softmax(x, axis=-1), np.float32) for x in logits]
    widest = max(SIZES)
    self.padded = jnp.stack([
      jnp.pad(x, ((0, 0), (0, max(cells) - x.shape[1]), (0, widest - x.shape[2])),
              constant_values=NEG_INF)
      for x in self.logp
    ])

  def start(self, context, may_get):
    del context, may_get
    return None, jnp.zeros((ROWS, 1), jnp.int32), jnp.asarray(self.logp[0])

  def step(self, shared, state, code_BW, level):
    del shared
    state = state * jnp.array(SIZES)[level - 1] + code_BW
    rows = jnp.arange(ROWS)[:, None]
    return state, self.padded[level][rows, state]

  def score(self, row: int, sid) -> float:
    prefix = (0, sid[0], sid[0] * SIZES[1] + sid[1])
    return float(sum(self.logp[level][row, prefix[level], sid[level]] for level in range(3)))


def plain_beam(model: TableModel, row: int, sids: np.ndarray, widths) -> list[tuple]:
  """A beam kept as a Python list of prefixes."""
  legal = [tuple(s) for s in sids.tolist()]
  beam = [((), 0.0)]
  for level, width in enumerate(widths):
    grown = []
    for prefix, score in beam:
      number = 0
      for i, code in enumerate(prefix):
        number = number * SIZES[i] + code
      for code in sorted({s[level] for s in legal if s[:level] == prefix}):
        grown.append(((*prefix, code), score + float(model.logp[level][row, number, code])))
    beam = sorted(grown, key=lambda item: -item[1])[:width]
  return beam


@pytest.mark.parametrize("widths", [(6, 30, 50), (50, 50, 50), (4, 9, 12), (5, 5, 5), (9, 3, 4)])
@pytest.mark.parametrize("count", [3, 40])
def test_equals_plain_beam_and_enumeration(widths, count):
  for seed in range(2):
    rng = np.random.default_rng(100 * count + seed)
    sids, model = random_sids(rng, count), TableModel(rng)
    tree = build_prefix_tree(sids)
    beams = jax.jit(
      lambda arrays, tree=tree, model=model: beam_search(
        None, arrays, tree=tree, widths=widths, start=model.start, step=model.step
      )
    )(tree.arrays)
    for row in range(ROWS):
      expected = plain_beam(model, row, sids, widths)
      found = int((beams.sid_BW[row] >= 0).sum())
      assert [tuple(c) for c in beams.code_BWL[row, :found].tolist()] == [p for p, _ in expected]
      np.testing.assert_allclose(beams.logp_BW[row, :found], [s for _, s in expected], atol=1e-5)
      np.testing.assert_array_equal(sids[beams.sid_BW[row, :found]], beams.code_BWL[row, :found])
      assert (beams.code_BWL[row, found:] == -1).all()
      assert (beams.logp_BW[row, found:] == NEG_INF).all()
      if min(widths) >= count:  # nothing was pruned: this is the exact ranking
        exact = sorted(sids.tolist(), key=lambda s, row=row: -model.score(row, s))
        assert beams.code_BWL[row, :found].tolist() == exact


@pytest.mark.parametrize("widths", [(50, 50, 50), (7, 35, 40)])  # one scan; single levels
def test_log_probs_may_be_of_the_codes_that_lead_on(widths):
  """By hand: p of a code over the sum of those that lead to an SID of the request's own subset."""
  rng = np.random.default_rng(5)
  sids, model = random_sids(rng, 40), TableModel(rng)
  tree = build_prefix_tree(sids)
  member_RS = rng.random((ROWS, 40)) < np.array([[1.0], [0.5], [0.1]])
  word_RU = jnp.asarray(pack_subsets(member_RS, tree.capacity))
  search = compile_search(
    lambda params, *args: model.start(*args), lambda params, *args: model.step(*args), tree, widths,
    "children",
  )
  beams = search(None, None, tree.arrays, None, word_RU, jnp.arange(ROWS)[:, None])
  for row in range(ROWS):
    own = [tuple(sid) for sid in sids[member_RS[row]].tolist()]
    expected = {}
    for sid in own:
      logp = 0.0
      for level in range(3):
        prefix = np.ravel_multi_index(sid[:level], SIZES[:level]) if level else 0
        table_V = np.exp(model.logp[level][row, prefix])
        leads_on = {other[level] for other in own if other[:level] == sid[:level]}
        logp += np.log(table_V[sid[level]] / table_V[sorted(leads_on)].sum())
      expected[sid] = logp
    assert sum(np.exp(list(expected.values()))) == pytest.approx(1)
    found = [tuple(sid) for sid in beams.code_BWL[row].tolist() if sid[0] >= 0]
    assert found == sorted(own, key=lambda sid: -expected[sid])
    np.testing.assert_allclose(
      beams.logp_BW[row, : len(found)], [expected[sid] for sid in found], atol=1e-5
    )


def guided(model: TableModel, tree, widths, least: int, most: int, promise):
  """A search by a guide, compiled."""
  search = compile_search(
    lambda params, *args: model.start(*args), lambda params, *args: model.step(*args), tree, widths,
    "children", ValueGuide(least, most, promise),
  )
  return search(None, None, tree.arrays)


def no_promise(params, state, code_BW, level):
  return jnp.zeros(code_BW.shape)


@pytest.mark.parametrize("widths", [(50, 50, 50), (6, 11, 8)])  # one scan; single levels
def test_beams_that_promise_little_have_few_children(widths):
  """Against plain lists: k = clip(ceil(most x promise), least, most) children of each prefix."""
  rng = np.random.default_rng(9)
  sids, model = random_sids(rng, 40), TableModel(rng)
  legal = [tuple(sid) for sid in sids.tolist()]

  def promise(params, state, code_BW, level):  # by the parent and the code, 0 to 1 by quarters
    return (3 * state + code_BW + level) % 5 / 4

  beams = guided(model, build_prefix_tree(sids), widths, 1, 3, promise)
  for row in range(ROWS):
    beam = [((), 0.0)]
    for level, width in enumerate(widths):
      grown = []
      for prefix, score in beam:
        number = np.ravel_multi_index(prefix, SIZES[:level]) if level else 0
        codes = sorted({sid[level] for sid in legal if sid[:level] == prefix})
        p_V = np.exp(model.logp[level][row, number])
        codes.sort(key=lambda code, p_V=p_V: -p_V[code])
        kept, total = len(codes), p_V[codes].sum()
        if level:
          parent = np.ravel_multi_index(prefix[:-1], SIZES[: level - 1]) if level > 1 else 0
          kept = max(1, int(np.ceil(3 * ((3 * parent + prefix[-1] + level) % 5 / 4))))
        grown += [((*prefix, code), score + np.log(p_V[code] / total)) for code in codes[:kept]]
      beam = sorted(grown, key=lambda item: -item[1])[:width]
    found = int((beams.sid_BW[row] >= 0).sum())
    assert [tuple(c) for c in beams.code_BWL[row, :found].tolist()] == [p for p, _ in beam]
    np.testing.assert_allclose(beams.logp_BW[row, :found], [s for _, s in beam], atol=1e-5)
    assert found < 40


@pytest.mark.parametrize("widths", [(50, 50, 50), (6, 11, 8)])
def test_a_guide_that_lets_all_children_live_changes_no_bit(widths):
  rng = np.random.default_rng(4)
  model, tree = TableModel(rng), build_prefix_tree(random_sids(rng, 40))
  plain = compile_search(
    lambda params, *args: model.start(*args), lambda params, *args: model.step(*args), tree, widths,
    "children",
  )(None, None, tree.arrays)
  every = max(SIZES)
  jax.tree.map(
    np.testing.assert_array_equal, guided(model, tree, widths, every, every, no_promise), plain
  )


def test_one_width_per_level():
  rng = np.random.default_rng(0)
  model, tree = TableModel(rng), build_prefix_tree(random_sids(rng, 5))
  with pytest.raises(ValueError, match="3 levels"):
    beam_search(None, tree.arrays, tree=tree, widths=(4, 4), start=model.start, step=model.step)


@pytest.fixture(scope="module", params=["lazy", "autoregressive", "multi_token"])
def trained_like(request):
  config = ModelConfig(
    decoder=request.param, width=16, num_heads=2, num_layers=2, num_lazy_layers=1, copy_path=True
  )
  decoder = build_decoder(config, VOCABULARY)
  params = shaken_params(decoder)
  return decoder, params, random_context(np.random.default_rng(0), ROWS)


def test_search_finds_the_decoders_most_probable_sids(trained_like):
  """The whole catalogue scored by teacher forcing gives the same ranking and log-probs."""
  decoder, params, context = trained_like
  sids = random_sids(np.random.default_rng(1), 30)
  tree = build_prefix_tree(sids)
  search = compile_search(start_fn(decoder), step_fn(decoder), tree, (30, 30, 30))
  bin_means = jnp.array([1.0, 2.0, 3.0, 5.0])
  beams = search(params, context, tree.arrays, bin_means)
  every = np.broadcast_to(sids, (ROWS, *sids.shape))
  shown = showing(context, [sids] * ROWS)
  forced = jax.jit(decoder.apply)({"params": params}, shown, every)
  logp = np.asarray(forced.sid_BCL.sum(axis=-1))
  value = np.exp(np.asarray(forced.ecpm_BCV)) @ np.asarray(bin_means)
  for row in range(ROWS):
    order = np.argsort(-logp[row])
    np.testing.assert_allclose(beams.logp_BW[row], logp[row][order], atol=1e-4)
    at = np.asarray(beams.sid_BW[row])
    assert sorted(at.tolist()) == list(range(30))
    np.testing.assert_allclose(beams.logp_BW[row], logp[row][at], atol=1e-4)
    np.testing.assert_allclose(beams.expected_value_BW[row], value[row][at], atol=1e-4)


def test_a_new_set_of_sids_of_equal_shape_needs_no_recompilation(trained_like):
  decoder, params, context = trained_like
  trees = []
  for last in (3, 4):  # the same branching, other codes
    sids = np.array([[0, 1, last], [2, 0, 1], [2, 3, 0]], np.int32)
    trees.append(build_prefix_tree(sids))
  assert trees[0].branching_L == trees[1].branching_L
  search = compile_search(start_fn(decoder), step_fn(decoder), trees[0], (3, 3, 3))
  first = search(params, context, trees[0].arrays)
  second = search(params, context, trees[1].arrays)
  assert search._cache_size() == 1
  assert [0, 1, 3] in first.code_BWL[0].tolist()
  assert [0, 1, 4] in second.code_BWL[0].tolist()


def test_recommender_expands_and_reranks_by_value(trained_like):
  decoder, params, context = trained_like
  sids = random_sids(np.random.default_rng(2), 20)
  codes_AL = np.concatenate([sids, sids[:5]])  # five SIDs hold two ads
  index = build_ad_index(codes_AL, np.arange(25, dtype=np.float64))
  bins = (1.0, 4.0, 9.0, 16.0)

  # One SID of the catalogue is in every history.
  context = context._replace(ad_code_BTL=context.ad_code_BTL.copy())
  context.ad_code_BTL[:, 0] = sids[7]

  def recommend(gamma: float):
    return Recommender(
      generator_of(decoder), params, index=index, bin_means=bins, with_value=True,
      config=SearchConfig(widths=(20, 20, 20), batch_size=4, value_exponent=gamma),
    )(context, 30)

  plain = recommend(0.0)
  for row in range(ROWS):
    ads = plain.ad_RK[row][:25]
    assert sorted(ads.tolist()) == list(range(25))
    assert (plain.ad_RK[row][25:] == -1).all()
    np.testing.assert_array_equal(codes_AL[ads], plain.code_RKL[row, :25])
    assert (np.diff(plain.logp_RK[row, :25]) <= 1e-6).all()
    for ad in range(5):  # of two ads on one SID the one with the higher priority comes first
      assert ads.tolist().index(ad + 20) + 1 == ads.tolist().index(ad)
  by_value = recommend(3.0)
  score = plain.logp_RK + 3 * np.log(plain.expected_value_RK)
  for row in range(ROWS):
    best = plain.ad_RK[row, np.argmax(score[row, :25])]
    np.testing.assert_array_equal(codes_AL[by_value.ad_RK[row, 0]], codes_AL[best])
    ads = by_value.ad_RK[row, :25]
    np.testing.assert_array_equal(codes_AL[ads], by_value.code_RKL[row, :25])
  for row in range(ROWS):
    met = {tuple(c) for name in ("ad_code_BTL", "organic_code_BOL")
           for c in getattr(context, name)[row].tolist()}
    new = [tuple(c) not in met for c in plain.code_RKL[row, :25].tolist()]
    assert plain.new_RK[row, :25].tolist() == new and not all(new)
  with pytest.raises(ValueError, match="batch_size"):
    Recommender(
      generator_of(decoder), params, index=index, bin_means=bins,
      config=SearchConfig(widths=(20, 20, 20), batch_size=2),
    )(context, 5)


def test_recommender_keeps_to_the_allowed_ads(trained_like):
  decoder, params, context = trained_like
  sids = random_sids(np.random.default_rng(2), 20)
  codes_AL = np.concatenate([sids, sids[:5]])  # five SIDs hold two ads
  index = build_ad_index(codes_AL, np.arange(25, dtype=np.float64))
  recommender = Recommender(
    generator_of(decoder), params, index=index, bin_means=(1.0, 4.0, 9.0, 16.0),
    config=SearchConfig(widths=(20, 20, 20), batch_size=4),
  )
  plain = recommender(context, 25)
  late, even, every = np.arange(25) >= 20, np.arange(25) % 2 == 0, np.ones(25, bool)
  allowed = [recommender.allow(keep) for keep in (late, late & even, every)]
  found = recommender(context, 8, allowed=allowed)
  for row, ads in enumerate([range(20, 25), (20, 22, 24), range(25)]):
    expected = [ad for ad in plain.ad_RK[row].tolist() if ad in ads][:8]
    assert found.ad_RK[row].tolist() == expected + [-1] * (8 - len(expected))
    filled = found.ad_RK[row] >= 0
    np.testing.assert_array_equal(found.code_RKL[row, filled], codes_AL[found.ad_RK[row, filled]])
  with pytest.raises(ValueError, match=r"needs \[25\] bool"):
    recommender.allow(late[:3])
  with pytest.raises(ValueError, match=r"needs \[25\] bool"):
    recommender.allow(np.arange(25))


def test_excluded_ads_never_come_and_take_no_place(trained_like):
  """Every ad scored by teacher forcing, the excluded ones struck out: the best eight that remain.

  The last level keeps eight beams: the eight best SIDs of which an ad is left.
  """
  decoder, params, context = trained_like
  sids = random_sids(np.random.default_rng(4), 30)
  context = context._replace(
    short_code_BML=np.stack([sids[step * np.arange(1, 8)] for step in (1, 2, 4)])
  )
  codes_AL = np.concatenate([sids, sids[:12]])  # twelve SIDs hold two ads
  index = build_ad_index(codes_AL, np.arange(42, dtype=np.float64))
  recommender = Recommender(
    generator_of(decoder), params, index=index, bin_means=(1.0, 4.0, 9.0, 16.0),
    config=SearchConfig(widths=(30, 30, 8), batch_size=4),
  )
  every = np.broadcast_to(codes_AL, (ROWS, *codes_AL.shape))
  forced = jax.jit(decoder.apply)

  def logp_of(left_RA):
    """Where only SIDs with an ad that is left can be copied."""
    shown = showing(context, [codes_AL[left_A] for left_A in left_RA])
    return np.asarray(forced({"params": params}, shown, every).sid_BCL.sum(axis=-1))

  best_RA = np.argsort(-logp_of(np.ones((ROWS, 42), bool)), axis=1)
  rng = np.random.default_rng(5)
  seen = [
    best_RA[0, :25],  # what the model likes best
    np.append(np.arange(30, 36), np.arange(10)),  # both ads of some SIDs, one of others
    rng.permutation(42)[:39],  # fewer are left than are asked for
  ]
  before = recommender(context, 8)
  found = recommender(context, 8, allowed=[recommender.without(ads) for ads in seen])
  left_RA = np.stack([~np.isin(np.arange(42), ads) for ads in seen])
  logp_RA = np.where(left_RA, logp_of(left_RA), -np.inf)
  for row in range(ROWS):
    left = np.argsort(-logp_RA[row])[: left_RA[row].sum()].tolist()
    ads = found.ad_RK[row][found.ad_RK[row] >= 0].tolist()
    assert len(ads) == min(8, len(left)) and not set(ads) & set(seen[row].tolist())
    # Ads of one SID are equally likely, so that it is log-probabilities that are compared.
    expected = logp_RA[row, left][: len(ads)]
    np.testing.assert_allclose(logp_RA[row, ads], expected, atol=1e-4)
    np.testing.assert_allclose(found.logp_RK[row, : len(ads)], expected, atol=1e-4)
  # Conditions hold as well, and who excludes nothing gets what all get.
  late = np.arange(42) >= 20
  logp_RA = np.where(left_RA & late, logp_of(left_RA & late), -np.inf)
  some = [recommender.without(ads, recommender.allow(late)) for ads in seen]
  found = recommender(context, 8, allowed=some)
  for row in range(ROWS):
    left = np.argsort(-logp_RA[row])[: (left_RA[row] & late).sum()].tolist()
    ads = found.ad_RK[row][found.ad_RK[row] >= 0].tolist()
    assert set(ads) <= set(left) and len(ads) == min(8, len(left))
    np.testing.assert_allclose(logp_RA[row, ads], logp_RA[row, left][: len(ads)], atol=1e-4)
  nothing = [recommender.without(np.zeros(0, np.int64))] * ROWS
  np.testing.assert_array_equal(recommender(context, 8, allowed=nothing).ad_RK, before.ad_RK)


def test_widths_can_change_from_call_to_call(trained_like):
  decoder, params, context = trained_like
  index = build_ad_index(random_sids(np.random.default_rng(2), 20), np.zeros(20))

  def recommender(widths):
    return Recommender(
      generator_of(decoder), params, index=index, bin_means=(1.0,) * 4,
      config=SearchConfig(widths=widths, batch_size=4),
    )

  wide = recommender((6, 7, 8))
  narrow = wide.search(context, widths=(2, 3, 4))
  assert narrow.code_BWL.shape == (ROWS, 4, 3) and wide.search(context).code_BWL.shape[1] == 8
  np.testing.assert_array_equal(
    narrow.code_BWL, recommender((2, 3, 4)).search(context).code_BWL
  )
