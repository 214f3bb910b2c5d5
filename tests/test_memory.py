import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from gr4ad_jax.memory import keep_freed_memory

print(keep_freed_memory())
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**24)  # 128 MiB, 32,768 pages of 4 KiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def outcome(**variables):
  theirs = ("MALLOC_", "GLIBC_TUNABLES", "GR4AD_KEEP_MEMORY")
  environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT], env=environment | variables, capture_output=True, text=True,
    check=True,
  )
  done, faults = run.stdout.split()
  return done == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
  done, faults = outcome()
  assert done
  assert faults < 100


@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "4"), ("GR4AD_KEEP_MEMORY", "0")])
def test_the_user_has_the_last_word(name, value):
  done, faults = outcome(**{name: value})
  assert not done
  assert faults > 100 or platform.libc_ver()[0] != "glibc"
