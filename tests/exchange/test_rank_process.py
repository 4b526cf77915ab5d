"""Ends in processes of their own are as good as ends in this one: what the contract on a GPU stands on, without a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from elastic_ep.exchange.base import DeviceExchange, ExchangeShape
from elastic_ep.wire.messages import Member
from tests.exchange import test_contract as contract
from tests.exchange.group import Group, Routing, random_batch, reference, results
from tests.exchange.hubs import SHM_PROCESSES, Kind, ShmProcesses, end_processes
from tests.exchange.remote import Pool, ProcessGone, RemoteDeviceExchange
from tests.kit.solo_exchange import SoloDeviceExchange

SHAPE = ExchangeShape(num_ranks=2, max_tokens=4, hidden=3, top_k=2, slots_per_rank=1, operations_per_step=2)


@pytest.fixture(scope="module", autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    end_processes()


@pytest.fixture
def hub() -> Iterator[ShmProcesses]:
    hub = ShmProcesses(SHAPE)
    yield hub
    hub.close()


@pytest.mark.parametrize(
    "test",
    [
        contract.test_only_this_steps_tokens_of_live_ranks_arrive,
        pytest.param(
            partial(contract.test_a_mask_ends_the_wait_and_poisons_the_step, performed=1), id="mask"
        ),
        contract.test_a_mask_after_the_last_operation_still_poisons_the_step,
        contract.test_a_masked_incarnation_stays_masked_and_the_next_one_takes_part,
    ],
)
def test_a_part_of_the_contract(test: Callable[[Kind], None]) -> None:
    test(SHM_PROCESSES)


def test_an_error_is_raised_here_with_its_traceback(hub: ShmProcesses) -> None:
    end = hub.end(Member(0, 1))
    end.begin_step(0)
    with pytest.raises(ValueError, match="out of range") as caught:
        end.dispatch(torch.zeros(1, 3), torch.tensor([[0, 7]]))
    (note,) = caught.value.__notes__
    assert "'dispatch'" in note
    assert "exchange/pull.py" in note
    end.close()
    end.close()


def test_a_process_is_used_again_unless_it_died(hub: ShmProcesses) -> None:
    dead = hub.end(Member(0, 1))
    pid = dead.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessGone, match=r"died \(-9\) under 'begin_step'"):
        dead.begin_step(0)
    dead.close()
    second = hub.end(Member(0, 2))
    assert second.process.pid != pid
    second.close()
    assert hub.end(Member(0, 3)).process is second.process


def test_an_end_that_was_not_closed_takes_its_process_with_it(hub: ShmProcesses) -> None:
    before = ShmProcesses(SHAPE)
    end = before.end(Member(0, 1))
    before.close()
    assert hub.end(Member(0, 1)).process is not end.process
    with pytest.raises(ProcessGone):
        end.begin_step(0)


def open_solo(shape: ExchangeShape, member: Member, place: str) -> DeviceExchange:
    return LiveSolo(shape.slots_per_rank, torch.device("cpu"))


class LiveSolo(SoloDeviceExchange):
    """Its only rank may be told of itself."""

    def activate(self, member: Member) -> None:
        pass

    connect = activate


class Solo:
    """A group of one rank whose end, in a process of its own, has a device's format."""

    pool = Pool(open_solo)

    def __init__(self, shape: ExchangeShape) -> None:
        self._shape = shape

    def end(self, member: Member) -> RemoteDeviceExchange:
        return RemoteDeviceExchange(self.pool, self._shape, member, "", {})

    def close(self) -> None:
        self.pool.close()


def test_tensors_travel_in_the_format_of_the_other_end_to_the_bit() -> None:
    shape = ExchangeShape(1, 6, 3, 2, 4, 4)
    layers = [random_batch(shape, 6, seed, nowhere=0.3) for seed in range(2)]
    with Group(Solo(shape), [Member(0, 1)]) as ranks:
        done = results(ranks.step(0, {0: layers}, Routing.plain(shape)))[0]
        assert ranks.format.rows is torch.bfloat16
        contract.assert_exact(ranks.format, done.outputs, layers, frozenset())
        assert not torch.equal(done.outputs[0].float(), reference(layers[0]))


def test_what_is_not_of_the_format_declared_is_found() -> None:
    hub = Solo(ExchangeShape(1, 6, 3, 2, 4, 2))
    end = hub.end(Member(0, 1))
    with pytest.raises(TypeError, match="float64 on cpu from an exchange that declares"):
        end.dispatch(torch.ones(1, 3, dtype=torch.float64), torch.tensor([[0, 1]]))
    end.close()
    hub.close()
