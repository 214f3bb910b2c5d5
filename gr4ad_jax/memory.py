"""How the C library's allocator treats memory that a program frees."""

from __future__ import annotations

import ctypes
import os

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEPT_BYTES = 2**30  # of freed memory at the heap's end
_STEP_BYTES = 2**26  # by which the heap grows


def keep_freed_memory() -> bool:
  """Makes glibc keep up to 1 GiB of freed memory for the next allocation.

  XLA's CPU runtime allocates the buffers of a program at every call. Where they are large, glibc
  maps them anew each time, and the kernel hands out zeroed pages one fault after another: up to a
  quarter of a training step, for a fifth more compile time (docs/scaling.md). To be called before
  threads start, as each may open a heap of its own.

  Returns:
    Whether it was done: not with another C library, nor where the environment has
    GR4AD_KEEP_MEMORY=0 or glibc's own variables.
  """
  if os.environ.get("GR4AD_KEEP_MEMORY") == "0":
    return False
  if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  options = (
    (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _STEP_BYTES)
  )
  return all([mallopt(option, value) for option, value in options])
