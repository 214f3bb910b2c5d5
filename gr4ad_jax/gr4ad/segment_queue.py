"""Which segments a learner has learned from, which wait, and which it has put into quarantine.

A file that cannot be read, or holds no events as they must be, must not keep the good ones behind
it waiting. It stays where it is, for the folder is its writer's; OUT/quarantine.json names it, says
why, and knows its content: it is tried again when that has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from gr4ad_jax.data.segments import segment_files
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.progress import console


@dataclasses.dataclass(frozen=True)
class Learned:
  """A segment that is in the parameters."""

  sha256: str | None  # of its bytes; None = of a version that did not note it
  read_s: float | None  # unix seconds of that moment; None as above


class SegmentQueue:
  """The segments of a folder, by name."""

  def __init__(self, folder: Path, out: Path):
    """Opens what `out` knows of earlier lives."""
    self.learned: dict[str, Learned] = {}
    self._folder, self._file = folder, out / "quarantine.json"
    self._known: dict[str, tuple] = {}  # file -> its state and checksum at the last look
    self._told: dict[str, str | None] = {}  # learned file -> other content that was told of
    try:
      found = json.loads(self._file.read_text(encoding="utf-8"))
      self.quarantine: dict[str, dict[str, Any]] = {
        name: row for name, row in found.items() if "sha256" in row
      }
    except (OSError, ValueError, TypeError, AttributeError):  # they are tried again
      self.quarantine = {}

  def restore(self, learned: dict[str, Any]) -> None:
    """Begins where a checkpoint was written, with what `record` gave then."""
    checksums, read_s = learned.get("sha256", {}), learned.get("read_s", {})
    self.learned = {
      name: Learned(checksums.get(name), read_s.get(name)) for name in learned["segments"]
    }

  def record(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON values."""
    return {
      "segments": list(self.learned),
      "sha256": {name: row.sha256 for name, row in self.learned.items()},
      "read_s": {name: row.read_s for name, row in self.learned.items()},
    }

  def waiting(self) -> list[Path]:
    """Segments to learn from, in order; tells of learned ones whose content is another one now."""
    found = []
    for path in segment_files(self._folder):
      name = path.name
      if name in self.learned:
        self._compare(path)
      elif name not in self.quarantine or self.checksum(path) != self.quarantine[name]["sha256"]:
        found.append(path)
    return found

  def checksum(self, path: Path) -> str | None:
    """SHA-256 of a file, which is read again when it has been touched; None = cannot be read."""
    state, found = None, None
    with contextlib.suppress(OSError):
      stat = path.stat()
      state = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
      if path.name in self._known and self._known[path.name][0] == state:
        return self._known[path.name][1]
      with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    self._known[path.name] = state, found
    return found

  def set_aside(self, path: Path, sha256: str | None, error: Exception) -> None:
    """Puts a file whose content has this checksum into quarantine."""
    why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    why = " ".join(why.removeprefix(f"{path}: ").split())[:300]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    known = self.quarantine.get(path.name, {}).get("why") == why
    self.quarantine[path.name] = {"why": why, "since": now, "sha256": sha256}
    storage.write_json(self._file, self.quarantine)
    if known:  # one that is being written is tried again and again
      return
    console.print(
      f"{path}: in quarantine ({why}); it stays there, is tried again when it has changed, and "
      f"those behind it go on; {len(self.quarantine):,} in {self._file}"
    )

  def add(self, path: Path, learned: Learned) -> None:
    """A segment is in the parameters."""
    self.learned[path.name] = learned
    if self.quarantine.pop(path.name, None):
      storage.write_json(self._file, self.quarantine)

  def _compare(self, path: Path) -> None:
    """Tells once of a learned file that is another one now."""
    known, now = self.learned[path.name].sha256, self.checksum(path)
    if known is None or now in (known, self._told.get(path.name, known)):
      return
    self._told[path.name] = now
    console.print(
      f"{path}: has changed since it was learned from; the parameters hold what it was. To learn "
      "from what it is now, give it another name"
    )
