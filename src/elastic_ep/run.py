"""`python -m elastic_ep.run`: serve a mixture-of-experts model on elastic ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import structlog

from elastic_ep import logs
from elastic_ep.command_line import Help, Parser, add_flags, read
from elastic_ep.config import PRELOAD, ConfigError, EventLogMode, LogConfig, ServeConfig
from elastic_ep.host.server_process import ServerProcess, begun

BUNDLED_MODEL = Path(__file__).parent / "assets" / "model"
FAILED = 1
USAGE_ERROR = 2


def parse(arguments: list[str] | None = None) -> ServeConfig:
    """The configuration that the command line asks for. Raises `ConfigError`; with --help, SystemExit."""
    options = vars(read(make_parser(), sys.argv[1:] if arguments is None else arguments))
    positional, named = options.pop("model_folder"), options.pop("model")
    if positional is not None and named is not None:
        raise ConfigError(f"the model is given twice, as {positional} and as --model {named}")
    options["model"] = str(BUNDLED_MODEL) if positional is None and named is None else named or positional
    options["api_key"] = tuple(options["api_key"])
    options["served_model_name"] = tuple(options["served_model_name"] or ())
    options["event_log"] = EventLogMode(options["event_log"]) if options["event_log"] else None
    return ServeConfig(**options)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m elastic_ep.run",
        description="Serve a mixture-of-experts model over HTTP from elastic expert-parallel ranks.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("model_folder", nargs="?", metavar="MODEL", help="as --model")
    parser.add_argument(
        "--config", metavar="FILE", help="flags as members of a YAML file; those given beside it win"
    )
    add_flags(parser, ServeConfig)
    return parser


def main(arguments: list[str] | None = None) -> int:
    logs.configure(LogConfig())
    try:
        config = parse(arguments)
        if config.mps:  # which its children must be told of: they begin when its daemon runs
            return _serve(config, None)
        with begun(PRELOAD) as server:
            return _serve(config, server)
    except ConfigError as error:
        structlog.get_logger().error(str(error))
        return USAGE_ERROR
    except Exception:
        structlog.get_logger().exception("the run process ends by an exception")
        return FAILED


def command(arguments: list[str] | None = None) -> int:
    """`elastic-ep serve MODEL ...`."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["serve"]:
        return main(given[1:])
    asked = given[:1] in (["--help"], ["-h"])
    print(
        "usage: elastic-ep serve MODEL [--flags]; elastic-ep serve --help lists them",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else USAGE_ERROR


def _serve(config: ServeConfig, server: ServerProcess | None) -> int:
    # Imported late: --help and wrong flags answer at once, and the fork server imports meanwhile.
    from elastic_ep.serve import serve

    return serve(config, server=server)


if __name__ == "__main__":
    sys.exit(main())
