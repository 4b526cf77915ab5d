"""Prometheus metrics of the whole run process, behind plain methods.

Names follow vLLM where it has them, with this project's prefix. Everything belongs to one registry made here,
so two servers in one process do not meet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from elastic_ep.group.known_names import KnownNames
from elastic_ep.group.port import LossCause, Rebalancing
from elastic_ep.machines.membership.events import GroupState
from elastic_ep.wire.messages import NO_PAGES, Member, PageCounts, RankState

_PREFIX = "elastic_ep:"
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LENGTHS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_PAUSE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

FINISH_REASONS = ("stop", "length", "abort")
ERROR_STATUSES = (400, 401, 404, 405, 408, 413, 415, 422, 429, 500, 503, 504)
"""Of what the server answers itself."""


class _FastHistogram(Collector):
    """A histogram whose `observe` costs a bisection and two additions, not a lock and a walk of the buckets: with
    a `_FastCounter` 0.4 us, where prometheus_client's own two take 5.8.

    For what happens at every token; only the event loop's thread writes and reads it.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        buckets = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class _FastCounter(Collector):
    """A counter that is a plain number."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self.value = 0

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self.value)


class _One(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


class Flow(NamedTuple):
    """Tokens generated since the start; the longest time between deliveries of one stream since `flow` was last asked."""

    generated: int
    longest_gap_s: float


@dataclass(frozen=True, slots=True)
class ChoiceLife:
    """Of a choice that has ended. Times are `time.monotonic()`, and None where it did not get so far; lengths are tokens.

    `queued_s`: how long after `started_s` a rank had it; `moved_s`: when it was given to another one.
    """

    started_s: float
    queued_s: float | None
    first_s: float | None
    last_s: float | None
    ended_s: float
    prompt: int
    generated: int
    max_tokens: int
    moved_s: tuple[float, ...] = ()


class Metrics:
    """What the server counts. Call from the event loop's thread only. All durations are seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._by_name: dict[str, Collector] = {}
        """Ours, by name without prefix."""
        self._longest_gap_s = 0.0
        self._request_times: dict[str, _FastHistogram] = {}
        self._request_lengths: dict[str, _FastHistogram] = {}
        self._make_request_metrics()
        self._make_group_metrics()
        self._make_series()

    def _make_request_metrics(self) -> None:
        self._prompt_tokens = self._fast_counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generation_tokens = self._fast_counter("generation_tokens", "Generated tokens.")
        self._first_token = self._fast_histogram(
            "time_to_first_token_seconds", "From reading a request to its first token.", _FIRST_TOKEN_SECONDS
        )
        self._between_tokens = self._fast_histogram(
            "inter_token_latency_seconds", "Between deliveries of tokens of one stream.", _TOKEN_SECONDS
        )
        self._finished = self._counter("request_success", "Finished choices.", "finished_reason")
        for name, text in (
            ("e2e_request_latency_seconds", "From reading a request to the end of a choice."),
            ("request_queue_time_seconds", "Until a rank had it."),
            ("request_prefill_time_seconds", "From then to its first token."),
            ("request_decode_time_seconds", "From its first token to its last."),
        ):
            self._request_times[name] = self._fast_histogram(name, text, _REQUEST_SECONDS)
        self._request_pace = self._fast_histogram(
            "request_time_per_output_token_seconds", "A choice's mean time between tokens.", _TOKEN_SECONDS
        )
        for name, text in (
            ("request_prompt_tokens", "Of each choice, tokens of its prompt."),
            ("request_generation_tokens", "Of each choice, tokens that were generated."),
            ("request_params_max_tokens", "Of each choice, tokens that it might have had."),
        ):
            self._request_lengths[name] = self._fast_histogram(name, text, _LENGTHS)
        self._http_errors = self._counter("http_errors", "Error answers over HTTP.", "status")
        self.disconnects = self._counter("client_disconnects", "Requests that their client left.")
        self._running = self._gauge("num_requests_running", "Requests that a rank works on.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a rank.")
        self.replayed = self._counter("requests_replayed", "Requests taken over from a lost rank.")
        self.moved = self._counter("requests_moved", "Requests moved from a rank's queue to a free seat.")

    def _make_group_metrics(self) -> None:
        self._rank_state = self._gauge("rank_state", "1 for the state that a rank is in.", "rank", "state")
        self.epoch = self._gauge("epoch", "Epoch of the newest view.")
        self._rank_losses = self._counter("rank_losses", "Ranks lost.", "cause")
        self.failover_stall = self._histogram(
            "failover_stall_seconds", "Longest gap between a survivor's steps around a loss."
        )
        self.rejoin_pause = self._histogram(
            "rejoin_pause_seconds", "Longest gap between a member's steps around a join."
        )
        self.poisoned_steps = self._counter("poisoned_steps", "Steps run again because a peer was masked.")
        self._rebalances = self._counter("eplb_rebalances", "Rebalancings of experts by load.")
        self._imbalance = self._gauge(
            "expert_load_imbalance", "Max/mean expected load of a rank, as last planned."
        )
        self._copies = self._counter("expert_copies", "Expert copies made.", "source")
        self.failed_copies = self._counter(
            "expert_copy_failures", "Copies of experts that a rank could not make; they are tried again."
        )
        self._dropped_messages = self._fast_counter("dropped_messages", "Malformed or foreign messages.")

        self._group_state = self._gauge("group_state", "1 for the state that the group is in.", "state")
        self._group_idle = self._gauge("group_idle", "1 while there is nothing to do.")
        self._tolerates = self._gauge("tolerates", "More ranks that can be lost with every expert alive.")
        self._tolerates_hosts = self._gauge(
            "tolerates_hosts", "More hosts that can be lost with every expert alive; 0 if there is one host."
        )
        self._kv_usage = self._gauge(
            "kv_cache_usage_perc", "Share of the serving ranks' KV cache in use; 1 is all."
        )
        self._rank_kv_usage = self._gauge(
            "rank_kv_cache_usage_perc", "Share of a rank's KV cache in use.", "rank"
        )
        self._make_page_metrics()

    def _make_page_metrics(self) -> None:
        """By rank, through all its incarnations."""
        self._page_gauges = {
            field: self._gauge(name, text, "rank")
            for field, name, text in (
                ("total", "kv_cache_pages", "Pages of a rank's KV cache."),
                ("held", "kv_cache_held_pages", "Of these, pages that requests hold."),
                ("named", "kv_cache_named_pages", "Of these, pages that other requests may share."),
                ("shelf_pages", "shelf_pages", "Pages in a rank's part of the shelf."),
                ("shelf_bytes", "shelf_bytes", "Bytes of these."),
            )
        }
        self._page_counters = {
            field: self._counter(name, text, "rank")
            for field, name, text in (
                ("queries", "prefix_cache_queries", "Tokens of admitted requests."),
                ("hits", "prefix_cache_hits", "Of these, tokens that were not computed."),
                (
                    "evictions",
                    "kv_cache_evictions",
                    "Pages evicted from the device that others might have shared.",
                ),
                ("stored", "shelf_pages_stored", "Pages copied to the shelf."),
                ("fetched", "shelf_pages_fetched", "Pages copied from the shelf."),
                ("dropped", "shelf_pages_dropped", "Pages that gave way on the shelf, or never got there."),
                (
                    "bad",
                    "shelf_pages_bad",
                    "Pages of the shelf that were not what they should be, and not taken.",
                ),
            )
        }
        self._pages_told: dict[int, tuple[Member, PageCounts]] = {}

    def _make_series(self) -> None:
        """Those with labels exist from the start: to what appears with its first event, increase() is blind."""
        for counter, values in (
            (self._finished, FINISH_REASONS),
            (self._http_errors, map(str, ERROR_STATUSES)),
            (self._rank_losses, LossCause),
            (self._copies, ("peer", "checkpoint")),
        ):
            for value in values:
                counter.labels(value)

    # What the HTTP layer records.

    def prompt_tokens(self, count: int) -> None:
        self._prompt_tokens.value += count

    def first_token(self, count: int, seconds: float) -> None:
        """The first `count` tokens of a choice, `seconds` after its request."""
        self._generation_tokens.value += count
        self._first_token.observe(seconds)

    def tokens(self, count: int, seconds: float) -> None:
        """`count` more tokens of a choice, `seconds` after the ones before."""
        self._generation_tokens.value += count
        self._between_tokens.observe(seconds)
        if seconds > self._longest_gap_s:
            self._longest_gap_s = seconds

    @property
    def generated(self) -> float:
        """Tokens, of all choices."""
        return self._generation_tokens.value

    def flow(self) -> Flow:
        """For one asker, as it begins the time anew."""
        seen = Flow(self._generation_tokens.value, self._longest_gap_s)
        self._longest_gap_s = 0.0
        return seen

    def finished(self, reason: str, life: ChoiceLife | None = None) -> None:
        """A choice ended: "stop", "length" or "abort". `life`: what is known of it."""
        self._finished.labels(reason).inc()
        if life is None:
            return
        begun_s = life.started_s if life.queued_s is None else life.started_s + life.queued_s
        times = {
            "e2e_request_latency_seconds": life.ended_s - life.started_s,
            "request_queue_time_seconds": life.queued_s,
        }
        if life.first_s is not None and life.last_s is not None:
            times["request_prefill_time_seconds"] = life.first_s - begun_s
            times["request_decode_time_seconds"] = life.last_s - life.first_s
            if life.generated > 1:
                self._request_pace.observe((life.last_s - life.first_s) / (life.generated - 1))
        for name, seconds in times.items():
            if seconds is not None:
                self._request_times[name].observe(max(0.0, seconds))
        lengths = (life.prompt, life.generated, life.max_tokens)
        for histogram, length in zip(self._request_lengths.values(), lengths, strict=True):
            histogram.observe(length)

    def http_error(self, status: int) -> None:
        self._http_errors.labels(str(status)).inc()

    # What the control plane records.

    def requests(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def rank_state(self, rank: int, state: RankState) -> None:
        for other in RankState:
            self._rank_state.labels(str(rank), other.value).set(1.0 if other is state else 0.0)

    def group(self, state: GroupState, *, idle: bool, tolerates: int, tolerates_hosts: int = 0) -> None:
        for other in GroupState:
            if other is not GroupState.PAUSED:  # to operators that is idle
                self._group_state.labels(other.value).set(1.0 if other is state else 0.0)
        self._group_idle.set(idle)
        self._tolerates.set(tolerates)
        self._tolerates_hosts.set(tolerates_hosts)

    def kv_cache(self, usage: Mapping[int, float], members: Sequence[int]) -> None:
        """`usage` of each rank, 0 to 1; `members` are those that serve."""
        for rank, share in usage.items():
            self._rank_kv_usage.labels(str(rank)).set(share)
        shares = [usage[rank] for rank in members]
        self._kv_usage.set(sum(shares) / len(shares) if shares else 0.0)

    def pages(self, member: Member, counts: PageCounts) -> None:
        """As the member said last. Its counters began with it, those of its rank go on."""
        of, before = self._pages_told.get(member.rank, (member, NO_PAGES))
        if of != member:
            before = NO_PAGES
        rank = str(member.rank)
        for field, gauge in self._page_gauges.items():
            gauge.labels(rank).set(getattr(counts, field))
        for field, counter in self._page_counters.items():
            counter.labels(rank).inc(max(0, getattr(counts, field) - getattr(before, field)))
        self._pages_told[member.rank] = member, PageCounts(*map(max, before, counts))

    def rank_lost(self, cause: LossCause) -> None:
        self._rank_losses.labels(cause.value).inc()

    def rebalanced(self, outcome: Rebalancing) -> None:
        self._rebalances.inc()
        self._imbalance.set(outcome.imbalance)

    def expert_copied(self, source: str, count: int = 1) -> None:
        """`source`: "peer" or "checkpoint"."""
        self._copies.labels(source).inc(count)

    def messages_dropped(self, total: int) -> None:
        """So many since the start."""
        self._dropped_messages.value = total

    def known_as(self, model_name: str) -> None:
        """Serve what vLLM and SGLang have under their names, too."""
        self.registry.register(KnownNames(self._named, model_name))

    def _named(self, name: str) -> Metric:
        (found,) = self._by_name[name].collect()
        return found

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return b"".join(self.parts())

    def parts(self) -> Iterator[bytes]:
        """The same, metric by metric: others can have their turn of the event loop in between."""
        for metric in self.registry.collect():
            yield generate_latest(_One(metric))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        made = Counter(_PREFIX + name, text, labels, registry=self.registry)
        self._by_name[name] = made
        return made

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        made = Gauge(_PREFIX + name, text, labels, registry=self.registry)
        self._by_name[name] = made
        return made

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(_PREFIX + name, text, registry=self.registry, buckets=_PAUSE_SECONDS)

    def _fast_counter(self, name: str, text: str) -> _FastCounter:
        made = _FastCounter(_PREFIX + name, text)
        self.registry.register(made)
        self._by_name[name] = made
        return made

    def _fast_histogram(self, name: str, text: str, bounds: Sequence[float]) -> _FastHistogram:
        made = _FastHistogram(_PREFIX + name, text, bounds)
        self.registry.register(made)
        self._by_name[name] = made
        return made
