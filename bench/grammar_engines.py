"""llguidance beside xgrammar: how long grammars take to compile, and masks to compute. One thread.

    python -m bench.grammar_engines [--vocabulary 151643] [--out bench/results/grammar_engines.json]

With the bundled tokenizer, and with one of `--vocabulary` tokens, learnt from the Python sources of this installation.
xgrammar is measured if it is installed. Each text is followed to its end, masks before tokens.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher
from tests.kit.served import percentile, write_result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.kit.command_line import command_line
from elastic_ep.gateway.guided import vocabulary
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.guided import grammars
from elastic_ep.guided.grammars import LIMITS
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.run import BUNDLED_MODEL

_LEARNT_FROM = 60 << 20
_ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
        "address": _ADDRESS,
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
_FIELDS = [f"field_{number}" for number in range(60)]
_WIDE = {
    "type": "object",
    "properties": {name: {"type": ["string", "null"]} for name in _FIELDS},
    "required": _FIELDS,
    "additionalProperties": False,
}
_ANNA = {
    "name": "Anna von Something Ünicode",
    "age": 42,
    "tags": ["a", "b", "c"],
    "address": {"street": "Long street name 12, second floor", "zip": "12345"},
}
_CASES: dict[str, tuple[Any, str]] = {
    "schema": (_PERSON, json.dumps(_ANNA, ensure_ascii=False)),
    "wide schema": (_WIDE, json.dumps({name: f"value {name}" for name in _FIELDS})),
    "pattern": (
        r"[A-Z][a-z]{2,20} [0-9]{4}-[0-9]{2}-[0-9]{2}( [a-z]+)*",
        "Hello 2026-11-28 some more words at the end of it",
    ),
}


Ready = tuple[Callable[[], object], Callable[[int], bool]]
"""A compiled grammar at the beginning of a text: what computes the next mask, and what takes a token."""
Compiler = Callable[[Any], Ready]


def llguidance(text: Vocabulary) -> Compiler:
    tokenizer = text.tokenizer()
    words = np.zeros(text.mask_words, np.uint32)

    def compiled(asked: Any) -> Ready:
        grammar = grammars.json_schema(asked) if isinstance(asked, dict) else grammars.regex(asked)
        matcher = LLMatcher(tokenizer, grammars.to_lark(grammar), log_level=0, limits=LIMITS)
        assert not matcher.is_error(), matcher.get_error()
        address, size = words.ctypes.data, words.nbytes
        return lambda: matcher.unsafe_compute_mask_ptr(address, size), matcher.consume_token

    return compiled


def xgrammar(names: list[str], end: int) -> Compiler:
    """Raises ImportError."""
    library: Any = importlib.import_module("xgrammar")
    kind = library.VocabType.BYTE_LEVEL
    info = library.TokenizerInfo(names, vocab_type=kind, vocab_size=len(names), stop_token_ids=[end])
    words = library.allocate_token_bitmask(1, len(names))

    def compiled(asked: Any) -> Ready:
        compiler = library.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        if isinstance(asked, dict):
            grammar = compiler.compile_json_schema(json.dumps(asked))
        else:
            grammar = compiler.compile_regex(asked)
        matcher = library.GrammarMatcher(grammar)
        return lambda: matcher.fill_next_token_bitmask(words, 0), matcher.accept_token

    return compiled


def measure(compiler: Compiler, text: ChatTokenizer) -> dict[str, Any]:
    """Twice: the first time is not counted."""
    seen: dict[str, Any] = {}
    for _ in range(2):
        for name, (asked, said) in _CASES.items():
            tokens = text.encode(said, add_special_tokens=False)
            began = time.perf_counter()
            mask, take = compiler(asked)
            compile_s = time.perf_counter() - began
            masks, takes = [], []
            for token in tokens:
                began = time.perf_counter()
                mask()
                masked = time.perf_counter()
                assert take(token), (name, token)
                masks.append(masked - began)
                takes.append(time.perf_counter() - masked)
            seen[name] = {
                "tokens": len(tokens),
                "compile_ms": round(1e3 * compile_s, 2),
                "mask_us": {share: round(1e6 * percentile(masks, share), 1) for share in (0.5, 0.99)},
                "token_us": round(1e6 * percentile(takes, 0.5), 1),
            }
    return seen


def learnt(size: int) -> ChatTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sources(), trainer)
    return ChatTokenizer(tokenizer)


def _sources() -> Iterator[str]:
    left = _LEARNT_FROM
    for folder in ("purelib", "stdlib"):
        for file in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            if 0 < file.stat().st_size < 300_000 and left > 0:
                left -= file.stat().st_size
                yield file.read_text(encoding="utf-8", errors="replace")


def both(text: ChatTokenizer) -> dict[str, Any]:
    size = text.vocab_size
    known = vocabulary(ApiSettings("", 64, size, "", model_eos_token_ids=(0,)), text)
    assert isinstance(known, Vocabulary)
    began = time.perf_counter()
    known.tokenizer()
    result: dict[str, Any] = {"tokens": size, "tokenizer_s": round(time.perf_counter() - began, 3)}
    result["llguidance"] = measure(llguidance(known), text)
    try:
        names = [text.token_name(token) for token in range(size)]
        result["xgrammar"] = measure(xgrammar(names, 0), text)
    except ImportError:
        result["xgrammar"] = "not installed"
    return result


def main() -> None:
    parser = command_line(__doc__, "grammar_engines")
    parser.add_argument("--vocabulary", type=int, default=151643, help="(default: %(default)s)")
    options = parser.parse_args()
    result = {"bundled": both(ChatTokenizer.load(BUNDLED_MODEL)), "large": both(learnt(options.vocabulary))}
    print(json.dumps(result, indent=1))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
