"""What a server tells about itself: Prometheus metrics, and the last minute for its page."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import prometheus_client as prometheus

End = Literal["in_time", "late", "shed", "refused", "failed", "gone", "invalid"]
"""Of a request: "shed" could not be answered in time, "refused" met a full queue, of "gone" the client hung up,
"invalid" was no image or no request."""

_WINDOW = 60  # seconds
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


@dataclass
class _Second:
    """What happened within one second."""

    number: int
    ends: Counter[End] = field(default_factory=Counter)
    choices: Counter[str] = field(default_factory=Counter)
    accuracy: float = 0.0


class Statistics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus.Counter("stitchable_requests", "Requests by how they ended.", ["end"], **options)
        self.answers = prometheus.Counter("stitchable_answers", "Answers by what ran.", ["choice"], **options)
        self.batches = prometheus.Counter("stitchable_batches", "Batches by what ran.", ["choice"], **options)
        options["buckets"] = _SECONDS
        self.latency = prometheus.Histogram("stitchable_latency_seconds", "From body to answer.", **options)
        self.waited = prometheus.Histogram("stitchable_queue_seconds", "From body to batch.", **options)
        self.ran = prometheus.Histogram("stitchable_run_seconds", "Of a batch.", **options)
        del options["buckets"]
        self.queue = prometheus.Gauge("stitchable_queue_length", "Requests that wait or are decoded.", **options)
        self.slowdown = prometheus.Gauge("stitchable_slowdown", "Observed by predicted seconds of a batch.", **options)
        attainment = prometheus.Gauge(
            "stitchable_attainment", "Part of the requests answered in time, over the last minute.", **options
        )
        attainment.set_function(lambda: self.last_minute()["attainment"] or 0.0)
        self._seconds: deque[_Second] = deque(maxlen=_WINDOW)

    def ended(self, end: End, choice: str = "", accuracy: float = 0.0) -> None:
        """A request has ended; an answered one names what ran and how accurate that is."""
        self.requests.labels(end).inc()
        now = self._now()
        now.ends[end] += 1
        if choice:
            self.answers.labels(choice).inc()
            now.choices[choice] += 1
            now.accuracy += accuracy

    def last_minute(self) -> dict[str, Any]:
        """Requests per second, attainment, mean accuracy of the answers, and how often each choice answered."""
        self._now()
        ends: Counter[str] = Counter()
        choices: Counter[str] = Counter()
        for second in self._seconds:
            ends.update(second.ends)
            choices.update(second.choices)
        wanted = sum(ends[end] for end in ("in_time", "late", "shed", "refused", "failed"))
        accuracy = sum(second.accuracy for second in self._seconds)
        return {
            "requests_per_second": [sum(second.ends.values()) for second in self._seconds],
            "attainment": ends["in_time"] / wanted if wanted else None,
            "accuracy": accuracy / choices.total() if choices else None,
            "ends": dict(ends),
            "choices": dict(choices),
        }

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return prometheus.generate_latest(self.registry)

    def _now(self) -> _Second:
        number = int(time.monotonic())
        first = self._seconds[-1].number + 1 if self._seconds else number
        for missing in range(max(first, number - _WINDOW + 1), number + 1):
            self._seconds.append(_Second(missing))
        return self._seconds[-1]
