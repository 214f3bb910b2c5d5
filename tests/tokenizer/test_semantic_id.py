"""Semantic IDs of small hand-made logs: codes, contents, storage, health."""

import dataclasses
import functools
import importlib.util

import ml_dtypes
import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.embedding.embeddings import embed
from gr4ad_jax.tokenizer import fsq, residual_kmeans, rq_vae, semantic_id
from gr4ad_jax.tokenizer.config import METHODS, TokenizerConfig
from gr4ad_jax.tokenizer.feature_hash import hash_codes

PAPER_COLUMNS = ("account_id", "conversion_type")


def make_logs(num_ads=24, embedding=True, text=None):
  rng = np.random.default_rng(0)
  ads = pd.DataFrame({
    "ad_id": [f"ad{a}" for a in range(num_ads)],
    "advertiser_id": [f"brand{a % 3}" for a in range(num_ads)],
    "account_id": [f"account{a % 5}" for a in range(num_ads)],
    "category": "Food > Snacks",
    "text": text or [f"snack of kind {a // 4}" for a in range(num_ads)],
    "price": rng.random(num_ads),
    "conversion_type": ["purchase" if a % 2 else "call" for a in range(num_ads)],
  })
  if embedding:
    ads["embedding"] = list(rng.standard_normal((num_ads, 6)).astype(np.float32))
  contents = pd.DataFrame({
    "content_id": ["same product", "article", "nameless"],
    "ad_id": ["ad5", None, None],
    "category": "",
    "text": ["", "snack of kind 0", ""],
  })
  events = pd.DataFrame({
    "user_id": ["u"], "time": [0], "ad_id": ["ad0"], "content_id": [None], "action": ["click"]
  })  # fmt: skip
  return build_logs(
    ads=ads, contents=contents, events=events, files={}, source="test", currency="USD"
  )


def assign_semantic_ids(logs, config, **options):
  return semantic_id.assign_semantic_ids(logs, embed(logs, config.encoder), config, **options)


def small(**changes):
  fields = {"encoder": "given", "codebook_sizes": (6, 4, 32), "kmeans_iterations": 3, **changes}
  return TokenizerConfig(**fields)


def test_codes_are_residual_codes_then_the_hash():
  logs = make_logs()
  for columns in (PAPER_COLUMNS, ("ad_id",), ("category", "price", "ad_id")):
    sids = assign_semantic_ids(logs, small(hash_columns=columns, seed=5))
    assert sids.codes_AL.shape == (24, 3) and sids.codes_AL.dtype == np.int32
    assert [c.shape for c in sids.quantizer_arrays.values()] == [(6, 6), (4, 6)]
    unit_AD = logs.ads.embedding_AD / np.linalg.norm(logs.ads.embedding_AD, axis=1, keepdims=True)
    quantised_AL = residual_kmeans.encode(sids.quantizer_arrays, unit_AD)
    np.testing.assert_array_equal(sids.codes_AL[:, :2], quantised_AL)
    hashed = hash_codes([getattr(logs.ads, name) for name in columns], size=32, seed=5)
    np.testing.assert_array_equal(sids.codes_AL[:, 2], hashed)


def test_a_quantised_last_level_is_one_more_codebook():
  sids = assign_semantic_ids(make_logs(), small(last_level="quantised", codebook_sizes=(6, 4, 8)))
  assert [len(c) for c in sids.quantizer_arrays.values()] == [6, 4, 8]
  assert sids.codes_AL.shape == (24, 3) and sids.num_quantised == 3


def test_a_suffix_numbers_the_ads_of_a_prefix_and_new_ads_go_on():
  logs = make_logs()
  sids = assign_semantic_ids(logs, small(last_level="suffix"))
  assert len(np.unique(sids.codes_AL, axis=0)) == 24
  for prefix in np.unique(sids.codes_AL[:, :2], axis=0):
    of_prefix = (sids.codes_AL[:, :2] == prefix).all(1)
    assert sids.codes_AL[of_prefix, 2].tolist() == list(range(of_prefix.sum()))
  new_NL = semantic_id.code_new_ads(sids, embed(logs, "given").ad_AD[[3, 3, 7]], {})
  np.testing.assert_array_equal(new_NL[:, :2], sids.codes_AL[[3, 3, 7], :2])
  both = np.concatenate([sids.codes_AL, new_NL])
  assert len(np.unique(both, axis=0)) == 27
  with pytest.raises(ValueError, match="the last level has 2 codes, but . ads share the codes"):
    assign_semantic_ids(logs, small(last_level="suffix", codebook_sizes=(6, 4, 2)))
  chosen = assign_semantic_ids(logs, small(last_level="suffix", codebook_sizes=()))
  assert chosen.codebook_sizes[-1] > chosen.codes_AL[:, -1].max()


@pytest.mark.parametrize("last_level", ["hash", "quantised"])
def test_an_ad_coded_later_gets_the_codes_that_it_would_have_had(last_level):
  logs = make_logs()
  config = small(last_level=last_level, codebook_sizes=(6, 4, 8), hash_columns=PAPER_COLUMNS)
  sids = assign_semantic_ids(logs, config)
  unit_AD = embed(logs, "given").ad_AD
  columns = {name: getattr(logs.ads, name)[5:9] for name in PAPER_COLUMNS}
  np.testing.assert_array_equal(
    semantic_id.code_new_ads(sids, unit_AD[5:9], columns), sids.codes_AL[5:9]
  )
  if last_level == "hash":
    with pytest.raises(ValueError, match="account_id, conversion_type missing"):
      semantic_id.code_new_ads(sids, unit_AD[5:9], {})
  with pytest.raises(ValueError, match="5 columns, but the codebooks have 6"):
    semantic_id.code_new_ads(sids, unit_AD[5:9, :5], columns)


def test_an_interrupted_fit_goes_on(tmp_path):
  logs, config = make_logs(), small(kmeans_iterations=6)
  path = tmp_path / "resume.npz"

  def stopping(steps, description, total, completed=0):
    if "level 2" in description:
      raise KeyboardInterrupt
    return steps

  with pytest.raises(KeyboardInterrupt):
    assign_semantic_ids(logs, config, resume_path=path, progress=stopping)
  assert path.exists()
  told = []

  def telling(steps, description, total, completed=0):
    told.append(description)
    return steps

  sids = assign_semantic_ids(logs, config, resume_path=path, progress=telling)
  assert told == ["k-means level 2"] and not path.exists()
  np.testing.assert_array_equal(sids.codes_AL, assign_semantic_ids(logs, config).codes_AL)


def test_contents_of_ads_share_codes_and_others_have_none_without_a_text_encoder():
  sids = assign_semantic_ids(make_logs(), small())
  np.testing.assert_array_equal(sids.content_codes_OL[0], sids.codes_AL[5])
  np.testing.assert_array_equal(sids.content_codes_OL[1:], -1)


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs wordllama")
def test_text_codes_follow_the_text():
  logs = make_logs(embedding=False)
  sids = assign_semantic_ids(logs, small(encoder="wordllama"))
  again = assign_semantic_ids(logs, small(encoder="wordllama"))
  np.testing.assert_array_equal(sids.codes_AL, again.codes_AL)
  for kind in range(6):
    of_kind_AL = sids.codes_AL[kind * 4 : kind * 4 + 4, :2]
    assert len(np.unique(of_kind_AL, axis=0)) == 1
  # The article has the text of ads 0 to 3, and the hash of its own id.
  np.testing.assert_array_equal(sids.content_codes_OL[1, :2], sids.codes_AL[0, :2])
  article_hash = hash_codes([np.array(["article"], object)], size=32)[0]
  assert sids.content_codes_OL[1, 2] == article_hash
  np.testing.assert_array_equal(sids.content_codes_OL[2], -1)


def test_sizes_follow_the_rule():
  def sizes(num_ads, **changes):
    return semantic_id.default_sizes(num_ads, TokenizerConfig(**changes))

  assert sizes(24_500_000, hash_columns=PAPER_COLUMNS) == (16384, 4096, 1024)
  assert sizes(7516, hash_columns=PAPER_COLUMNS) == (256, 64, 16)
  assert sizes(7516) == (256, 64, 256)
  assert sizes(7516, last_level="quantised") == (256, 64, 16)
  assert sizes(1, hash_columns=PAPER_COLUMNS) == (1, 1, 16)  # no more codes than ads
  sids = assign_semantic_ids(make_logs(), small(codebook_sizes=()))
  assert sids.codebook_sizes == sizes(24)


def test_round_trip_through_a_folder(tmp_path):
  config = small(hash_columns=PAPER_COLUMNS)
  sids = assign_semantic_ids(make_logs(), config)
  for _ in range(2):  # the second replaces the first
    semantic_id.save(sids, tmp_path / "sids")
  loaded = semantic_id.load(tmp_path / "sids")
  assert loaded.config == config and hash(loaded.config) == hash(config)
  assert loaded.codebook_sizes == sids.codebook_sizes
  for name in ("codes_AL", "content_codes_OL"):
    np.testing.assert_array_equal(getattr(loaded, name), getattr(sids, name))
  assert loaded.quantizer_arrays.keys() == sids.quantizer_arrays.keys()
  for name, table in sids.quantizer_arrays.items():
    np.testing.assert_array_equal(loaded.quantizer_arrays[name], table)
  np.testing.assert_array_equal(loaded.reconstruct(), sids.reconstruct())
  assert [p.name for p in tmp_path.iterdir()] == ["sids"]  # nothing temporary stays behind
  with pytest.raises(ValueError, match=r"no codes\.npz"):
    semantic_id.load(tmp_path)


def with_embedding(logs, embedding_AD):
  return dataclasses.replace(logs, ads=dataclasses.replace(logs.ads, embedding_AD=embedding_AD))


def test_given_needs_an_embedding_with_a_direction():
  with pytest.raises(LogError, match="column `embedding`"):
    embed(make_logs(embedding=False), "given")
  logs = make_logs()
  for value, message in ((0, r"row 3 \(ad_id ad3\) is all zeros"), (np.nan, "row 3 holds a value")):
    embedding_AD = logs.ads.embedding_AD.copy()
    embedding_AD[3] = value
    with pytest.raises(LogError, match=message):
      embed(with_embedding(logs, embedding_AD), "given")


def test_a_file_of_embeddings_stands_for_the_column(tmp_path):
  logs = make_logs()
  expected_AD = embed(logs, "given").ad_AD
  np.save(tmp_path / "mine.npy", logs.ads.embedding_AD)
  bare = make_logs(embedding=False)
  np.testing.assert_array_equal(embed(bare, "given", file=tmp_path / "mine.npy").ad_AD, expected_AD)
  np.save(tmp_path / "short.npy", logs.ads.embedding_AD[:-1])
  np.save(tmp_path / "complex.npy", np.ones((24, 3), complex))
  np.save(tmp_path / "huge.npy", np.full((24, 3), 1e300))
  np.savez(tmp_path / "two.npz", a=logs.ads.embedding_AD, b=logs.ads.embedding_AD)
  whole = (tmp_path / "two.npz").read_bytes()
  (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "text.npy").write_text("no array")
  (tmp_path / "empty.npy").write_bytes(b"")
  for name, message in (
    ("short.npy", r"shape \(23, 6\), expected \[24, D\]"), ("complex.npy", "dtype complex128"),
    ("huge.npy", "row 0 holds a value that is not finite"),
    ("two.npz", r"holds 2 arrays \(a, b\), must hold one"), ("cut.npz", "not readable"),
    ("text.npy", "not readable"), ("empty.npy", "not readable"), ("absent.npy", "not readable"),
  ):
    with pytest.raises(LogError, match=message):
      embed(bare, "given", file=tmp_path / name)
  with pytest.raises(ValueError, match="goes with encoder 'given'"):
    embed(bare, "wordllama", file=tmp_path / "mine.npy")


REAL_TYPES = (
  np.float16, ml_dtypes.bfloat16, np.float64, np.longdouble, np.int8, np.uint8, np.int64, ">f4",
  ">f8", ">i2", bool,
)


@pytest.mark.parametrize("kind", REAL_TYPES, ids=str)
def test_embeddings_of_any_real_type_stand_for_their_float32_copy(kind, tmp_path):
  """In every layout and file; the squares of these numbers leave half precision."""
  logs = make_logs(embedding=False)
  given_AD = (np.random.default_rng(1).normal(size=(24, 6)) * 100).clip(1, 120).astype(kind)
  np.save(tmp_path / "copy.npy", given_AD.astype(np.float32))
  expected_AD = embed(logs, "given", file=tmp_path / "copy.npy").ad_AD
  np.testing.assert_allclose(np.linalg.norm(expected_AD, axis=1), 1, rtol=1e-6)
  np.save(tmp_path / "c.npy", given_AD)
  np.save(tmp_path / "fortran.npy", np.asfortranarray(given_AD))
  np.savez(tmp_path / "one.npz", X=given_AD)
  for name in ("c.npy", "fortran.npy", "one.npz"):
    np.testing.assert_array_equal(
      embed(logs, "given", file=tmp_path / name).ad_AD, expected_AD, err_msg=name
    )
  apart_AD = np.repeat(given_AD, 2, axis=1)[:, ::2]  # as a slice of a wider table
  found_AD = embed(with_embedding(logs, apart_AD), "given").ad_AD
  np.testing.assert_array_equal(found_AD, expected_AD)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_the_size_of_an_embedding_does_not_matter(size):
  logs = make_logs()
  expected_AD = embed(logs, "given").ad_AD
  sized_AD = (logs.ads.embedding_AD.astype(np.float64) * size).astype(np.float32)
  found_AD = embed(with_embedding(logs, sized_AD), "given").ad_AD
  np.testing.assert_allclose(found_AD, expected_AD, atol=1e-6 if size > 1e-38 else 1e-3)


def test_more_codes_than_ads_are_refused_with_the_remedy():
  with pytest.raises(ValueError, match="level 1 has 30 codes for 24 rows; give at most 24"):
    assign_semantic_ids(make_logs(), small(codebook_sizes=(30, 4, 8)))


@pytest.mark.parametrize("method", METHODS)
def test_every_quantizer_makes_semantic_ids_that_survive_a_folder(method, tmp_path, monkeypatch):
  for module, name, config in (
    (rq_vae, "fit", rq_vae.RqVaeConfig), (rq_vae, "fit_plus", rq_vae.RqKmeansPlusConfig),
    (fsq, "fit", fsq.FsqConfig),
  ):  # fewer steps: what is learned is tested elsewhere
    short = functools.partial(getattr(module, name), config=config(num_steps=40))
    monkeypatch.setattr(module, name, short)
  logs = make_logs(num_ads=40)
  sids = assign_semantic_ids(logs, small(quantizer=method, codebook_sizes=(8, 4, 32)))
  assert (sids.codes_AL.min(0) >= 0).all() and (sids.codes_AL.max(0) < (8, 4, 32)).all()
  assert sids.reconstruct().shape == (40, 6)
  semantic_id.save(sids, tmp_path / "sids")
  loaded = semantic_id.load(tmp_path / "sids")
  columns = {"ad_id": logs.ads.ad_id}
  new_AL = semantic_id.code_new_ads(loaded, embed(logs, "given").ad_AD, columns)
  np.testing.assert_array_equal(new_AL, sids.codes_AL)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("encoder", "bert"),
    ("codebook_sizes", (16,)),
    ("codebook_sizes", (16, 0)),
    ("hash_columns", ("colour",)),
    ("hash_columns", ()),
    ("last_level", "none"),
    ("quantizer", "pq"),
    ("seed", -1),
    ("kmeans_iterations", 0),
    ("balance_epsilon", -0.1),
  ],
)
def test_bad_configs_name_the_field(field, value):
  with pytest.raises(ValueError, match=field):
    TokenizerConfig(**{field: value})
