"""Files and folders that appear whole or not at all, whoever is killed meanwhile.

What is written lies beside its place under a hidden name until it is complete. Then it takes the
place in one step, so that a reader sees the old content or the new one. Of several writers the
last one counts. The hidden name says which process writes: what a killed one has left is removed
when another process of the same machine first writes into that folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's <fcntl.h> and <linux/fs.h>


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = False, private: bool = False) -> Iterator[BinaryIO]:
  """A file to write, which becomes `path` when the block ends without error.

  Args:
    path: of the file; its folder is made where missing.
    durable: the content is on the disk itself before the file appears: a machine that loses power
      leaves no empty file.
    private: only the owner may read it, whatever the process's rule for new files.
  """
  fresh = _beside(path)
  try:
    with open(fresh, "xb", opener=_open_private if private else None) as file:
      yield file
      if durable:
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
  finally:
    fresh.unlink(missing_ok=True)


def _open_private(path: str, flags: int) -> int:
  return os.open(path, flags, 0o600)


def write_text(path: Path, text: str) -> None:
  """Writes a small file in one piece; its folder is made where missing."""
  with new_file(path) as file:
    # Logs may hold half a surrogate pair, which JSON can spell and UTF-8 cannot.
    file.write(text.encode(errors="replace"))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """An empty folder to fill, which takes the place of `path` when the block ends without error."""
  with scratch_folder(path) as fresh:
    yield fresh
    put_in_place(fresh, path)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
  """An empty folder beside `path`, on the same disk, which is removed when the block ends."""
  fresh = _beside(path)
  fresh.mkdir()
  try:
    yield fresh
  finally:
    shutil.rmtree(fresh, ignore_errors=True)


def put_in_place(fresh: Path, path: Path) -> None:
  """Renames a folder; what `path` held before is removed."""
  old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
  while True:
    try:
      fresh.rename(path)  # Linux and macOS replace an empty folder, and refuse any other
      break
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
    if _exchange(fresh, path):
      old = fresh
      break
    # In two steps where there is no other way. Who is killed between them leaves the old folder
    # under a name that nobody sweeps.
    with contextlib.suppress(FileNotFoundError):  # another writer took it away first
      path.rename(old)
  shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
  """Swaps two folders in one step; False where the system or the disk cannot."""
  try:
    swap = ctypes.CDLL(None).renameat2
  except (AttributeError, OSError, TypeError):
    return False
  return swap(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _beside(path: Path) -> Path:
  """A hidden name beside `path` that says who writes there; the folder of both is made."""
  path = path.absolute()
  path.parent.mkdir(parents=True, exist_ok=True)
  _sweep(path.parent)
  writer = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
  return path.with_name(f".{path.name[:50]}.{writer}.tmp")  # file systems take 255 bytes


@functools.cache  # once is enough: what this process begins it also ends
def _sweep(folder: Path) -> None:
  """Removes what killed processes of this machine have left in a folder."""
  for entry in folder.glob(f".*.{_machine()}-*-*.tmp"):
    writer = int(entry.name.split("-")[-2])
    if not _is_running(writer):
      _remove(entry)


def sweep(folder: Path, names: str = "*") -> None:
  """Removes all that is half written in a folder, whoever began it, wherever that ran.

  For a folder that the caller alone writes to: a container that is started again knows nothing of
  the processes of the one before.

  Args:
    folder: may be missing.
    names: of the files and folders that were to appear, as a pattern.
  """
  for entry in folder.glob(f".{names}.*-*-*.tmp"):
    _remove(entry)


def _remove(entry: Path) -> None:
  if entry.is_dir():
    shutil.rmtree(entry, ignore_errors=True)
  else:
    entry.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
  """Where process numbers mean the same: this machine, and on Linux this container."""
  try:
    container = os.readlink("/proc/self/ns/pid")
  except OSError:
    container = ""
  return hashlib.blake2b(f"{platform.node()} {container}".encode(), digest_size=4).hexdigest()


def _is_running(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it is another user's
    return True
  return True
