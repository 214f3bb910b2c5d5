"""The three decoders: by hand, by invariance, and teacher forcing against step-by-step decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.data.shortlist import NUMBERS
from gr4ad_jax.gr4ad.batch import Context
from gr4ad_jax.gr4ad.build import build_decoder, init_params, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig, preset
from gr4ad_jax.gr4ad.copy_path import CopyScore
from gr4ad_jax.gr4ad.lazy_decoder import Fuse
from gr4ad_jax.search.generator import whatever
from gr4ad_jax.training.task import count_params
from tests.support import VOCABULARY, random_codes, random_context, shaken_params

SMALL = ModelConfig(width=16, num_heads=2, num_layers=3, num_lazy_layers=2)
VARIANTS = {
  "lazy": SMALL,
  "lazy, copy path": dataclasses.replace(SMALL, copy_path=True),
  "lazy, projected, layer norm, fused bos": dataclasses.replace(
    SMALL, kv_mode="projected", norm="layer", fuse_bos=True
  ),
  "autoregressive, copy path": dataclasses.replace(
    SMALL, decoder="autoregressive", copy_path=True
  ),
  "multi-token": dataclasses.replace(SMALL, decoder="multi_token", kv_mode="projected"),
  "multi-token, copy path": dataclasses.replace(SMALL, decoder="multi_token", copy_path=True),
  "autoregressive, item scorer": dataclasses.replace(
    SMALL, decoder="autoregressive", copy_path=True, item_scorer=True, item_width=8,
    history_length=6,
  ),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request):
  """A decoder whose gates are not at their neutral start."""
  decoder = build_decoder(VARIANTS[request.param], VOCABULARY)
  params = shaken_params(decoder)
  forced = jax.jit(lambda context, codes: decoder.apply({"params": params}, context, codes))
  return decoder, params, forced


def test_level_sees_only_earlier_codes(model):
  _, _, forced = model
  rng = np.random.default_rng(0)
  context, codes = random_context(rng, 2), random_codes(rng, 2, 3)
  base = forced(context, codes)
  for changed in range(3):
    other = codes.copy()
    other[..., changed] = (other[..., changed] + 1) % VOCABULARY.codebook_sizes[changed]
    new = forced(context, other)
    for level in range(3):
      same = np.allclose(new.sid_BCL[..., level], base.sid_BCL[..., level], atol=1e-5)
      assert same == (level < changed), (changed, level)
    assert not np.allclose(new.ecpm_BCV, base.ecpm_BCV, atol=1e-5)  # the value follows the SID


def test_unfused_pass_ignores_every_other_code(model):
  _, _, forced = model
  rng = np.random.default_rng(1)
  context, codes = random_context(rng, 2), random_codes(rng, 2, 3)
  base = forced(context, codes).mtp_BCL
  if base is None:
    return  # the ordinary decoder has no such pass
  for changed in range(3):
    other = codes.copy()
    other[..., changed] = (other[..., changed] + 1) % VOCABULARY.codebook_sizes[changed]
    kept = [level for level in range(3) if level != changed]
    np.testing.assert_allclose(
      forced(context, other).mtp_BCL[..., kept], base[..., kept], atol=1e-6
    )


def test_lazy_trunk_has_no_gradient_from_tokens():
  decoder = build_decoder(SMALL, VOCABULARY)
  params = init_params(decoder, jax.random.key(0))
  rng = np.random.default_rng(2)
  empty = random_context(rng, 1)._replace(
    ad_code_BTL=np.full((1, 5, 3), -1, np.int32), organic_code_BOL=np.full((1, 4, 3), -1, np.int32),
    trend_code_BNL=np.full((1, 3, 3), -1, np.int32),
  )  # no code enters through the context, so that only target tokens could

  def trunk_sum(params):
    shared, _, _ = start_fn(decoder)(params, empty, whatever)
    return jnp.sum(shared.start_BPD**2)

  grads = jax.jit(jax.grad(trunk_sum))(params)
  assert all(not np.any(g) for g in jax.tree.leaves(grads["tables"]))
  assert np.any(grads["lazy_layers_0"]["feed_forward"]["out"]["kernel"])


def test_a_position_of_the_trunk_sees_those_before_it_and_none_after():
  """Search and teacher forcing share the trunk, so that their agreement says nothing of it."""
  decoder = build_decoder(SMALL, VOCABULARY)
  params = shaken_params(decoder)
  context = random_context(np.random.default_rng(9), 1)

  def states(positions_PD):
    shared, _, _ = start_fn(decoder)(params | {"positions": positions_PD}, context, whatever)
    return jnp.sum(shared.start_BPD[0] ** 2, axis=-1)

  slope_PPD = jax.jit(jax.jacrev(states))(params["positions"])
  np.testing.assert_array_equal(np.any(slope_PPD != 0, axis=-1), np.tril(np.ones((4, 4), bool)))


@pytest.fixture(scope="module")
def reader():
  """Contexts of two requests -> log-probs, by a decoder that reads all fields; such a context."""
  config = dataclasses.replace(SMALL, id_rows=64, id_width=8, copy_path=True)
  decoder, rng = build_decoder(config, VOCABULARY), np.random.default_rng(10)
  context = random_context(rng, 2)
  copied, generated = context.short_code_BML[:1, :1], random_codes(rng, 1, 1)
  codes = np.concatenate([copied, generated], axis=1).astype(np.int32)
  context = context._replace(
    user_id_B=np.array([3, 50], np.int32), ad_id_BT=rng.integers(0, 64, (2, 5)).astype(np.int32)
  )
  params, codes = shaken_params(decoder), np.repeat(codes, 2, axis=0)
  fresh = init_params(decoder, jax.random.key(0))  # whose weights of ads are not all or nothing
  params["output"]["copy"] = fresh["output"]["copy"]
  return jax.jit(lambda context: decoder.apply({"params": params}, context, codes).sid_BCL), context


def test_every_field_of_the_context_is_read_and_rows_never_mix(reader):
  """A change to one field of the first request changes what it is shown, and no other request."""
  forced, context = reader
  base, sizes = np.asarray(forced(context)), np.array(VOCABULARY.codebook_sizes)
  for name, value in context.present().items():
    size = sizes if "code" in name else np.array((3, 4)) if name == "feature_BF" else 32
    other = value.copy()
    other[0] = (other[0] + 1) % size
    new = np.asarray(forced(context._replace(**{name: other})))
    assert np.abs(new[0] - base[0]).max() > 1e-3, name
    np.testing.assert_allclose(new[1], base[1], atol=1e-6, err_msg=name)


def test_the_same_number_of_two_features_is_not_the_same_value(reader):
  forced, context = reader
  alike = Context(**{name: np.repeat(x[:1], 2, axis=0) for name, x in context.present().items()})
  sid_BCL = np.asarray(forced(alike._replace(feature_BF=np.array([[1, 2], [2, 1]], np.int32))))
  assert np.abs(sid_BCL[0] - sid_BCL[1]).max() > 1e-3


@pytest.mark.parametrize("traced", [False, True], ids=["static level", "traced level"])
def test_steps_equal_teacher_forcing(model, traced):
  decoder, params, forced = model
  rng = np.random.default_rng(3)
  context, codes = random_context(rng, 2), random_codes(rng, 2, 4)
  expected = forced(context, codes)

  @jax.jit
  def decode(context, codes):
    shared, state, logp_B1V = start_fn(decoder)(params, context, whatever)
    state = jax.tree.map(lambda x: jnp.repeat(x, codes.shape[1], axis=1), state)
    logp = [jnp.repeat(logp_B1V, codes.shape[1], axis=1)]
    for level in range(1, 4):
      at = jnp.int32(level) if traced and level < 3 else level
      state, logp_BCV = step_fn(decoder)(params, shared, state, codes[..., level - 1], at)
      logp.append(logp_BCV)
    return logp

  *levels, ecpm = decode(context, codes)
  for level, logp_BCV in enumerate(levels):
    picked = np.take_along_axis(np.asarray(logp_BCV), codes[..., level][..., None], axis=-1)
    np.testing.assert_allclose(picked[..., 0], expected.sid_BCL[..., level], atol=2e-5)
    total = np.exp(np.asarray(logp_BCV, np.float64)).sum(axis=-1)
    np.testing.assert_allclose(total, 1, atol=1e-5)  # a distribution, copy path or not
  np.testing.assert_allclose(ecpm, expected.ecpm_BCV, atol=2e-5)


def test_means_over_codes_are_those_of_all_targets(model):
  """Each code in the place of a target's tells what it would have been worth."""
  decoder, params, forced = model
  context = random_context(np.random.default_rng(5), 2)
  codes = context.ad_code_BTL[:, :2].copy()  # so that there is something to copy
  codes[:, 1, 2] = (codes[:, 1, 2] + 1) % VOCABULARY.codebook_sizes[2]
  means = decoder.apply({"params": params}, context, codes, code_means=True).code_mean_BCL
  for level, size in enumerate(VOCABULARY.codebook_sizes):
    other, total = codes.copy(), 0
    for code in range(size):
      other[..., level] = code
      total = total + np.asarray(forced(context, other).sid_BCL[..., level])
    np.testing.assert_allclose(means[..., level], total / size, rtol=1e-4)
  assert forced(context, codes).code_mean_BCL is None


def test_padding_changes_nothing(model):
  _, _, forced = model
  rng = np.random.default_rng(4)
  context, codes = random_context(rng, 2), random_codes(rng, 2, 3)

  def pad(x, width):
    filler = np.full((2, width, *x.shape[2:]), -1, np.int32)
    return np.concatenate([x, filler], axis=1)

  padded = Context(**{
    name: pad(value, 3) if name.startswith(("ad_", "organic_")) else value
    for name, value in context.present().items()
  })
  for a, b in zip(forced(context, codes), forced(padded, codes), strict=True):
    if a is not None:
      np.testing.assert_allclose(a, b, atol=2e-5)
  extra = np.concatenate([codes, np.full((2, 1, 3), -1)], axis=1)
  np.testing.assert_allclose(
    forced(context, extra).sid_BCL[:, :3], forced(context, codes).sid_BCL, atol=2e-5
  )


def test_history_order_matters_to_the_item_scorer_alone(model):
  """Cross-attention has no positions: recency enters by buckets alone."""
  decoder, _, forced = model
  rng = np.random.default_rng(5)
  context, codes = random_context(rng, 2), random_codes(rng, 2, 3)
  order = np.array([3, 1, 0, 4, 2])
  shuffled = context._replace(**{
    name: getattr(context, name)[:, order]
    for name in ("ad_code_BTL", "ad_count_BT", "ad_age_BT", "ad_trend_BT", "ad_id_BT")
  })
  moved_BCL = np.abs(forced(shuffled, codes).sid_BCL - forced(context, codes).sid_BCL)
  assert (moved_BCL.max() > 1e-3) == decoder.config.item_scorer
  assert decoder.config.item_scorer or moved_BCL.max() < 2e-5


def test_empty_context_is_finite(model):
  _, _, forced = model
  context = Context(**{
    name: np.full_like(value, 0 if name == "feature_BF" else -1)
    for name, value in random_context(np.random.default_rng(6), 1).present().items()
  })
  assert np.isfinite(forced(context, random_codes(np.random.default_rng(6), 1, 2)).sid_BCL).all()


def test_copy_path_mixture_by_hand():
  """p(SID) = (1 - g) p_gen(SID) + g sum of a_i over its ads; code by code it is the same."""
  decoder = build_decoder(dataclasses.replace(SMALL, copy_path=True), VOCABULARY)
  params = init_params(decoder, jax.random.key(0))
  promoted = NUMBERS.index("promoted engagements, half-life 112 d")
  number_BMF = np.zeros((1, 5, len(NUMBERS)), np.int32)
  number_BMF[0, :, promoted] = np.rint(1024 * np.log1p([4, 2, 1, 1, 9]))
  context = random_context(np.random.default_rng(7), 1)._replace(
    short_code_BML=np.array(
      [[[2, 4, 1], [2, 4, 3], [2, 4, 1], [1, 0, 2], [-1, -1, -1]]], np.int32  # the last is none
    ),
    short_number_BMF=number_BMF,
  )

  @jax.jit
  def forced(params, code_BCL):
    return decoder.apply({"params": params}, context, code_BCL).sid_BCL

  def gated(logit):
    copy = params["output"]["copy"] | {"gate_bias": jnp.asarray(logit / 8)}
    return params | {"output": params["output"] | {"copy": copy}}

  codes = np.array([[[2, 4, 1], [2, 4, 3], [1, 0, 2], [5, 1, 1], [2, 0, 0]]], np.int32)
  share = np.array([5 / 8, 2 / 8, 1 / 8, 0, 0])
  generated = np.exp(forced(gated(-1e9), codes).sum(-1))[0]
  g = 1 / (1 + np.exp(-1.0))
  mixed = np.exp(forced(gated(1.0), codes).sum(-1))[0]
  np.testing.assert_allclose(mixed, (1 - g) * generated + g * share, rtol=2e-3)


def test_an_empty_shortlist_leaves_all_to_the_generator():
  decoder = build_decoder(dataclasses.replace(SMALL, copy_path=True), VOCABULARY)
  context = random_context(np.random.default_rng(9), 1)
  nothing = {name: np.full_like(getattr(context, name), -1)
             for name in ("short_code_BML", "short_number_BMF")}
  params = init_params(decoder, jax.random.key(0))
  _, _, logp_B1V = start_fn(decoder)(params, context._replace(**nothing), whatever)
  assert np.exp(logp_B1V).sum() == pytest.approx(1, abs=1e-5)


def test_copying_starts_by_own_counts_and_share():
  """exp(score): engagements at 112 days, organic ones times .3, and 160 times the share."""
  x = {
    "promoted engagements, half-life 112 d": [2, 0, 0.5],
    "promoted engagements, half-life 7 d": [1, 0, 0],
    "organic engagements, half-life 112 d": [0, 3, 1],
    "share of all engagements, half-life 1.5 d": [0, 0, 0.01], "price": [4, 0, 9],
  }
  number_BMF = np.zeros((1, 3, len(NUMBERS)), np.int32)
  for name, values in x.items():
    unit = 1e6 if name.startswith("share") else 1.0
    number_BMF[0, :, NUMBERS.index(name)] = np.rint(1024 * np.log1p(np.array(values) * unit))
  code_BML = np.array([[[0, 2], [1, 0], [1, 1]]])
  score_BM, params = CopyScore((2, 3)).init_with_output(jax.random.key(0), number_BMF, code_BML)
  np.testing.assert_allclose(np.exp(score_BM[0]), [2, 0.9, 0.5 + 0.3 + 1.6], rtol=2e-3)
  # Once it has learned something, ads of equal numbers differ by their codes.
  params["params"]["last_kernel"] = jnp.ones((32, 1))
  same_BMF = np.repeat(number_BMF[:, :1], 3, axis=1)
  score_BM = CopyScore((2, 3)).apply(params, same_BMF, np.array([[[0, 2], [1, 2], [0, 2]]]))
  assert score_BM[0, 0] == score_BM[0, 2] != score_BM[0, 1]
  # And a code is worth something by itself; parameters count 2.5 times.
  params["params"] |= {"worth_0": jnp.array([0.2, 0.4]), "worth_1": jnp.array([0.0, 0.0, 4.0])}
  worth_BM = CopyScore((2, 3)).apply(params, same_BMF, np.array([[[0, 2], [1, 2], [0, 2]]]))
  np.testing.assert_allclose(worth_BM - score_BM, [[10.5, 11.0, 10.5]], rtol=1e-4)


def test_with_neighbours_copying_starts_by_their_rule():
  """exp(score): own engagements, and what followed, came before, was alike and known by half."""
  near = [2, 1, 3, 4, 5, 0, 0, 5]  # 2 + .3 + .6 * (3 + 4) + .6 * 5 * 5 / (5 + 5)
  number_BMF = np.zeros((1, 3, len(NUMBERS) + len(near)), np.int32)
  stored = np.rint(1024 * np.log1p(near * np.array([20, 20, 20, 20, 4, 20, 400, 1])))
  number_BMF[0, :2, len(NUMBERS) :] = stored
  number_BMF[0, 1, NUMBERS.index("promoted engagements, half-life 112 d")] = 1024 * np.log1p(3)
  score_BM, params = CopyScore(()).init_with_output(
    jax.random.key(0), number_BMF, np.zeros((1, 3, 2), np.int32)
  )
  np.testing.assert_allclose(np.exp(score_BM[0]), [8, 11, 1e-6], rtol=3e-3)
  assert set(params["params"]) == {
    "rule", "near", "last_kernel",
    *(f"{layer}_{kind}" for layer in ("first", "second") for kind in ("kernel", "bias")),
  }


def test_fuse_by_hand():
  """Eq. 10 on numbers: W_f [m * (W_g s) ; s]."""
  config = ModelConfig(width=2, num_heads=1, num_layers=1, num_lazy_layers=0)
  params = {
    "gate": {"kernel": jnp.array([[1.0, 2.0], [0.0, 1.0]])},
    "out": {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])},
  }
  m, s = jnp.array([3.0, 5.0]), jnp.array([1.0, 2.0])
  # s W_g = (1, 4); m * that = (3, 20); [3, 20, 1, 2] W_f = (3 + 1, 20 + 1 + 4)
  np.testing.assert_allclose(Fuse(config).apply({"params": params}, m, s), [4.0, 25.0])


@pytest.mark.parametrize(
  ("name", "billions"),
  [("0.03b", 0.027), ("0.08b", 0.079), ("0.16b", 0.157), ("0.32b", 0.311)],
)
def test_paper_presets_have_the_papers_sizes(name, billions):
  """Reference 2.7: 126 d^2 of layers, 3 d^2 of Fuse, 21504 d of tables; ours adds the context."""
  vocabulary = dataclasses.replace(
    VOCABULARY, codebook_sizes=(16384, 4096, 1024), num_ecpm_bins=32, num_trending=0
  )
  decoder = build_decoder(preset(name).model, vocabulary)
  params = jax.eval_shape(lambda key: init_params(decoder, key), jax.random.key(0))
  width = decoder.config.width
  core = count_params(
    {k: v for k, v in params.items() if k.startswith(("layers", "lazy", "fuse", "tables"))}
  )
  assert core == pytest.approx(129 * width**2 + 21504 * width, rel=0.01)
  assert core == pytest.approx(billions * 1e9, rel=0.02)


def test_dropout_needs_training_mode():
  decoder = build_decoder(dataclasses.replace(SMALL, dropout=0.5), VOCABULARY)
  params = init_params(decoder, jax.random.key(0))
  rng = np.random.default_rng(8)
  context, codes = random_context(rng, 1), random_codes(rng, 1, 1)

  @jax.jit
  def run(key):
    return decoder.apply(
      {"params": params}, context, codes, deterministic=False, rngs={"dropout": jax.random.key(key)}
    ).sid_BCL

  assert not np.allclose(run(0), run(1))
  np.testing.assert_array_equal(run(0), run(0))
