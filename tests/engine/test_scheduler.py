"""Scheduler invariants under random traffic, without tensors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.scheduler import Chunk, Scheduler, Sequence
from elastic_ep.kv.page_table import NULL_PAGE
from elastic_ep.machines.requests.records import HORIZON
from elastic_ep.wire.messages import SamplingParams

PARAMS = SamplingParams(max_tokens=1)


def sequence(number: int, length: int) -> Sequence:
    return Sequence(number, [number] * length, length, PARAMS, 0, 0)


def check(scheduler: Scheduler, chunks: list[Chunk], limits: EngineLimits) -> None:
    held = [page for seq in scheduler.running for page in seq.pages]
    assert len(set(held)) == len(held)
    assert NULL_PAGE not in held
    assert len(held) + scheduler.pages.free == limits.num_pages
    assert len(scheduler.running) <= limits.max_num_seqs
    assert sum(chunk.length for chunk in chunks) <= limits.max_num_batched_tokens
    assert len({chunk.sequence.request_id for chunk in chunks}) == len(chunks)
    arrival = [seq.request_id for seq in (*scheduler.running, *scheduler.waiting)]
    assert arrival == sorted(arrival), "first come, first served"
    for seq in scheduler.waiting:
        assert not seq.pages
        assert seq.computed == 0
    for chunk in chunks:
        assert chunk.sequence in scheduler.running
        assert chunk.length > 0
        assert chunk.start == chunk.sequence.computed
        assert len(chunk.sequence.pages) * limits.page_size >= chunk.start + chunk.length
    decoding = {s.request_id for s in scheduler.running if s.computed + 1 == len(s.tokens) and s.computed}
    assert decoding <= {chunk.sequence.request_id for chunk in chunks}, "no prompt holds up a decode"


@settings(deadline=None)
@given(st.data())
def test_invariants_and_everyone_finishes(data: st.DataObject) -> None:
    max_seqs = data.draw(st.integers(1, 5))
    limits = EngineLimits(
        max_model_len=40,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=data.draw(st.integers(max_seqs, 30)),
        page_size=data.draw(st.sampled_from([1, 4, 16])),
        num_pages=0,
    )
    fewest = -(-limits.max_model_len // limits.page_size)
    limits = EngineLimits(
        40,
        max_seqs,
        limits.max_num_batched_tokens,
        limits.page_size,
        fewest + data.draw(st.integers(0, fewest)),
    )
    scheduler = Scheduler(limits)
    wanted: dict[int, int] = {}
    arriving = data.draw(st.lists(st.tuples(st.integers(1, 39), st.integers(1, 30)), min_size=1, max_size=8))
    for step in range(3000):
        if arriving and (step % 3 == 0):
            length, new = arriving.pop()
            wanted[step] = min(length + new, limits.max_model_len)
            scheduler.add(sequence(step, length))
        if data.draw(st.integers(0, 60)) == 0 and scheduler.waiting:
            scheduler.remove(scheduler.waiting[-1])
        chunks = scheduler.schedule()
        check(scheduler, chunks, limits)
        if step % 5 == 4:
            chunks = scheduler.schedule()  # a poisoned step: nothing was committed, so the work comes again
            check(scheduler, chunks, limits)
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(1)
                if len(chunk.sequence.tokens) >= wanted[chunk.sequence.request_id]:
                    scheduler.remove(chunk.sequence)
        if not (arriving or scheduler.running or scheduler.waiting):
            assert scheduler.pages.free == limits.num_pages
            return
        assert chunks or arriving, "stuck"
    raise AssertionError("never done")


def test_a_long_prompt_is_cut_and_decodes_go_first() -> None:
    scheduler = Scheduler(EngineLimits(200, 4, 10, 16, 100))
    short, long = sequence(1, 3), sequence(2, 25)
    scheduler.add(short)
    scheduler.add(long)
    first = scheduler.schedule()
    assert [(c.sequence, c.start, c.length, c.samples) for c in first] == [
        (short, 0, 3, True),
        (long, 0, 7, False),
    ]
    scheduler.commit(first)
    short.tokens.append(9)
    second = scheduler.schedule()
    assert [(c.sequence, c.start, c.length) for c in second] == [(short, 3, 1), (long, 7, 9)]
    scheduler.commit(second)
    short.tokens.append(9)
    assert [(c.length, c.samples) for c in scheduler.schedule()] == [(1, True), (9, True)]


def test_prompts_get_what_is_said_beside_decodes_and_decodes_all_they_need() -> None:
    scheduler = Scheduler(EngineLimits(200, 4, 10, 16, 100))
    short, long, third = sequence(1, 3), sequence(2, 25), sequence(3, 9)
    scheduler.add(short)
    scheduler.commit(scheduler.schedule())
    short.tokens.append(9)
    assert [chunk.sequence for chunk in scheduler.schedule(lambda: 1 // 0)] == [short], (
        "there are none to ask for"
    )
    scheduler.add(long)
    scheduler.add(third)

    def lengths(prompt_tokens: int) -> list[tuple[Sequence, int]]:
        chunks = scheduler.schedule(lambda: prompt_tokens)
        scheduler.commit([chunk for chunk in chunks if chunk.sequence is not short])
        return [(chunk.sequence, chunk.length) for chunk in chunks]

    assert lengths(0) == [(short, 1)]
    assert lengths(4) == [(short, 1), (long, 4)]
    assert lengths(99) == [(short, 1), (long, 9)], "more than fits"
    assert lengths(0) == [(short, 1)], "one that has begun"
    assert lengths(8) == [(short, 1), (long, 8)]
    assert lengths(6) == [(short, 1), (long, 4), (third, 2)]


def test_the_youngest_gives_way_when_open_ended_answers_outgrow_the_cache() -> None:
    """They are promised `HORIZON` tokens beyond those that they have, not the whole context."""
    scheduler = Scheduler(EngineLimits(2000, 3, 2000, 16, 125))
    old, young = sequence(1, 900), sequence(2, 8)
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.preemptions:
        scheduler.commit(chunks := scheduler.schedule())
        for chunk in chunks:
            chunk.sequence.tokens.append(1)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young]
    assert len(young.tokens) > HORIZON


@settings(deadline=None)
@given(st.data())
def test_who_says_how_much_it_wants_never_pauses_once_it_has_begun(data: st.DataObject) -> None:
    """However short the cache is: a new request waits instead, and those in mid-answer are admitted before new ones."""
    page, seats = data.draw(st.sampled_from([1, 4, 16])), data.draw(st.integers(1, 6))
    longest = 60
    pages = -(-longest // page) + data.draw(st.integers(0, 2 * longest // page))
    scheduler = Scheduler(
        EngineLimits(longest, seats, max(seats, data.draw(st.integers(4, 70))), page, pages)
    )
    request = st.tuples(st.integers(1, 30), st.integers(0, 8), st.integers(1, 20))
    arriving = data.draw(st.lists(request, min_size=1, max_size=12))
    begun: set[int] = set()
    for step in range(5000):
        if arriving and step % 2 == 0:
            length, emitted, more = arriving.pop()
            new = Sequence(
                step, [step] * (length + emitted), length, PARAMS, 0, 0, most=length + emitted + more
            )
            scheduler.add(new)
        in_mid_answer = [bool(seq.output_len) for seq in scheduler.waiting]
        assert in_mid_answer == sorted(in_mid_answer, reverse=True)
        scheduler.commit(chunks := scheduler.schedule())
        assert begun <= {chunk.sequence.request_id for chunk in chunks}, "a stream pauses"
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(1)
                begun.add(chunk.sequence.request_id)
                if len(chunk.sequence.tokens) >= chunk.sequence.most:
                    begun.remove(chunk.sequence.request_id)
                    scheduler.remove(chunk.sequence)
        if not (arriving or scheduler.running or scheduler.waiting):
            assert scheduler.pages.free == pages
            assert scheduler.preemptions == 0
            return
        assert chunks or arriving, "stuck"
    raise AssertionError("never done")


def test_a_stream_that_has_its_pages_back_does_not_wait_behind_a_new_prompt() -> None:
    """The prompt began while they were on their way."""
    scheduler = Scheduler(EngineLimits(400, 4, 16, 16, 100), on_shelf=lambda name: name in moved.names)
    moved = Sequence(1, [1] * 100, 90, PARAMS, 0, 0)
    scheduler.add(moved)
    assert scheduler.schedule() == []
    (fetch,) = scheduler.take_copies().fetch
    scheduler.add(sequence(2, 200))
    scheduler.commit(scheduler.schedule())
    scheduler.fetched(fetch.ticket, len(fetch.names))
    first, second = scheduler.schedule()
    assert (first.sequence, first.start, first.length, first.samples) == (moved, 96, 4, True)
    assert second.length == 12


def test_a_moved_stream_has_its_pages_copied_while_a_prompt_takes_whole_steps() -> None:
    scheduler = Scheduler(EngineLimits(400, 4, 16, 16, 100), on_shelf=lambda name: name in moved.names)
    moved, late = Sequence(1, [1] * 100, 90, PARAMS, 0, 0), sequence(3, 20)
    scheduler.add(sequence(2, 200))
    scheduler.commit(scheduler.schedule())
    scheduler.add(late)
    scheduler.add(moved)
    scheduler.commit(scheduler.schedule())
    (fetch,) = scheduler.take_copies().fetch
    assert scheduler.fetching == {fetch.ticket: moved}
    assert list(scheduler.waiting) == [late]


def test_a_suspect_is_computed_by_itself_until_it_has_proved_itself() -> None:
    """In every other step, so that the others go on; if the device breaks then, there is one to blame."""
    scheduler = Scheduler(EngineLimits(40, 4, 20, 4, 40))
    others, suspect = [sequence(1, 3), sequence(2, 3)], sequence(3, 3)
    suspect.alone_until = 2
    for each in (*others, suspect):
        scheduler.add(each)
    batches = []
    for _ in range(8):
        scheduler.commit(chunks := scheduler.schedule())
        batches.append([chunk.sequence.request_id for chunk in chunks])
        for chunk in chunks:
            chunk.sequence.tokens.append(1)
    assert batches[:4] == [[1, 2], [3], [1, 2], [3]]
    assert batches[-1] == [1, 2, 3]


@pytest.mark.parametrize(
    ("limits", "fault"),
    [(EngineLimits(65, num_pages=4), "cannot hold one"), (EngineLimits(64, 8, 7), "every decode fits")],
)
def test_impossible_limits_are_refused(limits: EngineLimits, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Scheduler(limits)


def test_a_step_is_foreseen_only_if_nobody_else_has_anything_to_do() -> None:
    limits = EngineLimits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, num_pages=12)
    scheduler = Scheduler(limits)

    def step() -> list[Chunk]:
        chunks = scheduler.schedule()
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(1)
        return chunks

    first, second = sequence(1, 14), sequence(2, 20)
    scheduler.add(first)
    step()
    scheduler.add(second)
    mixed = scheduler.schedule()
    assert scheduler.foresee(mixed) is None, "a prompt is not done with one token more"
    for _ in range(4):
        step()
    assert second.output_len > 0
    decodes = scheduler.schedule()
    assert scheduler.foresee(decodes) == [Chunk(one, start + 1, 1) for one, start, _ in decodes]
    assert scheduler.foresee(decodes[:1]) is None, "another one decodes too"
    scheduler.add(sequence(3, 4))
    assert scheduler.foresee(decodes) is None, "somebody waits"
    scheduler.remove(scheduler.waiting[0])
    held = len(first.pages) + len(second.pages)
    taken = scheduler.pages.take(scheduler.pages.free)
    while (foreseen := scheduler.foresee(scheduler.schedule())) is not None:
        assert len(first.pages) + len(second.pages) == held
        step()
    assert taken is not None
    scheduler.pages.release(taken)
    foreseen = scheduler.foresee(scheduler.schedule())
    assert foreseen is not None
    assert len(first.pages) + len(second.pages) == held + 1, "with a page for it"
