"""A `gr4ad serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class Server:
  """A running server."""

  def __init__(self, process: subprocess.Popen, url: str, log: Path):
    self.process, self.url, self.log = process, url, log

  def rss_mb(self) -> float:
    """Memory that the process holds, MB."""
    for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
      if line.startswith("VmRSS:"):
        return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {self.process.pid} has gone; see {self.log}")

  def metric(self, name: str, label: str = "") -> float:
    """The sum of a metric over its labels, or over those with a text such as 'result="ok"'."""
    with urllib.request.urlopen(f"{self.url}/metrics") as reply:
      lines = reply.read().decode().splitlines()
    values = [
      float(line.rpartition(" ")[2]) for line in lines
      if line.split("{")[0].split(" ")[0] == name and label in line
    ]
    return sum(values)


@contextlib.contextmanager
def running_server(
  run: Path, store: Path, *options: object, log: Path, start_s: float = 600.0
) -> Iterator[Server]:
  """Starts a server and waits until it is ready; kills it at the end.

  Args:
    run: folder of a trained run.
    store: folder of its events and ads.
    options: of `gr4ad serve`.
    log: file for what it says.
    start_s: seconds that it may take until it is ready.

  Raises:
    RuntimeError: it ended instead.
    TimeoutError: it is not ready in time.
  """
  port = free_port()
  command = [sys.executable, "-m", "gr4ad_jax", "serve", "--workdir", run, "--store", store,
             "--port", port, *options]
  with log.open("wb") as output:
    process = subprocess.Popen(
      [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, env=os.environ
    )
  server = Server(process, f"http://127.0.0.1:{port}", log)
  deadline = time.monotonic() + start_s
  try:
    while not _ready(server.url):
      if process.poll() is not None:
        raise RuntimeError(f"the server ended: {log.read_text()[-1000:]}")
      if time.monotonic() > deadline:
        raise TimeoutError(f"the server is not ready after {start_s:.0f} s; see {log}")
      time.sleep(0.2)
    yield server
  finally:
    process.kill()
    process.wait()


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def _ready(url: str) -> bool:
  try:
    with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:
      return reply.status == 200
  except (urllib.error.URLError, OSError):
    return False
