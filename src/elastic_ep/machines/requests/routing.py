"""The routing machine: which rank runs which request, and which tokens its client has had.

The router knows the prompt and every delivered token of every live request, so the loss of a rank costs a
request nothing but time: it goes to another rank as a longer prompt and continues at the next index. Tokens
are believed only from the request's present owner and only at the next index, hence exactly once, in order.

In the same way a request that waits in a rank moves to one that has a free seat: what a lost rank had overfills
the survivors, and the rank that comes back would stand idle beside them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.machine import Machine
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.events import Effect, Event, RoutingConfig
from elastic_ep.machines.requests.lifecycle import REQUEST, RequestState
from elastic_ep.machines.requests.prefixes import Prefixes, marks_of
from elastic_ep.machines.requests.records import Rank, Request
from elastic_ep.machines.requests.seating import movable, moves, rank_for, receiver_of
from elastic_ep.machines.tables import TableMachine
from elastic_ep.wire.messages import Cancel, FailureCode, Member, Token


@dataclass(eq=False)
class RoutingMachine(Machine[Event, Effect]):
    """Feed it with `step`; everything without an underscore may be read.

    `requests` holds the live ones by id, `waiting` the ids among them that no rank has, in the order in which
    they will be assigned: those that lost their rank first (in mid-answer before others), then first come, first served.
    """

    config: RoutingConfig

    def __post_init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self.ranks: dict[Member, Rank] = {}
        self.stopping = False
        self.unavailable: str | None = None
        """Why nothing will serve."""
        self.now_ms = 0
        self.prefixes = Prefixes()
        self.replays = 0
        self.moves = 0
        self.stale_tokens = 0
        """From a member that does not own the request, or not any more."""
        self.duplicate_tokens = 0
        self._draining: frozenset[Member] = frozenset()
        """Of whom it is to be said when they have no request left."""
        self._newest: dict[int, int] = {}
        self._highest_id = -1
        self._assignments = 0
        self._drained_said = False
        self._effects: list[Effect] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Submitted: self._on_submitted,
            ev.CancelRequested: self._on_cancel,
            ev.RankUp: self._on_rank_up,
            ev.RankDraining: self._on_rank_draining,
            ev.RankResumed: self._on_rank_resumed,
            ev.RankDown: self._on_rank_down,
            ev.TokensCommitted: self._on_tokens,
            ev.Failed: self._on_failed,
            ev.Blamed: self._on_blamed,
            ev.NothingWillServe: self._on_nothing_will_serve,
            ev.Tick: self._on_tick,
            ev.StopRequested: self._on_stop,
            ev.DeadlinePassed: self._on_deadline,
        }

    @property
    def running(self) -> int:
        return len(self.requests) - len(self.waiting)

    def next_deadline_ms(self) -> int | None:
        """When a `Tick` may next have an effect. All have as long, so the oldest is due first."""
        oldest = next(iter(self.requests.values()), None)
        return oldest.due_ms if oldest else None

    def request_state(self, request_id: int) -> RequestState | None:
        """None: never heard of, refused, or ended."""
        request = self.requests.get(request_id)
        return RequestState(request.life.state) if request else None

    # The machine

    def _step(self, event: Event) -> list[Effect]:
        effects: list[Effect] = []
        self._effects = effects
        had_work = bool(self.requests)
        self._handlers[type(event)](event)
        for member in sorted(self._draining):
            if not self.ranks[member].requests:
                self._draining -= {member}
                effects.append(ev.RankDrained(member))
        if self.requests:
            if not had_work:
                effects.insert(0, ev.WorkBegan())
        else:
            if had_work:
                effects.append(ev.WorkEnded())
            if self.stopping and not self._drained_said:
                self._drained_said = True
                effects.append(ev.Drained())
        return effects

    def _on_submitted(self, event: ev.Submitted) -> None:
        asked = event.request
        if asked.request_id <= self._highest_id or asked.params.max_tokens < 1:
            raise UnexpectedEvent(f"request {asked.request_id}: a used id, or no tokens wanted")
        if asked.marks and len(asked.marks) != marks_of(len(asked.prompt), self.config.page_size):
            raise UnexpectedEvent(f"request {asked.request_id}: {len(asked.marks)} marks of such a prompt")
        self._highest_id = asked.request_id
        self._pass_time(event.now_ms)
        refusal = self._refusal(asked.request_id)
        if refusal is not None:
            self._effects.append(refusal)
            return
        request = Request(asked, TableMachine(REQUEST))
        request.promise(self.config)  # what it costs is asked before a rank has it
        if self.config.request_timeout_ms:
            request.due_ms = self.now_ms + self.config.request_timeout_ms
        self.requests[asked.request_id] = self.waiting[asked.request_id] = request
        self._distribute()

    def _refusal(self, request_id: int) -> ev.Refuse | None:
        config = self.config
        if self.stopping:
            return ev.Refuse(request_id, "stopping", config.retry_after_s)
        if self.unavailable is not None:
            return ev.Refuse(request_id, "unavailable", config.unavailable_retry_after_s, self.unavailable)
        if len(self.waiting) >= config.max_queued:
            return ev.Refuse(request_id, "busy", config.retry_after_s)
        return None

    def _on_tick(self, event: ev.Tick) -> None:
        if self._pass_time(event.now_ms):
            self._distribute()

    def _pass_time(self, now_ms: int) -> bool:
        """Whether requests have failed, as their time is over."""
        self.now_ms = max(self.now_ms, now_ms)
        over = False
        while (due_ms := self.next_deadline_ms()) is not None and due_ms <= self.now_ms:
            seconds = self.config.request_timeout_ms / 1000
            detail = f"the request was not complete {seconds:g} s after it came in (--request-timeout)"
            self._fail(next(iter(self.requests.values())), FailureCode.TIMEOUT, detail)
            over = True
        return over

    def _on_cancel(self, event: ev.CancelRequested) -> None:
        request = self.requests.get(event.request_id)
        if request is not None:
            self._withdraw(request, "cancel")
            self._distribute()

    def _on_rank_up(self, event: ev.RankUp) -> None:
        rank, incarnation = event.member
        if incarnation <= self._newest.get(rank, 0):
            raise UnexpectedEvent(f"{event.member} is up, but that incarnation was up or down already")
        older = Member(rank, self._newest.get(rank, 0))
        self._newest[rank] = incarnation
        self._remove(older)
        self.prefixes.forget(rank)  # what it was given before
        self.ranks[event.member] = Rank(event.member, event.num_pages or self.config.num_pages)
        self._distribute()

    def _on_rank_draining(self, event: ev.RankDraining) -> None:
        rank = self.ranks.get(event.member)
        if rank is not None:
            rank.accepting = False
            self._draining |= {event.member}
            self._distribute()

    def _on_rank_resumed(self, event: ev.RankResumed) -> None:
        rank = self.ranks.get(event.member)
        if rank is not None:
            rank.accepting = not rank.faulty
            self._draining -= {event.member}
            self._distribute()

    def _on_rank_down(self, event: ev.RankDown) -> None:
        rank, incarnation = event.member
        self._newest[rank] = max(incarnation, self._newest.get(rank, 0))
        self._remove(event.member, left=event.left)
        self._distribute()

    def _on_tokens(self, event: ev.TokensCommitted) -> None:
        """The only handler that runs all the time: no table, no search, a few dictionary look-ups a token."""
        rank = self.ranks.get(event.member)
        if rank is None or rank.faulty:
            self.stale_tokens += len(event.tokens)
            return
        for cached in event.cached:
            request = rank.requests.get(cached.request_id)
            if request is not None and not request.emitted:  # later owners' are nothing to its client
                self._effects.append(ev.FromCache(*cached))
        batches: dict[int, list[Token]] = {}
        ended: dict[int, str] = {}
        fault = ""
        for token in event.tokens:
            request_id = token.request_id
            request = rank.requests.get(request_id)
            if request is None:
                self.stale_tokens += 1
                continue
            emitted = request.emitted
            if token.index != len(emitted):
                if token.index > len(emitted):
                    if event.member in request.moved_from and len(emitted) == request.emitted_before:
                        # HAZARD: the rank had the request before. These are words of that time, and those that came
                        # before them were stale. Its first token of now is no gap.
                        self.stale_tokens += 1
                        continue
                    fault = f"request {request_id}: token {token.index} came before {len(emitted)}"
                    break
                self.duplicate_tokens += 1
                continue
            emitted.append(token.token)
            if token.finish is None and len(emitted) >= request.asked.params.max_tokens:
                token = token._replace(finish="length")
            if request_id in batches:
                batches[request_id].append(token)
            else:
                batches[request_id] = [token]
            if token.finish is not None:
                ended[request_id] = token.finish
                self._end(request, "fail" if token.finish == "abort" else "finish")
        for request_id, tokens in batches.items():
            self._effects.append(ev.Deliver(request_id, tuple(tokens)))
            if request_id in ended:
                self._effects.append(ev.Finish(request_id, ended[request_id]))
            elif len((request := rank.requests[request_id]).emitted) > request.reach:
                self._promise_more(request, rank)
        if fault:
            rank.accepting, rank.faulty = False, True
            self._effects.append(ev.Fault(event.member, fault))
        if event.held is not None:
            rank.held = frozenset(event.held)
        if ended or event.held is not None:
            self._distribute()

    def _on_failed(self, event: ev.Failed) -> None:
        rank = self.ranks.get(event.member)
        request = rank.requests.get(event.request_id) if rank and not rank.faulty else None
        if request is None:  # ended, or moved, and another has it now
            return
        self._end(request, "fail")
        self._effects.append(ev.Finish(event.request_id, "abort", event.code, event.reason))
        self._distribute()

    def _on_blamed(self, event: ev.Blamed) -> None:
        rank = self.ranks.get(event.member)
        if rank is not None:
            rank.blamed = tuple(number for number in event.request_ids if number in rank.requests)

    def _on_nothing_will_serve(self, event: ev.NothingWillServe) -> None:
        self.unavailable = event.reason
        for request in list(self.requests.values()):
            self._fail(request, FailureCode.UNAVAILABLE, event.reason)

    def _on_stop(self, event: ev.StopRequested) -> None:
        self.stopping = True

    def _on_deadline(self, event: ev.DeadlinePassed) -> None:
        self.stopping = True
        for request in list(self.requests.values()):
            self._fail(request, FailureCode.ABORTED, "the server stopped before the request was complete")

    # Parts

    def _end(self, request: Request, trigger: str) -> None:
        request.life.fire(trigger)
        request_id = request.asked.request_id
        del self.requests[request_id]
        if request.owner is None:
            del self.waiting[request_id]
        else:
            self.ranks[request.owner].let_go(request)

    def _withdraw(self, request: Request, trigger: str) -> None:
        """End it before its time, so its owner has to hear of it."""
        self._end(request, trigger)
        if request.owner is not None:
            self._effects.append(ev.Send(request.owner, Cancel(request.asked.request_id)))

    def _fail(self, request: Request, code: FailureCode, detail: str) -> None:
        self._withdraw(request, "fail")
        self._effects.append(ev.Finish(request.asked.request_id, "abort", code, detail))

    def _remove(self, member: Member, *, left: bool = False) -> None:
        """The member is no more; what it had goes to the front of the queue: those in mid-answer first, then as they came
        in. One that has left counts no more than one that gives what waits in it."""
        rank = self.ranks.pop(member, None)
        self._draining -= {member}
        if rank is None:
            return
        replaying = [*takewhile(_was_cut_off, self.waiting.values()), *rank.requests.values()]
        for request_id, request in rank.requests.items():
            fruitless = len(request.emitted) == request.emitted_before
            request.fruitless = request.fruitless + (not left) if fruitless else 0
            request.owner = None
            self.waiting[request_id] = request
            request.life.fire("rank_lost")
        for request in sorted(replaying, key=_in_mid_answer_first, reverse=True):
            self.waiting.move_to_end(request.asked.request_id, last=False)
        for request_id in rank.blamed:
            if request_id in rank.requests:
                rank.requests[request_id].blames += 1
        for request_id, request in sorted(rank.requests.items()):
            cost = self._cost(request, rank)
            if cost:
                self._fail(request, FailureCode.FAILED, cost)
            elif left:
                self.moves += 1
                self._effects.append(ev.Moved(request_id, member))
            else:
                self.replays += 1
                self._effects.append(ev.Replayed(request_id, member))

    def _cost(self, request: Request, lost: Rank) -> str:
        """Why the request may not go to yet another rank, if so."""
        if request.blames > 1 and lost.blamed == (request.asked.request_id,):
            return f"{request.blames} ranks have failed while they computed this request"
        if request.fruitless > self.config.max_fruitless_replays:
            return f"{request.fruitless} ranks in a row were lost with this request before it got a token"
        return ""

    def _distribute(self) -> None:
        """Give out what waits: streams that were cut off and have no rank, those that wait in a rank, new requests."""
        self._assign(RequestState.REPLAYING, self.config.replay_limit)
        self._move_waiting()
        self._assign(RequestState.QUEUED, self.config.assign_limit)

    def _assign(self, state: RequestState, limit: int) -> None:
        """Those at the front of the queue, as long as they are in `state` and a rank takes them."""
        while self.waiting:
            request_id, request = next(iter(self.waiting.items()))
            rank = (
                rank_for(request, limit, self.ranks.values(), self.prefixes, self.config)
                if request.life.state is state
                else None
            )
            if rank is None:
                return
            del self.waiting[request_id]
            request.life.fire("assign")
            self._give(request, rank)

    def _rank_for(self, request: Request, limit: int) -> Rank | None:
        return rank_for(request, limit, self.ranks.values(), self.prefixes, self.config)

    def _move_waiting(self) -> None:
        """What waits in a rank goes to ranks that have a seat for it, and pages."""
        for request, giver, receiver in moves(self.ranks.values(), self.config):
            self._move(request, giver, receiver)

    def _move(self, request: Request, giver: Rank, receiver: Rank) -> None:
        """The giver is not lost: it does not count as fruitless, but its tokens end a row of fruitless owners."""
        request_id = request.asked.request_id
        if len(request.emitted) > request.emitted_before:
            request.fruitless = 0
        request.moved_from |= {giver.member}
        giver.let_go(request)
        self.moves += 1
        self._effects.append(ev.Moved(request_id, giver.member))
        self._effects.append(ev.Send(giver.member, Cancel(request_id)))
        self._give(request, receiver)

    def _give(self, request: Request, rank: Rank) -> None:
        request.owner = rank.member
        request.emitted_before = len(request.emitted)
        request.promise(self.config)
        rank.take(request)
        self.prefixes.give(request.asked.marks, rank.member.rank)
        self._assignments += 1
        rank.last_assigned = self._assignments
        self._effects.append(ev.Send(rank.member, request.assignment()))

    def _promise_more(self, request: Request, rank: Rank) -> None:
        rank.pages -= request.own
        request.promise(self.config)
        rank.pages += request.own

    # Invariants

    def _check(self) -> None:
        seen = dict.fromkeys(self.waiting, 0)
        for member, rank in self.ranks.items():
            assert rank.member == member
            assert self._newest[member.rank] == member.incarnation, f"{member} is up, but not the newest"
            assert len(rank.requests) <= self.config.replay_limit, f"{member} has too many requests"
            fresh = Rank(member)
            for request in list(rank.requests.values()):
                fresh.take(request)
            assert (fresh.pages, fresh.marks) == (rank.pages, rank.marks), f"{member}: pages counted wrong"
            for request_id, request in rank.requests.items():
                assert request_id not in seen, f"request {request_id} is in two places"
                seen[request_id] = 1
                assert request.owner == member, f"request {request_id}: owner {request.owner}, is at {member}"
                assert request.life.state is RequestState.RUNNING
        assert seen.keys() == self.requests.keys(), (
            "a live request is nowhere, or one that ended is somewhere"
        )
        for request_id, request in self.requests.items():
            assert request.asked.request_id == request_id <= self._highest_id
            assert len(request.emitted) < request.asked.params.max_tokens, f"request {request_id} is done"
            assert request.due_ms is None or request.due_ms > self.now_ms, f"request {request_id} is overdue"
        assert list(self.requests) == sorted(self.requests), "the oldest is not the first"
        assert self.unavailable is None or not self.requests, "requests wait for nothing"
        self._check_queue()
        self._check_seats()

    def _check_queue(self) -> None:
        for request_id, request in self.waiting.items():
            assert request.owner is None, f"request {request_id} waits, but {request.owner} has it"
        states = [request.life.state for request in self.waiting.values()]
        replaying = states.count(RequestState.REPLAYING)
        assert set(states[:replaying]) <= {RequestState.REPLAYING}, "a replay waits behind a new request"
        replays = list(self.waiting.values())[:replaying]
        assert replays == sorted(replays, key=_in_mid_answer_first), (
            "a stream that was cut off waits behind others"
        )
        queued = list(self.waiting.items())[replaying:]
        assert queued == sorted(queued, key=lambda item: item[0]), "not first come, first served"
        for request_id, request in queued:
            assert request.life.state is RequestState.QUEUED
            assert not request.emitted, f"request {request_id} has tokens, but never had a rank"
        if self.waiting:
            limit = self.config.replay_limit if replaying else self.config.assign_limit
            first = next(iter(self.waiting.values()))
            assert self._rank_for(first, limit) is None, "a request waits beside a free rank"

    def _check_seats(self) -> None:
        """Nothing waits for a seat beside a rank that has one for it, and pages, but what must stay where it is."""
        for member, rank in self.ranks.items():
            for request in movable(rank, self.config):
                free = receiver_of(request, rank, self.ranks.values(), self.config)
                assert free is None or len(rank.requests) <= self.config.max_num_seqs, (
                    f"request {request.asked.request_id} waits in {member} beside {free.member}"
                )


def _was_cut_off(request: Request) -> bool:
    return request.life.state is RequestState.REPLAYING


def _in_mid_answer_first(request: Request) -> tuple[bool, int]:
    return not request.emitted, request.asked.request_id
