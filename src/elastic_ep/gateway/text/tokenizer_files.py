"""A tokenizer with all that the files beside `tokenizer.json` say of it, read as transformers' fast tokenizer does.

Those files can add tokens, and say which are special and which template is for what; text and ids would differ
from what the model was trained with if only `tokenizer.json` were read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from elastic_ep.gateway.text.chat_template import DEFAULT

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = "extra_special_tokens"
_OLD_EXTRA = "additional_special_tokens"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATES_FOLDER = "additional_chat_templates"
_ADDED_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """`special_tokens` by the names that templates know them by (bos_token, eos_token, ...).

    `chat_template` is one source, several by name, or None.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | dict[str, str] | None


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Raises ValueError with one line when a file is missing or broken, OSError when one cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the tokenizer is read from there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The tokenizers library raises bare Exception.
    except Exception as error:
        raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
    config = _read_object(folder / "tokenizer_config.json")
    added = config.get("added_tokens_decoder")
    if not config.get(_EXTRA) and _OLD_EXTRA in config:
        config[_EXTRA] = config.pop(_OLD_EXTRA)
    if added is None:
        config = _merged(config, _read_object(folder / "special_tokens_map.json"))
    named, extra = _special_tokens(config)
    padding = tokenizer.padding
    if padding is not None and "pad_token" not in config:
        named["pad_token"] = padding["pad_token"]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    if added is None:
        old = [*(named[name] for name in _NAMED if name in named), *_tokens(config.get(_EXTRA))]
        special = {_content(token) for token in old}
        listed = {**_old_added_tokens(folder, special), **tokenizer.get_added_tokens_decoder()}
    else:
        listed = _added_tokens(added, folder / "tokenizer_config.json")
    _add_tokens(tokenizer, [listed[index] for index in sorted(listed)], named, extra)
    by_name = {name: _content(token) for name, token in named.items()}
    return TokenizerFiles(tokenizer, by_name, _chat_template(folder, config))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return plain


def _merged(config: dict[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """`special_tokens_map.json`, of before `added_tokens_decoder`, goes before what the configuration says."""
    merged = {**config, **special_map}
    mine, more = config.get(_EXTRA), special_map.get(_EXTRA)
    if isinstance(mine, list) and isinstance(more, list):
        merged[_EXTRA] = [*mine, *more]
    return merged


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, str | AddedToken], list[str | AddedToken]]:
    """Those with a name, the model's own ones last, and those without."""
    extra = config.get(_EXTRA)
    own = [name for name in config if name.endswith("_token") and name not in _NAMED]
    entries = {name: config.get(name) for name in (*_NAMED, *own)}
    if isinstance(extra, dict):
        entries, extra = {**entries, **extra}, None
    if extra is None:
        extra = config.get(_OLD_EXTRA)
    named = {name: token for name, entry in entries.items() if (token := _token(entry)) is not None}
    return named, _tokens(extra)


def _tokens(entries: Any) -> list[str | AddedToken]:
    listed = entries if isinstance(entries, list) else []
    return [token for entry in listed if (token := _token(entry)) is not None]


def _token(entry: Any) -> str | AddedToken | None:
    """A token written as a string or an object; None for anything else."""
    if isinstance(entry, dict) and isinstance(entry.get("content"), str):
        return AddedToken(**{name: entry[name] for name in _ADDED_TOKEN if name in entry})
    return entry if isinstance(entry, str) else None


def _content(token: str | AddedToken) -> str:
    content: str = token if isinstance(token, str) else token.content
    return content


def _added_tokens(added: Any, path: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder`, by id."""
    if not isinstance(added, dict) or not all(index.isdecimal() for index in added):
        raise ValueError(f"{path}: added_tokens_decoder must be an object with token ids for names")
    tokens = {int(index): _token(entry) for index, entry in added.items()}
    if not all(isinstance(token, AddedToken) for token in tokens.values()):
        raise ValueError(f"{path}: added_tokens_decoder must hold objects with a content")
    return {index: token for index, token in tokens.items() if isinstance(token, AddedToken)}


def _old_added_tokens(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    """`added_tokens.json`, of before `added_tokens_decoder`, by id."""
    path = folder / "added_tokens.json"
    plain = _read_object(path)
    if not all(type(index) is int for index in plain.values()):
        raise ValueError(f"{path} must give each token an id")
    return {
        index: AddedToken(token, normalized=token not in special, special=token in special)
        for token, index in plain.items()
    }


def _add_tokens(
    tokenizer: Tokenizer,
    listed: list[AddedToken],
    named: Mapping[str, str | AddedToken],
    extra: list[str | AddedToken],
) -> None:
    """Those that are listed get their flags also if the tokenizer has them; the others are added if it has them not.

    A token keeps the id that the tokenizer has for it, and a new one gets the next. What is special stays special.
    """
    present = [*tokenizer.get_added_tokens_decoder().values(), *listed]
    special = {token.content for token in present if token.special} | {
        _content(one) for one in named.values()
    }
    known = {token.content for token in present}
    new: list[str | AddedToken] = []
    for token in [*named.values(), *extra]:
        if _content(token) not in known and token not in new:
            new.append(token)
    wanted = [*listed, *(AddedToken(one, special=True) if isinstance(one, str) else one for one in new)]
    for token in wanted:
        token.special = token.special or token.content in special
    tokenizer.add_tokens(wanted)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Templates in files of their own hide those in `tokenizer_config.json`."""
    found: dict[str, str] = {}
    if (folder / _TEMPLATE_FILE).is_file():
        found[DEFAULT] = _read_template(folder / _TEMPLATE_FILE)
    for path in sorted((folder / _TEMPLATES_FOLDER).glob("*.jinja")):
        found[path.name.removesuffix(".jinja")] = _read_template(path)
    if found:
        return found[DEFAULT] if found.keys() == {DEFAULT} else found
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        return {str(name): source for name, source in template.items() if isinstance(source, str)}
    return template if isinstance(template, str) else None


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
