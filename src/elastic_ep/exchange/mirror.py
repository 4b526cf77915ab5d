"""What one host's windows have to say to another's, as frames; and the other way round. No sockets here, and no torch.

A rank of another host is mirrored: its tokens, and the results that it owes, are written into this host's windows as if
it ran here, its word last. So ranks, in Python and in C++, know of one protocol (`pull.py`), and an operation across
hosts is that of one host with a longer way between a post and its being seen.

A frame is all that one rank did in one operation for the ranks of one host: of a dispatch its choices and the tokens that
go there, of a combine the results for tokens of that host, each with its place. Frames are applied in the order of
operations, each whole or not at all.

Why what is read is what was posted. In operation n a rank overwrites what it wrote in n - 2, once every live peer has
posted n - 1; and a rank of the other host posts n - 1 after it has the frame of n - 2. So what a frame is made of stays
as it is while there is a rank over there that the sender waits for. If it has masked all of them, there is nobody to
tell. If it has masked them, gone on, or been replaced while the frame was made, the frame is thrown away.

Why late frames do no harm. Operation numbers only grow, also from one incarnation to the next, and a frame that is not
newer than the rank's word is dropped. One that is newer, of a rank that died after it, lands in the dead rank's part of
the windows, which nobody reads before its next incarnation has posted; results are written for those alone that have
not masked its incarnation, and those who mask it while they are written wait for that (`carried.py`). So an incarnation
must not seem to have posted what an earlier one has: it takes the word back before it says who it is (`pull.py`).

HAZARD: words are one for all ranks of a host. A rank that was masked by the sender, and has not masked it, takes what it
sends the others for complete. Its results are of no use then, and must not be: who is masked by a member is out.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.bell import FutexBell
from elastic_ep.exchange.carried import Carried
from elastic_ep.exchange.windows import LINE, Windows
from elastic_ep.wire.messages import Member

HEADER = struct.Struct("<4sIqqiii")
"""Magic, CRC-32 of all that follows, incarnation, operation, rank, tokens, rows."""
MAGIC = b"eeX1"
_CRC_AT = 8
_STRIDE = LINE // 8
_POSTED, _TOKENS, _INCARNATION, _HERE = range(4)


class BadFrame(ValueError):
    """Not a frame of this group: whoever sent it is not to be listened to any longer."""


class Header(NamedTuple):
    crc: int
    incarnation: int
    number: int
    rank: int
    tokens: int
    rows: int

    @property
    def is_dispatch(self) -> bool:
        return self.number % 2 == 1


@dataclass(frozen=True, slots=True)
class _Parts:
    """Views of one host's windows."""

    words: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int32]
    x: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]


class Mirror:
    """The windows behind `fd`, of host `own`; `hosts[rank]`.

    Raises ValueError if the windows are not made for several hosts.
    """

    def __init__(self, fd: int, shape: ExchangeShape, hosts: Sequence[int], own: int) -> None:
        if len(hosts) != shape.num_ranks:
            raise ValueError(f"hosts of {len(hosts)} ranks, but there are {shape.num_ranks}")
        if not Carried.is_there(fd, shape):
            raise ValueError("the windows are of one host alone: make them with carried=True")
        self.shape = shape
        self.hosts = tuple(hosts)
        self.own = own
        self._fd = fd
        self._buffer = memoryview(mmap.mmap(fd, Windows.layout(shape).carried_total))
        self._parts = _views(self._buffer, shape)
        self._parts.words[:, _HERE] = [host == own for host in self.hosts]
        self.bell = FutexBell(self._buffer, shape.num_ranks)
        self._masks = Carried(fd, shape)

    def ranks_of(self, host: int) -> list[int]:
        return [rank for rank, there in enumerate(self.hosts) if there == host]

    def posted(self, rank: int) -> int:
        return int(self._parts.words[rank, _POSTED])

    def towards(self, host: int) -> Outgoing:
        return Outgoing(self, host)

    def from_host(self, host: int) -> Incoming:
        return Incoming(self, host, Carried(self._fd, self.shape))

    @property
    def parts(self) -> _Parts:
        return self._parts

    def line(self, rank: int) -> tuple[int, int, int]:
        """Posted, tokens, incarnation: as written by the rank, in any order."""
        posted, tokens, incarnation = self._parts.words[rank, : _INCARNATION + 1].tolist()
        return posted, tokens, incarnation

    def waits_for_any(self, rank: int, others: Collection[int]) -> bool:
        """Whether there is one of `others` that `rank` has not masked, as far as their incarnations are known here."""
        for other in others:
            incarnation = int(self._parts.words[other, _INCARNATION])
            if not incarnation or not self._masks.is_masked(rank, Member(other, incarnation)):
                return True
        return False


class Outgoing:
    """What the ranks of this host have done, for the ranks of another. `heard`: the last operation of each that is known
    there."""

    def __init__(self, mirror: Mirror, host: int) -> None:
        self._mirror = mirror
        self._there = mirror.ranks_of(host)
        self.heard: dict[int, int] = dict.fromkeys(mirror.ranks_of(mirror.own), 0)
        shape = mirror.shape
        self._slots_there = np.zeros(shape.num_ranks * shape.slots_per_rank + 1, np.bool_)
        for rank in self._there:
            self._slots_there[rank * shape.slots_per_rank : (rank + 1) * shape.slots_per_rank] = True

    def frames(self) -> Iterator[bytes]:
        """All that is new. What has been yielded counts as heard."""
        for rank in self.heard:
            number = self._mirror.posted(rank)
            if number <= self.heard[rank]:
                continue
            # A rank may be one operation ahead of what is known there: it does not wait for that, but for answers.
            for each in (number - 1, number):
                if each <= self.heard[rank]:
                    continue
                if (frame := self._frame(rank, each)) is None:
                    break
                self.heard[rank] = each
                yield frame

    def _frame(self, rank: int, number: int) -> bytes | None:
        """None: it is not what the rank has posted any more, or nobody is there to hear it."""
        mirror = self._mirror
        _, tokens, incarnation = mirror.line(rank)
        if not mirror.waits_for_any(rank, self._there):
            return None
        tokens = min(max(tokens, 0), mirror.shape.max_tokens)
        if number % 2:
            places, rows, experts = self._dispatched(rank, tokens)
            body = experts.tobytes() + places.tobytes() + rows.tobytes()
        else:
            tokens = 0
            places, rows = self._owed(rank)
            body = places.tobytes() + rows.tobytes()
        mirror.bell.fence()
        posted, _, incarnation_now = mirror.line(rank)
        if incarnation_now != incarnation or posted not in (number, number + 1):
            return None
        if not mirror.waits_for_any(rank, self._there):
            return None
        head = HEADER.pack(MAGIC, 0, incarnation, number, rank, tokens, len(places))
        crc = zlib.crc32(body, zlib.crc32(head[_CRC_AT:]))
        return HEADER.pack(MAGIC, crc, incarnation, number, rank, tokens, len(places)) + body

    def _dispatched(
        self, rank: int, tokens: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        parts = self._mirror.parts
        experts = parts.experts[rank, :tokens].copy()
        goes = self._slots_there[experts.clip(-1, len(self._slots_there) - 1)].any(axis=1)
        places = goes.nonzero()[0].astype(np.int32)
        return places, parts.x[rank, places], experts

    def _owed(self, rank: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The results that `rank` has written for tokens of the other host, and their rows among all boxes."""
        mirror, shape = self._mirror, self._mirror.shape
        per_rank = shape.max_tokens * shape.top_k
        found = []
        for source in self._there:
            tokens = min(max(mirror.line(source)[1], 0), shape.max_tokens)
            owners = mirror.parts.experts[source, :tokens].reshape(-1) // shape.slots_per_rank
            found.append((owners == rank).nonzero()[0] + source * per_rank)
        places = np.concatenate(found).astype(np.int32)
        return places, mirror.parts.boxes[places]


class Incoming:
    """What ranks of another host have done, for those of this one."""

    def __init__(self, mirror: Mirror, host: int, masks: Carried) -> None:
        self._mirror = mirror
        self._host = host
        self._masks = masks
        self.dropped = 0
        """Frames that came too late."""

    def known(self) -> dict[int, int]:
        """The last operation of each of their ranks that is known here."""
        return {rank: self._mirror.posted(rank) for rank in self._mirror.ranks_of(self._host)}

    def header(self, data: bytes) -> Header:
        """Of the frame that begins with `data`. Raises `BadFrame`."""
        magic, crc, incarnation, number, rank, tokens, rows = HEADER.unpack(data)
        shape = self._mirror.shape
        header = Header(crc, incarnation, number, rank, tokens, rows)
        if magic != MAGIC:
            raise BadFrame("it does not begin like a frame")
        if not 0 <= rank < shape.num_ranks or self._mirror.hosts[rank] != self._host:
            raise BadFrame(f"of rank {rank}, which is not on that host")
        most = shape.max_tokens if header.is_dispatch else shape.num_ranks * shape.max_tokens * shape.top_k
        if number < 1 or not 0 <= tokens <= shape.max_tokens or not 0 <= rows <= most:
            raise BadFrame(f"operation {number} with {tokens} tokens and {rows} rows")
        return header

    def body_bytes(self, header: Header) -> int:
        shape = self._mirror.shape
        choices = header.tokens * shape.top_k if header.is_dispatch else 0
        return 4 * (choices + header.rows * (1 + shape.hidden))

    def apply(self, head: bytes, header: Header, body: bytes) -> None:
        """Write it into the windows and say so to the ranks here. Raises `BadFrame`, with nothing written."""
        if zlib.crc32(body, zlib.crc32(head[_CRC_AT:])) != header.crc:
            raise BadFrame("its checksum is wrong")
        mirror, rank = self._mirror, header.rank
        posted, _, incarnation = mirror.line(rank)
        if header.number <= posted or header.incarnation < incarnation:
            self.dropped += 1
            return
        if header.is_dispatch:
            self._take_tokens(header, body)
        else:
            self._take_results(header, body)
        words = mirror.parts.words
        words[rank, _INCARNATION] = header.incarnation
        mirror.bell.fence()
        words[rank, _POSTED] = header.number
        mirror.bell.fence()
        mirror.bell.raise_alarm()

    def _take_tokens(self, header: Header, body: bytes) -> None:
        shape, parts, rank, tokens = self._mirror.shape, self._mirror.parts, header.rank, header.tokens
        choices = tokens * shape.top_k
        experts = np.frombuffer(body, np.int32, choices).reshape(tokens, shape.top_k)
        places = np.frombuffer(body, np.int32, header.rows, 4 * choices)
        rows = _rows(body, 4 * (choices + header.rows), header.rows, shape)
        _check(experts, -1, shape.num_ranks * shape.slots_per_rank)
        _check(places, 0, tokens)
        parts.x[rank, places] = rows
        parts.experts[rank, :tokens] = experts
        parts.experts[rank, tokens:] = -1
        parts.words[rank, _TOKENS] = tokens

    def _take_results(self, header: Header, body: bytes) -> None:
        shape, mirror = self._mirror.shape, self._mirror
        places = np.frombuffer(body, np.int32, header.rows)
        rows = _rows(body, 4 * header.rows, header.rows, shape)
        per_rank = shape.max_tokens * shape.top_k
        _check(places, 0, shape.num_ranks * per_rank)
        sources = places // per_rank
        here = mirror.ranks_of(mirror.own)
        if not np.isin(sources, here).all():
            raise BadFrame("results for tokens of another host")
        sender = Member(header.rank, header.incarnation)
        with self._masks.held():
            for rank in here:
                wanted = sources == rank
                if wanted.any() and not self._masks.is_masked(rank, sender):
                    mirror.parts.boxes[places[wanted]] = rows[wanted]


def _views(buffer: memoryview, shape: ExchangeShape) -> _Parts:
    windows = Windows.layout(shape)
    ranks, tokens, top_k, hidden = shape.num_ranks, shape.max_tokens, shape.top_k, shape.hidden

    def part(offset: int, dtype: Any, *sizes: int) -> Any:
        return np.frombuffer(buffer, dtype, int(np.prod(sizes)), offset).reshape(sizes)

    return _Parts(
        words=part(windows.words, np.int64, ranks, _STRIDE),
        experts=part(windows.experts, np.int32, ranks, tokens, top_k),
        x=part(windows.x, np.float32, ranks, tokens, hidden),
        boxes=part(windows.boxes, np.float32, ranks * tokens * top_k, hidden),
    )


def _rows(body: bytes, offset: int, count: int, shape: ExchangeShape) -> npt.NDArray[np.float32]:
    return np.frombuffer(body, np.float32, count * shape.hidden, offset).reshape(count, shape.hidden)


def _check(numbers: npt.NDArray[np.int32], first: int, end: int) -> None:
    if numbers.size and (int(numbers.min()) < first or int(numbers.max()) >= end):
        raise BadFrame(f"a place out of range {first} to {end - 1}")
