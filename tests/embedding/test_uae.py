"""Unified ad embeddings: losses by hand, what the training sees, resumption, what it achieves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.data.records import ContentTable
from gr4ad_jax.embedding.ad_text import INSTRUCTIONS, ad_inputs, content_inputs
from gr4ad_jax.embedding.cooccurrence import ItemPairs
from gr4ad_jax.embedding.text_encoder import encode_with
from gr4ad_jax.embedding.uae import UaeConfig, embed_inputs, fine_tune, load_params, save_params
from gr4ad_jax.embedding.uae_batches import pair_masks, plan_batches, training_ads
from gr4ad_jax.embedding.uae_losses import attribute_loss, init_heads, multi_positive_nce
from gr4ad_jax.tokenizer.retrieval import held_out_retrieval
from gr4ad_jax.training.resume import ResumeFile
from tests.support import BRANDS, catalogue, ring_pairs, tiny_encoder


@pytest.fixture(scope="module")
def encoder():
  return tiny_encoder()


CONFIG = UaeConfig(
  attribute_steps=6, cooccurrence_steps=6, batch_size=8, learning_rate=1e-3, max_tokens=32
)


def flat(params):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


# Multi-positive InfoNCE


def cosines(matrix):
  """Rows of norm 1 with these cosines."""
  return jnp.asarray(np.linalg.cholesky(np.array(matrix)), jnp.float32)


def all_valid(size):
  return np.ones((size, size), bool)


def test_nce_of_three_rows_by_hand():
  # Cosines of row 0: 0.5 and 0; of row 1: 0.5 and 0.5. With tau = 0.5 the logits double.
  z_BD = cosines([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]])
  positive_BB = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 0]], bool)
  loss_B, has_B = multi_positive_nce(z_BD, positive_BB, all_valid(3), 0.5)
  np.testing.assert_allclose(loss_B, [-np.log(np.e / (np.e + 1)), 0, 0], atol=1e-6)
  assert has_B.tolist() == [True, True, False]


def test_nce_takes_one_logarithm_of_the_sum_over_positives():
  z_BD = jnp.eye(4)  # all cosines 0: each term of both sums is 1
  positive_BB = np.zeros((4, 4), bool)
  positive_BB[0, [1, 2]] = True
  loss_B, _ = multi_positive_nce(z_BD, positive_BB, all_valid(4), 0.07)
  assert loss_B[0] == pytest.approx(np.log(3 / 2))  # not the mean of log 3 and log 3


def test_nce_with_one_positive_is_cross_entropy_over_the_others():
  rng = np.random.default_rng(0)
  z_BD = rng.standard_normal((6, 5))
  z_BD /= np.linalg.norm(z_BD, axis=1, keepdims=True)
  target_B = (np.arange(6) + 2) % 6
  loss_B, _ = multi_positive_nce(
    jnp.asarray(z_BD, jnp.float32), np.eye(6, dtype=bool)[target_B], all_valid(6), 0.1
  )
  for i, target in enumerate(target_B):
    others = np.delete(np.arange(6), i)
    logits = z_BD[others] @ z_BD[i] / 0.1
    expected = np.log(np.exp(logits).sum()) - z_BD[target] @ z_BD[i] / 0.1
    assert loss_B[i] == pytest.approx(expected, rel=1e-4)


def random_case(size=8):
  rng = np.random.default_rng(1)
  z_BD = rng.standard_normal((size, 4)).astype(np.float32)
  z_BD /= np.linalg.norm(z_BD, axis=1, keepdims=True)
  valid_BB = rng.random((size, size)) < 0.8
  return z_BD, rng.random((size, size)) < 0.3, valid_BB


def test_nce_does_not_depend_on_the_order_of_the_batch():
  z_BD, positive_BB, valid_BB = random_case()
  order = np.random.default_rng(2).permutation(8)
  loss_B, has_B = multi_positive_nce(z_BD, positive_BB, valid_BB, 0.07)
  moved_B, moved_has_B = multi_positive_nce(
    z_BD[order], positive_BB[order][:, order], valid_BB[order][:, order], 0.07
  )
  np.testing.assert_allclose(loss_B[order], moved_B, rtol=1e-5)
  np.testing.assert_array_equal(has_B[order], moved_has_B)


def test_nce_ignores_what_is_not_valid():
  z_BD, positive_BB, valid_BB = random_case()
  valid_BB[:, 3] = False
  loss_B, _ = multi_positive_nce(z_BD, positive_BB, valid_BB, 0.07)
  others = np.delete(np.arange(8), 3)
  without_B, _ = multi_positive_nce(
    z_BD[others], positive_BB[np.ix_(others, others)], valid_BB[np.ix_(others, others)], 0.07
  )
  np.testing.assert_allclose(loss_B[others], without_B, rtol=1e-5)


def test_nce_of_rows_without_positives_costs_nothing_and_moves_nothing():
  z_BD, positive_BB, valid_BB = random_case()
  none = np.zeros_like(positive_BB)

  def total(z_BD):
    return multi_positive_nce(z_BD, none, valid_BB, 0.07)[0].sum()

  assert total(z_BD) == 0
  np.testing.assert_array_equal(jax.grad(total)(z_BD), np.zeros_like(z_BD))
  # Nor where a batch has no valid pair at all.
  loss_B, has_B = multi_positive_nce(z_BD, positive_BB, none, 0.07)
  assert not has_B.any() and not np.asarray(loss_B).any()


def test_nce_is_finite_for_extreme_logits():
  z_BD = jnp.array([[1.0, 0], [1, 0], [-1, 0], [0, 1]])
  positive_BB = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)

  def total(z_BD):
    return multi_positive_nce(z_BD, positive_BB, all_valid(4), 1e-5)[0].sum()

  assert total(z_BD) == pytest.approx(2e5)  # row 0 alone: from cosine 1 down to -1
  assert np.isfinite(jax.grad(total)(z_BD)).all()


# Attributes


def test_attribute_loss_is_the_mean_over_known_attributes():
  class_BN = np.array([[1, 0], [0, -1], [-1, -1]])
  heads = init_heads(np.array([[3, 1]]), 2)
  assert [head["bias"].shape for head in heads] == [(4,), (2,)]
  z_BD = jnp.array([[1.0, 0], [0, 1], [0.6, 0.8]])
  loss_B = attribute_loss(z_BD, heads, class_BN)
  np.testing.assert_allclose(loss_B, [(np.log(4) + np.log(2)) / 2, np.log(4), 0], rtol=1e-6)
  gradient_BD = jax.grad(lambda z: attribute_loss(z, heads, class_BN)[2])(z_BD)
  assert not np.asarray(gradient_BD).any()


def test_attribute_loss_reads_the_embedding_times_the_root_of_its_width():
  heads = [{"kernel": jnp.array([[1.0, 0]] + [[0, 0]] * 3), "bias": jnp.zeros(2)}]
  loss_B = attribute_loss(jnp.array([[1.0, 0, 0, 0]]), heads, np.array([[0]]))
  np.testing.assert_allclose(loss_B, [np.log(1 + np.exp(-2))], rtol=1e-6)


# What a batch holds


def planned(ads, pairs, train_A=None, **options):
  train = training_ads(ads, pairs, train_A, min_class_count=2, masked_variants=2, seed=0)
  options = {
    "attribute_steps": 4, "cooccurrence_steps": 4, "pair_share": 1.0, "mask_share": 0.5
  } | options
  return train, plan_batches(train, batch_size=8, seed=0, **options)


def test_held_out_ads_are_in_no_batch_and_no_class():
  ads, train_A = catalogue(), np.arange(40) % 3 > 0
  ads.text[~train_A] = "heldoutword"
  ads.advertiser_id[~train_A] = "heldoutbrand"
  train, plan = planned(ads, ring_pairs(), train_A)
  assert not any("heldout" in text for text in plan.texts)
  assert len(train.ads.ad_id) == train_A.sum() == train.score_AA.shape[0]
  assert train.class_AN[:, -1].max() + 1 == len(BRANDS)


def test_fields_are_hidden_in_the_given_share_of_the_texts():
  for share in (0.0, 1.0):
    _, plan = planned(catalogue(), ring_pairs(), mask_share=share)
    for step in range(8):
      for u in plan.text_SB[step]:
        hides = "category:" not in plan.texts[u] or "advertiser:" not in plan.texts[u]
        assert hides == bool(share)
        if "advertiser:" not in plan.texts[u]:
          assert not any(brand in plan.texts[u] for brand in BRANDS)


def test_each_anchor_of_the_second_stage_has_a_positive():
  train, plan = planned(catalogue(), ring_pairs())
  for step in range(4, 8):
    positive_BB, valid_BB = pair_masks(train, plan, step)
    distance_BB = np.abs(plan.ad_SB[step][:, None] - plan.ad_SB[step]) % 40
    together_BB = np.isin(np.minimum(distance_BB, 40 - distance_BB), (1, 2))
    np.testing.assert_array_equal(positive_BB, together_BB)
    assert positive_BB[:4].any(-1).all()
    np.testing.assert_array_equal(valid_BB, distance_BB > 0)


def test_the_rest_of_a_batch_is_a_sample_of_all_ads():
  pairs = ItemPairs(np.array([0], np.int32), np.array([1], np.int32), np.ones(1, np.float32))
  _, plan = planned(catalogue(), pairs, attribute_steps=0, cooccurrence_steps=60, pair_share=0.5)
  assert set(plan.ad_SB[:, :4].ravel()) == {0, 1}
  assert set(plan.ad_SB[:, 4:].ravel()) == set(range(40))


def test_ads_of_one_text_are_neither_positives_nor_negatives():
  ads = catalogue(8)
  for field in ("text", "advertiser_id", "category"):
    getattr(ads, field)[2] = getattr(ads, field)[0]  # ads 0 and 2 read the same
  together = ItemPairs(
    np.array([0, 0, 2], np.int32), np.array([2, 5, 7], np.int32), np.ones(3, np.float32)
  )
  train, plan = planned(ads, together)
  assert train.score_AA[0].toarray().ravel().tolist() == [0] * 5 + [1, 0, 0]
  for step in range(8):
    ad_B = plan.ad_SB[step]
    _, valid_BB = pair_masks(train, plan, step)
    twins_BB = np.isin(ad_B, (0, 2))[:, None] & np.isin(ad_B, (0, 2))
    assert not valid_BB[twins_BB].any()


def test_neighbours_are_drawn_in_proportion_to_their_scores():
  ads = catalogue(8)
  pairs = ItemPairs(
    np.array([0, 0], np.int32), np.array([1, 2], np.int32), np.array([3, 1], np.float32)
  )
  train, plan = planned(ads, pairs, attribute_steps=0, cooccurrence_steps=1500)
  anchor_N, neighbour_N = plan.ad_SB[:, :4].ravel(), plan.ad_SB[:, 4:].ravel()
  drawn = neighbour_N[anchor_N == 0]
  assert set(drawn) == {1, 2}
  assert np.mean(drawn == 1) == pytest.approx(0.75, abs=0.04)  # 4 standard errors


# The training


@pytest.fixture(scope="module")
def tuned(encoder):
  return fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=CONFIG)


def test_only_the_upper_layers_change_and_the_seed_decides(encoder, tuned):
  own, new = encoder.params, tuned
  for name in ("token_table", "position_table", "segment"):
    np.testing.assert_array_equal(own[name], new[name])
  for before, after in zip(
    jax.tree.leaves(own["layers"]), jax.tree.leaves(new["layers"]), strict=True
  ):
    np.testing.assert_array_equal(before[0], after[0])
    assert before.shape == after.shape
  assert (own["layers"]["up_kernel"][1] != new["layers"]["up_kernel"][1]).all()
  again = fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=CONFIG)
  np.testing.assert_array_equal(flat(again), flat(new))
  other = fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=CONFIG, seed=1)
  assert (flat(other) != flat(new)).any()


def test_held_out_ads_change_nothing(encoder):
  train_A = np.arange(40) < 32
  ads, changed = catalogue(), catalogue()
  for field in ("text", "advertiser_id", "category"):
    getattr(changed, field)[~train_A] = "something else"
  config = dataclasses.replace(CONFIG, attribute_steps=3, cooccurrence_steps=3)
  one, two = (
    fine_tune(a, ring_pairs(), encoder=encoder, config=config, train_A=train_A)
    for a in (ads, changed)
  )
  np.testing.assert_array_equal(flat(one), flat(two))


class _Interrupted(Exception):
  pass


@pytest.mark.parametrize("last_step", [3, 6, 8])
def test_an_interrupted_training_ends_in_the_same_bits(encoder, tuned, tmp_path, last_step):
  def stopping(items, description, **_):
    for n, item in enumerate(items):
      if description == "fine-tune" and n == last_step:
        raise _Interrupted
      yield item

  def resume():
    return ResumeFile(tmp_path / "uae.npz", "key", seconds_between_saves=0)

  done = []

  def counting(items, description, total, completed=0):
    done.append((description, completed))
    return items

  with pytest.raises(_Interrupted):
    fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=CONFIG, resume=resume(),
              progress=stopping)  # fmt: skip
  params = fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=CONFIG, resume=resume(),
                     progress=counting)  # fmt: skip
  assert done[-1] == ("fine-tune", last_step)
  np.testing.assert_array_equal(flat(params), flat(tuned))


def test_without_memory_for_hidden_states_the_result_is_the_same(encoder, tuned):
  params = fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=CONFIG, state_bytes=0)
  np.testing.assert_allclose(flat(params), flat(tuned), atol=2e-3)  # states round to float16


@pytest.mark.parametrize("stage", ["attribute_steps", "cooccurrence_steps"])
def test_a_stage_of_0_steps_is_off(encoder, tuned, stage):
  config = dataclasses.replace(CONFIG, **{stage: 0})
  params = fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=config)
  assert (flat(params) != flat(tuned)).any() and (flat(params) != flat(encoder.params)).any()


def test_the_end_of_the_first_stage_is_told(encoder, tuned):
  """It is what a training of the first stage alone ends with."""
  told = []
  params = fine_tune(
    catalogue(), ring_pairs(), encoder=encoder, config=CONFIG, after_attributes=told.append
  )
  np.testing.assert_array_equal(flat(params), flat(tuned))  # looking changes nothing
  alone = fine_tune(
    catalogue(), ring_pairs(), encoder=encoder,
    config=dataclasses.replace(CONFIG, cooccurrence_steps=0),
  )
  assert len(told) == 1
  np.testing.assert_allclose(flat(told[0]), flat(alone), atol=1e-6)


def test_without_any_step_the_encoder_stays(encoder):
  config = dataclasses.replace(CONFIG, attribute_steps=0, cooccurrence_steps=0)
  params = fine_tune(catalogue(), None, encoder=encoder, config=config)
  np.testing.assert_array_equal(flat(params), flat(encoder.params))


def test_all_layers_may_learn(encoder):
  config = dataclasses.replace(
    CONFIG, trainable_layers=2, attribute_steps=2, cooccurrence_steps=0
  )
  params = fine_tune(catalogue(), ring_pairs(), encoder=encoder, config=config)
  assert (params["layers"]["up_kernel"] != encoder.params["layers"]["up_kernel"]).all()
  np.testing.assert_array_equal(params["token_table"], encoder.params["token_table"])


def margin(ads, group_A, encoder, **options):
  """Mean cosine of ads of a group, less that of all ads."""
  z_AD = embed_inputs(ad_inputs(ads), encoder, max_tokens=32, **options)
  same_AA, cosine_AA = group_A[:, None] == group_A, z_AD @ z_AD.T
  return cosine_AA[same_AA].mean() - cosine_AA.mean()


def test_attributes_bring_ads_of_a_brand_together(encoder):
  ads, brand_A = catalogue(), np.arange(40) % 4
  config = dataclasses.replace(
    CONFIG, attribute_steps=60, cooccurrence_steps=0, learning_rate=1e-2
  )
  params = fine_tune(ads, None, encoder=encoder, config=config)
  before = margin(ads, brand_A, encoder)
  assert margin(ads, brand_A, encoder, params=params) > 2 * before > 0


def test_cooccurrence_brings_together_what_goes_together(encoder):
  # Ads of one colour go together; the colour is no attribute.
  ads, colour_A = catalogue(), np.arange(40) % 5
  item_P = np.repeat(np.arange(40, dtype=np.int32), 2)
  neighbour_P = (item_P + np.tile(np.int32([5, 10]), 40)) % 40
  pairs = ItemPairs(item_P, neighbour_P, np.ones(80, np.float32))
  config = dataclasses.replace(
    CONFIG, attribute_steps=0, cooccurrence_steps=60, learning_rate=1e-2, mask_share=0.0,
    pair_share=1.0,
  )
  params = fine_tune(ads, pairs, encoder=encoder, config=config)
  before = margin(ads, colour_A, encoder)
  assert margin(ads, colour_A, encoder, params=params) > before + 0.2


# Files and the border


def test_saved_parameters_come_back(encoder, tuned, tmp_path):
  save_params(tmp_path / "tuned.npz", tuned, encoder=encoder)
  loaded = load_params(tmp_path / "tuned.npz", encoder=encoder)
  assert jax.tree.structure(loaded) == jax.tree.structure(tuned)
  np.testing.assert_array_equal(flat(loaded), flat(tuned))
  size = (tmp_path / "tuned.npz").stat().st_size
  assert size < flat(encoder.params["layers"]).nbytes  # the frozen layer is not in the file


def test_parameters_of_another_encoder_are_refused(encoder, tuned, tmp_path):
  save_params(tmp_path / "tuned.npz", tuned, encoder=encoder)
  other = dataclasses.replace(encoder, name="other", params=tuned)
  with pytest.raises(ValueError, match="not fine-tuned from the encoder 'other'"):
    load_params(tmp_path / "tuned.npz", encoder=other)
  with pytest.raises(ValueError, match="not readable"):
    load_params(tmp_path / "missing.npz", encoder=encoder)


def test_embeddings_come_from_the_cache_of_their_parameters(encoder, tuned, tmp_path):
  ads, options = catalogue(), {"max_tokens": 32, "cache": tmp_path}
  own_AD = embed_inputs(ad_inputs(ads), encoder, **options)
  tuned_AD = embed_inputs(ad_inputs(ads), encoder, params=tuned, **options)
  assert own_AD.shape == (40, 16) and own_AD.dtype == np.float32
  assert (own_AD != tuned_AD).any()
  np.testing.assert_allclose(np.linalg.norm(tuned_AD, axis=1), 1, atol=1e-6)
  assert len(list(tmp_path.iterdir())) == 2
  again_AD = embed_inputs(ad_inputs(ads), encoder, params=tuned, **options)
  np.testing.assert_array_equal(again_AD, tuned_AD)
  unread = dataclasses.replace(encoder, tokenizer=None)  # all of it is in the cache
  cached_AD = embed_inputs(ad_inputs(ads), unread, params=tuned, **options)
  np.testing.assert_array_equal(cached_AD, tuned_AD)


def test_contents_are_read_like_ads(encoder):
  contents = ContentTable(
    np.array(["c0", "c1"], object), np.array([-1, -1]), np.array(["home > tool", ""], object),
    np.array(["acme red", "bolt"], object),
  )  # fmt: skip
  embedding_OD = embed_inputs(content_inputs(contents), encoder, max_tokens=32)
  instruction = INSTRUCTIONS["product"]
  expected_OD = encode_with(
    encoder,
    [f"{instruction} category: home > tool. text: acme red", f"{instruction} text: bolt"],
    max_tokens=32,
  )
  np.testing.assert_allclose(embedding_OD, expected_OD, atol=1e-6)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("trainable_layers", 0), ("attribute_steps", -1), ("cooccurrence_steps", -1),
    ("batch_size", 7), ("batch_size", 0), ("learning_rate", 0.0), ("head_learning_rate", -1.0),
    ("weight_decay", -0.1), ("temperature", 0.0), ("mask_share", 1.5), ("masked_variants", -1),
    ("attribute_weight", float("nan")), ("min_class_count", 0), ("max_tokens", 0),
  ],
)  # fmt: skip
def test_bad_configs_are_named(field, value):
  with pytest.raises(ValueError, match=f"{field}={value}"):
    UaeConfig(**{field: value})


def test_bad_arguments_are_named(encoder):
  ads, pairs = catalogue(), ring_pairs()

  def refused(message, *, pairs=pairs, train_A=None, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=message):
      fine_tune(ads, pairs, encoder=encoder, config=config, train_A=train_A)

  refused("trainable_layers: 3, the encoder has 2", trainable_layers=3)
  refused(r"max_tokens: 64, must be in 1..32", max_tokens=64)
  refused("train_A: bool", train_A=np.ones(3, bool))
  refused("train_A: no ad", train_A=np.zeros(40, bool))
  refused("cooccurrence_steps: 6, but no two ads", pairs=None)
  refused("attribute_steps: 6, but no attribute", min_class_count=50)
  refused("learning_rate: 1e.30, the training diverged", learning_rate=1e30)


# Retrieval of held-out ads


def test_held_out_retrieval_by_hand():
  # Queries 0 and 1 (labels 0 and 1); the gallery lies at angles of 10, 20, 30 degrees from both.
  def at(degrees):
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]

  x_AD = np.array([at(0), at(0), at(10), at(20), at(30)], np.float32)
  label_A, query_A = np.array([0, 1, 0, 1, -1]), np.array([1, 1, 0, 0, 0], bool)
  assert held_out_retrieval(x_AD, label_A, query_A, ks=(1, 2)) == {1: 0.5, 2: 1.0}
  # Nobody's label, and one that the gallery lacks, are no queries.
  label_A[0] = -1
  assert held_out_retrieval(x_AD, label_A, query_A, ks=(1, 2)) == {1: 0.0, 2: 1.0}
  label_A[1] = 7
  assert held_out_retrieval(x_AD, label_A, query_A) == {}


def test_held_out_retrieval_counts_ties_by_expectation():
  x_AD = np.array([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]], np.float32)
  label_A, query_A = np.array([0, 0, 1, 1, 1]), np.array([1, 0, 0, 0, 0], bool)
  hits = held_out_retrieval(x_AD, label_A, query_A, ks=(1, 2, 3, 4, 9))
  # Ad 4 is nearest; then three at one distance, one of them right.
  np.testing.assert_allclose([hits[k] for k in (1, 2, 3, 4, 9)], [0, 1 / 3, 2 / 3, 1, 1])
