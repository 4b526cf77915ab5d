"""The metrics once more, under the names and labels that dashboards made for vLLM and for SGLang read.

They are made of ours when somebody scrapes, so nothing is counted twice. What this server cannot say (preemptions, tokens
an iteration) is left out: a panel then shows nothing, and not a number that means something else.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from elastic_ep.machines.rank.lifecycle import SEATED

VLLM, SGLANG = "vllm:", "sglang:"
ENGINE = {"engine": "0"}
"""To vLLM's dashboards the group is one engine."""
RATE_S = 1.0
"""Throughput is of so long a time at least."""

_BOTH = {
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "time_per_output_token_seconds": "inter_token_latency_seconds",
}
OF_VLLM = {
    **_BOTH,
    "num_requests_running": "num_requests_running",
    "num_requests_waiting": "num_requests_waiting",
    "kv_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "request_success": "request_success",
    "request_queue_time_seconds": "request_queue_time_seconds",
    "request_prefill_time_seconds": "request_prefill_time_seconds",
    "request_decode_time_seconds": "request_decode_time_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
    "request_max_num_generation_tokens": "request_generation_tokens",
    "request_params_max_tokens": "request_params_max_tokens",
}
"""Their name -> ours, both without prefix, and without `_total`."""
OF_SGLANG = {
    **_BOTH,
    "num_running_reqs": "num_requests_running",
    "num_queue_reqs": "num_requests_waiting",
    "token_usage": "kv_cache_usage_perc",
    "cached_tokens": "prefix_cache_hits",
    "queue_time_seconds": "request_queue_time_seconds",
}
_OWN_LABELS = frozenset({"le", "finished_reason"})
"""Labels of ours that theirs have, too; over all others it is summed."""

Source = Callable[[str], Metric]
"""Our metric of that name, as it is now."""


class KnownNames(Collector):
    def __init__(self, source: Source, model_name: str) -> None:
        self._source = source
        self._model = {"model_name": model_name}
        self._rate = 0.0
        self._generated = (time.monotonic(), 0.0)

    def collect(self) -> Iterator[Metric]:
        for prefix, names, labels in (
            (VLLM, OF_VLLM, {**self._model, **ENGINE}),
            (SGLANG, OF_SGLANG, self._model),
        ):
            for theirs, ours in names.items():
                yield _renamed(self._source(ours), prefix + theirs, labels)
        yield self._engines()
        yield self._gauge(
            "cache_hit_rate", "Share of prompt tokens that were not computed.", self._hit_rate()
        )
        yield self._gauge("gen_throughput", "Generated tokens a second, of late.", self._throughput())
        requests = Metric(SGLANG + "num_requests", "Finished choices.", "counter")
        requests.add_sample(f"{requests.name}_total", self._model, _sum(self._source("request_success")))
        yield requests

    def _engines(self) -> Metric:
        """A rank's health, in the shape that vLLM gives it."""
        healthy = Metric(VLLM + "engine_healthy", "1 while the rank serves.", "gauge")
        ranks: dict[str, float] = defaultdict(float)
        for sample in self._source("rank_state").samples:
            ranks[sample.labels["rank"]] += sample.value * (sample.labels["state"] in SEATED)
        for rank, value in ranks.items():
            healthy.add_sample(healthy.name, {**self._model, "engine": rank}, value)
        return healthy

    def _hit_rate(self) -> float:
        queries = _sum(self._source("prefix_cache_queries"))
        return _sum(self._source("prefix_cache_hits")) / queries if queries else 0.0

    def _throughput(self) -> float:
        """Since the scrape before, if that was long enough ago."""
        (then, before), now = self._generated, time.monotonic()
        if now - then >= RATE_S:
            generated = _sum(self._source("generation_tokens"))
            self._rate = (generated - before) / (now - then)
            self._generated = (now, generated)
        return self._rate

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        made = Metric(SGLANG + name, text, "gauge")
        made.add_sample(made.name, self._model, value)
        return made


def _renamed(ours: Metric, name: str, labels: Mapping[str, str]) -> Metric:
    made = Metric(name, ours.documentation, ours.type)
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in _counts(ours):
        kept = tuple((key, value) for key, value in sample.labels.items() if key in _OWN_LABELS)
        place = (name + sample.name.removeprefix(ours.name), kept)
        sums[place] = sums.get(place, 0.0) + sample.value
    if not ours.samples:
        # One by rank, before there is any: all series are there from the start.
        sums[name + ("_total" if ours.type == "counter" else ""), ()] = 0.0
    for (full, kept), value in sums.items():
        made.add_sample(full, {**labels, **dict(kept)}, value)
    return made


def _counts(metric: Metric) -> list[Sample]:
    """Without the times at which counters were made."""
    return [sample for sample in metric.samples if not sample.name.endswith("_created")]


def _sum(metric: Metric) -> float:
    return float(sum(sample.value for sample in _counts(metric)))
