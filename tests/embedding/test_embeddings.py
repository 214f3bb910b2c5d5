"""A log's embeddings with MiniLM, published and fine-tuned, kept for the ads that come later."""

import functools

import numpy as np
import pytest

from gr4ad_jax.embedding import embeddings
from gr4ad_jax.embedding.uae import UaeConfig
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.semantic_id import assign_semantic_ids
from tests.support import tiny_encoder


@pytest.fixture
def tiny(monkeypatch):
  """A random encoder in place of MiniLM, and a fine-tuning of a few steps."""
  monkeypatch.setattr(embeddings, "load_minilm", tiny_encoder)
  monkeypatch.setattr(embeddings, "MAX_TOKENS", 32)
  monkeypatch.setattr(embeddings, "UaeConfig", functools.partial(
    UaeConfig, attribute_steps=2, cooccurrence_steps=2, batch_size=8, max_tokens=32
  ))


@pytest.mark.parametrize("encoder", ["minilm", "uae"])
def test_ads_that_come_later_are_embedded_as_the_log_was(tiny, tiny_logs, tmp_path, encoder):
  found = embeddings.embed(tiny_logs, encoder, folder=tmp_path)
  contents = tiny_logs.contents
  there_O = np.array([bool(text) for text in contents.text])
  np.testing.assert_array_equal(found.content_rows, np.flatnonzero((contents.ad < 0) & there_O))
  assert len(found.content_ND) == len(found.content_rows) > 0
  np.testing.assert_allclose(np.linalg.norm(found.ad_AD, axis=1), 1, rtol=1e-5)
  later_AD = embeddings.open_encoder(encoder, folder=tmp_path)(tiny_logs.ads)
  np.testing.assert_allclose(later_AD, found.ad_AD, atol=1e-6)


def test_what_was_fine_tuned_is_kept(tiny, tiny_logs, tmp_path, monkeypatch):
  first = embeddings.embed(tiny_logs, "uae", folder=tmp_path)
  assert (first.ad_AD != embeddings.embed(tiny_logs, "minilm").ad_AD).any()
  monkeypatch.setattr(embeddings, "fine_tune", None)
  again = embeddings.embed(tiny_logs, "uae", folder=tmp_path)
  np.testing.assert_array_equal(again.ad_AD, first.ad_AD)
  with pytest.raises(TypeError):  # another seed is another fine-tuning
    embeddings.embed(tiny_logs, "uae", folder=tmp_path, seed=1)
  with pytest.raises(ValueError, match="0 fine-tuned encoders"):
    embeddings.open_encoder("uae", folder=tmp_path / "nothing")


def test_each_tokenizing_finds_the_encoder_that_it_was_made_with(tiny, tiny_logs, tmp_path):
  """Another fine-tuning leaves its own file beside; a run serves on with that of its codes."""
  first, second = (embeddings.embed(tiny_logs, "uae", folder=tmp_path, seed=s) for s in (0, 1))
  config = TokenizerConfig(encoder="uae", codebook_sizes=(4, 4, 8), kmeans_iterations=2)
  for made in (first, second):
    semantic_id.save(assign_semantic_ids(tiny_logs, made, config), tmp_path / "sids")
    file = semantic_id.load(tmp_path / "sids").encoder_file
    later_AD = embeddings.open_encoder("uae", folder=tmp_path, file=file)(tiny_logs.ads)
    np.testing.assert_allclose(later_AD, made.ad_AD, atol=1e-6)
  assert (np.abs(first.ad_AD - second.ad_AD) > 1e-4).any()
  with pytest.raises(ValueError, match="2 fine-tuned encoders"):
    embeddings.open_encoder("uae", folder=tmp_path)


def test_a_file_goes_with_given_embeddings_alone(tiny_logs, tmp_path):
  with pytest.raises(ValueError, match="a file goes with encoder 'given'"):
    embeddings.embed(tiny_logs, "minilm", file=tmp_path / "a.npy")
