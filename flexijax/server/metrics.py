"""What is measured, for Prometheus: vLLM's names and shapes under `flexijax:`, and the tiers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from flexijax.engine.measured import EngineTotals
from flexijax.engine.occupancy import Occupancy
from flexijax.results import Generation
from flexijax.server.job import ChoiceTimes, Job, Update

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
# Of `Occupancy`: name, what it says.
_GAUGES = (
    ("num_requests_waiting", "Requests that wait for a row or for blocks."),
    ("num_requests_reading", "Requests whose prompt is being read."),
    ("num_requests_running", "Requests that hold a row and generate."),
    ("num_requests_paused", "Requests that hold a row and wait for blocks."),
    ("rows", "Requests that may hold a row."),
    ("kv_cache_usage_perc", "Share of the blocks that requests hold, 0 to 1."),
    ("blocks", "Blocks of the pools."),
    ("blocks_used", "Blocks that requests hold."),
    ("blocks_known", "Blocks that later prompts may begin with, held or not."),
    ("device_kv_bytes", "The device's tier: bytes of its arrays."),
    ("device_kv_used_bytes", "The device's tier: bytes that requests fill."),
    ("host_kv_bytes", "The host's tier: bytes of its arrays."),
    ("host_kv_used_bytes", "The host's tier: bytes that requests fill."),
)
_COUNTERS = (
    ("prompt_tokens", "Tokens of prompts that were read."),
    ("generation_tokens", "Tokens that were generated."),
    ("prefix_cache_queries", "Tokens of prompts that were looked up."),
    ("prefix_cache_hits", "Tokens of prompts that were in the cache already."),
    ("promoted_bytes", "Moved from the host's tier to the device's."),
    ("offloaded_bytes", "Moved from the device's tier to the host's."),
    ("evicted_tokens", "Dropped for good, summed over KV heads."),
    ("request_pauses", "How often a request had to wait for blocks in the middle of its text."),
    ("decode_seconds", "Spent on decode steps."),
    ("prefill_seconds", "Spent on reading prompts."),
    ("stall_seconds", "Spent on reading prompts while other requests could have gone on."),
)


class ServerMetrics:
    """Of one server; everything for its event loop. name: of the model, in every label."""

    def __init__(self, name: str) -> None:
        self._name, self._registry = name, CollectorRegistry()
        self._engine = _EngineCollector(name)
        self._registry.register(self._engine)
        self._ended = self._counter(
            "request_success", "Choices that ended, by why.", "finished_reason"
        )
        self._refused = self._counter("request_refused", "Requests by status, from 400.", "status")
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token.", _SECONDS
        )
        self._gap = self._histogram(
            "inter_token_latency_seconds",
            "Between tokens; of those that come at once, each its share.",
            _GAPS,
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Of a choice, after its first token.", _GAPS
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From a request to its end.", _SECONDS
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Until its prompt began to be read.", _SECONDS
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Reading its prompt.", _SECONDS
        )
        self._decode = self._histogram("request_decode_time_seconds", "Its decode steps.", _SECONDS)
        self._longest = self._histogram(
            "request_longest_gap_seconds", "The longest time between two of its tokens.", _SECONDS
        )
        self._prompt = self._histogram("request_prompt_tokens", "Of its prompt.", _TOKENS)
        self._generated = self._histogram("request_generation_tokens", "Generated.", _TOKENS)

    def arrived(self, job: Job, update: Update, now: float) -> None:
        """Something came of a choice; now: seconds of `time.perf_counter`."""
        count, times = len(update.tokens), job.times.get(update.choice)
        if count and times is None:
            job.times[update.choice] = ChoiceTimes(now, now, count)
            self._ttft.observe(now - job.arrived)
        elif count and times is not None:
            for _ in range(count):
                self._gap.observe((now - times.last) / count)
            times.last, times.tokens = now, times.tokens + count
        if update.end is not None:
            self._end(job, update.end, job.times.get(update.choice), now)

    def refused(self, status: int) -> None:
        """A response with a status of 400 or more."""
        self._refused.labels(self._name, str(status)).inc()

    def text(self, held: Occupancy, totals: EngineTotals) -> bytes:
        """All of it, in Prometheus' text format."""
        self._engine.held, self._engine.totals = held, totals
        return generate_latest(self._registry)

    def _end(
        self, job: Job, end: Generation | Exception, times: ChoiceTimes | None, now: float
    ) -> None:
        if isinstance(end, Exception):
            self._ended.labels(self._name, "error").inc()
            return
        self._ended.labels(self._name, end.finish_reason).inc()
        self._whole.observe(now - job.arrived)
        self._queue.observe(end.metrics.queue_s)
        self._prefill.observe(end.metrics.prefill_s)
        self._decode.observe(end.metrics.decode_s)
        self._longest.observe(end.metrics.longest_gap_s)
        self._prompt.observe(end.metrics.prompt_tokens)
        self._generated.observe(end.metrics.new_tokens)
        if times is not None and times.tokens > 1:
            self._per_token.observe((times.last - times.first) / (times.tokens - 1))

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(
            f"flexijax:{name}", meaning, ["model_name"], registry=self._registry, buckets=buckets
        )
        return made.labels(self._name)

    def _counter(self, name: str, meaning: str, label: str) -> Counter:
        labels = ["model_name", label]
        return Counter(f"flexijax:{name}", meaning, labels, registry=self._registry)


class _EngineCollector(Collector):
    """What the engine itself counts, as it was looked at last."""

    def __init__(self, name: str) -> None:
        self.held: Occupancy | None = None
        self.totals = EngineTotals()
        self._name = name
        self._most: dict[str, float] = {}
        self._overlap = 0.0

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        held = self.held
        if held is None:
            return
        gauges = (
            *(held.waiting, held.reading, held.running, held.paused, held.rows),
            *(held.used_blocks / held.blocks, held.blocks, held.used_blocks, held.cached_blocks),
            *(held.device_bytes, held.device_used, held.host_bytes, held.host_used),
        )
        for (name, meaning), value in zip(_GAUGES, gauges, strict=True):
            yield self._gauge(name, meaning, value)
        # Between texts the last share stands.
        self._overlap = self._overlap if held.overlap is None else held.overlap
        meaning = "Of the pages that running requests chose, the share that was on the device."
        yield self._gauge("page_overlap", meaning, self._overlap)
        totals = self.totals
        counts = (
            *(totals.prompt_tokens, totals.new_tokens, held.prefix_queries, held.prefix_hits),
            *(held.promoted_bytes, held.offloaded_bytes, held.evicted_tokens, totals.paused),
            *(totals.decode_s, totals.prefill_s, totals.stalled_s),
        )
        for (name, meaning), value in zip(_COUNTERS, counts, strict=True):
            # What moved for a request that failed is known no more, and counters never go back.
            self._most[name] = max(value, self._most.get(name, 0))
            family = CounterMetricFamily(f"flexijax:{name}", meaning, labels=["model_name"])
            family.add_metric([self._name], self._most[name])
            yield family

    def _gauge(self, name: str, meaning: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"flexijax:{name}", meaning, labels=["model_name"])
        family.add_metric([self._name], value)
        return family
