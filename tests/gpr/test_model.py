"""The whole model: training and search say the same, and a label is told of nothing too late."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.catalog.prepared import open_prepared
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.gpr.batch import Batch, Context, Vocabulary
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.config import GuidedSearchConfig, LossConfig, StreamConfig
from gr4ad_jax.gpr.generator import generator_of
from gr4ad_jax.gpr.hte import range_losses, value_losses
from gr4ad_jax.gpr.label_rows import LabelRows
from gr4ad_jax.gpr.model import BeamState, Gpr, init_params
from gr4ad_jax.gpr.mtp import entropy_gap, head_losses, head_weights, mtp_task
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.search.generator import named_arrays, whatever
from gr4ad_jax.training.task import Task
from tests.gpr.support import SIZES, SMALL, VOCABULARY, asked, log_probs, random_batch, shaken


@pytest.fixture(scope="module")
def small():
  model = Gpr(SMALL, VOCABULARY)
  return model, shaken(model), log_probs(model)


@pytest.mark.parametrize(("thinking", "traced"), [(0, False), (2, False), (2, True)])
def test_search_says_what_training_says(thinking, traced):
  """The first head at the last request, code by code, and the value of the ad; also where a search
  scans over levels.
  """
  model = Gpr(dataclasses.replace(SMALL, thinking=thinking, refining=thinking), VOCABULARY)
  params, batch = shaken(model), random_batch()
  said = asked(model)(params, *batch)
  expected_BL = said.logp_BPNL[:, -1, 0]
  generator, target_BL = generator_of(model), batch.target_BPNL[:, -1, 0]

  def search(params, context, target_BL, last):
    shared, state, logp_BWV = generator.start(params, context, whatever)
    found = [logp_BWV]
    # Two beams from the second level on, of which the second one goes astray.
    state = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), state)
    for level in (1, last):
      code_B = jax.lax.dynamic_index_in_dim(target_BL, level - 1, axis=1, keepdims=False)
      code_BW = jnp.stack([code_B, jnp.zeros_like(code_B)], axis=1)
      state, logp_BWV = generator.step(params, shared, state, code_BW, level)
      found.append(logp_BWV)
    last_BW = jnp.stack([target_BL[:, 2], jnp.zeros_like(target_BL[:, 0])], axis=1)
    return found, generator.step(params, shared, state, last_BW, 3)[1]

  compiled = jax.jit(search, static_argnames=() if traced else ("last",))
  found, value = compiled(params, batch.context, target_BL, last=2)
  for level, logp_BWV in enumerate(found):
    picked_B = np.asarray(logp_BWV)[np.arange(2), 0, target_BL[:, level]]
    np.testing.assert_allclose(picked_B, expected_BL[:, level], rtol=2e-4, atol=2e-5)
    whole = np.exp(np.asarray(logp_BWV, np.float64)).sum(axis=-1)
    np.testing.assert_allclose(whole, np.ones_like(whole), rtol=1e-5)
  if traced:
    assert found[-1].shape[-1] == max(SIZES) and (found[-1][..., 6:] <= NEG_INF / 2).all()
  # What V says is the value less its mean, in deviations; less than nothing is nothing.
  expected_B = np.maximum(5 + 2 * np.asarray(said.value_BPV)[:, -1, 3], 1e-6)
  assert value.shape == (2, 2, 1)
  np.testing.assert_allclose(np.exp(value[:, 0, 0]), expected_B, rtol=2e-4, atol=2e-5)


def test_no_level_sees_its_own_or_a_later_code(small):
  model, params, logp = small
  batch = random_batch()
  expected = np.asarray(logp(params, *batch))
  for level in range(3):
    changed = batch.target_BPNL.copy()
    changed[..., level] = (changed[..., level] + 1) % SIZES[level]
    found = np.asarray(logp(params, *batch._replace(target_BPNL=changed)))
    np.testing.assert_allclose(found[..., :level], expected[..., :level], atol=1e-5)
    if level < 2:
      assert np.abs(found[..., level + 1 :] - expected[..., level + 1 :]).min() > 0


def test_codes_that_lead_nowhere_have_no_probability(small):
  """By hand: p of the target among the codes that lead on, of what it was among all."""
  model, params, logp = small
  batch = random_batch()
  every_BPNLV = np.stack([  # log p of each code at the last level, the others as they are
    np.asarray(logp(params, *batch._replace(
      target_BPNL=np.concatenate([batch.target_BPNL[..., :2], np.full((2, 3, 3, 1), code)], -1)
    )))[..., 2] for code in range(6)
  ], axis=-1)
  leads_on = np.random.default_rng(1).random((2, 3, 3, 6)) < 0.5
  np.put_along_axis(leads_on, batch.target_BPNL[..., 2:], True, axis=-1)
  legal = batch.legal_BPNLU.copy()
  legal[..., 2, 0] = (leads_on * 2 ** np.arange(6)).sum(axis=-1)
  found = np.asarray(logp(params, *batch._replace(legal_BPNLU=legal)))
  before = np.asarray(logp(params, *batch))
  share = (np.exp(every_BPNLV) * leads_on).sum(axis=-1)
  np.testing.assert_allclose(found[..., :2], before[..., :2], atol=1e-5)
  np.testing.assert_allclose(found[..., 2], before[..., 2] - np.log(share), rtol=1e-4, atol=1e-5)


def test_heads_and_labels_do_not_see_each_other(small):
  model, params, logp = small
  batch = random_batch()
  expected = np.asarray(logp(params, *batch))
  changed = batch.target_BPNL.copy()
  changed[:, 1, 2] = (changed[:, 1, 2] + 1) % np.array(SIZES)
  found = np.asarray(logp(params, *batch._replace(target_BPNL=changed)))
  same = np.ones(expected.shape, bool)
  same[:, 1, 2] = False
  np.testing.assert_allclose(found[same], expected[same], atol=1e-5)


def test_a_label_is_told_of_nothing_that_came_with_or_after_its_request(small):
  """Ads of the label's own group and everything of later ones changed: the same to the last bit."""
  model, params, logp = small
  batch, other = random_batch(groups=5, labels=1), random_batch(groups=5, labels=1, seed=9)
  for group in range(4):
    asked = batch._replace(group_BP=np.full((2, 1), group, np.int32))
    expected = np.asarray(logp(params, *asked))
    context = {name: x.copy() for name, x in named_arrays(batch.context).items()}
    for name in ("request_BGF", "count_BG", "gap_BG"):
      context[name][:, group + 1 :] = getattr(other.context, name)[:, group + 1 :]
    for name, first in (("ad_code_BTL", group), ("ad_action_BT", group),
                        ("organic_code_BOL", group + 1)):
      context[name][:, 2 * first :] = getattr(other.context, name)[:, 2 * first :]
    found = np.asarray(logp(params, *asked._replace(context=Context(**context))))
    np.testing.assert_array_equal(found, expected)
    if group:  # and what came before is read
      context["ad_code_BTL"][:, :2] = other.context.ad_code_BTL[:, :2]
      found = np.asarray(logp(params, *asked._replace(context=Context(**context))))
      assert np.abs(found - expected).min() > 0


def test_padding_before_a_stream_changes_nothing(small):
  model, params, logp = small
  batch = random_batch(groups=4)
  wide = {}
  for name, x in named_arrays(batch.context).items():
    width = {"user_BF": 0, "ad_code_BTL": 4, "ad_action_BT": 4, "organic_code_BOL": 4}.get(name, 2)
    before = np.full((2, width, *x.shape[2:]), -1, np.int32)
    wide[name] = np.concatenate([before, x], axis=1) if width else x
  found = logp(params, Context(**wide), batch.group_BP + 2, *batch[2:4])
  np.testing.assert_allclose(found, logp(params, *batch), rtol=2e-4, atol=2e-5)


def test_thinking_tokens_are_what_each_position_gives_out_taken_in_by_the_next(small):
  """One whole causal pass over start, th_1, th_2 gives th_1, th_2 again."""
  model, params, _ = small

  def both(module: Gpr, context: Context):
    encoded = module.encode(context)
    mask_BCS = encoded.allowed_BSS[:, 14:15]  # the last request's
    ptd = module.ptd
    token_BCKD = ptd.think(encoded.intent_BSD, mask_BCS).token_BCKD
    start_BCKD = jnp.broadcast_to(ptd.start_D, (2, 1, 1, 16))
    h_BCQD = jnp.concatenate([start_BCKD, token_BCKD[:, :, :-1]], axis=2)
    h_BCQD += ptd.positions_PD[None, None, :2]
    for layer in ptd.layers:
      h_BCQD, _ = layer(h_BCQD, layer.keys_values(encoded.intent_BSD), mask_BCS)
    return token_BCKD, ptd.final_norm(h_BCQD)

  tokens, again = model.apply({"params": params}, random_batch().context, method=both)
  assert tokens.shape == (2, 1, 2, 16)
  np.testing.assert_allclose(again, tokens, rtol=2e-4, atol=2e-5)


def test_logits_of_a_head_by_hand(small):
  """(P_j u) E_l^T + b_{j,l}; before training P_j u is u."""
  model, params, _ = small
  state_ND = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)

  def logits(module: Gpr, state_ND):
    return module.ptd.logits(state_ND, 1), module.ptd.first_head(state_ND[None, :1], 1)

  found_NV, first_11V = model.apply({"params": params}, state_ND, method=logits)
  table_VD, ptd = params["tables"]["level_1"], params["ptd"]
  expected_NV = [
    (state_ND[j] @ ptd["project"][j]) @ table_VD.T + ptd["bias_1"][j] for j in range(3)
  ]
  np.testing.assert_allclose(found_NV, expected_NV, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(first_11V[0, 0], jax.nn.log_softmax(expected_NV[0]), rtol=1e-4)
  start = init_params(model, jax.random.key(0))["ptd"]["project"]
  np.testing.assert_array_equal(start, np.tile(np.eye(16), (3, 1, 1)))


def test_other_number_types_are_named(small):
  with pytest.raises(ValueError, match="precision='fp8': GPR searches in 'trained' or 'bfloat16'"):
    generator_of(small[0]).at_precision("fp8")
  low, convert = generator_of(small[0]).at_precision("bfloat16")
  logp = low.start(convert(small[1]), random_batch().context, whatever)[2]
  exact = generator_of(small[0]).start(small[1], random_batch().context, whatever)[2]
  np.testing.assert_allclose(np.exp(logp), np.exp(exact), atol=0.05)


def test_half_precision_learns_from_the_same_loss(small):
  """Parameters, softmax and losses stay float32."""
  _, params, _ = small
  half = Gpr(dataclasses.replace(SMALL, compute_dtype="bfloat16"), VOCABULARY)
  losses = [
    jax.jit(mtp_task(model, LossConfig()).loss)(params, random_batch(), None)["loss"][0]
    for model in (small[0], half)
  ]
  assert losses[1].dtype == jnp.float32
  np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


def test_weights_of_heads_by_hand():
  np.testing.assert_allclose(head_weights(jnp.zeros(4)), [0.25] * 4)
  found = head_weights(jnp.log(jnp.array([8.0, 4, 2, 2])))  # softmax: 1/2, 1/4, 1/8, 1/8
  np.testing.assert_allclose(found, [0.45, 0.25, 0.15, 0.15], rtol=1e-6)
  np.testing.assert_allclose(head_weights(jnp.array([3.0])), [1.0])
  # log 4 - 1.75 log 2 = 0.25 log 2
  gap = entropy_gap(jnp.log(jnp.array([8.0, 4, 2, 2])))
  np.testing.assert_allclose(gap, 0.25 * np.log(2), rtol=1e-5)
  np.testing.assert_allclose(entropy_gap(jnp.zeros(4)), 0, atol=1e-7)


def test_learned_weights_go_where_the_loss_is_small():
  """The least sum_j w_j CE_j + log N - H has softmax(a)_j ~ exp(-0.8 CE_j)."""
  ce_N = jnp.array([2.0, 3.0, 5.0])

  def total(a_N):
    return jnp.sum(head_weights(a_N) * ce_N) + entropy_gap(a_N)

  np.testing.assert_allclose(jax.grad(total)(-0.8 * ce_N), np.zeros(3), atol=1e-6)
  assert np.abs(jax.grad(total)(jnp.zeros(3))).max() > 0.1


def test_labels_that_are_not_there_cost_nothing():
  """With gradient 0, whatever stands there."""
  target_BPNL = jnp.array([[[[1, 2, 3], [-1, -1, -1]]]])

  def total(logp_BPNL):
    return jnp.sum(head_losses(logp_BPNL, target_BPNL))

  logp_BPNL = jnp.array([[[[-1.0, -2.0, -0.5], [-9.0, jnp.nan, -9.0]]]])
  assert total(logp_BPNL) == 3.5
  np.testing.assert_array_equal(
    jax.grad(total)(logp_BPNL), [[[[-1, -1, -1], [0, 0, 0]]]]
  )


def test_values_by_hand(small):
  """V_0 of the state before the first code, V_l of the state that emitted code l, and the code."""
  model, params, _ = small
  rng = np.random.default_rng(2)
  state_D, token_D = (rng.normal(size=16).astype(np.float32) for _ in range(2))

  def values(module: Gpr, state_D, token_D):
    return module.hte.before(state_D), module.hte.after(state_D, token_D, 2)

  found = model.apply({"params": params}, state_D, token_D, method=values)
  hte = params["hte"]
  for value, x_D, level in zip(
    found, (state_D, np.concatenate([state_D, token_D])), (0, 2), strict=True
  ):
    bias = hte["bias"][level]
    hidden = jax.nn.gelu(x_D @ hte[f"hidden_{level}"]["kernel"] + bias[:-1])
    expected = hidden @ hte[f"out_{level}"]["kernel"][:, 0] + bias[-1]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_error_of_values_by_hand():
  """(1 - .5)^2 + (-1 - .5)^2 of a label worth 6, as (6 - 5) / 2 = .5; the second does not count."""
  value_BPV = jnp.array([[[1.0, -1.0], [jnp.nan, 3.0]]])
  worth_BP, where_BP = jnp.array([[6.0, 0.0]]), jnp.array([[True, False]])

  def total(value_BPV):
    return jnp.sum(value_losses(value_BPV, worth_BP, where_BP, VOCABULARY))

  assert total(value_BPV) == 2.5
  np.testing.assert_allclose(jax.grad(total)(value_BPV), [[[1, -3], [0, 0]]])


def test_quantiles_of_values_by_hand():
  """Two values at a quantile of 1: 3 lies 2 above it, 0 lies 1 below; the last does not count."""
  value_BPV = jnp.array([[[3.0], [0.0], [jnp.nan]]])
  where_BP = jnp.array([[True, True, False]])

  def cost(low, high, value_BPV):
    return range_losses(value_BPV, jnp.array([low]), jnp.array([high]), where_BP)

  # .05 x 2 + .95 x 2, and .95 x 1 + .05 x 1.
  np.testing.assert_allclose(cost(1.0, 1.0, value_BPV), [[2.0, 1.0, 0.0]], rtol=1e-6)
  slope = jax.grad(lambda x: cost(1.0, 1.0, x).sum())(value_BPV)
  np.testing.assert_array_equal(slope, np.zeros((1, 3, 1)))
  # Of a hundred values the least cost has 5 below the one, and 5 above the other.
  value_BPV = jnp.arange(100.0)[None, :, None]
  where_BP = jnp.ones((1, 100), bool)
  for low, high in ((4.5, 94.5), (3.5, 95.5), (5.5, 93.5)):
    assert cost(low, high, value_BPV).sum() >= cost(4.5, 94.5, value_BPV).sum()


@pytest.mark.parametrize("traced", [False, True])
def test_a_beams_promise_is_the_place_of_its_value_between_the_quantiles(small, traced):
  model, params, _ = small
  params = params | {"hte": params["hte"] | {
    "low": jnp.array([9.0, -2.0, -1.0, 9.0]), "high": jnp.array([9.0, 3.0, 1.0, 9.0]),
  }}
  rng = np.random.default_rng(3)
  state_BWD = rng.normal(size=(2, 3, 16)).astype(np.float32)
  code_BW = np.array([[0, 1, 2], [3, 4, 1]])
  guide = generator_of(model, GuidedSearchConfig(most_children=5)).guide

  def value(module: Gpr, state_BWD, code_BW, level):
    return module.hte.after(state_BWD, module.tables.embed(code_BW, level - 1), level)

  beam = BeamState((), state_BWD)
  for level, (low, high) in ((1, (-2.0, 3.0)), (2, (-1.0, 1.0))):
    value_BW = model.apply({"params": params}, state_BWD, code_BW, level, method=value)
    expected = np.clip((np.asarray(value_BW) - low) / (high - low), 0, 1)
    at = jnp.int32(level) if traced else level
    promise = jax.jit(guide.promise) if traced else guide.promise
    np.testing.assert_allclose(promise(params, beam, code_BW, at), expected, atol=1e-5)
    limit = guide.limit(params, beam, code_BW, level)
    np.testing.assert_array_equal(limit, np.clip(np.ceil(5 * expected), 2, 5))
    assert len(np.unique(limit)) > 1


def test_nothing_but_the_evaluator_learns_from_values(small):
  """Decoders and code tables get a gradient of exactly zero; every value's own network gets one."""
  model, params, _ = small
  batch = random_batch()

  def total(params):
    found = model.apply({"params": params}, *batch[:4])
    where_BP = jnp.ones(batch.worth_BP.shape, bool)
    spread_BP = range_losses(found.value_BPV, *found.value_range, where_BP)
    error_BP = value_losses(found.value_BPV, batch.worth_BP, where_BP, VOCABULARY)
    return jnp.sum(error_BP + spread_BP)

  slopes = jax.jit(jax.grad(total))(params)
  for name, tree in slopes.items():
    for slope in jax.tree.leaves(tree):
      assert np.any(slope != 0) if name == "hte" else not np.any(slope != 0), name


@pytest.mark.parametrize("kind", ["learned", "equal"])
def test_the_loss_of_a_batch_by_hand(small, kind):
  model, params, logp = small
  batch = random_batch()
  batch.target_BPNL[0, 2, 1:] = -1
  batch.target_BPNL[:, :, 2] = -1
  batch.group_BP[1, 0] = -1
  batch.target_BPNL[1, 0] = -1
  found = jax.jit(mtp_task(model, LossConfig(head_weights=kind)).loss)(params, batch, None)
  logp_BPNL = np.asarray(logp(params, *batch), np.float64)
  a_N = np.asarray(params["head_logit"], np.float64) * (kind == "learned")
  softmax_N = np.exp(a_N) / np.exp(a_N).sum()
  expected = np.log(3) + (softmax_N * np.log(softmax_N)).sum()
  for head, labels in enumerate((
    [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)], [(0, 0), (0, 1), (1, 1), (1, 2)], [],
  )):
    total = sum(-logp_BPNL[row, label, head].sum() for row, label in labels)
    expected += (0.2 / 3 + 0.8 * softmax_N[head]) * total / max(len(labels), 1)
    np.testing.assert_allclose(found[f"head_{head + 1}_loss"][0], total, rtol=1e-4)
    assert found[f"head_{head + 1}_loss"][1] == len(labels)
  balance, count = found["balance_loss"]
  expected += 0.01 * balance / count
  value_BPV = np.asarray(asked(model)(params, *batch).value_BPV, np.float64)
  target_BP1 = (batch.worth_BP[..., None] - 5) / 2
  error_BP = ((value_BPV - target_BP1) ** 2).sum(axis=-1)
  value = sum(error_BP[row, label] for row, label in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2)))
  np.testing.assert_allclose(found["value_loss"][0], value, rtol=1e-4)
  expected += 0.5 * value / count
  apart = value_BPV[:, :, None] - np.stack([params["hte"]["low"], params["hte"]["high"]])
  share = np.array([[0.05], [0.95]])
  range_BP = np.where(apart > 0, share, share - 1) * apart
  range_BP = range_BP.sum(axis=(2, 3))
  expected += 1e-3 * (range_BP[0].sum() + range_BP[1, 1:].sum()) / count
  refining, labels = found["refining_loss"]
  said_BP = np.asarray(asked(model)(params, *batch).refining_BP, np.float64)
  counted = said_BP[0].sum() + said_BP[1, 1:].sum()
  np.testing.assert_allclose(refining, counted, rtol=1e-4)
  assert labels == count
  expected += 0.1 * refining / count
  np.testing.assert_allclose(found["loss"][0] / found["loss"][1], expected, rtol=1e-4)
  assert found["loss"][1] == count == 5


def test_a_label_reads_alone_what_it_reads_in_its_row(tiny_data):
  """Each label of the test split: in a row with others, and as the only request of a context."""
  prepared = open_prepared(str(tiny_data), str(tiny_data / "sids"))
  users = ExampleMaker(
    prepared.logs, prepared.examples.config, vocabulary=prepared.examples.features
  )
  stream = StreamConfig(groups=16, bundle=4, labels=8)
  sids = prepared.sids
  maker = BatchMaker(stream, users, sids.codes_AL, sids.content_codes_OL, sids.codebook_sizes)
  assert maker.vocabulary == Vocabulary((8, 4, 8), (4,), (3, 24, 7))  # values: as they are
  model = Gpr(SMALL, maker.vocabulary)
  params, logp = shaken(model), log_probs(model)
  rows = LabelRows(users, 2, stream=stream, num_heads=3)
  examples = {(e.user, e.time_s): e for e in read_split(prepared.examples, "test")}
  checked = 0
  for row in list(rows)[:6]:
    batch = maker([row])
    in_row_PNL = np.asarray(logp(params, *batch))[0]
    for label, group in enumerate(row["group_P"].tolist()):
      if group < 0:
        continue
      time_s = int(row["time_s_G"][group])
      example = next(e for (user, at), e in examples.items() if at == time_s and np.isin(
        row["time_s_G"], users.past(user).ad_request_s).all())
      alone = Batch(
        maker.context([example]), np.full((1, 8), 15, np.int32),
        *(np.repeat(x[:, label : label + 1], 8, axis=1) for x in batch[2:5]),
      )
      np.testing.assert_allclose(
        np.asarray(logp(params, *alone))[0, 0], in_row_PNL[label], rtol=1e-3, atol=1e-4
      )
      checked += 1
  assert checked > 20
  assert isinstance(mtp_task(model, LossConfig()), Task)
