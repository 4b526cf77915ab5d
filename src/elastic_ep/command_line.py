"""How a command line is read: mistakes are one line, and flags of vLLM and SGLang are known."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import structlog
import yaml

from elastic_ep.config import ConfigError, Flag, ServeConfig, flag_name, why
from elastic_ep.foreign_flags import FOREIGN, take_out


def read(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What the arguments say. Raises `ConfigError`; with --help, SystemExit."""
    own = own_flags(parser)
    given, lines = take_out(arguments, own)
    options, unknown = parser.parse_known_args(given)
    if not unknown and options.config is not None:
        filed, more = take_out(_from_file(parser, Path(options.config)), own)
        under, unknown = parser.parse_known_args(filed)
        if options.model_folder is not None:
            under.model = None
        for name, several in vars(options).items():
            if isinstance(several, list) and several:
                setattr(under, name, [])
        options, _ = parser.parse_known_args(given, under)
        lines += more
    if unknown:
        raise ConfigError(_unknown(unknown[0], own))
    del options.config
    for line in lines:
        structlog.get_logger().info(line)
    return options


def _from_file(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """A YAML file's members as arguments, as vLLM reads one. Raises `ConfigError`."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {why(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"--config {file}: it must hold names of flags with their values")
    own = own_flags(parser)
    switches = {name for action in parser._actions if action.nargs == 0 for name in action.option_strings}
    many = {name for action in parser._actions if action.nargs == "+" for name in action.option_strings}
    each = {
        name
        for action in parser._actions
        if isinstance(action.default, list)
        for name in action.option_strings
    }
    arguments: list[str] = []
    for name, value in content.items():
        flag = "--" + name.lstrip("-").replace("_", "-")
        if flag in ("--config", "--help"):
            raise ConfigError(f"--config {file}: {flag} is for the command line")
        match value:
            case None if flag in own:
                pass
            case False if flag in switches:
                off = f"--no-{flag[2:]}"
                arguments += [off] if off in own else []
            case False if flag in own:
                raise ConfigError(f"--config {file}: {flag} takes a value, and false is none")
            case None | False:
                arguments += [] if flag in FOREIGN else [flag]
            case True:
                arguments.append(flag)
            case list() if flag in many:
                arguments += [flag, *map(str, value)]
            case list() if flag in each:
                arguments += [f"{flag}={one}" for one in value]
            case list() | dict():
                arguments.append(f"{flag}={json.dumps(value)}")
            case _:
                arguments.append(f"{flag}={value}")
    return arguments


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
        elif flag.several:
            how |= {"nargs": "+", "metavar": "NAME", "default": None}
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
