"""How a command line is read: mistakes are one line, and flags of vLLM and SGLang are known."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import MISSING, fields
from typing import Any, NoReturn

import structlog

from elastic_ep.config import ConfigError, Flag, ServeConfig, flag_name
from elastic_ep.foreign_flags import FOREIGN, take_out


def read(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What the arguments say. Raises `ConfigError`; with --help, SystemExit."""
    own = own_flags(parser)
    given, lines = take_out(arguments, own)
    options, unknown = parser.parse_known_args(given)
    if unknown:
        raise ConfigError(_unknown(unknown[0], own))
    for line in lines:
        structlog.get_logger().info(line)
    return options


def own_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    return frozenset(name for action in parser._actions for name in action.option_strings)


def _unknown(argument: str, own: frozenset[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no flag: see --help"
    name = argument.partition("=")[0]
    known = {flag.lstrip("-"): flag for flag in (*FOREIGN, *own)}
    near = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=0.7)
    return f"there is no flag {name}: " + (f"is {known[near[0]]} meant?" if near else "see --help")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other setting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def add_flags(parser: argparse.ArgumentParser, settings: type[ServeConfig]) -> None:
    """One for each field, as its metadata say."""
    for setting in fields(settings):
        flag: Flag = setting.metadata["flag"]
        kind = str(setting.type).removesuffix(" | None")
        how: dict[str, Any] = {"default": None if setting.default is MISSING else setting.default}
        if flag.two:
            how["action"] = argparse.BooleanOptionalAction
        elif kind == "bool":
            how["action"] = "store_false" if setting.default else "store_true"
        elif flag.repeated:
            how |= {"action": "append", "default": []}
        elif kind.startswith("tuple"):
            how["type"] = json_names
        else:
            how |= {"type": {"int": int, "float": float}.get(kind, str), "choices": flag.choices or None}
        names = filter(None, (flag_name(setting), flag.other_name))
        parser.add_argument(*names, dest=setting.name, help=flag.help, **how)


class Help(argparse.HelpFormatter):
    """Shows the default of every flag that takes a value and has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        if action.nargs == 0 or action.default in (None, []) or action.default is argparse.SUPPRESS:
            return said
        default = json.dumps(action.default) if isinstance(action.default, tuple) else str(action.default)
        return f"{said} (default: {default.replace('%', '%%')})".lstrip()


def json_names(given: str) -> tuple[str, ...]:
    """A JSON list of strings, which is how vLLM takes several."""
    try:
        names = json.loads(given)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise argparse.ArgumentTypeError(f"{given!r} is not a JSON list of strings, as '[\"*\"]'")
    return tuple(names)
