"""What /metrics says, in Prometheus' words."""

from __future__ import annotations

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  PlatformCollector,
  ProcessCollector,
  generate_latest,
)

from gr4ad_jax.catalog.catalog import LiveCatalog
from gr4ad_jax.serving.batcher import Batcher
from gr4ad_jax.serving.engine import Answer, Engine
from gr4ad_jax.serving.journal import Journal

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class HttpMetrics:
  """Requests of one server, and its process."""

  def __init__(self):
    """Registers them."""
    self.registry = registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    self._requests = Counter(
      "gr4ad_requests_total", "HTTP requests", ("path", "status"), registry=registry
    )
    self._seconds = Histogram(
      "gr4ad_request_seconds", "Time of an HTTP request", ("path",), buckets=_SECONDS,
      registry=registry,
    )

  def answered(self, path: str, status: str, seconds: float) -> None:
    """One HTTP request, by the name of its route."""
    self._requests.labels(path, status).inc()
    self._seconds.labels(path).observe(seconds)

  def text(self) -> bytes:
    """All of the registry."""
    return generate_latest(self.registry)


class Metrics:
  """Counters of the server of a run; its parts count in them."""

  def __init__(self):
    """Registers them."""
    self.http = HttpMetrics()
    registry = self.http.registry

    def counter(name: str, text: str, *labels: str) -> Counter:
      return Counter(name, text, labels, registry=registry)

    self._call_seconds = Histogram(
      "gr4ad_search_seconds", "Time of a compiled search, by beam factor", ("factor",),
      buckets=_SECONDS, registry=registry,
    )
    self._batch = Histogram(
      "gr4ad_batch_requests", "Requests that shared a search", buckets=(1, 2, 4, 8, 16, 32, 64),
      registry=registry,
    )
    self._served = counter("gr4ad_served_total", "Searched requests, by beam factor", "factor")
    self._value = counter(
      "gr4ad_returned_value_total", "Expected value of the ads returned, currency, by beam factor",
      "factor",
    )
    self.cache = counter(  # hit, joined (another one computed it), or miss
      "gr4ad_cache_total", "Requests that the result cache could have answered", "result"
    )
    self.events = counter("gr4ad_events_total", "Events accepted")
    self.reloads = counter("gr4ad_reloads_total", "Parameters taken over", "result")
    self.faults = counter(
      "gr4ad_job_faults_total", "Background work that failed and is tried again", "job"
    )
    self.index_changes = counter("gr4ad_index_changes_total", "Writes of the index")

  def watch(
    self, *, engine: Engine, batcher: Batcher, catalog: LiveCatalog, journal: Journal
  ) -> None:
    """Registers gauges that look at these parts when they are read."""

    def gauge(name: str, text: str, read) -> None:
      Gauge(name, text, registry=self.http.registry).set_function(read)

    gauge("gr4ad_queue_requests", "Requests that wait", lambda: batcher.waiting)
    gauge("gr4ad_beam_factor", "The present schedule", lambda: batcher.beams.factor)
    gauge("gr4ad_capacity_qps", "Requests a second at base widths",
          lambda: batcher.beams.capacity)
    gauge("gr4ad_parameters_step", "Step of the parameters", lambda: engine.step)
    gauge("gr4ad_index_version", "Writes of the index so far",
          lambda: catalog.now.snapshot.version)
    gauge("gr4ad_unreadable_rows", "Rows of the store that are not what was written",
          lambda: journal.num_unreadable)
    gauge("gr4ad_live_ads", "Ads that can be recommended",
          lambda: len(catalog.now.snapshot.index.ads_A))

  def answered(self, answer: Answer) -> None:
    """One searched request."""
    factor = f"{answer.factor:g}"
    self._served.labels(factor).inc()
    if answer.place == 0:  # once a call
      self._batch.observe(answer.batch)
      self._call_seconds.labels(factor).observe(answer.seconds["search"])
    value_K = answer.found.expected_value_RK[0]
    self._value.labels(factor).inc(float(value_K[answer.found.ad_RK[0] >= 0].sum()))
