"""What accelerators can do: peak rates and memory, known from data sheets or measured.

A device is what JAX counts as one: a TPU chip, a GPU. Sources: Google Cloud's pages on TPU v4, v5e,
v5p and v6e; NVIDIA's data sheets (SXM forms of A100, H100 and H200; without sparsity).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gr4ad_jax.config import ConfigError

_MATMUL_SHAPE = (2048, 1024, 1024)  # large enough that overheads do not count


@dataclasses.dataclass(frozen=True)
class Device:
  """What one device can do.

  Attributes:
    flops_per_s: peak of dense bfloat16 matrix products.
    memory_bytes: its own memory.
    bytes_per_s: between it and its memory; inf where that is not known.
  """

  flops_per_s: float
  memory_bytes: float
  bytes_per_s: float


DEVICES = {
  "v4": Device(275e12, 32e9, 1.2e12),
  "v5e": Device(197e12, 16e9, 0.82e12),
  "v5p": Device(459e12, 95e9, 2.77e12),
  "v6e": Device(918e12, 32e9, 1.64e12),
  "a100": Device(312e12, 80e9, 2.04e12),
  "h100": Device(989e12, 80e9, 3.35e12),
  "h200": Device(989e12, 141e9, 4.8e12),
  "l4": Device(121e12, 24e9, 0.3e12),
  "l20": Device(119.5e12, 48e9, 0.864e12),
}
_CORES_PER_CHIP = {"v4": 2, "v5p": 2}  # the number in these slices' names counts cores
# The first pattern that is found in jax.Device.device_kind names the device.
_KINDS = (
  ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"),
  ("TPU v6", "v6e"), ("A100", "a100"), ("H100", "h100"), ("H200", "h200"), ("L40", None),
  ("L4", "l4"), ("L20", "l20"),
)  # fmt: skip


def parse_devices(text: str) -> tuple[Device, int]:
  """The kind and the number of devices that "v5e-16", "h100-8" or "cpu" stands for.

  A slice of v4 or v5p is named after its cores, two a chip: v5p-8 has four chips.

  Raises:
    ConfigError: not of this form, or a kind without known figures.
  """
  if text == "cpu":
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(measured_rate("float32"), pages, float("inf")), 1
  match = re.fullmatch(r"(\w+)-(\d+)", text.lower().replace("v5litepod", "v5e"))
  kind, count = (match[1], int(match[2])) if match else ("", 0)
  if kind not in DEVICES or count < 1 or count % _CORES_PER_CHIP.get(kind, 1):
    raise ConfigError(
      f"devices={text!r}: needs KIND-NUMBER as in v5e-16 or h100-8, or cpu; known kinds: "
      f"{', '.join(DEVICES)}"
    )
  return DEVICES[kind], count // _CORES_PER_CHIP.get(kind, 1)


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> float:
  """FLOP/s that these devices reach together at best; NaN where an accelerator is not known.

  Args:
    devices: all of one kind, those of other processes too.
    dtype: type of the matrix product that is measured now where the devices are CPUs.
  """
  if devices[0].platform == "cpu":  # simulated devices share the cores of their host
    return measured_rate(dtype) * len({device.process_index for device in devices})
  for pattern, kind in _KINDS:
    if pattern in devices[0].device_kind:
      return DEVICES[kind].flops_per_s * len(devices) if kind else float("nan")
  return float("nan")


def matmul(dtype: str) -> tuple[Callable[[], jax.Array], int]:
  """A large matrix product on the default device, and its FLOPs."""
  rows, inner, columns = _MATMUL_SHAPE
  left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(left, right), 2 * rows * inner * columns


@functools.cache
def measured_rate(dtype: str, *, repeats: int = 5) -> float:
  """FLOP/s of a large matrix product on the default device, measured once a process: the best of
  some calls."""
  multiply, flops = matmul(dtype)
  multiply().block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    multiply().block_until_ready()
    seconds.append(time.perf_counter() - start)
  return flops / min(seconds)
