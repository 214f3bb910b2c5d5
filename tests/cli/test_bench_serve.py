"""A day of traffic: its rates, what is sent, and what is said of the answers."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from gr4ad_jax.cli import bench_serve
from gr4ad_jax.cli.bench_config import LoadConfig
from gr4ad_jax.cli.bench_serve import Sample
from gr4ad_jax.config import ConfigError


def test_rates_of_a_day_by_hand():
  config = LoadConfig(peak_qps=20, off_peak_share=0.1, burst_share=3)
  rates = {0.0: 2, 0.2: 2, 0.3: 11, 0.5: 20, 0.65: 60, 0.7: 20, 0.8: 11, 0.9: 2, 1.0: 2}
  assert {share: bench_serve.rate(share, config) for share in rates} == pytest.approx(rates)


def test_arrivals_follow_the_rate():
  config = LoadConfig(peak_qps=50, day_s=2_000, burst_share=2)
  share = np.array(bench_serve.arrivals(config)) / config.day_s
  for low, high, qps in ((0, 0.25, 5), (0.25, 0.35, 27.5), (0.35, 0.62, 50), (0.62, 0.67, 100)):
    found = ((low <= share) & (share < high)).sum()
    expected = qps * (high - low) * config.day_s
    assert found == pytest.approx(expected, abs=5 * expected**0.5)


def test_summary_by_hand():
  samples = [
    Sample(0.1, "off-peak", 10.0, 200, 0, 1.6, 2.0),
    Sample(0.9, "off-peak", 30.0, 200, 0, 0.5, 4.0, cached=True),
    Sample(1.2, "peak", 5.0, 429, 1),
    Sample(1.4, "peak", 5.0, 0, 1),
  ]
  found = bench_serve.summary(samples)
  assert list(found) == ["off-peak", "peak", "day"]
  assert found["off-peak"] == pytest.approx({
    "requests": 2, "qps": 2.0, "p50_ms": 20.0, "p95_ms": 29.0, "p99_ms": 29.8, "errors": 0,
    "refused": 0, "cache_hits": 0.5, "factor": 1.6, "value": 3.0,
  })  # a cached answer was not searched, so its beams do not count
  assert found["peak"]["errors"] == found["peak"]["refused"] == 1
  assert math.isnan(found["peak"]["p50_ms"]) and found["day"]["qps"] == 2.0


class Server(BaseHTTPRequestHandler):
  """Two users; every answer holds one ad, and no event is taken."""

  asked: list[tuple[str, dict]] = []

  def do_GET(self):
    self._answer(200, ["u0", "u1"])

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    self.asked.append((self.path, body))
    ads = [{"ad_id": "a7", "probability": 0.5, "expected_value": 4.0}]
    answer = {"ads": ads, "cached": False, "schedule": {"factor": 1.0}}
    self._answer(*((200, answer) if self.path == "/v1/recommend" else (503, {})))

  def _answer(self, status, values):
    self.send_response(status)
    self.send_header("content-type", "application/json")
    self.end_headers()
    self.wfile.write(json.dumps(values).encode())

  def log_message(self, *_):
    pass


def test_a_day_is_sent_and_written(tmp_path):
  Server.asked.clear()
  server = ThreadingHTTPServer(("localhost", 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  config = LoadConfig(peak_qps=40, day_s=1, event_share=1, k=3, timeout_s=60)
  try:
    url = f"http://localhost:{server.server_port}"
    samples = bench_serve.run_load(url, config)
  finally:
    server.shutdown()
    server.server_close()
  times = bench_serve.arrivals(config)
  good, lost = ([s for s in samples if s.status == status] for status in (200, 503))
  assert sorted(s.due_s for s in good) == sorted(s.due_s for s in lost) == times
  assert all(s.value == 2.0 and s.factor == 1.0 and s.latency_ms > 0 for s in good)
  assert all(math.isnan(s.latency_ms) for s in lost)  # an event that was not taken
  kinds = [path for path, _ in Server.asked]
  assert kinds.count("/v1/recommend") == kinds.count("/v1/events") == len(times)
  assert all(body["k"] == 3 for path, body in Server.asked if path == "/v1/recommend")
  bench_serve.write(samples, config, tmp_path)
  written = json.loads((tmp_path / "load.json").read_text())
  assert written["summary"]["day"]["errors"] == len(times) and written["load"]["k"] == 3
  assert written["requests"]["part"] == [s.part for s in samples]
  assert None in written["requests"]["latency_ms"]  # JSON knows no NaN
  assert (tmp_path / "load.png").stat().st_size > 10_000


def test_no_server_is_told(tmp_path):
  with pytest.raises(ConfigError, match="no server that knows users"):
    bench_serve.run_load("http://localhost:1", LoadConfig())
