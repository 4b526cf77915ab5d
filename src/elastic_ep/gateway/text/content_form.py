"""In which form a chat template wants the content of messages: as a string, as a list of parts, or either.

A template that walks over the parts of a string shows nothing of it, and one that joins strings fails at a list.
So this follows, through the syntax tree of a template, which expressions hold a message's content.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

from jinja2 import nodes

_PART_FILTERS = frozenset({"map", "selectattr", "rejectattr", "groupby"})
"""These look at attributes of what they are given; a string's characters have none of use."""
_SAME_ITEMS = frozenset(
    {"list", "reverse", "sort", "unique", "select", "reject", "trim", "default", "d", "safe"}
)
"""Filters after which content is still content, and messages messages."""


class ContentForm(enum.Enum):
    """`--chat-template-content-format`; EITHER, as the client wrote it, can only be detected."""

    STRING = "string"
    PARTS = "openai"
    EITHER = "either"

    def shape(self, content: Any) -> Any:
        """`content`, a string or a list of parts, in this form; parts that are not text stay as they are."""
        if self is ContentForm.PARTS and isinstance(content, str):
            return [{"type": "text", "text": content}]
        if isinstance(content, (list, tuple)):
            if self is ContentForm.STRING and all(_is_text(part) for part in content):
                return "\n".join(part["text"] for part in content)
            return list(content)
        return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def wanted_form(template: nodes.Template) -> ContentForm:
    walk = _Walk(template)
    if not walk.takes_parts():
        return ContentForm.STRING
    return ContentForm.EITHER if walk.asks_for_string() else ContentForm.PARTS


class _Walk:
    """Names that hold messages, one message, or content, anywhere in a template: one set for all scopes.

    Scopes do not matter here: a name that holds content in one place and something else in another is rare, and then
    the template mostly asks what it has got.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._messages = {"messages"}
        self._message: set[str] = set()
        self._content: set[str] = set()
        while self._spread():
            pass

    def takes_parts(self) -> bool:
        """Does it walk over content, or look into a part of it?"""
        loops = (loop.iter for loop in self._tree.find_all(nodes.For))
        filters = (one.node for one in self._tree.find_all(nodes.Filter) if one.name in _PART_FILTERS)
        parts: Iterator[nodes.Node] = self._tree.find_all((nodes.Getattr, nodes.Getitem))
        owners = (_owner(part) for part in parts if _key(part) in ("text", "type"))
        inner = (part.node for part in owners if isinstance(part, nodes.Getitem) and _is_index(part))
        return any(self._is_content(one) for found in (loops, filters, inner) for one in found)

    def asks_for_string(self) -> bool:
        """Does it handle strings by themselves?"""
        tests = self._tree.find_all(nodes.Test)
        return any(test.name == "string" and self._is_content(test.node) for test in tests)

    def _spread(self) -> bool:
        """Follow assignments, loops and calls of macros once; was anything learnt?"""
        before = (len(self._messages), len(self._message), len(self._content))
        for target, value in self._bindings():
            if self._is_messages(value):
                self._messages.add(target)
            if self._is_message(value):
                self._message.add(target)
            if self._is_content(value):
                self._content.add(target)
        for loop in self._tree.find_all(nodes.For):
            if isinstance(loop.target, nodes.Name) and self._is_messages(loop.iter):
                self._message.add(loop.target.name)
        return before != (len(self._messages), len(self._message), len(self._content))

    def _bindings(self) -> Iterator[tuple[str, nodes.Expr]]:
        """(name, expression that it may hold)"""
        for one in self._tree.find_all(nodes.Assign):
            yield from _pairs(one.target, one.node)
        for block in self._tree.find_all(nodes.With):
            for target, value in zip(block.targets, block.values, strict=True):
                yield from _pairs(target, value)
        macros = {macro.name: macro for macro in self._tree.find_all(nodes.Macro)}
        for call in self._tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == "namespace":
                for keyword in call.kwargs:
                    yield f".{keyword.key}", keyword.value
            elif isinstance(call.node, nodes.Name) and call.node.name in macros:
                names = [argument.name for argument in macros[call.node.name].args]
                yield from zip(names, call.args, strict=False)
                for keyword in call.kwargs:
                    yield keyword.key, keyword.value

    def _is_messages(self, value: nodes.Node | None) -> bool:
        return any(_name(one) in self._messages for one in _sources(value, slices=True))

    def _is_message(self, value: nodes.Node | None) -> bool:
        return any(
            _name(one) in self._message
            or (isinstance(one, nodes.Getitem) and _is_index(one) and self._is_messages(one.node))
            or (isinstance(one, nodes.Getattr) and one.attr in ("previtem", "nextitem"))
            or (
                isinstance(one, nodes.Filter)
                and one.name in ("first", "last")
                and self._is_messages(one.node)
            )
            for one in _sources(value)
        )

    def _is_content(self, value: nodes.Node | None) -> bool:
        return any(
            _name(one) in self._content or (_key(one) == "content" and self._is_message(_owner(one)))
            for one in _sources(value, slices=True)
        )


def _pairs(target: nodes.Node, value: nodes.Node) -> Iterator[tuple[str, nodes.Expr]]:
    """The names that an assignment binds, with what each gets; attributes of namespaces by their own name."""
    if isinstance(target, nodes.Tuple) and isinstance(value, nodes.Tuple):
        for one, part in zip(target.items, value.items, strict=False):
            yield from _pairs(one, part)
    elif isinstance(value, nodes.Expr):
        if isinstance(target, nodes.Name):
            yield target.name, value
        elif isinstance(target, nodes.NSRef):
            yield f".{target.attr}", value


def _sources(value: nodes.Node | None, *, slices: bool = False) -> Iterator[nodes.Node]:
    """What an expression's value may be, seen through filters, conditions and alternatives."""
    if value is None:
        return
    if isinstance(value, nodes.Filter) and value.name in _SAME_ITEMS:
        yield from _sources(value.node, slices=slices)
    elif isinstance(value, nodes.CondExpr):
        yield from _sources(value.expr1, slices=slices)
        yield from _sources(value.expr2, slices=slices)
    elif isinstance(value, (nodes.Or, nodes.And)):
        yield from _sources(value.left, slices=slices)
        yield from _sources(value.right, slices=slices)
    elif slices and isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice):
        yield from _sources(value.node, slices=slices)
    else:
        yield value


def _name(value: nodes.Node) -> str | None:
    """Of a variable, or of a namespace's attribute with a dot before it."""
    if isinstance(value, nodes.Name):
        return value.name
    return f".{value.attr}" if isinstance(value, nodes.Getattr) else None


def _key(value: nodes.Node) -> str | None:
    """ "x" in `one.x`, `one['x']` and `one.get('x')`."""
    if isinstance(value, nodes.Getattr):
        return value.attr
    if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Const):
        return value.arg.value if isinstance(value.arg.value, str) else None
    if _is_get(value) and isinstance(value, nodes.Call) and isinstance(value.args[0], nodes.Const):
        return value.args[0].value if isinstance(value.args[0].value, str) else None
    return None


def _owner(value: nodes.Node) -> nodes.Node | None:
    """`one` in the same."""
    if isinstance(value, nodes.Call):
        return value.node.node if isinstance(value.node, nodes.Getattr) else None
    return value.node if isinstance(value, (nodes.Getattr, nodes.Getitem)) else None


def _is_get(value: nodes.Node) -> bool:
    return (
        isinstance(value, nodes.Call)
        and isinstance(value.node, nodes.Getattr)
        and value.node.attr == "get"
        and bool(value.args)
    )


def _is_index(value: nodes.Getitem) -> bool:
    """`one[0]`, `one[-1]`, `one[loop.index0 - 1]`: anything but a slice or a name."""
    return not isinstance(value.arg, nodes.Slice) and _key(value) is None
