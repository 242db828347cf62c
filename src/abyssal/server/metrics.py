"""Numbers for Prometheus: vLLM's names where they mean the same, so that its dashboards show this server too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from abyssal.engine import EngineStatistics, Output

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000)


class ServerMetrics:
    """The metrics of one server."""

    def __init__(self, model_name: str, statistics: Callable[[], EngineStatistics]) -> None:
        """Start at zero; `statistics` returns the engine's own counts at each scrape."""
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, statistics))
        label = ["model_name"]

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, help_, label, buckets=buckets, registry=self._registry)
            return metric.labels(model_name)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", SECONDS)
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a text.", SECONDS)
        self.request_time = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", SECONDS)
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.generated_tokens = histogram("vllm:request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self._model_name = model_name
        self._finished = Counter(
            "vllm:request_success",
            "Texts that ended, by reason; abort: the client left.",
            [*label, "finished_reason"],
            registry=self._registry,
        )
        self._responses = Counter(
            "abyssal:http_responses", "Responses by path and status.", ["path", "status"], registry=self._registry
        )

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def timer(self, num_prompt_tokens: int, num_texts: int) -> RequestTimer:
        """Return a timer of a request that begins now."""
        return RequestTimer(self, num_prompt_tokens, num_texts)

    def count_finished(self, reason: str, texts: int = 1) -> None:
        """Count texts that ended."""
        self._finished.labels(self._model_name, reason).inc(texts)

    def count_response(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()


class RequestTimer:
    """Times one request."""

    def __init__(self, metrics: ServerMetrics, num_prompt_tokens: int, num_texts: int) -> None:
        """Start the clock."""
        self._metrics, self._num_prompt_tokens, self._num_open = metrics, num_prompt_tokens, num_texts
        self._began = time.perf_counter()
        self._latest: dict[tuple[int, int], float] = {}  # request and text -> when its latest token came
        self._num_tokens = 0
        self._unfinished_reason = "abort"

    def observe(self, output: Output) -> None:
        """Note a token."""
        now, text = time.perf_counter(), (output.request_id, output.index)
        if not self._latest:
            self._metrics.first_token.observe(now - self._began)
        elif text in self._latest:
            self._metrics.between_tokens.observe(now - self._latest[text])
        self._latest[text] = now
        self._num_tokens += output.token is not None
        if output.finish_reason is not None:
            self._num_open -= 1
            self._metrics.count_finished("length" if output.finish_reason == "length" else "stop")

    def fail(self) -> None:
        """Note that a fault ended the texts that were not finished."""
        self._unfinished_reason = "error"

    def end(self) -> None:
        """Note that the request is over."""
        if self._num_open:
            self._metrics.count_finished(self._unfinished_reason, self._num_open)
        self._metrics.request_time.observe(time.perf_counter() - self._began)
        self._metrics.prompt_tokens.observe(self._num_prompt_tokens)
        self._metrics.generated_tokens.observe(self._num_tokens)


class _EngineCollector(Collector):
    """The engine's statistics as metrics."""

    def __init__(self, model_name: str, statistics: Callable[[], EngineStatistics]) -> None:
        self._model_name, self._statistics = model_name, statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        gauges = {
            "vllm:num_requests_running": ("Texts that hold pages.", now.num_running),
            "vllm:num_requests_waiting": ("Texts that wait for pages.", now.num_waiting),
            "vllm:kv_cache_usage_perc": (
                "Share of the pages that are in use, 0 to 1.",
                now.num_pages_used / now.num_pages,
            ),
            "abyssal:pages_kept": ("Pages that later requests may share.", now.num_pages_cached),
            "abyssal:makes_drafts": ("Whether drafts pay at this load.", int(now.makes_drafts)),
        }
        for name, (help_, value) in gauges.items():
            gauge = GaugeMetricFamily(name, help_, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        counters = {
            "vllm:prompt_tokens": (
                "Tokens of prompts that were computed.",
                now.prompt_tokens_total - now.shared_tokens_total,
            ),
            "vllm:generation_tokens": ("Tokens generated.", now.new_tokens_total),
            "vllm:num_preemptions": ("Texts that lost their pages and started over.", now.preemptions_total),
            "vllm:prefix_cache_queries": ("Tokens looked up among the kept pages.", now.prompt_tokens_total),
            "vllm:prefix_cache_hits": ("Tokens found there.", now.shared_tokens_total),
            "vllm:spec_decode_num_drafts": ("Passes that verified drafts.", next(iter(now.drafted), 0)),
            "vllm:spec_decode_num_draft_tokens": ("Tokens drafted.", sum(now.drafted)),
            "vllm:spec_decode_num_accepted_tokens": ("Drafts that were the sampled token.", sum(now.accepted)),
            "abyssal:steps": ("Passes of the model.", now.steps_total),
        }
        for name, (help_, value) in counters.items():
            counter = CounterMetricFamily(name, help_, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted by place.", labels=["model_name", "position"]
        )
        for place, accepted in enumerate(now.accepted):
            places.add_metric([self._model_name, str(place)], accepted)
        yield places
