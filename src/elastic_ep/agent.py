"""`python -m elastic_ep.agent --join HOST:PORT --key-file F`: this machine takes part in a group that runs elsewhere."""

from __future__ import annotations

import asyncio
import importlib.metadata
import ipaddress
import signal
import sys
from functools import partial
from pathlib import Path

import anyio
import structlog

from elastic_ep import logs, titles
from elastic_ep.command_line import Help, Parser
from elastic_ep.config import LOG_LEVELS, ConfigError, LogConfig, address_of
from elastic_ep.host.scheduling import make_prompt
from elastic_ep.joined import USAGE_ERROR, JoinOptions, live, local_address
from elastic_ep.wire.group_key import BadKey, GroupKey


def parse(arguments: list[str] | None = None) -> JoinOptions:
    """Raises `ConfigError`; with --help, SystemExit."""
    parser = Parser(
        prog="python -m elastic_ep.agent",
        description="Have this machine's ranks take part in a group whose first host was started with --hosts.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--join", required=True, metavar="ADDRESS:PORT", help="--hosts-address of the first host"
    )
    parser.add_argument("--key-file", required=True, metavar="FILE", help="a copy of the first host's")
    parser.add_argument(
        "--address", help="of this machine, that the other hosts dial; as the first host sees it if not given"
    )
    parser.add_argument("--log-dir", default="runs", help="where the logs of this host's ranks go")
    parser.add_argument("--log-level", default=LogConfig().level, choices=LOG_LEVELS)
    parser.add_argument("--log-format", default=LogConfig().format, choices=("console", "json"))
    options = parser.parse_args(arguments)
    group = address_of("--join", options.join)
    try:
        address = (
            local_address(group) if options.address is None else str(ipaddress.ip_address(options.address))
        )
        key = GroupKey.of_file(Path(options.key_file))
    except BadKey as error:
        raise ConfigError(f"--key-file {error}") from error
    except ValueError as error:
        raise ConfigError(f"--address {options.address}: give an IP address ({error})") from error
    except OSError as error:
        raise ConfigError(
            f"--join {options.join}: it cannot be reached ({error.strerror}): give --address"
        ) from error
    return JoinOptions(
        group=group,
        address=address,
        key=key,
        release=importlib.metadata.version("elastic-ep"),
        log_dir=Path(options.log_dir),
        log=LogConfig(options.log_level, options.log_format),
    )


async def _run(options: JoinOptions) -> int:
    stop = anyio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return await live(options, stop)


def main(arguments: list[str] | None = None) -> int:
    logs.configure(LogConfig())
    try:
        options = parse(arguments)
    except ConfigError as error:
        structlog.get_logger().error(str(error))
        return USAGE_ERROR
    logs.configure(options.log, "host")
    titles.show(f"host of the group at {options.group[0]}:{options.group[1]}", "eep-host")
    make_prompt()
    return anyio.run(partial(_run, options))


if __name__ == "__main__":
    sys.exit(main())
