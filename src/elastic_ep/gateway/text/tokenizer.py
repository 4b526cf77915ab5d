"""Text to tokens and back, and the chat template, from a Hugging Face model folder.

Uses `tokenizers` and `jinja2` only: importing transformers would cost the run process seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elastic_ep.gateway.text.chat_template import (
    RESERVED,
    CannotContinue,
    ChatTemplate,
    ChatTemplateError,
    ChatTemplates,
    PromptTooLong,
)
from elastic_ep.gateway.text.content_form import ContentForm
from elastic_ep.gateway.text.detokenize import (
    ByteDetokenizer,
    Detokenizer,
    EdgedDetokenizer,
    WindowDetokenizer,
)
from elastic_ep.gateway.text.spelling import read_spelling, token_names
from elastic_ep.gateway.text.tokenizer_files import read_tokenizer

__all__ = ["CannotContinue", "ChatTemplateError", "ChatTokenizer", "PromptTooLong"]
_CONTEXT = 16
"""Tokens of a prompt that a decoder which looks at neighbours gets to see."""


class ChatTokenizer:
    """A tokenizer, its incremental decoder and its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        content_form: ContentForm | None = None,
    ) -> None:
        """`special_tokens` are the variables that templates know: bos_token, eos_token, pad_token, unk_token, ...

        `content_form` None: as each template wants it. Raises ValueError for a template that does not parse.
        """
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens or {})
        self._template = None if chat_template is None else ChatTemplates(chat_template, content_form)
        self._special_ids = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self._names = token_names(tokenizer)
        self._spelling = read_spelling(tokenizer, self._names)
        self._table: list[bytes] | None = None
        """Without special tokens, where the ends of a text are as its middle."""
        if self._spelling is not None and self._spelling.has_no_ends:
            rest = self._spelling.rest
            self._table = [b"" if i in self._special_ids else shown for i, shown in enumerate(rest)]
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        named = range(len(self._names)) if self._spelling is None else self._special_ids
        shown = [self._names[token].encode("utf-8", "replace") for token in named]
        self.max_token_bytes: int = max(
            1, *map(len, shown), *map(len, self._spelling.rest if self._spelling else ())
        )

    @classmethod
    def load(
        cls, folder: Path, chat_template: str | None = None, content_form: ContentForm | None = None
    ) -> ChatTokenizer:
        """From `tokenizer.json`; `tokenizer_config.json`, `chat_template.jinja` and others beside it are optional.

        `chat_template` is a template to use instead of the folder's. Raises ValueError with one clear line when a file
        is missing or broken.
        """
        files = read_tokenizer(folder)
        template = files.chat_template if chat_template is None else chat_template
        return cls(files.tokenizer, template, files.special_tokens, content_form)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, which must not hold lone surrogates. Special tokens in it are recognised."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`, without special tokens unless told otherwise: what a stream of them would show."""
        if self._spelling is None:
            return self._decode_at_once(list(tokens), skip_special_tokens=skip_special_tokens)
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.finish()

    def detokenizer(self, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one stream of tokens; what joins up is what `decode` gives.

        The stream goes on from the tokens of `context`: a blank before its first word stays, if they have any text.
        """
        if self._spelling is None:
            decode = partial(self._decode_at_once, skip_special_tokens=skip_special_tokens)
            return WindowDetokenizer(decode, context[-_CONTEXT:])
        if self._table is not None:
            return ByteDetokenizer(self._table if skip_special_tokens else self._spelling.rest)
        return EdgedDetokenizer(self._spelling, self._special_ids if skip_special_tokens else (), context)

    def token_id(self, token: str) -> int | None:
        """Of a token by its name."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def token_name(self, token: int) -> str:
        """As the vocabulary has it; empty for an id without a token."""
        return self._names[token] if 0 <= token < len(self._names) else ""

    def tokens_from(self, first: int) -> list[int]:
        """Ids with a token, from `first` on."""
        return [token for token in range(first, len(self._names)) if self._names[token]]

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token in mid-text, special tokens by their name; empty for an id without text."""
        if self._spelling is None or token in self._special_ids:
            return self.token_name(token).encode("utf-8", "replace")
        rest = self._spelling.rest
        return rest[token] if 0 <= token < len(rest) else b""

    @property
    def spells_tokens(self) -> bool:
        """Whether `token_bytes` tells what a token adds to a text."""
        return self._spelling is not None

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Of special tokens by their name in the vocabulary."""
        return {self.token_name(token): token for token in sorted(self._special_ids)}

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """By name: bos_token, eos_token, ..."""
        return self._special_tokens

    @property
    def content_forms(self) -> Mapping[str, ContentForm]:
        """In which form each chat template gets the content of messages."""
        return {} if self._template is None else self._template.content_forms

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_characters: int | None = None,
    ) -> str:
        """The prompt for a conversation, as `apply_chat_template` of transformers makes it.

        `chat_template` is a template, or the name of one of the model's; `variables` go before special tokens of the
        same name. Raises `ChatTemplateError`.
        """
        given = variables or {}
        if taken := RESERVED & given.keys():
            raise ChatTemplateError(
                f"The chat template gets {', '.join(sorted(taken))} from the request itself."
            )
        return self._choose(chat_template, with_tools=tools is not None).render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._special_tokens, **given},
            max_characters=max_characters,
        )

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Sources by name."""
        return {} if self._template is None else self._template.sources

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def template_uses(
        self, variable: str, chat_template: str | None = None, *, with_tools: bool = False
    ) -> bool:
        """Whether the template that `render_chat` would choose looks at `variable`. Raises `ChatTemplateError`."""
        return self._choose(chat_template, with_tools=with_tools).uses(variable)

    def template_mentions(self, word: str, chat_template: str | None = None) -> bool:
        """Whether a template that `render_chat` could choose has `word`. Raises `ChatTemplateError`."""
        return any(self._choose(chat_template, with_tools=some).mentions(word) for some in (False, True))

    def _choose(self, wanted: str | None, *, with_tools: bool = False) -> ChatTemplate:
        if self._template is None and wanted is None:
            raise ChatTemplateError("This model has no chat template. Use /v1/completions instead.")
        return (self._template or ChatTemplates({})).choose(wanted, with_tools=with_tools)

    def _decode_at_once(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text
