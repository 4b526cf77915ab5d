"""Chat templates: Jinja programs that turn a conversation into the text of a prompt.

What they may use and how they are rendered is what `apply_chat_template` of Hugging Face's transformers does, which is
what their authors tried them with; the tests hold the two side by side. Importing transformers would cost seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from elastic_ep.gateway.text.content_form import ContentForm, wanted_form
from elastic_ep.gateway.text.loop_budget import FILTER, VARIABLE, LoopBudget, bound_loops, count

Message = Mapping[str, Any]

DEFAULT = "default"
TOOL_USE = "tool_use"
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of every template: not to be given otherwise."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names for a message's reasoning; the first that is there counts."""
_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put behind the final message to find its end in the prompt. The blank tells whether the template trims. It is the
same as in transformers, as templates may look at a message's length or letters."""
_LONGEST_REASON = 1000
_COMPILED_SOURCES = 8
"""Templates out of requests that stay compiled."""


class ChatTemplateError(ValueError):
    """The messages could not be turned into a prompt; the text says why."""


class CannotContinue(ChatTemplateError):
    """The last message cannot be gone on with."""


class PromptTooLong(ChatTemplateError):
    """A template makes more of this than was allowed; rendering ended after `characters`."""

    def __init__(self, characters: int) -> None:
        super().__init__(f"The chat template makes more than {characters} characters of this.")
        self.characters = characters


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, content_form: ContentForm | None = None) -> None:
        """`content_form` None: as the template wants it. Raises ValueError for a source that does not parse."""
        try:
            self.content_form = content_form or wanted_form(_environment().parse(source))
            self._template = _environment().from_string(bound_loops(_environment().parse(source)))
            # What Jinja has there is a `ChainMap`, and it copies that for every prompt.
            self._template.globals = dict(self._template.globals)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"does not parse: {error.message} (line {error.lineno})") from error
        # Jinja compiles to Python: what only Python's compiler refuses, or is nested too deeply, ends here.
        except (SyntaxError, RecursionError, jinja2.TemplateError) as error:
            raise ValueError(f"does not parse: {_reason(error)}") from error
        self.source = source
        self._variables: set[str] | None = None
        """That it looks at, once somebody has asked."""

    def uses(self, variable: str) -> bool:
        """Does it look at `variable` of those that it is given?"""
        if self._variables is None:
            self._variables = jinja2.meta.find_undeclared_variables(_environment().parse(self.source))
        return variable in self._variables

    def mentions(self, word: str) -> bool:
        return word in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
        max_characters: int | None,
    ) -> str:
        """The prompt. `max_characters` bounds its length, as far as a template that writes piece by piece can be.

        Raises `ChatTemplateError`.
        """
        if continue_final_message and add_generation_prompt:
            raise CannotContinue(
                "'continue_final_message' and 'add_generation_prompt' exclude each other: the first goes on with the "
                "last message, the second begins a new one."
            )
        chat = [_plain_message(message, self.content_form) for message in messages]
        continued = self._mark_end(chat) if continue_final_message else None
        context = {
            **variables,
            "messages": chat,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
            VARIABLE: LoopBudget(),
        }
        try:
            prompt = _join(self._template.generate(context), max_characters)
        except ChatTemplateError:
            raise
        # A template is a program; whatever the messages make it raise, the request is at fault, not we.
        except Exception as error:
            raise ChatTemplateError(f"The chat template rejects these messages: {_reason(error)}") from error
        return prompt if continued is None else _cut_at_mark(prompt, continued)

    def _mark_end(self, chat: list[dict[str, Any]]) -> str:
        """Mark the end of the final message's text in `chat`, and return that text. Raises `ChatTemplateError`."""
        if not chat:
            raise CannotContinue("'continue_final_message' needs a message to go on with.")
        content = chat[-1].get("content")
        if content is None:
            raise CannotContinue("'continue_final_message': the last message has no content to go on with.")
        if "content" not in self.source:
            raise CannotContinue("'continue_final_message': this chat template shows no content of messages.")
        if not isinstance(content, (list, tuple)):
            chat[-1]["content"] = content + _END_MARK
            return str(content)
        for place in reversed(range(len(content))):
            if "text" in content[place]:
                text = str(content[place]["text"])
                marked = {**content[place], "text": text + _END_MARK}
                chat[-1]["content"] = [*content[:place], marked, *content[place + 1 :]]
                return text
        raise CannotContinue("'continue_final_message': the last message has no text to go on with.")


class ChatTemplates:
    """A model's templates, by name."""

    def __init__(self, sources: str | Mapping[str, str], content_form: ContentForm | None = None) -> None:
        """One source, or several by name. Raises ValueError with one line when one does not parse."""
        named = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        self._content_form = content_form
        self._single = isinstance(sources, str)
        self._by_name: dict[str, ChatTemplate] = {}
        for name, source in named.items():
            try:
                self._by_name[name] = ChatTemplate(source, content_form)
            except ValueError as error:
                which = "the chat template" if name == DEFAULT else f"the chat template {name!r}"
                raise ValueError(f"{which} {error}") from error
        self._compile: Callable[[str], ChatTemplate] = lru_cache(_COMPILED_SOURCES)(self._compile_source)

    @property
    def sources(self) -> dict[str, str]:
        """By name of template."""
        return {name: template.source for name, template in self._by_name.items()}

    @property
    def content_forms(self) -> dict[str, ContentForm]:
        """By name of template."""
        return {name: template.content_form for name, template in self._by_name.items()}

    def choose(self, wanted: str | None = None, *, with_tools: bool = False) -> ChatTemplate:
        """`wanted` is a template's name or a whole template; else the one for tools, or the default.

        Raises `ChatTemplateError`.
        """
        if wanted is not None:
            named = None if self._single else self._by_name.get(wanted)
            return named or self._compile(wanted)
        if with_tools and not self._single and TOOL_USE in self._by_name:
            return self._by_name[TOOL_USE]
        if DEFAULT not in self._by_name:
            names = ", ".join(sorted(self._by_name))
            raise ChatTemplateError(f"This model has no default chat template: name one of {names}.")
        return self._by_name[DEFAULT]

    def _compile_source(self, source: str) -> ChatTemplate:
        try:
            return ChatTemplate(source, self._content_form)
        except ValueError as error:
            raise ChatTemplateError(f"The chat template of the request {error}") from error


def _plain_message(message: Message, form: ContentForm) -> dict[str, Any]:
    """A copy without nulls, the reasoning under each name that templates read, content in the form they want."""
    plain = {name: value for name, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    if "content" in plain:
        plain["content"] = form.shape(plain["content"])
    return plain


def _join(pieces: Any, max_characters: int | None) -> str:
    taken = []
    length = 0
    for piece in pieces:
        taken.append(piece)
        length += len(piece)
        if max_characters is not None and length > max_characters:
            raise PromptTooLong(length)
    return "".join(taken)


def _cut_at_mark(prompt: str, continued: str) -> str:
    mark = _END_MARK.rstrip()
    if continued.strip() not in prompt or mark not in prompt:
        raise CannotContinue(
            "'continue_final_message': the chat template does not show the last message as it is, so it cannot be "
            "gone on with."
        )
    end = prompt.rindex(mark)
    # A template that trims messages has trimmed this one, too, had it not been for the mark.
    before = prompt[:end] if prompt.startswith(_END_MARK, end) else prompt[:end].rstrip()
    # Some templates show a message more than once.
    return before.replace(_END_MARK, "").replace(mark, "")


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}..."


@lru_cache(1)
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters.update({"tojson": _to_json, FILTER: count})
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what the model is trained on. It is shown as it is, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  # as in the base class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in templates; the class itself has more to offer than they should reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates: names that begin with an underscore are refused, as the sandbox does elsewhere."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute "self"
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have an attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
