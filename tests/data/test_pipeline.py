"""Stored examples, batches, value buckets and weights, resumable iterators."""

import dataclasses

import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import open_examples, read_split
from gr4ad_jax.data.pipeline import hash_buckets, train_batches
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.gr4ad.config import LossConfig
from gr4ad_jax.gr4ad.run import RunFile, open_inputs
from gr4ad_jax.gr4ad.value import fit_value_scale, level_weights, sample_weight, value_bucket


@pytest.fixture(scope="module")
def inputs(tiny_data):
  return open_inputs(RunFile(str(tiny_data), str(tiny_data / "sids")))


def test_stored_examples_equal_the_made_ones(inputs):
  maker = ExampleMaker(inputs.logs, inputs.examples.config)
  for number, split in enumerate(("train", "validation", "test")):
    made = [e for user in range(60) for e in maker.user_examples(user, number)]
    stored = read_split(inputs.examples, split)
    assert len(made) == len(stored) == inputs.examples.counts[split]["examples"]
    for a, b in zip(made, stored, strict=True):
      for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_batches_hold_codes_and_padding(inputs):
  examples = read_split(inputs.examples, "test")[:5]
  batch = inputs.make_batch(examples)
  codes_AL = inputs.sids.codes_AL
  for row, example in enumerate(examples):
    count = len(example.target_C)
    np.testing.assert_array_equal(batch.target_BCL[row, :count], codes_AL[example.target_C])
    assert (batch.target_BCL[row, count:] == -1).all()
    assert (batch.weight_BC[row, :count] > 0).all() and (batch.weight_BC[row, count:] == 0).all()
    seen = len(example.ad_T)
    np.testing.assert_array_equal(batch.context.ad_code_BTL[row, :seen], codes_AL[example.ad_T])
    assert (batch.context.ad_count_BT[row, seen:] == -1).all()
    # An organic content with an ad of the same product carries that ad's codes.
    for place, content in enumerate(example.organic_O.tolist()):
      ad = inputs.logs.contents.ad[content]
      if ad >= 0:
        np.testing.assert_array_equal(
          batch.context.organic_code_BOL[row, place], codes_AL[ad]
        )


def test_histories_carry_the_shares_of_their_ads_and_products(inputs):
  """As known at the request's hour; a content without an ad has none, padding is -1."""
  examples, trending = read_split(inputs.examples, "test")[:20], inputs.examples.trending
  context = inputs.make_batch(examples).context
  product_O = inputs.logs.contents.ad
  seen = []
  for row, example in enumerate(examples):
    row_of = int(trending.rows(np.array([example.time_s]))[0])
    for got, ads in (
      (context.ad_trend_BT[row], example.ad_T),
      (context.organic_trend_BO[row], product_O[example.organic_O]),
    ):
      np.testing.assert_array_equal(got[: len(ads)], trending.bucket_of(row_of, ads))
      assert (got[len(ads) :] == -1).all()
    best = trending.listed(row_of)[:64]
    np.testing.assert_array_equal(
      context.trend_code_BNL[row, : len(best)], inputs.sids.codes_AL[best]
    )
    seen += product_O[example.organic_O].tolist()
  assert min(seen) == -1 and max(seen) > 0


def test_ads_of_one_sid_come_by_their_engagements_in_training(inputs):
  """Those of later days are what is to be found."""
  events, index = inputs.logs.events, inputs.index
  learned = (events.ad >= 0) & (events.time_s < inputs.examples.config.validation_start_s)
  count_A = np.bincount(events.ad[learned], minlength=40)
  held = [index.ads_A[a:b].tolist() for a, b in zip(index.ads_start, index.ads_start[1:],
                                                    strict=False)]
  assert max(map(len, held)) > 1
  for ads in held:
    assert ads == sorted(ads, key=lambda ad: (-count_A[ad], ad))


def test_hash_buckets_are_those_that_trained_models_know():
  ids = np.array(["a", "b", 7], object)
  assert hash_buckets(ids, 8192).tolist() == [3157, 8017, 2618]


def take(batches, count):
  return [next(batches) for _ in range(count)]


def flat(batch) -> np.ndarray:
  return np.concatenate([np.ravel(x).astype(np.float64) for x in (*batch.context, *batch[1:])])


def test_iterator_state_continues_at_the_next_batch(inputs):
  def fresh(threads):
    return train_batches(
      inputs.examples.sources["train"], inputs.make_batch, batch_size=32, seed=3,
      read_threads=threads,
    )

  whole = fresh(2)
  take(whole, 5)
  state = whole.get_state()
  expected = take(whole, 30)  # past the end of an epoch
  resumed = fresh(0)
  resumed.set_state(state)
  for a, b in zip(expected, take(resumed, 30), strict=True):
    np.testing.assert_array_equal(flat(a), flat(b))


def test_seed_decides_the_order_and_every_epoch_is_whole(inputs):
  source = inputs.examples.sources["train"]

  def weights(seed, batches):
    data = train_batches(source, inputs.make_batch, batch_size=16, seed=seed)
    return np.concatenate([b.context.feature_BF[:, 0] for b in take(data, batches)])

  per_epoch = len(source) // 16
  assert not np.array_equal(weights(0, per_epoch), weights(1, per_epoch))
  counts = np.bincount(weights(0, per_epoch))
  everyone = np.bincount([r["feature_F"][0] for r in source])
  assert (np.abs(counts - everyone) < 16).all()


def test_hosts_share_the_batches_of_one(inputs):
  """Past the end of an epoch too, where the split does not divide over the hosts."""
  def requests(host, num_hosts):
    data = train_batches(
      inputs.examples.sources["train"], lambda examples: [e.request for e in examples],
      batch_size=16, seed=0, host=host, num_hosts=num_hosts,
    )
    return take(data, 2 * len(inputs.examples.sources["train"]) // 16)

  alone = requests(0, 1)
  parts = [requests(host, 4) for host in range(4)]
  assert alone == [sum(rows, []) for rows in zip(*parts, strict=True)]


@pytest.mark.parametrize(("batch", "hosts"), [(33, 2), (10**6, 1)])
def test_impossible_batches_are_refused(inputs, batch, hosts):
  with pytest.raises(ValueError, match="batch_size"):
    train_batches(
      inputs.examples.sources["train"], inputs.make_batch, batch_size=batch, seed=0,
      num_hosts=hosts,
    )


def test_buckets_are_equiprobable_and_weights_average_to_one(inputs):
  examples = inputs.examples
  rng = np.random.default_rng(0)
  many = dataclasses.replace(
    examples, train_value_N=rng.lognormal(size=len(examples.train_value_N)).astype(np.float32)
  )
  scale = fit_value_scale(many, LossConfig(num_ecpm_bins=8))
  bucket_N = value_bucket(scale, many.train_value_N, many.train_ecpm_N)
  shares = np.bincount(bucket_N, minlength=8) / len(bucket_N)
  np.testing.assert_allclose(shares, 1 / 8, atol=0.01)
  means = [many.train_value_N[bucket_N == b].mean() for b in range(8)]
  np.testing.assert_allclose(scale.bin_means, means, rtol=1e-4)
  weight_N = sample_weight(
    scale, LossConfig(), many.train_past_value_N, many.train_action_N, many.train_of_request_N
  )
  assert weight_N.mean() == pytest.approx(1, abs=1e-3)


def test_equal_quantiles_are_merged_and_ecpm_comes_first(inputs):
  examples = inputs.examples
  ones = dataclasses.replace(examples, train_value_N=np.ones_like(examples.train_value_N))
  assert fit_value_scale(ones, LossConfig()).num_bins == 1
  ecpm_N = np.full_like(examples.train_ecpm_N, np.nan)
  ecpm_N[:4] = [1, 2, 3, 4]
  scale = fit_value_scale(
    dataclasses.replace(examples, train_ecpm_N=ecpm_N), LossConfig(num_ecpm_bins=2)
  )
  assert scale.uses_ecpm and scale.num_bins == 2
  assert scale.bin_means == pytest.approx((1.5 / 1000, 3.5 / 1000))  # currency an impression
  assert value_bucket(scale, np.zeros(3), np.array([1, 4, np.nan])).tolist() == [0, 1, -1]
  np.testing.assert_allclose(scale.bin_means, [0.0015, 0.0035])  # currency of one impression
  (edge,) = scale.bin_edges  # belongs to the bucket that begins there
  assert value_bucket(scale, np.zeros(2), np.array([edge - 0.01, edge])).tolist() == [0, 1]


def test_the_mean_that_user_weights_are_measured_by_is_that_of_logs(inputs):
  past = np.zeros_like(inputs.examples.train_past_value_N)
  past[: len(past) // 2] = np.e**2 - 1  # log1p = 2, for half of them
  scale = fit_value_scale(
    dataclasses.replace(inputs.examples, train_past_value_N=past), LossConfig()
  )
  assert scale.mean_log_past_value == pytest.approx(2 * (len(past) // 2) / len(past), rel=1e-4)


def test_user_weight_by_hand(inputs):
  config = LossConfig(click_weight=1, conversion_weight=4, user_weight_range=(0.5, 2))
  scale = dataclasses.replace(inputs.scale, mean_log_past_value=np.log(2), mean_weight=1.0)
  past = np.array([0.0, 1.0, 1.0, 1e9])  # log1p / log 2: 0, 1, 1, far above
  action = np.array([2, 2, 1, 1])
  size = np.array([1, 2, 4, 1])
  np.testing.assert_allclose(sample_weight(scale, config, past, action, size), [2, 4, 1, 2])
  config = dataclasses.replace(config, request_size_power=0.5)
  expected = [2, 4 / 2**0.5, 1 / 2, 2]
  np.testing.assert_allclose(sample_weight(scale, config, past, action, size), expected, rtol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 2.0), (0.5, 2.0), (0.0, 0.0)])
def test_where_nobody_has_spent_anything_all_users_count_alike(inputs, bounds):
  nothing = dataclasses.replace(
    inputs.examples, train_past_value_N=np.zeros_like(inputs.examples.train_past_value_N)
  )
  config = LossConfig(user_weight_range=bounds)
  scale = fit_value_scale(nothing, config)
  np.testing.assert_array_equal(
    sample_weight(scale, config, np.array([0.0, 9.0]), np.array([2, 2]), np.ones(2)), [1, 1]
  )


def test_weights_that_leave_nothing_to_learn_are_refused(inputs):
  clicks = dataclasses.replace(
    inputs.examples, train_action_N=np.ones_like(inputs.examples.train_action_N)
  )
  with pytest.raises(ConfigError, match="loss=.*click_weight=0.0.*every training target"):
    fit_value_scale(clicks, LossConfig(click_weight=0.0))


def test_weights_of_validation_have_the_mean_that_those_of_training_have(inputs):
  """By hand: 3 targets of weights 2, 4 and 0 and a padded one; means are 2, then 1."""
  batch = inputs.make_batch(read_split(inputs.examples, "validation")[:2])
  code_BCL = np.array([[[1, 1, 1], [2, 1, 1]], [[3, 1, 1], [-1, -1, -1]]])
  given = batch._replace(target_BCL=code_BCL, weight_BC=np.float32([[2, 4], [0, 0]]))
  (levelled,) = level_weights([given])
  np.testing.assert_array_equal(levelled.weight_BC, [[1, 2], [0, 0]])
  assert levelled.target_BCL is given.target_BCL
  none = given._replace(weight_BC=np.zeros((2, 2), np.float32))
  np.testing.assert_array_equal(level_weights([none])[0].weight_BC, 0)


def test_a_folder_without_examples_is_refused(tmp_path):
  with pytest.raises(LogError, match="gr4ad prepare"):
    open_examples(tmp_path)
