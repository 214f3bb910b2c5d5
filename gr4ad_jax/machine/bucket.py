"""Files in object stores, gs:// and s3://; whatever a driver raises is one error naming the place.

`checkpoints/` is never listed: `training.checkpoint` writes it, from all hosts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gr4ad_jax.machine import atomic, extras
from gr4ad_jax.machine.progress import track

# Scheme -> the driver that fsspec needs, and the extra that installs it.
DRIVERS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_CHECKPOINTS = "checkpoints/"
_PROBE = ".gr4ad-"  # names of files that tell whether a folder can be written
_AT_ONCE = 8  # files
_LARGE = 64 << 20  # bytes from which progress is told


class StorageError(OSError):
  """A place that cannot be read or written; the message names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Url:
  """A folder or file in a bucket."""

  scheme: str
  path: str
  """BUCKET/FOLDER/..."""

  def __str__(self) -> str:
    return f"{self.scheme}://{self.path}"

  def __truediv__(self, name: str) -> Url:
    return Url(self.scheme, f"{self.path}/{name}" if name else self.path)

  @property
  def name(self) -> str:
    """The last part."""
    return self.path.rpartition("/")[2]


def require_driver(url: Url) -> None:
  """Raises StorageError where what reads such URLs is not installed."""
  _filesystem(url)


def exists(url: Url) -> bool:
  """Whether a file or folder is there."""
  with _telling(url, "read"):
    return _filesystem(url).exists(url.path)


def read(url: Url) -> bytes:
  """A small file."""
  with _telling(url, "read"):
    return _filesystem(url).cat_file(url.path)


def write(url: Url, content: bytes) -> None:
  """Writes a small file in one piece."""
  with _telling(url, "written"):
    _filesystem(url).pipe_file(url.path, content)


def listing(url: Url) -> dict[str, tuple[int, str]]:
  """File -> (bytes, version), without checkpoints/; {"": ...} where the URL is a file."""
  with _telling(url, "read"):
    found = _filesystem(url).find(url.path, detail=True)
  files = {}
  for key, info in found.items():
    name = key.removeprefix(url.path).removeprefix("/")
    folder = key.endswith("/") or info.get("type") == "directory"
    probe = name.rpartition("/")[2].startswith(_PROBE)
    if not (folder or probe or name.startswith(_CHECKPOINTS)):
      stamps = (info.get(at) for at in ("generation", "ETag", "etag", "LastModified", "mtime"))
      files[name] = (info["size"], str(next((stamp for stamp in stamps if stamp), "")))
  return files


def require_writable(url: Url) -> None:
  """Raises StorageError where no file can be written into a folder."""
  probe = url / f"{_PROBE}{uuid.uuid4().hex}"
  with _telling(url, "written"):
    _filesystem(probe).pipe_file(probe.path, b"")
    _filesystem(probe).rm_file(probe.path)


def download(
  url: Url, names: Sequence[str], folder: Path, num_bytes: int, *, arrived: Callable[[str], None]
) -> None:
  """Reads files into a local folder, some at once; each there is the old one or the new one.

  Args:
    url: of the folder.
    names: of the files.
    folder: to write to.
    num_bytes: of all of them.
    arrived: called with the name of each file that is written, which one that is gone is not.
  """

  def get(name: str) -> None:
    try:
      with atomic.new_file(folder / name) as file:
        _filesystem(url).get_file((url / name).path, file.name)
    except FileNotFoundError:  # gone since it was listed
      return
    arrived(name)

  with _telling(url, "read"):
    _each(get, names, f"fetch {url}, files", num_bytes)


def upload(folder: Path, names: Sequence[str], url: Url, num_bytes: int) -> None:
  """Writes files of a local folder into one of a bucket, some at once."""

  def put(name: str) -> None:
    _filesystem(url).put_file(str(folder / name), (url / name).path)

  with _telling(url, "written"):
    _each(put, names, f"write {url}, files", num_bytes)


def remove(url: Url, names: Sequence[str]) -> None:
  """Removes files of a folder; those that are gone already count as removed."""

  def one(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      _filesystem(url).rm_file((url / name).path)

  with _telling(url, "written"):
    _each(one, names, "", 0)


def move(old: Url, new: Url) -> None:
  """Moves a folder within its bucket; where it is killed in between, all of the old one is left."""
  names = list(listing(old))

  def copy(name: str) -> None:
    _filesystem(old).cp_file((old / name).path, (new / name).path)

  with _telling(old, "moved"):
    _each(copy, names, "", 0)
  remove(old, names)


def _filesystem(url: Url) -> Any:
  import fsspec
  import fsspec.config

  driver, extra = DRIVERS[url.scheme]
  # Others write into the same folders, so that a listing is never to be kept.
  fsspec.config.conf.setdefault(url.scheme, {})["use_listings_cache"] = False
  try:
    return fsspec.filesystem(url.scheme)
  except ImportError:
    raise StorageError(f"{url}: needs {driver}; {extras.install(extra)}") from None


@contextlib.contextmanager
def _telling(url: Url, done: str) -> Iterator[None]:
  """Whatever a driver raises, as one error that names the place."""
  try:
    yield
  except StorageError:
    raise
  except Exception as error:
    reason = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
      reason = f"there is no such bucket or file: {reason}"
    raise StorageError(f"{url}: cannot be {done}; {reason}") from error


def _each(do: Callable, items: Sequence, description: str, num_bytes: int) -> None:
  """Some at once; the first error stops what has not begun."""
  if not items:
    return
  with ThreadPoolExecutor(_AT_ONCE) as pool:
    done = as_completed([pool.submit(do, item) for item in items])
    try:
      for future in track(done, description, len(items)) if num_bytes >= _LARGE else done:
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
