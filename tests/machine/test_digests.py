"""Files that change after they were written are named; what costs too much is not read."""

import json
import shutil

import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import digests


@pytest.fixture
def folder(tmp_path):
  """Files of three kinds, and the JSON file that holds their digests."""
  (tmp_path / "part").mkdir()
  (tmp_path / "part" / "a.bin").write_bytes(b"0123456789")
  (tmp_path / "b.txt").write_text("b")
  np.savez(tmp_path / "c.npz", x=np.arange(4))
  write(tmp_path)
  return tmp_path


def write(folder):
  files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".json"]
  about = {"digests": digests.of_files(folder, files)}
  (folder / "about.json").write_text(json.dumps(about))


def test_files_as_they_were_written_are_taken(folder):
  known = digests.check(folder / "about.json", remedy="make it again")
  assert set(known) == {"part/a.bin", "b.txt", "c.npz"} and known["part/a.bin"][0] == 10
  shutil.copytree(folder, folder.with_name("moved"))
  assert digests.check(folder.with_name("moved") / "about.json", remedy="") == known


@pytest.mark.parametrize(("change", "message"), [
  (lambda f: (f / "part/a.bin").write_bytes(b"0123456798"), "part/a.bin: holds something other"),
  (lambda f: (f / "part/a.bin").write_bytes(b"01234"), "a.bin: has 5 bytes, but 10 were written"),
  (lambda f: (f / "b.txt").unlink(), "b.txt: is gone"),
  (lambda f: np.savez(f / "c.npz", x=np.arange(4)[::-1]), "c.npz: holds something other"),
])
def test_a_changed_file_is_named_with_what_to_do(folder, change, message):
  change(folder)
  with pytest.raises(ConfigError, match=f"{message}.*; make it again"):
    digests.check(folder / "about.json", remedy="make it again")


def test_an_archive_of_the_same_arrays_is_the_same_whenever_it_was_written(folder, monkeypatch):
  before = digests.check(folder / "about.json", remedy="")
  monkeypatch.setattr("time.time", lambda: 2e9)
  np.savez(folder / "c.npz", x=np.arange(4))
  assert digests.check(folder / "about.json", remedy="") == before


def test_beyond_what_is_compared_the_size_alone_counts(folder, monkeypatch):
  monkeypatch.setattr(digests, "COMPARED_BYTES", 5)  # room for b.txt, the smallest
  (folder / "part/a.bin").write_bytes(b"9876543210")
  digests.check(folder / "about.json", remedy="")
  (folder / "b.txt").write_text("c")
  with pytest.raises(ConfigError, match="b.txt"):
    digests.check(folder / "about.json", remedy="")


def test_folders_of_earlier_versions_have_nothing_to_compare(folder):
  (folder / "about.json").write_text("{}")
  assert digests.check(folder / "about.json", remedy="") == {}
  assert digests.check(folder / "absent.json", remedy="") == {}
