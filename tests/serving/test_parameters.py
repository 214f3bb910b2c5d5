"""Published parameters that must not be served: refused, told, counted; the old ones go on."""

import json
import time

import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax.serving.server import build_app
from gr4ad_jax.training import published
from gr4ad_jax.training.published import publish
from tests.serving.support import ONE, ask, make


def changed_at(params, change):
  """Parameters whose first array of two dimensions is another one."""
  leaves, tree = jax.tree.flatten(jax.tree.map(np.array, params))
  at = next(i for i, leaf in enumerate(leaves) if leaf.ndim == 2)
  leaves[at] = change(leaves[at])
  return jax.tree.unflatten(tree, leaves)


def with_one(number):
  def change(leaf):
    leaf[1, 1] = number
    return leaf

  return change


def flip(folder, step):
  """A bit of the file in its middle."""
  file = folder / f"params-{step:08d}.msgpack"
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


@pytest.fixture(scope="module")
def served(served_run, tmp_path_factory):
  """A server that follows a learner, with a good publication of step 5; and its client."""
  folder = tmp_path_factory.mktemp("parameters")
  service = make(served_run, folder, config=ONE, published=folder / "published")
  good = jax.tree.map(lambda x: 1.01 * np.asarray(x), service.parameters.template)
  publish(folder / "published", 5, good, {})
  with TestClient(build_app(service)) as client:
    assert client.post("/v1/reload").json()["step"] == 5
    yield service, client, good


FAULTS = {
  "all NaN": lambda good: jax.tree.map(lambda x: x * np.nan, good),
  "one NaN": lambda good: changed_at(good, with_one(np.nan)),
  "one infinite": lambda good: changed_at(good, with_one(np.inf)),
  "one huge": lambda good: changed_at(good, with_one(1e30)),
  "a huge factor": lambda good: jax.tree.map(lambda x: x * np.float32(1e30), good),
  "one huge array": lambda good: changed_at(good, lambda leaf: leaf * np.float32(1e6)),
  "nothing but zeros": lambda good: jax.tree.map(np.zeros_like, good),
  "another model": lambda good: changed_at(good, lambda leaf: leaf[:, :-1]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unfit_parameters_are_refused_and_the_old_ones_served(served, fault, monkeypatch, capsys):
  service, client, good = served
  folder = service.parameters.published
  before = ask(client, user_id="u1", k=5)["ads"]
  refused = service.metrics.reloads.labels("refused")._value.get()
  with monkeypatch.context() as patch:  # a publisher that does not look
    patch.setattr(published, "require_fit", lambda params: {})
    publish(folder, 6, FAULTS[fault](good), {})
  reply = client.post("/v1/reload")
  assert reply.status_code == 503 and "parameters" in reply.json()["detail"]
  after = ask(client, user_id="u1", k=5)
  assert after["step"] == 5 and [ad["ad_id"] for ad in after["ads"]] == [
    ad["ad_id"] for ad in before
  ]
  assert service.metrics.reloads.labels("refused")._value.get() > refused
  assert client.get("/readyz").status_code == 200
  told = capsys.readouterr().err
  assert "refused" in told and "of step 5 are served on" in " ".join(told.split())
  publish(folder, 5, good, {})


def test_flipped_bytes_and_half_a_pointer_are_refused_once(served, capsys):
  service, client, good = served
  folder = service.parameters.published
  publish(folder, 7, good, {})
  flip(folder, 7)
  assert "its bytes are not those" in client.post("/v1/reload").json()["detail"]
  whole = (folder / "latest.json").read_bytes()
  for half in (whole[: len(whole) // 2], b"", b"{}", b"[1]", b'{"step": "7"}', b"\xff\xfe"):
    (folder / "latest.json").write_bytes(half)
    assert "latest.json: is damaged" in client.post("/v1/reload").json()["detail"]
  count = service.metrics.reloads.labels("refused")._value.get()
  faults = service.metrics.faults.labels("follow")._value.get()
  time.sleep(1.3)  # two looks at what is refused already
  assert service.metrics.reloads.labels("refused")._value.get() == count
  assert service.metrics.faults.labels("follow")._value.get() == faults
  publish(folder, 8, good, {})  # the next one is taken
  assert client.post("/v1/reload").json()["step"] == 8


def test_what_is_unfit_when_a_server_starts_does_not_keep_it_down(served_run, tmp_path, capsys):
  folder = tmp_path / "published"
  publish(folder, 3, {}, {})  # of another model
  service = make(served_run, tmp_path, config=ONE, published=folder)
  assert service.engine.step == service.opened.step
  (folder / "latest.json").write_text('{"step": 3, "fi')
  service.parameters.begin()
  told = " ".join(capsys.readouterr().err.split())
  assert told.count("refused: ") == 2 and "is damaged" in told


def test_a_pointer_keeps_the_checksums_of_files_that_are_there(tmp_path):
  def params(value):
    return {"a": np.full((2, 2), value, np.float32)}

  for step in (1, 2, 3):
    publish(tmp_path, step, params(step), {"about": "x"})
  pointer = json.loads((tmp_path / "latest.json").read_text())
  assert pointer["step"] == 3 and pointer["about"] == "x" and len(pointer["earlier"]) == 2
  flip(tmp_path, 2)
  with pytest.raises(published.UnfitError, match="params-00000002"):
    published.read_published(tmp_path, params(0), step=2)
  assert published.read_published(tmp_path, params(0), step=1)["a"][0, 0] == 1
  published.forget_before(tmp_path, 2)
  with pytest.raises(ValueError, match="finite"):
    publish(tmp_path, 4, params(np.nan), {})
  assert published.latest(tmp_path)["step"] == 3 and published.published_steps(tmp_path) == [2, 3]


def test_an_array_may_grow_but_not_jump():
  before = published.require_fit({"a": np.float32([0.5]), "b": np.float32([30.0])})
  published.require_fit({"a": np.float32([90.0]), "b": np.float32([-2_900.0])}, before)
  for a, b in ((101.0, 1.0), (1.0, -3_100.0)):
    with pytest.raises(published.UnfitError, match="jumped"):
      published.require_fit({"a": np.float32([a]), "b": np.float32([b])}, before)
