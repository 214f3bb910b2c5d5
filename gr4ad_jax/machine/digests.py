"""What the files of a folder hold, as short hashes: kept when they are made, compared when opened.

The JSON file that says that a folder is complete holds them under "digests": file -> [bytes, hash].
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gr4ad_jax.config import ConfigError

COMPARED_BYTES = 256 << 20  # of a folder at an opening: a fraction of a second

Digests = dict[str, list]
"""File below a folder -> [bytes, hash of what it holds]."""


def of_files(folder: Path, files: Iterable[Path]) -> Digests:
  """Digests of files below `folder`, all of their bytes read, some at once."""
  files = sorted(files)
  with ThreadPoolExecutor() as pool:  # hashing lets other threads run
    hashes = list(pool.map(_hash, files))
  return {
    file.relative_to(folder).as_posix(): [file.stat().st_size, found]
    for file, found in zip(files, hashes, strict=True)
  }


def check(about: Path, *, remedy: str) -> Digests:
  """The digests that a JSON file holds, once the files beside it are found to be those still.

  All sizes are compared, and what the files hold, smallest first, up to COMPARED_BYTES: opening
  large logs is not to read all of them twice.

  Args:
    about: the JSON file; where it is missing or damaged there is nothing to compare, which its
      reader tells.
    remedy: what to do where a file has changed.

  Returns:
    {} for folders that were made before there were digests.

  Raises:
    ConfigError: a file is gone, or holds something else; the message names it.
  """
  try:
    known: Digests = json.loads(about.read_text(encoding="utf-8")).get("digests", {})
  except (OSError, ValueError, AttributeError):
    return {}
  left = COMPARED_BYTES
  for name, (size, digest) in sorted(known.items(), key=lambda item: item[1][0]):
    file = about.parent / name
    if not file.is_file():
      raise ConfigError(f"{file}: is gone; {remedy}")
    if (found := file.stat().st_size) != size:
      raise ConfigError(f"{file}: has {found:,} bytes, but {size:,} were written; {remedy}")
    left -= size
    if left >= 0 and _hash(file) != digest:
      raise ConfigError(f"{file}: holds something other than was written; {remedy}")
  return known


def of_value(value: object) -> str:
  """A short hash of plain values, such as digests."""
  return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _hash(file: Path) -> str:
  digest = hashlib.blake2b(digest_size=16)
  if file.suffix == ".npz":
    # Its bytes hold the time of writing; its directory has a checksum of every array.
    try:
      with zipfile.ZipFile(file) as archive:
        members = [(member.filename, member.CRC) for member in archive.infolist()]
    except zipfile.BadZipFile:
      return "not an archive"
    digest.update(json.dumps(members).encode())
    return digest.hexdigest()
  with file.open("rb") as content:
    return hashlib.file_digest(content, lambda: digest).hexdigest()
