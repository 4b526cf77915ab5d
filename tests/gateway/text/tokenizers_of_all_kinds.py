"""Tiny tokenizers, one of each way that decoders have to spell tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_CORPUS = [
    "the cat and the dog sat on the mat, and the cat ate 12 fish",
    "wörter äöü 你好 你们 🙂🙂 don't.",
] * 3
SPECIAL = ("<unk>", "<s>", "</s>")


def _bpe(decoder: decoders.Decoder | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _with_added(tokenizer)


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<é ▁>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer


def _pieces(decoder: decoders.Decoder) -> Tokenizer:
    """As SentencePiece: words marked by U+2581, bytes for what the vocabulary lacks."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789 ▁.,'é")
    joined = ["▁t", "▁th", "▁the", "ca", "cat", "▁▁", "at", "▁a", "an", "and"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *joined]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("c", "a"), ("ca", "t"), ("▁", "▁"), ("a", "t")]
    merges += [("▁", "a"), ("a", "n"), ("an", "d")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(SPECIAL))
    return _with_added(tokenizer)


def _llama() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer = _pieces(decoders.Sequence(steps))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _gemma() -> Tokenizer:
    tokenizer = _pieces(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    tokenizer = _pieces(
        decoders.Sequence([decoders.Metaspace("▁", scheme), decoders.ByteFallback(), decoders.Fuse()])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    return tokenizer


def _trimmed_right() -> Tokenizer:
    tokenizer = _pieces(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)])
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def _wordpiece(*, cleanup: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=list(SPECIAL), show_progress=False, continuing_subword_prefix="##"
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _with_added(tokenizer)


def _suffix() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=list(SPECIAL), show_progress=False, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _with_added(tokenizer)


def _words() -> Tokenizer:
    words = sorted({word for line in _CORPUS for word in line.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return _with_added(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: _bpe(decoders.ByteLevel()),
    "byte level in a sequence": lambda: _bpe(decoders.Sequence([decoders.ByteLevel()])),
    "byte level, fused": lambda: _bpe(decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    "byte level, stripped": lambda: _bpe(
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    ),
    "Llama": _llama,
    "Gemma": _gemma,
    "metaspace, always": lambda: _metaspace("always"),
    "metaspace, first": lambda: _metaspace("first"),
    "metaspace, never": lambda: _metaspace("never"),
    "two blanks stripped": _trimmed_right,
    "word pieces": lambda: _wordpiece(cleanup=False),
    "word pieces, cleaned": lambda: _wordpiece(cleanup=True),
    "words with a suffix": _suffix,
    "whole words": _words,
    "pieces, replaced at last": lambda: _pieces(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("#", "+")]
        )
    ),
    "replaced by a pattern": lambda: _bpe(
        decoders.Sequence([decoders.Replace(Regex("Ġ+"), "Ġ"), decoders.ByteLevel()])
    ),
    "stripped one by one": lambda: _pieces(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()])
    ),
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()
