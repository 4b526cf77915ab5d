"""Text to tokens and back, and the chat template, from a Hugging Face model folder.

Uses `tokenizers` and `jinja2` only: importing transformers would cost the run process seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from elastic_ep.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer, byte_level_alphabet


class ChatTemplateError(ValueError):
    """The messages could not be turned into a prompt; the text says why."""


class Text:
    """A tokenizer, its incremental decoder and its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens` are the variables that templates know: bos_token, eos_token, pad_token, unk_token.

        Raises ValueError for a template that does not parse.
        """
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens or {})
        self._template = None if chat_template is None else _compile(chat_template)
        self._special_ids = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self._shown = _token_bytes(tokenizer)
        self._table: list[bytes] | None = None
        if _is_byte_level(tokenizer):
            self._table = [b"" if i in self._special_ids else shown for i, shown in enumerate(self._shown)]
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_token_bytes: int = max((len(shown) for shown in self._shown), default=1)

    @classmethod
    def load(cls, folder: Path) -> Text:
        """From `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; the latter two are optional.

        Raises ValueError with one clear line when a file is missing or broken.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: the model folder needs a tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        # The tokenizers library raises bare Exception.
        except Exception as error:
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_config(folder / "tokenizer_config.json")
        return cls(tokenizer, _find_template(folder, config), _special_tokens(config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, which must not hold lone surrogates. Special tokens in it are recognised."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`, without special tokens unless told otherwise."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one stream of tokens; what joins up is what `decode` gives."""
        if self._table is not None:
            return ByteDetokenizer(self._table if skip_special_tokens else self._shown)
        return WindowDetokenizer(partial(self.decode, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token alone, special tokens by their name; empty for an id without text."""
        return self._shown[token] if 0 <= token < len(self._shown) else b""

    def token_text(self, token: int) -> str:
        """One token alone, as text; part of a character shows as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation. Raises `ChatTemplateError`."""
        if self._template is None:
            raise ChatTemplateError("This model has no chat template. Use /v1/completions instead.")
        context = {
            **(variables or {}),
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        # A template is a program; whatever the messages make it raise, the request is at fault, not we.
        except Exception as error:
            raise ChatTemplateError(f"The chat template rejects these messages: {error}") from error


def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template does not parse: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    return decoder.get("type") == "ByteLevel"


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id, alone. Ids without a token have none."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    alphabet = byte_level_alphabet() if _is_byte_level(tokenizer) else {}
    for token, index in vocabulary.items():
        # Added tokens are written as they are; the decoder takes those with a foreign character literally.
        if alphabet and all(character in alphabet for character in token):
            table[index] = bytes([alphabet[character] for character in token])
        else:
            table[index] = token.encode("utf-8", "replace")
    return table


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return config


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
