"""Short names for values."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def cache_key(*parts: Any) -> str:
  """One name for JSON values; other values have another."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
