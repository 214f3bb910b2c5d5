"""Folders and files in object stores: gs://BUCKET/... and s3://BUCKET/...

A place is a `Path` of this machine or a `Url`. `place` alone makes one from text, and a `Url` is
not a path (no `__fspath__`): no program can take one for a local folder.

    fetch(place)           to read: a local copy, brought up to date
    new_folder(place)      to write from nothing: what is there is replaced
    working_copy(place)    to change: a local copy whose changes are pushed back
    scratch_copy(place)    the same, pushed only when asked for
    exists, read_text, write_text     one small file

Each of them takes a `Path` as it is, without a copy. What is fetched stays in GR4AD_CACHE
(~/.cache/gr4ad), and only files whose version in the bucket has changed are fetched again.

Who reads a folder must not take half of it for the whole. Every folder of this package has JSON
files that say that it is complete, and a checkpoint has commit_success.txt: a push writes these
markers last, those of subfolders first; where it replaces other files, it removes the markers that
it will write before anything else. `checkpoints/` is no part of a copy: `training.checkpoint`
writes it, from all hosts at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import atomic, bucket
from gr4ad_jax.machine.bucket import DRIVERS, StorageError, Url

_ROUNDS = 20  # a folder that changes more often while it is fetched is given up


Place = Path | Url


def place(text: str) -> Place:
  """What a user's text means.

  Raises:
    StorageError: another scheme, no bucket, or a name that is not UTF-8.
  """
  if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of another encoding
    raise StorageError(f"{text!a}: is not UTF-8, and not every library opens it; give it a name in "
                       "UTF-8")
  scheme, colon, rest = text.partition(":")
  if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
    return Path(text)
  if scheme in DRIVERS:
    parts = [part for part in rest.split("/") if part]
    if not rest.startswith("//") or not parts or {".", ".."} & set(parts):
      raise StorageError(f"{text}: write {scheme}://BUCKET/FOLDER")
    return Url(scheme, "/".join(parts))
  if rest.startswith("//"):
    known = " and ".join(f"{name}://" for name in DRIVERS)
    raise StorageError(f"{text}: {scheme}:// is not supported; {known} are, and local paths")
  return Path(text)


def local_path(text: str) -> Path:
  """A path of this machine.

  Raises:
    StorageError: a URL.
  """
  found = place(text)
  if isinstance(found, Url):
    raise StorageError(
      f"{text}: this one must be on the machine's own or a mounted disk (gcsfuse, mountpoint-s3)"
    )
  return found


def absolute(place: Place) -> str:
  """What run.json keeps: the same place from every folder, and of a bucket from every machine."""
  return str(place.resolve()) if isinstance(place, Path) else str(place)


def exists(place: Place) -> bool:
  """Whether a file or folder is there."""
  if isinstance(place, Path):
    return place.exists()
  return bucket.exists(place)


def require_free(place: Place) -> None:
  """Raises StorageError where the bucket has something there; local folders are their writer's."""
  if isinstance(place, Url) and exists(place):
    raise StorageError(f"{place}: exists already; pass another --out")


def require_replaceable(
  place: Place, what: str, *, markers: Sequence[str], parts: Sequence[str] = (), overwrite: bool
) -> None:
  """Refuses to replace what is there unasked, and anything else at all.

  Args:
    place: folder that a stage is going to write.
    what: it holds where all `markers` are there.
    markers: names of its files that say that it is complete.
    parts: names of what an interrupted stage leaves, which may always be replaced.
    overwrite: replace it.

  Raises:
    ConfigError: it is there, or something else is.
  """
  if all(exists(place / name) for name in markers):
    if not overwrite:
      raise ConfigError(f"{place}: holds {what} already; pass --overwrite or another --out")
  elif isinstance(place, Path) and place.exists():
    if not place.is_dir() or {path.name for path in place.iterdir()} - set(parts):
      raise ConfigError(f"{place}: holds other files; pass another --out")


def read_text(place: Place) -> str:
  """A small file."""
  if isinstance(place, Path):
    return place.read_text(encoding="utf-8")
  return bucket.read(place).decode()


def write_text(place: Place, text: str) -> None:
  """Writes a small file in one piece; the folder of a local one is made."""
  if isinstance(place, Path):
    atomic.write_text(place, text)
  else:
    bucket.write(place, text.encode())


def write_json(place: Place, values: Any) -> None:
  """Writes JSON in one piece: a reader sees the old file or the new one.

  JSON knows no NaN: a number that is not finite becomes null.
  """
  write_text(place, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(values: Any) -> Any:
  if isinstance(values, Mapping):
    return {name: _finite(value) for name, value in values.items()}
  if isinstance(values, list | tuple):
    return [_finite(value) for value in values]
  return None if isinstance(values, float) and not math.isfinite(values) else values


def fetch(place: Place) -> Path:
  """A folder or file to read: itself, or its copy in the cache as the bucket has it now.

  Where there is nothing, the path that is returned does not exist either.

  Raises:
    StorageError: the bucket cannot be read.
  """
  if isinstance(place, Path):
    return place
  with _mirrored(place) as path:
    return path


class Copy:
  """A folder on this machine that stands for a place; of a local one, the folder itself."""

  def __init__(self, place: Place, path: Path, known: dict[str, Any]):
    """`known`: file -> signature when the bucket had it; None = it has another one."""
    self.place, self.path, self._known = place, path, known
    self.kept = False  # where it could not be pushed

  def push(self) -> None:
    """Writes what has changed here to the bucket, and removes there what is gone here.

    Raises:
      StorageError: it could not be written; the copy stays, and the message says where.
    """
    if isinstance(self.place, Path):
      return
    here = _signatures(self.path)
    changed = {name for name, signature in here.items() if self._known.get(name) != signature}
    gone = self._known.keys() - here.keys()
    data = [name for name in changed if not _is_marker(name)]
    if gone or any(name in self._known for name in data):
      self._remove([name for name in changed | gone if _is_marker(name) and name in self._known])
    self._upload(data, here)
    self._remove([name for name in gone if name in self._known])
    by_depth = sorted(changed.difference(data), key=lambda name: (-name.count("/"), name))
    for name in by_depth:
      self._upload([name], here)

  def _upload(self, names: Sequence[str], signatures: dict[str, Any]) -> None:
    num_bytes = sum(signatures[name][0] for name in names)
    with self._writing():
      bucket.upload(self.path, names, self.place, num_bytes)
    self._known |= {name: signatures[name] for name in names}

  def _remove(self, names: Sequence[str]) -> None:
    with self._writing():
      bucket.remove(self.place, names)
    for name in names:
      del self._known[name]

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except StorageError as error:
      self.kept = True
      _shown.pop(str(self.path), None)
      raise StorageError(f"{error}; what was made is kept in {self.path}") from error


@contextlib.contextmanager
def new_folder(place: Place) -> Iterator[Copy]:
  """A folder to write from nothing; it replaces what is there when the block ends without error.

  Raises:
    StorageError: the bucket cannot be written, which is found out first.
  """
  with _staged(place) as copy:
    if isinstance(place, Url):
      copy._known = dict.fromkeys(bucket.listing(place))
      bucket.require_writable(place)
    yield copy
    copy.push()


@contextlib.contextmanager
def scratch_copy(place: Place) -> Iterator[Copy]:
  """A folder, without its checkpoints/, to change; what changes is only pushed when asked for.

  Raises:
    StorageError: the bucket cannot be read.
  """
  with _staged(place) as copy:
    if isinstance(place, Url):
      with _mirrored(place) as path:
        if path.is_dir():
          shutil.copytree(path, copy.path)
      copy.path.mkdir(exist_ok=True)
      copy._known = _signatures(copy.path)
    yield copy


@contextlib.contextmanager
def working_copy(place: Place) -> Iterator[Copy]:
  """A `scratch_copy` whose changes are pushed at the end, after an error too.

  Raises:
    StorageError: the bucket cannot be read, or a change cannot be written.
  """
  with scratch_copy(place) as copy:
    try:
      yield copy
    finally:
      copy.push()


@contextlib.contextmanager
def _staged(place: Place) -> Iterator[Copy]:
  """A folder of its own for every caller; it stays only where it could not be pushed."""
  if isinstance(place, Path):
    yield Copy(place, place, {})
    return
  (_cache() / "work").mkdir(parents=True, exist_ok=True)
  home = Path(tempfile.mkdtemp(dir=_cache() / "work"))
  path = home / place.name
  _shown[str(path)] = str(place)
  copy = Copy(place, path, {})
  try:
    yield copy
  finally:
    if not copy.kept:
      shutil.rmtree(home, ignore_errors=True)


_shown: dict[str, str] = {}


def as_named(text: str) -> str:
  """A message with the user's URLs in it instead of the local copies' paths."""
  for path, url in _shown.items():
    text = text.replace(path, url)
  return text


@contextlib.contextmanager
def _mirrored(url: Url) -> Iterator[Path]:
  """The copy in the cache, up to date; no other process of this machine changes it meanwhile."""
  home = _cache() / hashlib.blake2b(str(url).encode(), digest_size=8).hexdigest()
  home.mkdir(parents=True, exist_ok=True)
  path = home / url.name
  with open(home / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    manifest = home / "manifest.json"
    versions = json.loads(read_text(manifest))["versions"] if manifest.exists() else {}
    try:
      for _ in range(_ROUNDS):
        there = bucket.listing(url)
        for name in versions.keys() - there.keys():
          (path / name).unlink(missing_ok=True)
          del versions[name]
        missing = [
          name for name, (size, version) in there.items()
          if versions.get(name) != version or _size(path / name) != size
        ]
        if not missing:
          break
        bucket.download(
          url, missing, path, sum(there[name][0] for name in missing),
          arrived=lambda name, there=there: versions.update({name: there[name][1]}),
        )
      else:
        raise StorageError(f"{url}: changes all the time; fetch it when its writer is done")
    finally:
      write_json(manifest, {"url": str(url), "versions": versions})
    _shown[str(path)] = str(url)
    yield path


def _is_marker(name: str) -> bool:
  return name.endswith((".json", "commit_success.txt"))


def _signatures(path: Path) -> dict[str, Any]:
  return {
    str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime_ns)
    for file in path.rglob("*") if file.is_file()
  }


def _size(path: Path) -> int:
  return path.stat().st_size if path.is_file() else -1


def _cache() -> Path:
  return Path(os.environ.get("GR4AD_CACHE") or "~/.cache/gr4ad").expanduser()
