"""One process at a time in a folder; who comes second is told who is there.

The lock is the operating system's (flock): it goes with its process, however that ends, and nobody
has to clean up. The file `lock` in the folder says who holds it, and is gone when it is given back;
one that a killed process has left holds nothing.

A bucket has no such lock: two who write to one place in gs:// or s3:// are not kept apart.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import distributed
from gr4ad_jax.machine.storage import Place


class Lock:
  """A folder of this machine that nobody else works in until `close`, or this process ends."""

  def __init__(self, folder: Path, work: str):
    """Takes the folder, which is made where missing.

    Args:
      folder: to hold.
      work: what is done there, such as "a training"; those who come second read it.

    Raises:
      ConfigError: another one holds it; the message says who.
    """
    self._folder, self._path = folder, folder / "lock"
    self._made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
      self._file = self._path.open("a+")
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = _holder(self._path)
        self._file.close()
        raise ConfigError(
          f"{folder}: {holder} is at work here; wait for its end, stop it, or name another folder"
        ) from None
      except OSError:  # a disk without locks: better two at work than none
        break
      if self._is_there():
        break
      self._file.close()  # its last holder took it away between the two calls
    with contextlib.suppress(OSError):  # a full disk: held all the same
      self._file.truncate(0)
      now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
      self._file.write(f"{work} (process {os.getpid()} of {platform.node()}, since {now})\n")
      self._file.flush()

  def _is_there(self) -> bool:
    """Whether the open file is still that in the folder."""
    try:
      return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
    except FileNotFoundError:
      return False

  def close(self) -> None:
    """Gives the folder back; one that was made for nothing goes."""
    if self._file.closed:
      return
    with contextlib.suppress(OSError):
      if self._is_there():
        self._path.unlink()
      if self._made:
        self._folder.rmdir()
    with contextlib.suppress(OSError):  # what a full disk did not take
      self._file.close()


def _holder(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8").strip() or "another process"
  except (OSError, ValueError):
    return "another process"


@contextlib.contextmanager
def held(place: Place, work: str) -> Iterator[None]:
  """A place that no other run works in until the block ends; arguments as `Lock`.

  Processes that work together hold it together: the first one takes it. A bucket is not held.

  Raises:
    ConfigError: another one holds it.
  """
  lock, fault = None, None
  if isinstance(place, Path) and distributed.is_first():
    try:
      lock = Lock(place, work)
    except ConfigError as error:
      fault = error
  if not distributed.first_says(fault is None):  # else the others would wait for it for ever
    raise fault or ConfigError(f"{place}: is held by another run; the first process names it")
  try:
    yield
  finally:
    if lock:
      lock.close()
