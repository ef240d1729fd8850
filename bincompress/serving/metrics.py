"""What Prometheus reads: requests, tokens, times, and what waits."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from bincompress.inference.scheduler import Scheduler

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)


class Metrics:
    """Counts of one server."""

    def __init__(self, scheduler: Callable[[], Scheduler | None]) -> None:
        """scheduler: gives it, None until the model is loaded."""
        self._scheduler = scheduler
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "bincompress_requests", "HTTP requests by route and status", ["route", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "bincompress_first_token_seconds", "From a request to its first text", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "bincompress_text_seconds", "From a request to the end of its texts", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Any]:
        """Yield what the scheduler counts."""
        scheduler = self._scheduler()
        yield GaugeMetricFamily("bincompress_model_loaded", "1 once the model is loaded", float(scheduler is not None))
        if scheduler is None:
            return
        counts = scheduler.counts
        for name, text, value in (
            ("bincompress_prompt_tokens", "Tokens of prompts that were computed", counts.read),
            ("bincompress_reused_tokens", "Tokens of prompts that an earlier text had left computed", counts.reused),
            ("bincompress_written_tokens", "Tokens that were sampled", counts.written),
            ("bincompress_texts", "Texts that were finished, failed or cancelled", counts.finished),
            ("bincompress_passes", "Passes over the weights", counts.passes),
            ("bincompress_busy_seconds", "Time in passes", counts.busy_seconds),
        ):
            yield CounterMetricFamily(name, text, float(value))
        for name, text, value in (
            ("bincompress_texts_waiting", "Texts that wait for their turn", scheduler.waiting),
            ("bincompress_texts_written_now", "Texts that are being written", scheduler.active),
            ("bincompress_prefix_bytes", "Bytes of caches that are kept for texts to come", scheduler.prefix_bytes),
        ):
            yield GaugeMetricFamily(name, text, float(value))

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        found: bytes = generate_latest(self._registry)
        return found
