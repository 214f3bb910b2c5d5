"""Histories that share a reading, pooled states and whitening, by hand; the head's softmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.advertiser.head import HeadRow, head_task, log_probs, recency
from gr4ad_jax.advertiser.llama import Llama, lower_layers
from gr4ad_jax.advertiser.reading import pool, read_texts, share_beginnings, whiten
from tests.advertiser import support


def test_texts_that_begin_alike_share_one_reading():
  places = share_beginnings([[1, 2], [3], [1, 2, 3], [1, 4], [1, 2], [3, 1]])
  assert sorted(places.texts) == [(1, 2, 3), (1, 4), (3, 1)]
  held = [places.texts[text][:end] for text, end in zip(places.text_N, places.end_N, strict=True)]
  assert held == [(1, 2), (3,), (1, 2, 3), (1, 4), (1, 2), (3, 1)]


def test_pooled_states_by_hand():
  rng = np.random.default_rng(0)
  state_BTD = rng.normal(size=(1, 20, 3)).astype(np.float32)
  unit = state_BTD[0] / np.sqrt((state_BTD[0] ** 2).mean(axis=1, keepdims=True))
  pooled = pool(jnp.asarray(state_BTD), jnp.array([[3, 20]]))[0]
  # Without the first token: two tokens, and nineteen, of which sixteen are the latest.
  expected = [[*unit[1:3].mean(0), *unit[1:3].mean(0)], [*unit[1:].mean(0), *unit[4:].mean(0)]]
  np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5)


def test_what_is_read_of_a_beginning_does_not_depend_on_what_follows():
  model = support.tiny_model()
  config, params = lower_layers(model.config, model.params, 1)
  texts = [[5, 6, 7], [5, 6, 7, 8, 9, 10], [11, 12]]
  together = read_texts(Llama(config), params, texts)
  alone = np.concatenate([read_texts(Llama(config), params, [text]) for text in texts])
  assert together.shape == (3, 2 * config.width)
  np.testing.assert_allclose(together, alone, atol=1e-4)


def test_whitened_components_have_unit_variance_and_keep_the_largest():
  rng = np.random.default_rng(0)
  z_NC = rng.normal(size=(500, 3)) * [5, 1, 0.1]
  turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
  whitening = whiten((z_NC @ turn + 7).astype(np.float32), 2)
  x_NC = whitening((z_NC @ turn + 7).astype(np.float32))
  np.testing.assert_allclose(np.cov(x_NC.T), np.eye(2), atol=1e-3)
  assert abs(np.corrcoef(x_NC[:, 0], z_NC[:, 0])[0, 1]) > 0.99
  assert whiten(np.ones((4, 3), np.float32) * [[1], [2], [3], [4]], 3).turn_FC.shape == (3, 1)


def test_recency_and_the_head_by_hand():
  own_BH = jnp.array([[-1, 2, 0, 2], [-1, -1, -1, -1]])
  np.testing.assert_allclose(recency(own_BH, 3), [[1 / 2, 0, 1], [0, 0, 0]])
  params = {"kernel": jnp.array([[1.0, 2.0, 0.0]]), "bias": jnp.array([0.0, 1.0, 0.0]),
            "own": jnp.array([4.0, 3.0])}  # fmt: skip
  row = HeadRow(jnp.array([[0.5]]), own_BH[:1], jnp.array([1]))
  logit = np.array([0.5 + 2 + 3, 1 + 1, 4 + 3])
  expected = logit - np.log(np.exp(logit).sum())
  np.testing.assert_allclose(log_probs(params, row), [expected], rtol=1e-5)


def test_the_head_begins_at_popularity():
  task = head_task(np.array([3, 0, 1]), 2)
  row = HeadRow(np.ones((2, 2), np.float32), np.full((2, 4), -1), np.array([0, -1]))
  total, count = task.loss(task.init(None), row, None)["loss"]
  assert count == 1  # the other has no label
  assert float(total) == pytest.approx(-np.log(4 / (4 + 1 + 2)), rel=1e-5)
