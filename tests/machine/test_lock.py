"""A folder belongs to one process: who comes second is told who is there, and a kill frees it."""

import fcntl
import os
import platform
import signal
import subprocess
import sys

import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import lock, storage
from gr4ad_jax.machine.lock import Lock

HOLDER = """
import sys, time
from pathlib import Path
from gr4ad_jax.machine.lock import Lock
held = Lock(Path(sys.argv[1]), "a training")
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_told_who_holds_it_and_a_kill_frees_it(tmp_path):
  folder = tmp_path / "run"
  with subprocess.Popen(
    [sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True
  ) as holder:
    try:
      assert holder.stdout.readline() == "held\n"
      with pytest.raises(ConfigError) as refused, lock.held(folder, "a learner"):
        pass
      told = str(refused.value)
      for words in (str(folder), "a training", str(holder.pid), platform.node(), "since 20"):
        assert words in told
      assert "\n" not in told
    finally:
      holder.send_signal(signal.SIGKILL)
  with lock.held(folder, "a learner"):  # what the killed one left holds nothing
    assert f"a learner (process {os.getpid()} " in (folder / "lock").read_text()
  assert list(folder.iterdir()) == []


def test_a_folder_is_free_again_after_an_error_and_one_made_for_nothing_goes(tmp_path):
  with pytest.raises(KeyError), lock.held(tmp_path / "new", "a training"):
    raise KeyError
  assert not (tmp_path / "new").exists()
  with lock.held(tmp_path / "new", "a training"):
    (tmp_path / "new" / "kept").touch()
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_a_lock_given_back_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
  """The holder goes between the other's open and its flock, and takes the file with it."""
  first, real = Lock(tmp_path, "one"), fcntl.flock

  def flock(file, how):
    first.close()
    real(file, how)

  monkeypatch.setattr(fcntl, "flock", flock)
  second = Lock(tmp_path, "two")
  with pytest.raises(ConfigError, match="two"):
    Lock(tmp_path, "three")
  second.close()
  assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_not_held():
  url = storage.place("gs://bucket/run")
  with lock.held(url, "a training"), lock.held(url, "a training"):
    pass
