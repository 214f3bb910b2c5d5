import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from gr4ad_jax.machine.memory import keep_freed_memory

print(keep_freed_memory())
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  b"x" * 2**27  # 32,768 pages of 4 KiB; numpy would ask for huge ones itself
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
try:
  with open("/proc/self/smaps_rollup") as file:
    print(sum(int(line.split()[1]) for line in file if line.startswith("AnonHugePages")))
except OSError:  # not Linux
  print(0)
"""


def outcome(**variables):
  """Whether it was done, page faults of a second allocation, kB of memory in huge pages."""
  theirs = ("MALLOC_", "GLIBC_TUNABLES", "GR4AD_KEEP_MEMORY")
  environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT], env=environment | variables, capture_output=True, text=True,
    check=True,
  )
  done, faults, huge = run.stdout.split()
  return done == "True", int(faults), int(huge)


def huge_pages_on_request():
  try:
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
      return "[madvise]" in file.read()
  except OSError:
    return False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
  done, faults, _ = outcome()
  assert done
  assert faults < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.skipif(not huge_pages_on_request(), reason="Linux gives huge pages to all or to none")
def test_kept_memory_lies_in_huge_pages():
  assert outcome()[2] > 2**16
  assert outcome(GR4AD_KEEP_MEMORY="0")[2] < 2**16


@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "4"), ("GR4AD_KEEP_MEMORY", "0")])
def test_the_user_has_the_last_word(name, value):
  done, faults, _ = outcome(**{name: value})
  assert not done
  assert faults > 100 or platform.libc_ver()[0] != "glibc"
