"""What every implementation of the exchange must do, faults included."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.exchange.base import Exchange, ExchangeShape, Format, Received
from elastic_ep.exchange.pull import TILE
from elastic_ep.wire.messages import Member
from tests.exchange.group import (
    DEADLINE_S,
    Batch,
    Group,
    Routing,
    begin_step,
    random_batch,
    reference,
    results,
    until,
    used,
)
from tests.exchange.hubs import (
    FUSED,
    FUSED_TWO_HOSTS,
    LOOPBACK,
    MOONCAKE,
    PEER_MEMORY,
    SHM,
    TWO_HOSTS,
    Hub,
    Kind,
    end_processes,
)
from tests.kit.fused import needs_fused

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(300),
]
pytestmark = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(LOOPBACK, id="loopback"),
        pytest.param(SHM, id="shm"),
        pytest.param(FUSED, id="fused", marks=needs_fused()),
        pytest.param(TWO_HOSTS, id="two hosts"),
        pytest.param(FUSED_TWO_HOSTS, id="fused, two hosts", marks=needs_fused()),
        pytest.param(PEER_MEMORY, id="peer memory", marks=ON_GPU),
        pytest.param(MOONCAKE, id="mooncake", marks=ON_GPU),
    ],
)

SMALL = ExchangeShape(num_ranks=3, max_tokens=5, hidden=4, top_k=2, slots_per_rank=2, operations_per_step=4)


def group(kind: Kind, shape: ExchangeShape, ranks: range | None = None) -> Group:
    return Group(kind.hub(shape), [Member(rank, 1) for rank in ranks or range(shape.num_ranks)])


def batches(shape: ExchangeShape, seed: int, tokens: list[int] | None = None) -> dict[int, list[Batch]]:
    """For every rank, a batch for each layer."""
    layers = shape.operations_per_step // 2
    counts = tokens or [shape.max_tokens] * shape.num_ranks
    return {
        rank: [random_batch(shape, count, seed * 1000 + rank * 10 + layer) for layer in range(layers)]
        for rank, count in enumerate(counts)
    }


@pytest.fixture(scope="module", autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    end_processes()


def examples(most: int) -> Callable[[Callable[[Kind, st.DataObject], None]], Callable[[Kind], None]]:
    """`given` with as many examples as the kind can afford, `most` at most."""

    def decorate(test: Callable[[Kind, st.DataObject], None]) -> Callable[[Kind], None]:
        def all_examples(kind: Kind) -> None:
            def example(data: st.DataObject) -> None:
                test(kind, data)

            example.__name__ = test.__name__  # failures that hypothesis remembers are of this test alone
            limits = settings(max_examples=min(most, kind.most_examples), deadline=None, phases=kind.phases)
            limits(given(data=st.data())(example))()

        all_examples.__doc__ = test.__doc__
        return all_examples

    return decorate


def assert_exact(
    form: Format, outputs: list[torch.Tensor], layers: list[Batch], missing: frozenset[int]
) -> None:
    for output, batch in zip(outputs, layers, strict=True):
        assert_same(form, output, reference(batch, missing, form.rows))


def assert_same(form: Format, output: torch.Tensor, expected: torch.Tensor, where: str = "") -> None:
    """To the bit, or to the one rounding of a sum to rows shorter than float32 (`expected` is that sum).

    The second tolerance is for the roundings of the sum itself, in float32: its terms are a few hundred at most.
    """
    assert output.dtype == form.rows
    if form.rows is torch.float32:
        assert torch.equal(output, expected), where
    else:
        eps = torch.finfo(form.rows).eps
        torch.testing.assert_close(
            output.float(), expected, rtol=eps / 2, atol=1e-4, msg=lambda m: f"{where} {m}"
        )


def without(layers: list[Batch], shape: ExchangeShape, rank: int) -> list[Batch]:
    """The same tokens, but nothing is sent to `rank` (under the plain routing)."""
    cleaned = []
    for batch in layers:
        experts = batch.experts.clone()
        experts[experts // shape.slots_per_rank == rank] = -1
        cleaned.append(Batch(batch.x, experts, batch.weights))
    return cleaned


def experts_of(rank: int, shape: ExchangeShape) -> frozenset[int]:
    return frozenset(range(rank * shape.slots_per_rank, (rank + 1) * shape.slots_per_rank))


NOTHING: frozenset[int] = frozenset()


@st.composite
def shapes(draw: st.DrawFn, kind: Kind) -> ExchangeShape:
    ranks, slots = draw(
        st.tuples(st.integers(1, 5), st.integers(1, 3)).filter(
            lambda both: both[0] * both[1] % kind.experts_multiple == 0
        )
    )
    return ExchangeShape(
        num_ranks=ranks,
        max_tokens=draw(st.integers(1, 40)),
        hidden=draw(st.sampled_from([1, 2] if kind.on_device else [1, 3, 8])) * kind.hidden_multiple,
        top_k=draw(st.integers(1, min(4, ranks * slots))),
        slots_per_rank=slots,
        operations_per_step=2 * draw(st.integers(1, 3)),
    )


@examples(25)
def test_equals_the_dense_reference_whatever_the_counts(kind: Kind, data: st.DataObject) -> None:
    shape = data.draw(shapes(kind))
    routing = replace(
        plain := Routing.plain(shape), physical=tuple(data.draw(st.permutations(plain.physical)))
    )
    first = data.draw(st.integers(0, 2**40))
    counts = st.lists(st.integers(0, shape.max_tokens), min_size=shape.num_ranks, max_size=shape.num_ranks)
    with group(kind, shape) as ranks:
        for step in range(first, first + 3):
            layers = batches(shape, step - first, data.draw(counts))
            for rank, result in results(ranks.step(step, layers, routing)).items():
                assert result.lost == NOTHING
                assert_exact(ranks.format, result.outputs, layers[rank], NOTHING)
        assert [rank.exchange.operations for rank in ranks.ranks.values()] == [
            3 * shape.operations_per_step
        ] * shape.num_ranks


def test_what_is_received_is_in_the_format_declared(kind: Kind) -> None:
    shape = kind.fit(ExchangeShape(2, 20, 1, 2, 2, 2))
    everything_to = torch.tensor([[2, 3]]).repeat(20, 1)  # both slots of rank 1
    with group(kind, shape) as ranks:
        dispatches = []
        for rank in range(2):
            exchange = ranks.ranks[rank].exchange
            x = (100.0 * (rank + 1) + torch.arange(20.0)[:, None]).repeat(1, shape.hidden)

            def job(exchange=exchange, x=x):  # type: ignore[no-untyped-def]  # defaults bind now
                begin_step(exchange, 0, {1})
                received = exchange.dispatch(x.to(exchange.format.rows), everything_to)
                received = Received(received.packed.clone(), received.counts.clone())
                exchange.combine(received.packed, torch.ones(20, 2))
                exchange.end_step()
                return received

            dispatches.append(ranks.ranks[rank].submit(job))
        both = [future.result(DEADLINE_S) for future in dispatches]
        form = ranks.format
    whole = shape.num_ranks * shape.max_tokens
    for received, count in zip(both, (0, whole), strict=True):
        assert received.counts.view(2, form.parts).sum(dim=1).tolist() == [count, count]
        assert (received.counts.dtype, received.packed.dtype) == (form.counts, form.rows)
        capacity = whole if form.tile is None else max(1, -(-count // form.tile)) * form.tile
        assert tuple(received.packed.shape) == (2, capacity, shape.hidden)
        if form.zero_tail:
            assert not received.packed[~used(received)].any()
    rows = both[1].packed[used(both[1])].view(2, whole, -1).float()
    if not form.ordered:
        rows = rows.sort(dim=1).values
    sent = torch.cat([100 + torch.arange(20.0), 200 + torch.arange(20.0)])
    assert torch.equal(rows, sent[None, :, None].expand_as(rows))


def test_only_this_steps_tokens_of_live_ranks_arrive(kind: Kind) -> None:
    """Not what the same rank sent before, nor what a dead rank or an earlier incarnation left behind."""
    shape = kind.fit(ExchangeShape(3, 4, 1, 1, 2, 2))
    with group(kind, shape) as ranks:

        def arrived(step: int, tokens: dict[int, int]) -> int:
            """How many tokens rank 0 receives when each rank sends it so many."""

            def send(exchange: Exchange, count: int) -> Callable[[], int]:
                def job() -> int:
                    begin_step(exchange, step, {0})
                    x = torch.ones(count, shape.hidden, dtype=exchange.format.rows)
                    received = exchange.dispatch(x, torch.zeros(count, 1).long())
                    assert bool((received.packed[used(received)] == 1).all())
                    exchange.combine(received.packed, torch.ones(count, 1))
                    assert exchange.end_step() == NOTHING
                    return int(received.counts.sum())

                return job

            jobs = {n: ranks.ranks[n].submit(send(ranks.ranks[n].exchange, tokens[n])) for n in tokens}
            counts = {number: job.result(DEADLINE_S) for number, job in jobs.items()}
            assert not any(counts[number] for number in counts if number != 0)
            return counts[0]

        assert arrived(0, {0: 4, 1: 4, 2: 4}) == 12
        assert arrived(1, {0: 1, 1: 0, 2: 4}) == 5
        for rank in (0, 1):
            ranks.ranks[rank].exchange.mask(Member(2, 1))
        assert arrived(2, {0: 4, 1: 2}) == 6
        joiner = ranks.add(Member(2, 2))
        for rank in (0, 1):
            ranks.ranks[rank].exchange.connect(joiner.member)
            ranks.ranks[rank].exchange.activate(joiner.member)
            joiner.exchange.activate(Member(rank, 1))
        assert arrived(3, {0: 4, 1: 3, 2: 0}) == 7


def test_result_does_not_depend_on_placement(kind: Kind) -> None:
    shape = kind.fit(ExchangeShape(4, 24, 16, 4, 4, 2))
    layers = batches(shape, 1)
    seen = []
    for seed in range(4):
        physical = list(range(16))
        random.Random(seed).shuffle(physical)
        with group(kind, shape) as ranks:
            done = results(ranks.step(0, layers, Routing(tuple(physical), shape.slots_per_rank)))
            seen.append([done[rank].outputs[0] for rank in range(4)])
    for outputs in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[0], outputs, strict=True))


@pytest.mark.parametrize("performed", range(SMALL.operations_per_step))
def test_a_mask_ends_the_wait_and_poisons_the_step(kind: Kind, performed: int) -> None:
    """Rank 2 stops after `performed` operations of step 1; the others are seen to wait for it, then mask it."""
    small = kind.fit(SMALL)
    routing = Routing.plain(small)
    with group(kind, small) as ranks, Dying(performed) as dying:
        results(ranks.step(0, batches(small, 0), routing))
        layers = batches(small, 1)
        victim = ranks.ranks[2].step(1, layers[2], routing, dying)
        begun = {rank: Count() for rank in (0, 1)}
        survivors = {rank: ranks.ranks[rank].step(1, layers[rank], routing, begun[rank]) for rank in (0, 1)}
        ends = [ranks.ranks[rank].exchange for rank in (0, 1)]
        # Whoever begins an operation has been through all before, so the victim has performed its own.
        until(lambda: all(count.calls == performed + 1 for count in begun.values()))
        if not kind.on_device:
            until(lambda: all(end.operations == 4 + performed and end.waiting_for == 2 for end in ends))
        for end in ends:
            end.mask(Member(2, 1))
        for rank, result in results(survivors).items():
            assert result.lost == {2}
            complete = performed // 2
            assert_exact(ranks.format, result.outputs[:complete], layers[rank][:complete], NOTHING)
            if not kind.on_device:
                missing = experts_of(2, small)
                assert_exact(ranks.format, result.outputs[complete:], layers[rank][complete:], missing)
            assert ranks.ranks[rank].exchange.waiting_for is None
        for step in range(2, 6):
            layers = {rank: without(own, small, 2) for rank, own in batches(small, step).items() if rank != 2}
            for rank, result in results(ranks.step(step, layers, routing)).items():
                assert result.lost == NOTHING
                assert_exact(ranks.format, result.outputs, layers[rank], NOTHING)
        assert not victim.done()


class Count:
    """A `pause` that counts the operations that are about to begin."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


class Died(Exception):
    """The thread that plays a dead rank has gone as far as it should."""


class Dying:
    """A `pause` that lets `performed` operations pass and then holds the thread until the block ends."""

    def __init__(self, performed: int) -> None:
        self._left = performed
        self._released = threading.Event()

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()

    def __call__(self) -> None:
        if self._left == 0:
            self._released.wait()
            raise Died
        self._left -= 1


def test_a_rank_masked_between_steps_poisons_only_what_is_sent_to_it(kind: Kind) -> None:
    small = kind.fit(SMALL)
    routing = Routing.plain(small)
    with group(kind, small) as ranks:
        results(ranks.step(0, batches(small, 0), routing))
        for rank in (0, 1):
            ranks.ranks[rank].exchange.mask(Member(2, 1))
        layers = {0: without(batches(small, 1)[0], small, 2), 1: batches(small, 1)[1]}
        assert any(int((batch.experts >= 4).sum()) for batch in layers[1])
        done = results(ranks.step(1, layers, routing))
        assert done[0].lost == NOTHING
        assert_exact(ranks.format, done[0].outputs, layers[0], NOTHING)
        assert done[1].lost == {2}
        assert_exact(ranks.format, done[1].outputs, layers[1], experts_of(2, small))


def test_a_mask_after_the_last_operation_still_poisons_the_step(kind: Kind) -> None:
    small = kind.fit(SMALL)
    routing = Routing.plain(small)
    with group(kind, small) as ranks:
        calls = iter(range(99))

        def mask_late() -> None:
            if next(calls) == small.operations_per_step:
                ranks.ranks[0].exchange.mask(Member(2, 1))

        layers = batches(small, 0)
        first = ranks.ranks[0].step(0, layers[0], routing, mask_late)
        others = {rank: ranks.ranks[rank].step(0, layers[rank], routing) for rank in (1, 2)}
        assert first.result(DEADLINE_S).lost == {2}
        assert {result.lost for result in results(others).values()} == {NOTHING}


def test_what_a_masked_rank_left_behind_is_not_even_a_nan(kind: Kind) -> None:
    """Rank 1 puts NaN into all boxes; later entries that go to it or nowhere must be zero, not 0 * NaN."""
    shape = kind.fit(ExchangeShape(2, 3, 2, 2, 1, 2))
    everywhere = torch.tensor([[0, 1], [1, 0], [1, -1]])
    ones = torch.ones(3, 2)
    with group(kind, shape) as ranks:
        x = torch.ones(3, shape.hidden, dtype=ranks.format.rows)

        def poison(rank: int, value: float) -> Callable[[], frozenset[int]]:
            exchange = ranks.ranks[rank].exchange

            def job() -> frozenset[int]:
                begin_step(exchange, 0, {0, 1})
                received = exchange.dispatch(x, everywhere)
                output = exchange.combine(torch.full_like(received.packed, value), ones)
                assert bool(output.isnan().any())
                return exchange.end_step()

            return job

        jobs = [ranks.ranks[0].submit(poison(0, 1.0)), ranks.ranks[1].submit(poison(1, float("nan")))]
        assert [job.result(DEADLINE_S) for job in jobs] == [NOTHING, NOTHING]
        ranks.ranks[0].exchange.mask(Member(1, 1))

        def alone() -> tuple[torch.Tensor, frozenset[int]]:
            exchange = ranks.ranks[0].exchange
            begin_step(exchange, 1, {0, 1})
            received = exchange.dispatch(x, torch.tensor([[0, 1], [-1, 0], [-1, 1]]))
            return exchange.combine(torch.ones_like(received.packed), ones), exchange.end_step()

        output, lost = ranks.ranks[0].submit(alone).result(DEADLINE_S)
        assert lost == {1}
        assert output.tolist() == [[value] * shape.hidden for value in (1.0, 1.0, 0.0)]


def test_a_masked_incarnation_stays_masked_and_the_next_one_takes_part(kind: Kind) -> None:
    small = kind.fit(SMALL)
    routing = Routing.plain(small)
    with group(kind, small, range(2)) as ranks:
        survivors = [ranks.ranks[rank] for rank in (0, 1)]
        for rank in survivors:
            # A loss may be heard of before the activation of the same member.
            rank.exchange.mask(Member(2, 1))
            rank.exchange.activate(Member(2, 1))
        layers = {rank: without(own, small, 2) for rank, own in batches(small, 0).items() if rank != 2}
        assert {result.lost for result in results(ranks.step(0, layers, routing)).values()} == {NOTHING}
        joiner = ranks.add(Member(2, 2))
        for rank in survivors:
            rank.exchange.connect(joiner.member)
            rank.exchange.activate(joiner.member)
            joiner.exchange.activate(rank.member)
            rank.exchange.activate(Member(2, 1))  # late news, no effect
            rank.exchange.mask(Member(2, 1))
        for step in range(1, 4):
            all_layers = batches(small, step)
            for number, result in results(ranks.step(step, all_layers, routing)).items():
                assert result.lost == NOTHING
                assert_exact(ranks.format, result.outputs, all_layers[number], NOTHING)
        # A stale mask in mid-step ends no wait; the right one does.
        layers = batches(small, 4)
        waiting = {rank: ranks.ranks[rank].step(4, layers[rank], routing) for rank in (0, 1)}
        until(lambda: all(rank.exchange.waiting_for == 2 for rank in survivors))
        for rank in survivors:
            rank.exchange.mask(Member(2, 1))
        finished = joiner.step(4, layers[2], routing)
        for number, result in results({**waiting, 2: finished}).items():
            assert result.lost == NOTHING
            assert_exact(ranks.format, result.outputs, layers[number], NOTHING)


@examples(15)
def test_joins_and_losses_at_any_step(kind: Kind, data: st.DataObject) -> None:
    """Ranks come and go at boundaries; what is left is exact, and nobody waits for whoever is not there."""
    shape = kind.fit(ExchangeShape(4, 6, 3, 2, 2, 4))
    routing = Routing.plain(shape)
    with group(kind, shape, range(2)) as ranks:
        present, incarnations = {0, 1}, dict.fromkeys(range(4), 1)
        incarnations[2] = incarnations[3] = 0
        step = data.draw(st.integers(0, 10))
        for _ in range(data.draw(st.integers(1, 6))):
            changed = data.draw(st.integers(0, 3))
            if changed not in present:
                incarnations[changed] += 1
                joiner = ranks.add(Member(changed, incarnations[changed]))
                for rank in present:
                    ranks.ranks[rank].exchange.connect(joiner.member)
                    ranks.ranks[rank].exchange.activate(joiner.member)
                    joiner.exchange.activate(Member(rank, incarnations[rank]))
                present.add(changed)
            elif len(present) > 1:
                present.discard(changed)
                for rank in present:
                    ranks.ranks[rank].exchange.mask(Member(changed, incarnations[changed]))
            for _ in range(data.draw(st.integers(1, 3))):
                layers = {rank: own for rank, own in batches(shape, step).items() if rank in present}
                for gone in set(range(4)) - present:
                    layers = {rank: without(own, shape, gone) for rank, own in layers.items()}
                for rank, result in results(ranks.step(step, layers, routing)).items():
                    assert result.lost == NOTHING
                    assert_exact(ranks.format, result.outputs, layers[rank], NOTHING)
                step += 1


def test_ranks_of_random_speed_stay_exact(kind: Kind) -> None:
    """Nobody overwrites what another still reads: the only hazard of having one buffer."""
    shape = kind.fit(ExchangeShape(4, 8, 64, 2, 2, 2))
    routing = Routing.plain(shape)
    steps = kind.steps
    kinds_of_batch = [batches(shape, seed) for seed in range(7)]
    with group(kind, shape) as ranks:
        expected = [
            {rank: reference(own[0], rows=ranks.format.rows) for rank, own in layers.items()}
            for layers in kinds_of_batch
        ]

        def slow(rank: int) -> Callable[[], None]:
            dice = random.Random(rank)

            def pause() -> None:
                if dice.random() < 0.2:
                    time.sleep(dice.random() * 0.0005)

            return pause

        futures = [
            {
                rank: ranks.ranks[rank].step(step, kinds_of_batch[step % 7][rank], routing, slow(rank + step))
                for rank in range(4)
            }
            for step in range(steps)
        ]
        for step, done in enumerate(futures):
            for rank, result in results(done).items():
                assert result.lost == NOTHING
                where = f"step {step}, rank {rank}"
                assert_same(ranks.format, result.outputs[0], expected[step % 7][rank], where)


@pytest.fixture
def alone(kind: Kind) -> Iterator[Hub]:
    hub = kind.hub(kind.fit(SMALL))
    yield hub
    hub.close()


def test_one_rank_alone_needs_nobody(kind: Kind) -> None:
    shape = kind.fit(ExchangeShape(1, 4, 3, 2, 2, 2))
    layers = batches(shape, 3)
    with group(kind, shape) as ranks:
        done = results(ranks.step(0, layers, Routing.plain(shape)))
        assert_exact(ranks.format, done[0].outputs, layers[0], NOTHING)


def test_misuse_is_told(kind: Kind, alone: Hub) -> None:
    if kind.on_device:
        pytest.skip("what is on the device is not looked at by the host, which would have to wait for it")
    exchange = alone.end(Member(0, 1))
    x, experts, weights = torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.ones(1, 2)
    with pytest.raises(RuntimeError):
        exchange.dispatch(x, experts)
    exchange.begin_step(0)
    with pytest.raises(RuntimeError):
        exchange.combine(torch.zeros(2, TILE, 4), weights)
    for wrong in (6, 7, -2):
        exchange.begin_step(0)
        with pytest.raises(ValueError, match="out of range"):
            exchange.dispatch(x, torch.tensor([[0, wrong]]))
    exchange.begin_step(0)
    with pytest.raises(ValueError, match="max_tokens"):
        exchange.dispatch(torch.zeros(6, 4), torch.zeros(6, 2, dtype=torch.int64))
    exchange.begin_step(0)
    exchange.dispatch(x, experts)
    with pytest.raises(RuntimeError, match="not performed"):
        exchange.end_step()
    with pytest.raises(ValueError, match="rank 3"):
        alone.end(Member(3, 1))
    exchange.close()
    exchange.close()
