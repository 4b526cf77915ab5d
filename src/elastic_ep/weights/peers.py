"""A rank's weights from other ranks' memory: verified before a byte of them counts."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from isal.isal_zlib import crc32

from elastic_ep.weights.bank import Weights
from elastic_ep.weights.layout import expert_region, region, slot_region
from elastic_ep.weights.transfer import PullFailed, Read, TransferPlane, WrongBytes
from elastic_ep.wire.slot_messages import Region, StateAddress

_DENSE_PIECE_BYTES = 8 << 20
_TOGETHER_BYTES = 2 << 20
_AHEAD_BYTES = 4 << 20
_MOST_AHEAD = 4


@dataclass(frozen=True, slots=True)
class ExpertPull:
    """Fill the own `slot` of `layer` from `source_slot` of the rank at `source`, whose bytes must have `checksum`."""

    source: StateAddress
    source_slot: int
    layer: int
    slot: int
    checksum: int | None = None
    """None: whatever comes is right."""
    ticket: int = 0
    """The caller's own."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """The outcome: the checksum of the bytes now in the slot, or why it is as it was."""

    pull: ExpertPull
    checksum: int | None
    failure: PullFailed | None = None


def publish(plane: TransferPlane, weights: Weights) -> StateAddress:
    """Let peers read all of `weights`, which must stay where they are."""
    tensors = dict(weights.dense())
    for layer in range(weights.spec.moe_layers):
        for name in weights.expert_parts(layer):
            tensors[expert_region(layer, name)] = weights.mixture(layer)[name]
    regions = tuple(Region(name, tensor.data_ptr(), tensor.nbytes) for name, tensor in tensors.items())
    plane.register(regions)
    return StateAddress(plane.session, regions)


def pull_experts(
    plane: TransferPlane, weights: Weights, pulls: Iterable[ExpertPull], deadline_s: float
) -> Iterator[Pulled]:
    """Overwrite slots that no step uses, in order: while some are checked and written, the next are on their way.

    A pull that fails leaves its slot as it was: the bytes are checked before the first is written.
    `pulls` may have run out for now and go on later: it is asked again after each read. A read is of several small
    experts; `deadline_s` is for each, from when the one before is done with.
    """
    reads = _Reads(plane, pulls, _sizes(weights))
    under_way: deque[_Reading] = deque()
    try:
        while True:
            while len(under_way) <= reads.ahead and (reading := reads.begin()) is not None:
                under_way.append(reading)
            if not under_way:
                return
            yield from _outcomes(weights, under_way.popleft(), deadline_s)
    finally:
        for _, read in under_way:
            if isinstance(read, Read):
                read.release()


class _Reading(NamedTuple):
    pulls: Sequence[ExpertPull]
    read: Read | PullFailed


class _Reads:
    """Begins reads: one for what is pulled in a row from one source, as long as that is little.

    Each read is handed to another thread and back, which takes as long as half a megabyte does.
    """

    def __init__(self, plane: TransferPlane, pulls: Iterable[ExpertPull], sizes: Mapping[str, int]) -> None:
        self._plane = plane
        self._pulls = iter(pulls)
        self._sizes = sizes
        nbytes = sum(sizes.values())
        self._together = max(1, _TOGETHER_BYTES // nbytes)
        self._next: ExpertPull | None = None
        self.ahead = min(_MOST_AHEAD, max(1, _AHEAD_BYTES // (nbytes * self._together)))
        """How many should be under way beside the one that is waited for."""

    def begin(self) -> _Reading | None:
        """None: there is nothing to pull, for now."""
        first = self._next or next(self._pulls, None)
        self._next = None
        if first is None:
            return None
        try:
            parts = self._parts(first)
        except ValueError as error:
            return _Reading([first], PullFailed(str(error)))
        pulls = [first]
        while len(pulls) < self._together:
            self._next = pull = next(self._pulls, None)
            if pull is None or pull.source.session != first.source.session:
                break
            try:
                parts += self._parts(pull)
            except ValueError:
                break  # it fails alone
            pulls.append(pull)
            self._next = None
        return _Reading(pulls, self._plane.read(first.source.session, parts))

    def _parts(self, pull: ExpertPull) -> list[tuple[int, int]]:
        return slot_region(pull.source, pull.layer, pull.source_slot, self._sizes)


def _outcomes(weights: Weights, reading: _Reading, deadline_s: float) -> Iterator[Pulled]:
    pulls, read = reading
    if isinstance(read, PullFailed):
        yield from (Pulled(pull, None, read) for pull in pulls)
        return
    with read:
        try:
            data = read.wait(deadline_s)
        except PullFailed as failure:
            yield from (Pulled(pull, None, failure) for pull in pulls)
            return
        for pull, own in zip(pulls, data.split(len(data) // len(pulls)), strict=True):
            try:
                outcome = Pulled(pull, _fill(weights, pull, own))
            except PullFailed as failure:
                outcome = Pulled(pull, None, failure)
            yield outcome


def pull_dense(
    plane: TransferPlane,
    weights: Weights,
    source: StateAddress,
    expected_checksum: int | None,
    deadline_s: float,
) -> int:
    """Overwrite everything dense in `weights`, which nobody uses yet, and return its `dense_checksum`.

    Raises PullFailed, after `deadline_s` seconds in all at the latest; `weights` are then of no use as they are.
    """
    ends = time.monotonic() + deadline_s
    pieces = iter(_dense_pieces(weights, source))
    value = 0
    under_way: deque[tuple[torch.Tensor, Read]] = deque()
    try:
        while True:
            for target, part in itertools.islice(pieces, _MOST_AHEAD - len(under_way)):
                under_way.append((target, plane.read(source.session, [part])))
            if not under_way:
                break
            target, read = under_way.popleft()
            with read:
                data = read.wait(max(0.0, ends - time.monotonic()))
                value = crc32(data.numpy().data, value)
                target.copy_(data)
    finally:
        for _, read in under_way:
            read.release()
    if expected_checksum is not None and value != expected_checksum:
        raise WrongBytes(
            f"the dense weights of {source.session} have checksum {value:08x} instead of {expected_checksum:08x}",
            value,
        )
    return value


def _sizes(weights: Weights) -> dict[str, int]:
    """Bytes of a slot's parts."""
    return {name: part.nbytes for name, part in zip(weights.expert_parts(0), weights.slot(0, 0), strict=True)}


def _fill(weights: Weights, pull: ExpertPull, data: torch.Tensor) -> int:
    value = crc32(data.numpy().data)
    if pull.checksum is not None and value != pull.checksum:
        raise WrongBytes(
            f"slot {pull.source_slot} of layer {pull.layer} at {pull.source.session} has checksum {value:08x} "
            f"instead of {pull.checksum:08x}",
            value,
        )
    start = 0
    for target in weights.slot(pull.layer, pull.slot):
        target.copy_(data[start : start + target.nbytes].view(target.dtype).view(target.shape))
        start += target.nbytes
    weights.derive(pull.layer, pull.slot)
    return value


def _dense_pieces(weights: Weights, source: StateAddress) -> Sequence[tuple[torch.Tensor, tuple[int, int]]]:
    """Bytes of the dense tensors, and where the source has them. Raises PullFailed if it has others."""
    pieces = []
    for name, tensor in weights.dense().items():
        try:
            theirs = region(source, name)
        except ValueError as error:
            raise PullFailed(str(error)) from None
        if theirs.nbytes != tensor.nbytes:
            raise PullFailed(f"{name} has {theirs.nbytes} bytes at {source.session}, {tensor.nbytes} here")
        mine = tensor.view(-1).view(torch.uint8)
        for start in range(0, tensor.nbytes, _DENSE_PIECE_BYTES):
            target = mine[start : start + _DENSE_PIECE_BYTES]
            pieces.append((target, (theirs.address + start, target.nbytes)))
    return pieces
