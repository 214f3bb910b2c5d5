"""A server in a process of its own: killed, stopped, stalled; and a Redis that goes and comes."""

import concurrent.futures
import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from experiments._faults import within
from experiments._serving import free_port, running_server
from gr4ad_jax.serving.journal import Journal
from gr4ad_jax.serving.server import build_app
from tests.serving.support import ONE, SERVING, ask, make

OPTIONS = ("--clock", "log", "--serving.batch-sizes", "1", "--serving.beam-factors", "1.0",
           "--serving.body-timeout-s", "1", "--serving.deadline-ms", "60000")


def test_a_kill_loses_no_accepted_event_and_a_stop_ends_what_was_begun(served_run, tmp_path):
  accepted, lock = [], threading.Lock()

  def send(url, sender, stop):
    with httpx.Client(base_url=url, timeout=60) as client:
      number = 0
      while not stop.is_set():
        user = f"sender {sender}, event {number}"
        try:
          reply = client.post("/v1/events", json={"events": [{"user_id": user, "ad_id": "ad1"}]})
        except httpx.HTTPError:
          return  # the server is dead
        if reply.status_code == 200:
          with lock:
            accepted.append(user)
        number += 1

  def stalled(url):
    """A client that never sends the rest of its body; the status it gets."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
      connection.sendall(
        b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
      )
      return connection.recv(1000).split()[1]

  with running_server(served_run, tmp_path, *OPTIONS, log=tmp_path / "log") as server:
    process, url, stop = server.process, server.url, threading.Event()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      for sender in range(3):
        pool.submit(send, url, sender, stop)
      assert stalled(url) == b"408"
      asked = httpx.post(f"{url}/v1/recommend", json={"user_id": "u1"}, timeout=60)
      assert asked.status_code == 200
      assert within(60, lambda: len(accepted) > 10)
      process.send_signal(signal.SIGKILL)
      stop.set()
  journal = Journal(tmp_path / "journal.sqlite")
  kept = {event.user_id for _, event in journal.after(0, 10**6)}
  journal.close()
  assert set(accepted) <= kept

  with running_server(served_run, tmp_path, *OPTIONS, log=tmp_path / "log") as server:
    process, url = server.process, server.url
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      replies = [
        pool.submit(httpx.post, f"{url}/v1/recommend", json={"user_id": f"u{i}"}, timeout=60)
        for i in range(4)
      ]
      time.sleep(0.005)
      process.send_signal(signal.SIGTERM)
      answered = [r.result().status_code for r in replies if not r.exception()]
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert set(answered) <= {200, 429}
  assert list((tmp_path / "segments").glob("events-*.parquet"))  # what was left, at the end


@pytest.fixture
def redis(tmp_path):
  """Starts and stops a real redis-server."""
  binary = shutil.which("redis-server")
  if binary is None:
    pytest.skip("needs redis-server (Debian package redis-server)")
  port, running = free_port(), []

  class Redis:
    url = f"redis://127.0.0.1:{port}/0"

    def start(self):
      running.append(subprocess.Popen(
        [binary, "--port", str(port), "--save", "", "--dir", tmp_path], stdout=subprocess.DEVNULL
      ))
      for _ in range(1000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
          return
        time.sleep(0.05)

    def stop(self):
      running[-1].kill()
      running[-1].wait()

  service = Redis()
  service.start()
  yield service
  service.stop()


def test_servers_share_a_redis_and_go_on_without_it(served_run, redis, tmp_path):
  one = make(served_run, tmp_path / "one", redis=redis.url, config=ONE)
  two = make(served_run, tmp_path / "two", redis=redis.url, config=ONE)
  with TestClient(build_app(one)) as first, TestClient(build_app(two)) as second:
    def click(client, user, ad):
      reply = client.post("/v1/events", json={"events": [{"user_id": user, "ad_id": ad}]})
      assert reply.status_code == 200

    def ads(client, user):
      return [ad["ad_id"] for ad in ask(client, user_id=user, k=20, beam_factor=1.0)["ads"]]

    click(first, "shared", "ad1")
    assert within(60, lambda: ask(second, user_id="shared", k=3)["known_user"])
    assert ask(first, user_id="u5", k=3)["cached"] is False
    assert ask(second, user_id="u5", k=3)["cached"] is True  # what the other one computed

    # What was seen with one server, before the last max_history events, is known to the other.
    for _ in range(SERVING.max_history):
      click(first, "shared", "ad9")
    of_ad1 = {"user_id": "shared", "where": ["advertiser_id=brand1"], "k": 20}
    assert within(60, lambda: "ad9" not in {
      ad["ad_id"] for ad in ask(second, **of_ad1, exclude_seen=True)["ads"]
    })
    assert "ad1" not in {ad["ad_id"] for ad in ask(second, **of_ad1, exclude_seen=True)["ads"]}
    assert "ad1" in {ad["ad_id"] for ad in ask(second, **of_ad1)["ads"]}

    redis.stop()
    reply = ask(first, user_id="shared", k=3)
    assert reply["degraded"] == ["user_events"] and reply["ads"] and reply["known_user"]
    click(first, "shared", "ad2")  # accepted all the same
    click(first, "while away", "ad3")

    redis.start()  # empty: it kept nothing
    assert within(60, lambda: not ask(first, user_id="u6", k=3)["degraded"])
    assert within(60, lambda: ask(second, user_id="while away", k=3)["known_user"])
    assert one.journal.last_seq == 3 + SERVING.max_history
    assert ads(first, "while away") == ads(second, "while away")
