"""Real sockets, more of them than the process may have files: nobody else is kept from answers."""

import contextlib
import http.client
import resource
import socket
import subprocess
import sys
import time

import pytest

from experiments._serving import free_port
from gr4ad_jax.serving import connections

FILES = 256

# A server whose routes need a thread, a file and the store, as those of a run do.
SERVER = """
import asyncio, contextlib, sys
from pathlib import Path
from fastapi import APIRouter, Response
from gr4ad_jax.serving import border, connections
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.journal import Event, Journal
from gr4ad_jax.serving.metrics import HttpMetrics

port, folder = int(sys.argv[1]), Path(sys.argv[2])
connections.SLOW_S = 2.0
journal, api = Journal(folder / "journal.sqlite"), APIRouter(prefix="/v1")
event = Event("u1", 1, "ad1", None, 2, None, 1.0, None, {})

@contextlib.asynccontextmanager
async def running():
  yield

@api.post("/keep")
async def keep():
  await asyncio.to_thread(journal.add_events, [event])
  (folder / "another file").write_text("x")
  return {}

@api.get("/long")
async def long():
  return Response(bytes(30_000_000))

app = border.make_app(
  running, api, config=ServingConfig(body_timeout_s=2), metrics=HttpMetrics(), api_key=None,
  hosts=(), title="t",
)
border.serve(app, host="127.0.0.1", port=port)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """The port of a server that may have FILES files, and what it says."""
  port, folder = free_port(), tmp_path_factory.mktemp("server")
  with (folder / "said").open("wb") as said:
    process = subprocess.Popen(
      ["bash", "-c", f'ulimit -n {FILES}; exec "$@"', "bash",
       sys.executable, "-c", SERVER, str(port), str(folder)], stderr=said,
    )
  try:
    for _ in range(600):
      with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        break
      assert process.poll() is None, (folder / "said").read_text()
      time.sleep(0.1)
    yield port, folder / "said"
  finally:
    process.kill()
    process.wait()


def status(port, method, path):
  """The status of a reply, on a connection of its own."""
  with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
    connection.request(method, path)
    return connection.getresponse().status


def gone(sockets, *, most, within_s=60.0):
  """How many of them the server has ended, up to so many."""
  deadline, ended = time.monotonic() + within_s, set()
  while True:
    for i, one in enumerate(sockets):
      one.setblocking(False)
      with contextlib.suppress(BlockingIOError):
        try:
          if one.recv(100_000) == b"":
            ended.add(i)
        except ConnectionError:
          ended.add(i)
    if len(ended) >= most or time.monotonic() > deadline:
      return len(ended)
    time.sleep(0.05)


STARTS = {
  "silent": b"",
  "a head that does not end": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-",
  "a body that does not come": b"POST /v1/keep HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
  "answered, and then silent": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
}


def test_idle_sockets_take_no_answer_from_others(server):
  port, said = server
  with contextlib.ExitStack() as stack:
    for name, begin in STARTS.items():
      idle = []
      for _ in range(300):
        one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        with contextlib.suppress(ConnectionError):  # ended already, for the next ones
          one.sendall(begin)
        idle.append(one)
      for method, path in (("GET", "/healthz"), ("POST", "/v1/keep"), ("GET", "/metrics")):
        assert status(port, method, path) == 200, (name, path)
      most = 300 - FILES // 4
      assert gone(idle, most=most) >= most, name
  # Nobody had to wait until others gave up: there were files at any time.
  assert "out of system resource" not in said.read_text()


def test_a_connection_may_not_do_nothing_for_long(server):
  port, _ = server
  with contextlib.ExitStack() as stack:
    def connected(begin):
      one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
      one.sendall(begin)
      return one

    trickling = connected(STARTS["a head that does not end"])
    silent = connected(b"")
    again = connected(STARTS["answered, and then silent"])
    assert b"200 OK" in again.recv(1000)
    again.sendall(b"GET /hea")  # the head of a second request, which does not end either
    deaf = connected(b"GET /v1/long HTTP/1.1\r\nHost: x\r\n\r\n")  # it never reads
    with contextlib.suppress(ConnectionError):
      for _ in range(30):
        time.sleep(0.1)
        trickling.sendall(b"a")  # a byte now and then does not help
    assert gone([trickling, silent, again], most=3) == 3
    received = 0
    with contextlib.suppress(ConnectionError):
      while part := deaf.recv(1_000_000):
        received += len(part)
    assert received < 30_000_000
    assert status(port, "GET", "/healthz") == 200


@pytest.mark.parametrize("files, most", [
  (1024, 724), (100_000, 2_000), (256, 64), (3, 1), (resource.RLIM_INFINITY, 2_000),
])
def test_connections_leave_files_for_the_process(monkeypatch, files, most):
  monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
  assert connections.most_connections() == most
