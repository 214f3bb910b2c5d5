"""The item scorer and its place in the mixture: by hand, and by enumerating every SID."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.catalog.subsets import pack_subsets
from gr4ad_jax.gr4ad.batch import KnownAds
from gr4ad_jax.gr4ad.build import build_decoder, init_params, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.item_scorer import ItemScorer, RowRange, starting_alike, sums_over
from gr4ad_jax.nn.history_encoder import HistoryEncoder
from gr4ad_jax.search.beam_search import compile_search
from gr4ad_jax.search.generator import whatever
from tests.support import KNOWN_ADS, VOCABULARY, random_context

MODEL = ModelConfig(
  width=16, num_heads=2, num_layers=1, num_lazy_layers=0, copy_path=True, item_scorer=True,
  item_width=8, history_length=4, history_blocks=2,
)
EVERY = np.stack(np.unravel_index(np.arange(210), (7, 5, 6)), axis=-1).astype(np.int32)
DECODER = build_decoder(MODEL, VOCABULARY)
SCORER = jax.jit(ItemScorer(MODEL, VOCABULARY).apply)
ENCODER = jax.jit(HistoryEncoder(MODEL.history).apply)
FORCED = jax.jit(DECODER.apply)


@pytest.fixture(scope="module")
def params():
  """Fresh ones, but for gates at a half and ad vectors that differ more."""
  params = init_params(DECODER, jax.random.key(0))
  copy = params["output"]["copy"]
  copy["gate_bias"] = copy["item_share"]["bias"] = jnp.zeros(())
  copy["items"] = jax.tree.map(lambda x: x * (30 if x.ndim == 2 else 1), copy["items"])
  return params


def probabilities(params, context):
  """Of every SID, for both requests, [2, 210]."""
  sid_BCL = FORCED({"params": params}, context, np.stack([EVERY] * 2)).sid_BCL
  return np.exp(np.asarray(sid_BCL, np.float64).sum(axis=-1))


def dense(params, context):
  """p of every known ad, [B, A], with the encoder's state and nothing else of the code."""
  items = jax.tree.map(np.asarray, params["output"]["copy"]["items"])

  def vector(hash, code_L):
    row = np.flatnonzero(KNOWN_ADS.hash_A == hash)
    content = sum(items[f"level_{level}"][code] for level, code in enumerate(code_L))
    return content + (items["ad"][row[0]] if len(row) else 0)

  ad_AD = np.stack([vector(*ad) for ad in zip(KNOWN_ADS.hash_A, KNOWN_ADS.code_AL, strict=True)])
  found = []
  for hash_T, code_TL in zip(context.ad_id_BT, context.ad_code_BTL, strict=True):
    latest = [vector(*ad) for ad in zip(hash_T, code_TL, strict=True)][:4][::-1]
    variables = {"params": items["encoder"]}
    h_D = ENCODER(variables, np.stack(latest)[None], np.ones((1, 4), bool))[0]
    weight_A = np.exp(ad_AD @ np.asarray(h_D, np.float64))
    found.append(weight_A / weight_A.sum())
  return np.stack(found)


def test_scores_every_ad_against_the_latest_of_the_history(params):
  """Known ads of it by row and codes, others by codes alone; the oldest of five is not read."""
  context = random_context(np.random.default_rng(0), 2)
  context.ad_id_BT[0, 1] = 7  # of no known ad
  items = params["output"]["copy"]["items"]
  got = SCORER({"params": items}, context)
  np.testing.assert_allclose(got, dense(params, context), rtol=1e-4)
  assert got.max() > 3 * got.min()


def closed(params, **logits):
  """With these log odds of the gates."""
  copy = params["output"]["copy"]
  if "copying" in logits:
    copy = copy | {"gate_bias": jnp.asarray(logits["copying"] / 8)}
  if "items" in logits:
    copy = copy | {"item_share": copy["item_share"] | {"bias": jnp.asarray(logits["items"] / 8)}}
  return params | {"output": params["output"] | {"copy": copy}}


def test_the_mixture_over_every_sid(params):
  """p = (1 - g) generated + g ((1 - y) of the shortlist + y of all ads), g = y = 1/2."""
  context = random_context(np.random.default_rng(1), 2)
  generated = probabilities(closed(params, copying=-1e9), context)
  short = probabilities(closed(params, copying=1e9, items=-1e9), context)
  sid_A = np.ravel_multi_index(tuple(KNOWN_ADS.code_AL.T), (7, 5, 6))
  of_items = np.zeros((2, 210))
  np.add.at(of_items, (slice(None), sid_A), dense(params, context))
  mixed = probabilities(params, context)
  np.testing.assert_allclose(mixed.sum(axis=-1), 1, atol=1e-5)
  np.testing.assert_allclose(mixed, 0.5 * generated + 0.25 * (short + of_items), atol=2e-6)


def test_a_set_share_is_every_request_s(params):
  """p = (1 - y) of the shortlist + y of all ads, with y = .7."""
  context = random_context(np.random.default_rng(1), 2)
  short = probabilities(closed(params, copying=1e9, items=-1e9), context)
  decoder = build_decoder(dataclasses.replace(MODEL, item_share=0.7), VOCABULARY)
  assert "item_share" not in init_params(decoder, jax.random.key(0))["output"]["copy"]
  mixed_BCL = decoder.apply(
    {"params": closed(params, copying=1e9)}, context, np.stack([EVERY] * 2)
  ).sid_BCL
  expected = 0.3 * short
  sid_A = np.ravel_multi_index(tuple(KNOWN_ADS.code_AL.T), (7, 5, 6))
  np.add.at(expected, (slice(None), sid_A), 0.7 * dense(params, context))
  np.testing.assert_allclose(np.exp(mixed_BCL.sum(axis=-1)), expected, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"item_share": 0.7}, {"neighbours": 3}], ids=str)
def test_a_batch_may_have_any_size_in_an_artifact(changes):
  decoder = build_decoder(dataclasses.replace(MODEL, **changes), VOCABULARY)
  (rows,) = jax.export.symbolic_shape("rows")
  context = random_context(np.random.default_rng(0), 2, numbers=decoder.config.copied_numbers)
  context = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), context)
  params = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))

  @jax.jit
  def copied(params, context):
    return decoder.apply(
      {"params": params}, context, method=lambda module, x: module.output.copy_source(x).logp_BM
    )

  (logp_BM,) = jax.export.export(copied)(params, context).out_avals
  assert logp_BM.shape == (rows, context.short_code_BML.shape[1])


@pytest.mark.parametrize("copied", [6, 24], ids=["the best ads", "all ads"])
def test_a_search_follows_the_best_of_all_ads(params, copied):
  """Of 24 known ads; its probabilities are those given that no ad beyond the best is copied."""
  context = random_context(np.random.default_rng(2), 2)
  decoder = build_decoder(dataclasses.replace(MODEL, copied_items=copied), VOCABULARY)

  @jax.jit
  def decode(params, context):
    shared, state, first_B1V = start_fn(decoder)(params, context, whatever)
    logp_N = jnp.repeat(first_B1V[0, 0], 30)
    state = jax.tree.map(lambda x: jnp.repeat(x, 210, axis=1), state)
    for level in (1, 2):
      codes = jnp.stack([EVERY[:, level - 1]] * 2)
      state, logp_BWV = step_fn(decoder)(params, shared, state, codes, level)
      logp_N += logp_BWV[0, np.arange(210), EVERY[:, level]]
    return logp_N

  p_A = dense(params, context)[0]
  dropped = np.argsort(-p_A)[copied:]
  expected = probabilities(params, context)[0]
  np.add.at(
    expected, np.ravel_multi_index(tuple(KNOWN_ADS.code_AL[dropped].T), (7, 5, 6)),
    -0.25 * p_A[dropped],
  )
  np.testing.assert_allclose(np.exp(decode(params, context)), expected / expected.sum(), atol=2e-6)


def test_what_may_not_be_found_is_not_copied(params):
  """Half of all SIDs may: the shares of the others, of both sources, are those of the first."""
  context = random_context(np.random.default_rng(2), 2)
  words = pack_subsets(np.stack([np.arange(210) % 2 == n for n in (0, 1)]), 210)
  search = compile_search(start_fn(DECODER), step_fn(DECODER), build_prefix_tree(EVERY), (210,) * 3)
  subset_BN = np.array([[0], [1]], np.int32)
  generated = probabilities(closed(params, copying=-1e9), context)
  copied = probabilities(closed(params, copying=1e9), context)
  found = search(params, context, build_prefix_tree(EVERY).arrays, None, words, subset_BN)
  for row, sid_W in enumerate(np.asarray(found.sid_BW)[:, :105]):
    assert sorted(sid_W.tolist()) == list(range(row, 210, 2))
    expected = generated[row] + copied[row] / copied[row, row::2].sum()
    np.testing.assert_allclose(np.exp(found.logp_BW[row, :105]), 0.5 * expected[sid_W], atol=2e-6)


def test_without_a_shortlist_all_ads_are_copied_from(params):
  context = random_context(np.random.default_rng(3), 2)
  context.short_code_BML[:] = -1
  sid_A = np.ravel_multi_index(tuple(KNOWN_ADS.code_AL.T), (7, 5, 6))
  got = probabilities(closed(params, copying=1e9, items=-1e9), context)[0]
  np.testing.assert_allclose(got[sid_A], dense(params, context)[0], rtol=1e-3)


def test_without_a_history_ads_are_scored_and_all_is_finite(params):
  context = random_context(np.random.default_rng(4), 2)
  context.ad_id_BT[:] = -1
  context.ad_code_BTL[:] = -1
  items = params["output"]["copy"]["items"]
  p_A = SCORER({"params": items}, context)[0]
  assert p_A.sum() == pytest.approx(1, abs=1e-5) and p_A.max() > 1.1 * p_A.min()


def test_the_loss_of_a_target_is_that_of_its_sid(params):
  """Of a known ad, of an SID that no known ad has, and of padding."""
  context, codes = random_context(np.random.default_rng(5), 2), np.stack([EVERY] * 2)
  codes[:, :3] = [KNOWN_ADS.code_AL[5], EVERY[1], [-1, -1, -1]]
  item_BC = FORCED({"params": params}, context, codes).item_BC[:, :3]
  expected = [np.log(dense(params, context)[0, 5]), 0, 0]
  np.testing.assert_allclose(item_BC[0], expected, atol=1e-4)


def test_without_it_the_parameters_are_those_of_the_copy_path():
  off = build_decoder(dataclasses.replace(MODEL, item_scorer=False), VOCABULARY)
  plain = jax.eval_shape(lambda: init_params(off, jax.random.key(0)))
  both = jax.eval_shape(lambda: init_params(DECODER, jax.random.key(0)))
  assert both["output"]["copy"].keys() - plain["output"]["copy"].keys() == {"items", "item_share"}


def test_ranges_hold_the_ads_that_start_alike():
  code_AL = KNOWN_ADS.code_AL
  target_BCL = np.concatenate([code_AL[[0, 9, 23]], [[6, 4, 5], [0, 0, 1], [9, 0, 0]]])[None]
  rows = starting_alike(KNOWN_ADS, jnp.asarray(target_BCL))
  for c, target_L in enumerate(target_BCL[0]):
    for level in range(3):
      alike = (code_AL[:, : level + 1] == target_L[: level + 1]).all(axis=1)
      got = np.arange(int(rows.start[0, c, level]), int(rows.end[0, c, level]))
      np.testing.assert_array_equal(got, np.flatnonzero(alike))


def test_sums_over_ranges_of_any_length():
  rng = np.random.default_rng(6)
  p_BA = np.exp(rng.normal(size=(2, 37)) * 5).astype(np.float32)
  start = np.array([[0, 0, 3, 4, 8, 30, 36, 5], [7, 1, 16, 15, 9, 12, 0, 37]])
  end = np.array([[0, 37, 4, 9, 16, 37, 37, 6], [9, 36, 24, 33, 9, 13, 1, 37]])
  got = sums_over(p_BA, RowRange(jnp.asarray(start), jnp.asarray(end)), block=8)
  for row, column in np.ndindex(start.shape):
    expected = p_BA[row, start[row, column] : end[row, column]].sum()
    assert got[row, column] == pytest.approx(expected, rel=1e-5)


def test_known_ads_are_equal_by_what_they_hold_and_have_an_sid():
  hash_N, code_NL = np.array([5, 3, 9]), np.array([[1, 0], [-1, -1], [0, 7]])
  ads = KnownAds.of(hash_N, code_NL)
  np.testing.assert_array_equal(ads.hash_A, [9, 5])
  np.testing.assert_array_equal(ads.code_AL, [[0, 7], [1, 0]])
  again = KnownAds.of(hash_N[::-1], code_NL[::-1])
  assert ads == again and hash(ads) == hash(again)
  assert ads != KnownAds.of(hash_N, code_NL + 1)
