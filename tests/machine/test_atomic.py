"""Files and folders are whole at any moment: writers killed, at once, on a full disk."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gr4ad_jax.machine import atomic

PROGRAM = """
import os, signal, sys
from pathlib import Path
from gr4ad_jax.machine import atomic

path = Path(sys.argv[1])
with atomic.new_folder(path) if "folder" in path.name else atomic.new_file(path) as fresh:
  file = (fresh / "a").open("wb") if "folder" in path.name else fresh
  file.write(b"theirs")
  file.flush()
  if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def by_another_process(path: Path, end: str) -> None:
  ended = subprocess.run([sys.executable, "-c", PROGRAM, path, end], check=False)
  assert ended.returncode == (-signal.SIGKILL if end == "killed" else 0)


def write_folder(path: Path, content: str) -> None:
  with atomic.new_folder(path) as fresh:
    for name in ("a", "b"):
      (fresh / name).write_text(content)


def names(folder: Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["in one step", "in two steps"])
def replacing(request, monkeypatch):
  """As Linux replaces a folder, and as systems do that cannot swap two."""
  if request.param == "in two steps":
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)


def test_a_killed_writer_leaves_the_old_content_and_the_next_one_sweeps(tmp_path):
  old = tmp_path / "file", tmp_path / "folder"
  atomic.write_text(old[0], "old")
  write_folder(old[1], "old")
  for path in (*old, tmp_path / "new file", tmp_path / "new folder"):
    by_another_process(path, "killed")
    assert len([name for name in names(tmp_path) if name.endswith(".tmp")]) == 1  # its own
  assert {name for name in names(tmp_path) if not name.startswith(".")} == {"file", "folder"}
  assert old[0].read_text() == (old[1] / "b").read_text() == "old"
  by_another_process(old[0], "whole")
  assert names(tmp_path) == {"file", "folder"} and old[0].read_text() == "theirs"


def test_what_a_running_process_writes_is_not_swept(tmp_path):
  with atomic.new_file(tmp_path / "a") as file, atomic.new_folder(tmp_path / "b") as fresh:
    by_another_process(tmp_path / "c", "whole")
    (fresh / "x").write_text("ours")
    file.write(b"ours")
  assert names(tmp_path) == {"a", "b", "c"}


def test_an_error_leaves_the_old_content(tmp_path):
  atomic.write_text(tmp_path / "file", "old")
  write_folder(tmp_path / "folder", "old")
  with pytest.raises(KeyError), atomic.new_file(tmp_path / "file") as file:
    file.write(b"new")
    raise KeyError
  with pytest.raises(KeyError), atomic.new_folder(tmp_path / "folder") as fresh:
    (fresh / "a").write_text("new")
    raise KeyError
  assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "old"
  assert names(tmp_path) == {"file", "folder"}


@pytest.mark.parametrize("durable", [False, True])
def test_a_full_disk_leaves_the_old_content(tmp_path, durable):
  """A limit on the size of files fails the same call as a full disk does."""
  path = tmp_path / "file"
  atomic.write_text(path, "old")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
  try:
    with pytest.raises(OSError), atomic.new_file(path, durable=durable) as file:
      file.write(b"new" * 5000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_text() == "old" and names(tmp_path) == {"file"}


def test_a_folder_is_replaced_with_all_it_held(tmp_path, replacing):
  write_folder(tmp_path / "deep" / "folder", "old")
  (tmp_path / "deep" / "folder" / "stale").write_text("stale")
  write_folder(tmp_path / "deep" / "folder", "new")
  assert names(tmp_path / "deep" / "folder") == {"a", "b"}
  assert (tmp_path / "deep" / "folder" / "a").read_text() == "new"
  assert names(tmp_path / "deep") == {"folder"}


def test_of_two_writers_the_last_one_counts(tmp_path):
  """Whoever reads meanwhile finds one whole content of either."""
  target, folder, done = tmp_path / "file", tmp_path / "folder", threading.Event()
  mixed = []

  def write(content: str) -> None:
    for _ in range(50):
      atomic.write_text(target, content * 10_000)
      write_folder(folder, content)

  def read() -> None:
    while not done.is_set():
      if target.exists() and target.read_text() not in ("x" * 10_000, "y" * 10_000):
        mixed.append(target)
      if folder.exists():
        handle = os.open(folder, os.O_RDONLY)  # this folder, wherever it is moved to
        with contextlib.suppress(FileNotFoundError):  # being removed
          files = [os.open(name, os.O_RDONLY, dir_fd=handle) for name in ("a", "b")]
          if len({os.read(file, 10) for file in files}) > 1:
            mixed.append(folder)
          for file in files:
            os.close(file)
        os.close(handle)

  reader = threading.Thread(target=read)
  writers = [threading.Thread(target=write, args=(content,)) for content in "xy"]
  for thread in (reader, *writers):
    thread.start()
  for thread in writers:
    thread.join()
  done.set()
  reader.join()
  assert not mixed
  assert target.read_text() in ("x" * 10_000, "y" * 10_000)
  assert (folder / "a").read_text() == (folder / "b").read_text()
  assert names(tmp_path) == {"file", "folder"}


def test_a_scratch_folder_is_gone_at_the_end(tmp_path):
  with atomic.scratch_folder(tmp_path / "made" / "x") as scratch:
    (scratch / "part").write_text("1")
    assert scratch.parent == tmp_path / "made"
  with pytest.raises(KeyError), atomic.scratch_folder(tmp_path / "made" / "x"):
    raise KeyError
  assert names(tmp_path / "made") == set()
