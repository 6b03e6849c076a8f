"""What a server tells Prometheus: requests, examples, batches, the queue, memory and processor."""

from collections.abc import Callable, Mapping

from opfa.extras import importing

with importing("opfa serve", "opfa[serve]"):
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        Info,
        ProcessCollector,
        generate_latest,
    )

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The numbers of one server, apart from those of others in the same process."""

    def __init__(self, about: Mapping[str, str], num_waiting: Callable[[], int]) -> None:
        """`about` says which model this is; `num_waiting` is asked when somebody looks."""
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("opfa_model", "The model that is served.", registry=registry).info(dict(about))
        self._requests = Counter(
            "opfa_requests", "Requests for predictions, by status.", ["status"], registry=registry
        )
        self._seconds = Histogram(
            "opfa_request_seconds",
            "From the first line of a request to its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self._examples = Counter("opfa_examples", "Examples that were answered.", registry=registry)
        self._cut = Counter(
            "opfa_examples_cut", "Examples that were longer than the limit.", registry=registry
        )
        self._batches = Histogram(
            "opfa_batch_examples",
            "Examples that were computed at once.",
            buckets=SIZES,
            registry=registry,
        )
        self._computing = Histogram(
            "opfa_batch_seconds",
            "What a batch took in the model.",
            buckets=SECONDS,
            registry=registry,
        )
        Gauge("opfa_queue_examples", "Examples that wait.", registry=registry).set_function(
            num_waiting
        )
        self.num_requests = self.num_answered = self.num_examples = 0

    def request(self, status: int, seconds: float) -> None:
        """A request was answered, or refused."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)
        self.num_requests += 1
        self.num_answered += status == 200

    def batch(self, num_examples: int, seconds: float) -> None:
        """A batch was computed."""
        self._examples.inc(num_examples)
        self._batches.observe(num_examples)
        self._computing.observe(seconds)
        self.num_examples += num_examples

    def cut(self, num_examples: int) -> None:
        """So many examples were longer than the limit."""
        self._cut.inc(num_examples)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
