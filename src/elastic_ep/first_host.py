"""The first host of several: where the others join, and what they are told. See docs/hosts.md."""

from __future__ import annotations

import importlib.metadata
from contextlib import AsyncExitStack
from dataclasses import astuple
from functools import partial
from pathlib import Path

import structlog
import zmq

from elastic_ep.config import ConfigError, RankConfig, ServeConfig
from elastic_ep.group.hosts import Hosts
from elastic_ep.guided.vocabulary import FILE as VOCABULARY
from elastic_ep.host.agent_messages import Carry, carried_shape
from elastic_ep.host.devices import this_machine
from elastic_ep.host.fork_messages import LaunchOptions
from elastic_ep.host.keeper import Keeper
from elastic_ep.machines.hosts.events import HostsConfig
from elastic_ep.machines.hosts.machine import HERE
from elastic_ep.on_ray import agents
from elastic_ep.plan import ServePlan
from elastic_ep.wire.group_key import BadKey, GroupKey
from elastic_ep.wire.host_messages import GetReady, Reach
from elastic_ep.wire.host_sockets import HostsWire, listen
from elastic_ep.wire.sockets import CARRIER_PORT, ControllerWire

log = structlog.get_logger()


def control_wire(config: ServeConfig, directory: Path) -> ControllerWire:
    """The control plane; with several hosts over TCP, too, for whoever has the key. Raises `ConfigError`."""
    if config.key_file is None:
        return ControllerWire(directory)
    try:
        key = GroupKey.of_or_into_file(Path(config.key_file))
        return ControllerWire(directory, key, *config.joined_at)
    except BadKey as error:
        raise ConfigError(f"--key-file {error}") from error
    except zmq.ZMQError as error:
        raise _no_room(config, error) from error


def open_hosts(
    stack: AsyncExitStack,
    config: ServeConfig,
    plan: ServePlan,
    keeper: Keeper,
    wire: ControllerWire,
    told: RankConfig,
    options: LaunchOptions,
    run: str,
) -> Hosts:
    """Others can join from now on, until `stack` ends. `told`, `options`: how this host's ranks are launched. `run`: what
    the folder of logs is called, if there is one.

    Raises `ConfigError`.
    """
    address, port = config.joined_at
    guard = wire.guard
    assert guard is not None, "it is there with the key"
    carrier_port = port and port + CARRIER_PORT
    try:
        listener = stack.enter_context(listen(address, carrier_port))
    except OSError as error:
        raise _no_room(config, error) from error
    vocabulary = Path(told.directory) / VOCABULARY
    needs = GetReady(
        hosts=config.host_of_rank,
        config=told.to_json(),
        entry=options.entry,
        preload=options.preload,
        shape=astuple(plan.shape),
        vocabulary=vocabulary.read_bytes() if vocabulary.exists() else b"",
        run=run,
        pub_port=wire.ports[0],
        rank_port=wire.ports[1],
        carrier_port=carrier_port,
    )
    told_of = HostsConfig(
        hosts=config.host_of_rank,
        at_start=config.hosts,
        address=address,
        release=importlib.metadata.version("elastic-ep"),
        needs=needs,
        fused=plan.fused,
        carrier=Reach(HERE, address, listener.getsockname()[1]),
        machine=this_machine() if told.device == "cuda" else "",
    )
    try:
        hosts = Hosts(told_of, config.timing, keeper, partial(HostsWire, wire.context, guard, address, port))
    except zmq.ZMQError as error:
        raise _no_room(config, error) from error
    stack.callback(hosts.close)
    carried = Carry(config.host_of_rank, HERE, 1, guard.key.carriers, carried_shape(told.device, plan.shape))
    keeper.carry(carried, listener, hosts.on_links)
    if config.ray is not None and config.agents_on_ray:
        join = f"[{address}]" if ":" in address else address
        key_file = config.key_file or ""
        stack.enter_context(agents(config.ray, config.agents_on_ray, f"{join}:{hosts.port}", key_file))
    log.info(
        "other hosts join by: python -m elastic_ep.agent",
        join=f"{address}:{hosts.port}",
        key_file=config.key_file,
        awaited=config.hosts - 1,
        capacity=config.capacity_hosts,
    )
    return hosts


def _no_room(config: ServeConfig, error: OSError | zmq.ZMQError) -> ConfigError:
    return ConfigError(
        f"cannot listen at --hosts-address {config.hosts_address}, or at one of the three ports after it "
        f"({error.strerror}): give an address of this machine, and another port, or port 0 for any free ones"
    )
