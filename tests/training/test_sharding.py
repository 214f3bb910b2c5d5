"""Eight simulated devices: every mesh computes the same, and the programs move what they should."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gr4ad_jax.catalog.ad_index import build_ad_index
from gr4ad_jax.config import ConfigError
from gr4ad_jax.gr4ad.batch import Batch, KnownAds
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import LossConfig, ModelConfig, PreferenceConfig, preset
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.layouts import LAYOUTS
from gr4ad_jax.gr4ad.unified_task import ListBatch, UnifiedBatch, unified_task
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning.preference import Lists
from gr4ad_jax.machine import sharding
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.train_step import abstract_state, compile_programs
from tests.support import VOCABULARY as SMALL
from tests.support import moved, random_context

CODES, WIDTH, ROWS = 160, 64, 8
VOCABULARY = dataclasses.replace(SMALL, codebook_sizes=(CODES,) * 3)
MODEL = ModelConfig(width=WIDTH, num_heads=2, num_layers=1, num_lazy_layers=0)
DECODER = build_decoder(MODEL, VOCABULARY)
TRAIN = TrainConfig(num_steps=4, batch_size=ROWS, learning_rate=1e-2)
MESHES = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2))
METHOD = PreferenceConfig(method="uvr", lists_per_step=ROWS)


def mesh_of(shape):
  return sharding.build_mesh(data_parallel=shape[0], fsdp=shape[1], tensor=shape[2])


def codes(rng, *shape):
  return rng.integers(0, CODES, (*shape, 3)).astype(np.int32)


def logged_batch() -> Batch:
  rng = np.random.default_rng(0)
  context = random_context(rng, ROWS)
  return Batch(
    context, codes(rng, ROWS, 2), rng.integers(0, 4, (ROWS, 2)).astype(np.int32),
    rng.random((ROWS, 2)).astype(np.float32),
  )


def unified_batch() -> UnifiedBatch:
  rng = np.random.default_rng(1)
  lists = Lists(
    rng.uniform(0, 5, (ROWS, 4)).astype(np.float32),
    rng.uniform(-6, -4, (ROWS, 4, 3)).astype(np.float32),
    np.ones((ROWS, 4), bool), np.ones((ROWS, 4), bool),
  )
  return UnifiedBatch(logged_batch(), ListBatch(
    random_context(rng, ROWS), codes(rng, ROWS, 4), lists, np.full((ROWS, 4), -1, np.int32),
    rng.integers(0, 2, (ROWS, 4)).astype(np.float32),
  ))


@functools.cache
def trained(shape):
  """Losses of three steps of UVR on a mesh, the last state, and the compiled step as text."""
  mesh = mesh_of(shape)
  task = unified_task(DECODER, LossConfig(), METHOD)
  programs = compile_programs(task, TRAIN, mesh)
  state, batch = programs.init(jax.random.key(0)), programs.to_devices(unified_batch())
  program = programs.step.lower(state, batch).compile()
  losses = []
  for _ in range(3):
    state, metrics = program(state, batch, *programs.step.last)
    losses.append([float(metrics[name][0] / metrics[name][1]) for name in ("loss", "list_loss")])
  return np.array(losses), state, program.as_text()


@pytest.mark.parametrize("shape", MESHES[1:])
def test_every_mesh_learns_the_same(shape):
  """Logged samples, RSPO and their weights in one objective; float32 sums in another order."""
  losses, state, _ = trained(shape)
  expected, single, _ = trained(MESHES[0])
  assert abs(expected[-1, 0] - expected[0, 0]) > 0.1
  np.testing.assert_allclose(losses, expected, rtol=2e-5)
  for got, want in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(single.params), strict=True
  ):
    # AdamW divides by the gradient's size: what is next to nothing may go either way.
    assert np.mean(np.abs(np.asarray(got) - np.asarray(want)) > 2e-3) < 0.01


def test_a_mesh_scores_every_ad_as_one_device_does():
  """The table of ads is split by rows, over which the softmax and the best ads are taken."""
  ads = KnownAds.of(
    np.arange(996, 1124), np.random.default_rng(7).integers(0, CODES, (128, 3), np.int32)
  )
  model = dataclasses.replace(MODEL, copy_path=True, item_scorer=True, copied_items=16)
  decoder = build_decoder(model, dataclasses.replace(VOCABULARY, ads=ads))
  batch = logged_batch()
  batch.target_BCL[:, 0] = ads.code_AL[:ROWS]
  found = []
  for shape in (MESHES[0], MESHES[-1]):
    programs = compile_programs(vsl_task(decoder, LossConfig()), TRAIN, mesh_of(shape))
    state = programs.init(jax.random.key(0))
    for _ in range(2):
      state, metrics = programs.step(state, programs.to_devices(batch))
      found.append([float(metrics[name][0]) for name in ("loss", "item_loss")])
  table = state.params["output"]["copy"]["items"]["ad"]
  assert {shard.data.shape for shard in table.addressable_shards} == {(64, 64)}
  np.testing.assert_allclose(found[2:], found[:2], rtol=2e-5)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_every_mesh_finds_the_same_ads(shape):
  found = [
    recommender_on(mesh)(random_context(np.random.default_rng(5), ROWS), 20)
    for mesh in (None, mesh_of(shape))
  ]
  np.testing.assert_allclose(found[1].logp_RK, found[0].logp_RK, rtol=1e-4)
  assert np.mean(found[1].ad_RK == found[0].ad_RK) > 0.95  # near ties may change places


def recommender_on(mesh):
  rng = np.random.default_rng(2)
  index = build_ad_index(codes(rng, 300), rng.random(300))
  return Recommender(
    generator_of(DECODER), trained(MESHES[0])[1].params, index=index, mesh=mesh,
    bin_means=np.arange(4.0),
    config=SearchConfig(widths=(16, 32, 32), batch_size=ROWS, value_exponent=0.5),
  )


def test_data_parallel_training_only_adds_gradients_up():
  assert set(moved(trained((8, 1, 1))[2])) == {"all-reduce"}


def test_layers_are_gathered_and_tables_are_not():
  found = moved(trained((2, 2, 2))[2])
  gathered = found["all-gather"]
  # A layer's weights are gathered over fsdp, still split over tensor ...
  assert (WIDTH, 2, MODEL.feed_forward_width // 2) in gathered
  assert (MODEL.feed_forward_width // 2, WIDTH) in gathered
  # ... and no table of codes or of organic contents, nor the half that a device holds, ever is.
  for shape in gathered + found.get("all-to-all", []) + found.get("collective-permute", []):
    assert shape[-2:] not in ((CODES, WIDTH), (CODES // 2, WIDTH)), shape
    assert np.prod(shape) < VOCABULARY.num_organic_buckets * WIDTH / 2
    # Nor both halves of a layer's largest weights.
    assert np.prod(shape) <= WIDTH * MODEL.feed_forward_width
  assert "all-reduce" in found


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (1, 4, 2)])
def test_parameters_of_a_device_fall_with_their_number(shape):
  """Shapes of the 0.16B preset; nothing is allocated."""
  config = preset("0.16b").model
  vocabulary = dataclasses.replace(
    SMALL, codebook_sizes=(4096, 1024, 4096), feature_sizes=(2**20,)
  )
  task = vsl_task(build_decoder(config, vocabulary), LossConfig())
  state = abstract_state(task, TRAIN, mesh_of(shape))

  def share(params) -> float:
    leaves = jax.tree.leaves(params)
    own = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return float(own / sum(leaf.size for leaf in leaves))

  layers = {name: x for name, x in state.params.items() if "layers" in name}
  tables = [state.params["tables"], state.params["context_processor"]["features"]]
  assert share(layers) == pytest.approx(1 / 8, rel=0.01)
  assert share(tables) == pytest.approx(1 / shape[2], rel=0.01)
  by_name = jax.tree_util.tree_leaves_with_path(state.optimizer)
  moments = [x for path, x in by_name if "layers_0" in str(path) or "lazy" in str(path)]
  assert share(moments) == pytest.approx(1 / 8, rel=0.01)


def one_step(model=MODEL, shape=(1, 1, 1), **changes):
  config, mesh = dataclasses.replace(TRAIN, **changes), mesh_of(shape)
  task = vsl_task(build_decoder(model, VOCABULARY), LossConfig())
  programs = compile_programs(task, config, mesh)
  state = programs.init(jax.random.key(0))
  _, metrics = programs.step(state, programs.to_devices(logged_batch()))
  return [float(metrics[name][0] / metrics[name][1]) for name in ("loss", "grad_norm")]


def test_accumulation_and_recomputation_change_nothing():
  expected = one_step()
  for changes in (
    {"accumulate": 2, "shape": (2, 2, 1)},
    {"model": dataclasses.replace(MODEL, remat="all")},
    {"model": dataclasses.replace(MODEL, remat="products")},
  ):
    np.testing.assert_allclose(one_step(**changes), expected, rtol=2e-5, err_msg=str(changes))


def test_what_does_not_divide_is_refused():
  with pytest.raises(ConfigError, match="train.tensor=3: need 15 devices, 8 are there"):
    training_mesh(dataclasses.replace(TRAIN, data_parallel=5, tensor=3))
  with pytest.raises(ConfigError, match="batch_size=8: must be a multiple of 16.*accumulate=2"):
    training_mesh(dataclasses.replace(TRAIN, accumulate=2))
  with pytest.raises(ConfigError, match="train.accumulate=3: must divide"):
    dataclasses.replace(TRAIN, accumulate=3)
  with pytest.raises(ValueError, match="search.batch_size=6: must be a multiple of the 8"):
    Recommender(
      generator_of(DECODER), {}, index=None, config=SearchConfig(batch_size=6), bin_means=(),
      mesh=mesh_of((8, 1, 1)),
    )


def test_a_dimension_that_does_not_divide_stays_whole():
  state = {"tables": {"level_0": jax.ShapeDtypeStruct((1001, 64), np.float32)}}
  layout = sharding.state_sharding(mesh_of((1, 1, 8)), state, LAYOUTS)
  assert layout["tables"]["level_0"].spec == jax.sharding.PartitionSpec(None, None)
