"""Before the first step the model ranks as the rule does: own history and what is trending."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import prepare_examples, read_split
from gr4ad_jax.data.log_folder import LogParts
from gr4ad_jax.data.neighbours import neighbour_numbers
from gr4ad_jax.data.pipeline import hash_ids
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.gr4ad.build import build_decoder, init_params
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.run import RunFile, open_inputs
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.export import _histories
from gr4ad_jax.search.raw_histories import Kinds, read_items
from gr4ad_jax.search.recommender import Recommender

DAY = 86_400


@pytest.fixture(scope="module")
def inputs(tiny_data):
  model = dataclasses.replace(preset("tiny").model, width=16, num_layers=2, num_lazy_layers=1,
                              copy_path=True, shortlist=40, item_scorer=True)
  config = dataclasses.replace(preset("tiny"), model=model)
  return open_inputs(RunFile(str(tiny_data), str(tiny_data / "sids"), config)), model


@pytest.fixture(scope="module")
def sequences(tiny_data, inputs, tmp_path_factory):
  """The same logs by leave-one-out, for a model with neighbours."""
  data = tmp_path_factory.mktemp("sequences")
  (data / "logs").symlink_to(tiny_data / "logs")
  config = SequenceConfig(split="leave_one_out", num_trending=0, max_ad_history=8)
  prepare_examples(LogParts(data / "logs"), data / "examples", config)
  model = dataclasses.replace(inputs[1], shortlist=3, neighbours=12, item_scorer=False)
  config = dataclasses.replace(preset("tiny"), model=model)
  return open_inputs(RunFile(str(data), str(tiny_data / "sids"), config)), model, data


def rule(logs, example) -> np.ndarray:
  """What the rule gives to every ad, event by event: own + .3 organic + 160 trending share."""
  events, score_A, trending_A = logs.events, np.zeros(40), np.zeros(40)
  hour = example.time_s // 3600
  for user, time_s, ad, content, action in zip(
    events.user, events.time_s, events.ad, events.content, events.action, strict=True
  ):
    engaged = ad >= 0 and action >= Action.CLICK
    if engaged and time_s // 3600 < hour:
      trending_A[ad] += 0.5 ** ((hour - time_s // 3600) / 36)
    if user != example.user or time_s >= example.time_s:
      continue
    weight = 0.5 ** ((example.time_s - time_s) / DAY / 112)
    if engaged:
      score_A[ad] += weight
    elif content >= 0 and logs.contents.ad[content] >= 0:
      score_A[logs.contents.ad[content]] += 0.3 * weight
  return score_A + 160 * trending_A / max(trending_A.sum(), 1e-9)


def test_the_untrained_model_ranks_as_the_rule(inputs):
  inputs, model = inputs
  decoder = build_decoder(model, inputs.vocabulary)
  recommender = Recommender(
    generator_of(decoder), init_params(decoder, jax.random.key(0)), index=inputs.index,
    config=SearchConfig(widths=(8, 32, 40)), bin_means=inputs.scale.bin_means,
  )
  examples = read_split(inputs.examples, "test")[:12]
  found = recommender(inputs.make_batch.context(examples), 40)
  for row, example in enumerate(examples):
    score_A = rule(inputs.logs, example)
    index = inputs.index
    of_sid_A = np.bincount(index.sid_of_ad_A, score_A)[index.sid_of_ad_A]  # ads may share an SID
    ranked = found.ad_RK[row][found.ad_RK[row] >= 0]
    assert len(ranked) >= 30
    ranked_score = of_sid_A[ranked]
    # Numbers are stored to a thousandth, and the generator has a four-hundredth of the say.
    assert (ranked_score[1:] <= ranked_score[:-1] + 0.01 * score_A.max()).all()
    best = np.sort(of_sid_A)[::-1][: len(ranked)]
    np.testing.assert_allclose(np.sort(ranked_score)[::-1], best, atol=0.01 * score_A.max())


def test_with_neighbours_the_untrained_model_ranks_as_the_counter(sequences):
  """Beyond the ads that the user met, by counts that the neighbours' own test counts anew."""
  inputs, model, _ = sequences
  decoder = build_decoder(model, inputs.vocabulary)
  recommender = Recommender(
    generator_of(decoder), init_params(decoder, jax.random.key(0)), index=inputs.index,
    config=SearchConfig(widths=(8, 32, 40)), bin_means=inputs.scale.bin_means,
  )
  table, index = inputs.make_batch.transitions.table, inputs.index
  for example in read_split(inputs.examples, "test")[:12]:
    found = recommender(inputs.make_batch.context([example]), 40).ad_RK[0]
    followed, before, second, same, alike, _, _, lead = neighbour_numbers(table, example.ad_T)
    score_A = followed + 0.3 * before + 0.6 * (second + same) + 0.6 * alike * lead / (lead + 5)
    unmet = np.setdiff1d(np.arange(40), example.met_P)
    near = unmet[np.argsort(-score_A[unmet])][:12]
    of_sid = np.bincount(index.sid_of_ad_A[near], score_A[near], len(index.sids_SL))
    alone = ~np.isin(index.sid_of_ad_A[near], index.sid_of_ad_A[example.met_P])
    ranked = found[np.isin(found, near[alone])]
    assert len(ranked) > 3
    ranked_score = of_sid[index.sid_of_ad_A[ranked]]
    # The generator has a four-hundredth of the say.
    assert (ranked_score[1:] <= ranked_score[:-1] + 0.02 * score_A.max()).all()


def test_neighbours_need_leave_one_out(tiny_data, sequences):
  config = dataclasses.replace(preset("tiny"), model=sequences[1])
  with pytest.raises(ConfigError, match="neighbours=12: .* is split by time") as said:
    open_inputs(RunFile(str(tiny_data), str(tiny_data / "sids"), config))
  assert "\n" not in str(said.value)


def test_a_refit_counts_validating_engagements(tiny_data, sequences):
  """And none of a test request, which is each user's last of twelve."""
  inputs, model, data = sequences
  events, config = inputs.logs.events, dataclasses.replace(preset("tiny"), model=model)
  run = RunFile(str(data), str(tiny_data / "sids"), config, refit="tuned")
  for user in (0, 17):
    time_N = np.unique(events.time_s[(events.user == user) & (events.ad >= 0)])
    for transitions, counted in (
      (inputs.make_batch.transitions, 10), (open_inputs(run).make_batch.transitions, 11)
    ):
      ends = [len(transitions.own_pairs(user, int(time_s)).first_P) for time_s in time_N]
      assert ends[counted - 1] > 0 and not any(ends[counted:])


@pytest.mark.parametrize("name", ["inputs", "sequences"])
def test_an_artifact_makes_shortlist_and_hashes_of_a_raw_history(request, name):
  """Of the events as the HTTP API takes them, in the numbers of the run's own contexts."""
  inputs, model, *_ = request.getfixturevalue(name)
  logs, events = inputs.logs, inputs.logs.events
  example = read_split(inputs.examples, "test")[3]
  actions = ("impression", "click", "conversion")
  rows = np.flatnonzero((events.user == example.user) & (events.time_s < example.time_s))
  history = [
    {"time": int(events.time_s[row]), "action": actions[events.action[row]]} | (
      {"ad_id": logs.ads.ad_id[events.ad[row]]} if events.ad[row] >= 0
      else {"content_id": logs.contents.content_id[events.content[row]]}
    ) for row in rows
  ]
  arrays, features = _histories(
    SimpleNamespace(logs=logs, examples=inputs.examples, sids=inputs.sids,
                    history_tables=inputs.make_batch.tables)
  )
  arrays |= {"ad_id_A": logs.ads.ad_id.astype(str)}
  ids = {"ad_id": arrays["ad_id_A"], "content_id": arrays["content_id_O"]}
  row_of = {name: {x: row for row, x in enumerate(array.tolist())} for name, array in ids.items()}
  made = Kinds(arrays, row_of, features).of(
    read_items(history, example.time_s), {}, "", example.time_s
  )
  context = inputs.make_batch.context([example])
  if model.item_scorer:
    met = made["ad hashes"](())
    assert len(met) > 1
    np.testing.assert_array_equal(met, context.ad_id_BT[0, : len(met)])
    assert (context.ad_id_BT[0, len(met) :] == -1).all()
  listed = len(made["shortlist codes"](()))
  assert 0 < listed <= 40
  for kind, array in (("codes", context.short_code_BML), ("numbers", context.short_number_BMF)):
    np.testing.assert_array_equal(made[f"shortlist {kind}"](()), array[0, :listed])
    assert (array[0, listed:] == -1).all()


def test_an_ad_that_comes_later_is_read_in_histories_and_changes_no_shape(inputs):
  """By its own hash, which no known ad has, and its codes."""
  inputs, _ = inputs
  example = read_split(inputs.examples, "test")[3]
  ads = inputs.logs.ads
  one = dataclasses.replace(ads, **{
    field.name: column[:1] for field in dataclasses.fields(ads)
    if (column := getattr(ads, field.name)) is not None
  })
  one = dataclasses.replace(one, ad_id=np.array(["later"], object))
  number, code_1L = len(ads.ad_id), inputs.sids.codes_AL[:1]
  later = inputs.make_batch.with_ads(np.array([number]), one, code_1L)
  met = dataclasses.replace(example, ad_T=np.concatenate([[number], example.ad_T[1:]]))
  context = later.context([met])
  known = inputs.vocabulary.ads
  assert context.ad_id_BT[0, 0] == hash_ids(one.ad_id)[0] not in known.hash_A
  np.testing.assert_array_equal(context.ad_code_BTL[0, 0], code_1L[0])
  assert set(context.ad_id_BT[0, 1 : len(example.ad_T)]) <= set(known.hash_A)
  assert len(known) == len(ads.ad_id)
