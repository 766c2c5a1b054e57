"""What Prometheus scrapes: vLLM's names where it has them, with the adapter as a label.

`lora_name` is the adapter, empty for the bare base. Gauges are read off the engine and the registry when they are scraped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from twofold.server.registry import Registry
from twofold.server.worker import Worker

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of the histograms, in seconds."""


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self, base_name: str) -> None:
        self.base_name = base_name
        self.collected = CollectorRegistry()
        by = ("model_name", "lora_name")
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens taken in.", by, registry=self.collected)
        self._made = Counter("vllm:generation_tokens", "Tokens made.", by, registry=self.collected)
        self._finished = Counter(
            "vllm:request_success", "Answers, by how they ended.", (*by, "finished_reason"), registry=self.collected
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.", BETWEEN)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", FIRST)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._http = Counter(
            "twofold:http_requests", "Requests, by route and status.", ("route", "status"), registry=self.collected
        )

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name", "lora_name"), buckets=bounds, registry=self.collected)

    def watch(self, worker: Worker, registry: Registry) -> None:
        """Show the state of these from now on."""
        self.collected.register(_State(self.base_name, worker, registry))

    def answered(self, route: str, status: int) -> None:
        """A request over HTTP is done."""
        self._http.labels(route, str(status)).inc()

    def clock(self, adapter: str | None, arrived: float) -> Clock:
        """The times of one answer, whose request arrived at this time of `time.monotonic`."""
        return Clock(self, adapter, arrived)

    def prompt(self, adapter: str | None, tokens: int) -> None:
        """A prompt went into the engine."""
        self._prompt.labels(self.base_name, adapter or "").inc(tokens)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.collected)

    def forget(self, adapter: str) -> None:
        """Drop the series of an adapter that is not served any more."""
        for metric in (self._prompt, self._made, self._finished, self._first, self._between, self._queue, self._whole):
            metric.remove_by_labels({"lora_name": adapter})


class Clock:
    """When the tokens of one answer came."""

    def __init__(self, metrics: Metrics, adapter: str | None, arrived: float) -> None:
        labels = (metrics.base_name, adapter or "")
        self._finished, self._labels = metrics._finished, labels
        self._made = metrics._made.labels(*labels)
        self._first = metrics._first.labels(*labels)
        self._between = metrics._between.labels(*labels)
        self._queue = metrics._queue.labels(*labels)
        self._whole = metrics._whole.labels(*labels)
        self._start = arrived
        self._last: float | None = None

    def begin(self, at: float) -> None:
        """The engine took the request up, at this time."""
        self._queue.observe(at - self._start)

    def token(self) -> None:
        now = time.monotonic()
        self._made.inc()
        if self._last is None:
            self._first.observe(now - self._start)
        else:
            self._between.observe(now - self._last)
        self._last = now

    def end(self, reason: str) -> None:
        self._finished.labels(*self._labels, reason).inc()
        self._whole.observe(time.monotonic() - self._start)


class _State:
    """What the engine and the registry are doing at the moment of a scrape."""

    def __init__(self, base_name: str, worker: Worker, registry: Registry) -> None:
        self.base_name, self.worker, self.registry = base_name, worker, registry

    def collect(self) -> Iterator[Metric]:
        scheduler, loaded = self.worker.scheduler, self.registry.loaded
        yield self._gauge("vllm:num_requests_running", "Streams that make tokens.", scheduler.running)
        yield self._gauge("vllm:num_requests_waiting", "Streams that wait for a slot.", scheduler.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", scheduler.cache_used)
        yield self._gauge("twofold:adapters_registered", "Adapters that can be asked for.", len(self.registry.names()))
        yield self._gauge("twofold:adapters_loaded", "Adapters in memory.", len(loaded))
        yield self._gauge("twofold:adapter_bytes", "Bytes of the adapters in memory.", self.registry.memory.used_bytes)
        yield self._counter("twofold:adapter_loads", "Adapters read from disk.", self.registry.loads)
        yield self._counter("twofold:adapter_evictions", "Adapters dropped for others.", self.registry.memory.evictions)
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        busy = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use; the value is the time.", labels=names)
        running = ",".join(sorted(g.name for g in loaded if g.leases))
        busy.add_metric((str(len(self.registry.names())), running, ",".join(self.registry.awaited())), time.time())
        yield busy

    def _gauge(self, name: str, text: str, value: float | int) -> Metric:
        metric = GaugeMetricFamily(name, text, labels=("model_name",))
        metric.add_metric((self.base_name,), value)
        return metric

    def _counter(self, name: str, text: str, value: float | int) -> Metric:
        metric = CounterMetricFamily(name, text, labels=("model_name",))
        metric.add_metric((self.base_name,), value)
        return metric
