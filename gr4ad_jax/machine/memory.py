"""How the C library's allocator treats memory that a program frees."""

from __future__ import annotations

import ctypes
import mmap
import os

# Numbers of options in glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEPT_BYTES = 2**30  # of freed memory at the heap's end
_STEP_BYTES = 2**26  # by which the heap grows
_HUGE_BYTES = _KEPT_BYTES - 2**27  # of the heap's beginning; less than what is given back


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
    libc = ctypes.CDLL(None)
    mallopt = libc.mallopt
  except (AttributeError, OSError, TypeError):
    return False
  options = (  # one heap, which takes every size, keeps what is freed and grows by large steps
    (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _STEP_BYTES)
  )
  kept = all([mallopt(option, value) for option, value in options])  # mallopt gives 0 if it cannot
  if kept:
    _ask_for_huge_pages(libc)
  return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
  """Grows the heap, untouched, and advises Linux to fill it by pages of 2 MB.

  Fewer misses of the address cache: a training step takes a twentieth less (docs/scaling.md). Where
  the system refuses, the pages stay small.
  """
  if not hasattr(mmap, "MADV_HUGEPAGE"):
    return
  libc.aligned_alloc.restype = ctypes.c_void_p
  size = ctypes.c_size_t(_HUGE_BYTES)
  start = ctypes.c_void_p(libc.aligned_alloc(ctypes.c_size_t(mmap.PAGESIZE), size))
  if start:
    libc.madvise(start, size, mmap.MADV_HUGEPAGE)
    libc.free(start)
