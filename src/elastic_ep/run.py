"""`python -m elastic_ep.run`: serve a mixture-of-experts model on elastic ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import structlog

from elastic_ep import logs
from elastic_ep.command_line import Help, Parser, json_names, read
from elastic_ep.config import (
    CONTENT_FORMATS,
    LOG_FORMATS,
    LOG_LEVELS,
    ConfigError,
    EventLogMode,
    LogConfig,
    ServeConfig,
)

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
    options["event_log"] = EventLogMode(options["event_log"]) if options["event_log"] else None
    return ServeConfig(**options)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m elastic_ep.run",
        description="Serve a mixture-of-experts model over HTTP from elastic expert-parallel ranks.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model_folder", nargs="?", metavar="MODEL", help="as --model")
    add("--ranks", type=int, default=8, help="rank processes, 1 to 64")
    add(
        "--model",
        "--model-path",
        help="folder with a checkpoint in Hugging Face layout; the bundled one if not given",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add("--mps", action="store_true", help="a private MPS daemon, for several ranks on one GPU")
    add("--host", default="127.0.0.1", help="where to listen")
    add("--port", type=int, default=8000, help="0 picks a free one")
    add("--served-model-name", help="name in the API; the folder's name if not given")
    add("--api-key", action="append", default=[], help="clients must send it; may be given several times")
    _add_cors(parser)
    add("--max-model-len", type=int, help="prompt plus generated tokens; the model's own if not given")
    add("--max-num-seqs", type=int, help="sequences that a rank runs at once (16, on a GPU 64)")
    add(
        "--max-num-batched-tokens",
        type=int,
        help="tokens that a rank computes in one step (64, on a GPU 256)",
    )
    add("--num-gpu-blocks-override", dest="num_pages", type=int, help="KV cache pages (16 tokens) a rank")
    add("--max-queued", type=int, default=1024, help="requests that may wait; more get 429")
    add(
        "--request-timeout",
        dest="request_timeout_s",
        type=float,
        default=600.0,
        help="seconds after which a request that is not complete fails",
    )
    add("--ep-num-redundant-experts", type=int, help="extra expert copies; as many as experts if not given")
    add(
        "--enable-eplb",
        action="store_true",
        help="rebalance experts by load; keeps a slot of each rank spare",
    )
    add(
        "--eplb-rebalance-num-iterations",
        type=int,
        default=1000,
        help="steps between two rebalances, with --enable-eplb",
    )
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add(
        "--chat-template",
        help="a file with a chat template, or the template; the model folder's if not given",
    )
    add(
        "--chat-template-content-format",
        choices=CONTENT_FORMATS,
        default="auto",
        help="messages' content for the template: strings, lists of parts (openai), or as it wants them (auto)",
    )
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="let requests bring a chat template of their own",
    )
    add(
        "--relaunch-limit",
        type=int,
        default=10,
        help="early deaths in a row after which a rank waits 10 s and more for its next launch; 0: none returns",
    )
    add(
        "--hang-deadline",
        dest="hang_deadline_s",
        type=float,
        default=1.0,
        help="seconds until a hang is dealt with",
    )
    add(
        "--stop-deadline",
        dest="stop_deadline_s",
        type=float,
        default=30.0,
        help="seconds a graceful stop may take",
    )
    add(
        "--disable-fault-tolerance",
        dest="fault_tolerance",
        action="store_false",
        help="no death watch, no heartbeats, no hang detection, no event log: to measure what they cost",
    )
    add("--log-dir", default="runs", help="where each run's event log goes")
    add(
        "--event-log",
        choices=[mode.value for mode in EventLogMode],
        help="ids (if not given): all events without text and tokens; full: prompts and answers too; off: none",
    )
    add(
        "--event-log-max-mb",
        type=int,
        default=1024,
        help="what a run's event log may take on the disk; its oldest part is deleted. 0: no limit",
    )
    add("--log-level", choices=LOG_LEVELS, default="info", help="of the lines on stderr, of all processes")
    add("--log-format", choices=LOG_FORMATS, default="console", help="json: one object a line")
    add("--seed", type=int, default=0, help="of random weights, with --load-format dummy")
    return parser


def _add_cors(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--allowed-origins", type=json_names, default=("*",), help="whose web pages may call, as a JSON list")
    add("--allowed-methods", type=json_names, default=("*",), help="by which methods")
    add("--allowed-headers", type=json_names, default=("*",), help="with which headers")
    add("--allow-credentials", action="store_true", help="and with cookies")


def main(arguments: list[str] | None = None) -> int:
    logs.configure(LogConfig())
    try:
        config = parse(arguments)
        # Imported late: --help and wrong flags answer at once.
        from elastic_ep.serve import serve

        return serve(config)
    except ConfigError as error:
        structlog.get_logger().error(str(error))
        return USAGE_ERROR
    except Exception:
        structlog.get_logger().exception("the run process ends by an exception")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
