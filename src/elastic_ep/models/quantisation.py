"""What `quantization_config` in a checkpoint's `config.json` says: which modules are quantised, and how.

Standard library only. Fields and their meanings are those of transformers (fp8, mxfp4) and of compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from elastic_ep.models.config_json import UNQUANTISED, CheckpointError, ConfigFields, shown
from elastic_ep.models.formats import MX_BLOCK, PLAIN, Format, Fp8, Int4, Mxfp4
from elastic_ep.models.spec import ModelSpec, Moe, Parameter, Piece, with_parameters

METHODS = ("fp8", "mxfp4", "compressed-tensors")
"""As `quant_method` and --quantization name them."""
_NEVER = frozenset({"gate", "router", "shared_expert_gate", "embed_tokens"})
"""Modules that nobody quantises: not every checkpoint says so of them."""
_OTHERS = ("compression_config", "quantization")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_LONGEST_PATTERN, _MOST_REPEATS = 512, 4
_SUPPORTED = f"supported are {', '.join(METHODS)}, and checkpoints that are not quantised"


def quantised(spec: ModelSpec, config: ConfigFields) -> ModelSpec:
    """`spec` with the formats that the configuration gives its pieces. Raises `CheckpointError`."""
    _refuse_others(config)
    chosen = _chosen(config)
    if chosen is None:
        return spec
    made = with_parameters(spec, chosen.parameter)
    for layer in made.layers:
        if isinstance(layer.ffn, Moe):
            _check_experts(layer.ffn, chosen)
    return replace(made, quantisation=chosen.method)


def _check_experts(ffn: Moe, chosen: Quantisation) -> None:
    """What an expert is kept as is the same for all of a layer, and for all pieces of a parameter."""
    for part in ffn.parts:
        formats = {piece.format for piece in part.pieces}
        for expert in {ffn.experts - 1, *(one for one in chosen.named_experts if one < ffn.experts)}:
            formats |= {chosen.formatted(piece, expert).format for piece in part.pieces}
        if len(formats) > 1:
            module = part.pieces[0].tensor.removesuffix(".weight")
            raise chosen.fields.error(
                "quant_method",
                f"is {chosen.method}, but not for all of {module}: only all or none is supported",
            )


@dataclass(frozen=True)
class Quantisation:
    method: str
    format_of: Callable[[str, Piece], Format]
    """Of a matrix that is the weight of a module, by the module's name."""
    fields: ConfigFields
    named_experts: frozenset[int]
    """By their numbers, in what is not quantised."""

    def parameter(self, part: Parameter) -> Parameter:
        if part.exact:
            return part
        pieces = tuple(self.formatted(piece) for piece in part.pieces)
        if pieces[0].format != Mxfp4():
            return replace(part, pieces=pieces)
        if not part.turned:  # as numbers they lie [in, out], as blocks [out, in]
            pieces = tuple(_turned(piece) for piece in pieces)
        for piece in pieces:
            if piece.shape[1] % MX_BLOCK:
                said = f"is mxfp4, but {piece.tensor} has rows of {piece.shape[1]}, no multiple of {MX_BLOCK}"
                raise self.fields.error("quant_method", said)
        return replace(part, pieces=pieces, turned=True)

    def formatted(self, piece: Piece, expert: int = 0) -> Piece:
        """As `expert` has it, if it is a part of experts."""
        if len(piece.shape) != 2 or not (piece.tensor.endswith(".weight") or "{expert}" in piece.tensor):
            return piece
        module = piece.tensor.removesuffix(".weight").format(expert=expert)
        if not _NEVER.isdisjoint(module.split(".")[-2:]):
            return piece
        return replace(piece, format=self.format_of(module, piece))


def _turned(piece: Piece) -> Piece:
    assert piece.stacked is not None, "else it has no blocks"
    experts, *shape = piece.stacked.shape
    return replace(
        piece, shape=piece.shape[::-1], stacked=replace(piece.stacked, shape=(experts, *reversed(shape)))
    )


def _refuse_others(config: ConfigFields) -> None:
    """Else codes and scales would be taken for weights, or scales be left out."""
    for name in _OTHERS:
        if asked := config.get(name):
            raise config.error(name, f"says that the weights are quantised ({shown(asked)}): {_SUPPORTED}")
    for other in _FILES:
        file = config.file.parent / other
        if file.exists():
            raise CheckpointError(f"{file} says that the weights are quantised: {UNQUANTISED}")


def _chosen(config: ConfigFields) -> Quantisation | None:
    name = "quantization_config"
    asked = config.get(name)
    if not asked:
        return None
    method = asked.get("quant_method", asked.get("format")) if isinstance(asked, dict) else asked
    if not isinstance(asked, dict) or not isinstance(method, str) or method not in _READERS:
        raise config.error(name, f"says that the weights are quantised ({shown(method)}): {_SUPPORTED}")
    inner = ConfigFields(config.file, asked, f"{name}.")
    format_of = _READERS[method](inner)
    names = [name for one in _LISTS for name in _strings(inner, one)]
    numbers = (int(number) for name in names for number in _EXPERT.findall(name))
    return Quantisation(method, format_of, inner, frozenset(numbers))


_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers")
_EXPERT = re.compile(r"experts\\?\.(\d{1,6})(?!\d)")


def _fp8(config: ConfigFields) -> Callable[[str, Piece], Format]:
    config.allow("fmt", None, "e4m3")
    config.allow("activation_scheme", None, "static", "dynamic")
    config.allow("modules_to_convert", None, [])
    config.allow("expert_dtype", None, "fp8")
    config.allow("scale_fmt", None, "ue8m0", "float")
    size = config.get("weight_block_size")
    if size is None:
        made = Fp8(0, 0, "weight_scale")
    else:
        made = Fp8(*_block(config, "weight_block_size", size), "weight_scale_inv")
    skipped = _skipped(config)

    def format_of(module: str, _piece: Piece) -> Format:
        return PLAIN if module == "lm_head" or skipped(module) else made

    return format_of


def _mxfp4(config: ConfigFields) -> Callable[[str, Piece], Format]:
    skipped = _skipped(config)

    def format_of(module: str, piece: Piece) -> Format:
        if piece.stacked is None or "{expert}" not in piece.tensor or skipped(module):
            return PLAIN
        return Mxfp4()

    return format_of


def _compressed_tensors(config: ConfigFields) -> Callable[[str, Piece], Format]:
    config.allow("quantization_status", None, "compressed")
    config.allow("kv_cache_scheme", None, {})
    config.allow("sparsity_config", None, {})
    config.allow("transform_config", None, {})
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise config.error("config_groups", "is missing or malformed")
    ignored = _named(config, "ignore")
    schemes = []
    for name, plain in groups.items():
        if not isinstance(plain, dict):
            raise config.error(f"config_groups.{shown(name)}", "must be an object")
        group = ConfigFields(config.file, plain, f"quantization_config.config_groups.{name}.")
        default = config.get("format") if group.get("format") is None else group.get("format")
        schemes.append((_targets(group), _scheme(group, default)))

    def format_of(module: str, _piece: Piece) -> Format:
        if ignored(module):
            return PLAIN
        return next((made for targets, made in schemes if targets(module)), PLAIN)

    return format_of


def _scheme(group: ConfigFields, packing: Any) -> Format:
    plain = group.get("weights")
    if not isinstance(plain, dict):
        raise group.error("weights", f"is {shown(plain)}: only quantised weights are supported there")
    weights = ConfigFields(group.file, plain, group.within + "weights.")
    weights.allow("dynamic", None, False)
    kind, strategy = (weights.get("type"), weights.get("num_bits"), packing), weights.get("strategy")
    symmetric = weights.boolean("symmetric", True)
    if kind in _FP8_KINDS and symmetric:
        block = (0, 0)
        match strategy:
            case "channel":
                block = (1, 0)
            case "group":
                block = (1, weights.positive("group_size"))
            case "block":
                block = _block(weights, "block_structure", weights.get("block_structure"))
            case "tensor" | None:
                pass
            case _:
                raise weights.error("strategy", f"is {shown(strategy)}; {_STRATEGIES}")
        return Fp8(*block, "weight_scale", weights_alone=not group.get("input_activations"))
    if kind in _INT4_KINDS:
        # Order by activation, stored: each column names its group, which the products do not ask for.
        weights.allow("actorder", None, "static", "weight")
        if strategy not in ("group", "channel"):
            raise weights.error("strategy", f"is {shown(strategy)}; {_STRATEGIES}")
        size = weights.positive("group_size") if strategy == "group" else 0
        return Int4(size, zero_points=not symmetric)
    raise weights.error(
        "num_bits",
        f"is of a scheme that is not supported (type {shown(kind[0])}, {shown(kind[1])} bits, format {shown(packing)}, "
        f"symmetric {symmetric}); supported are float 8 (float-quantized, naive-quantized) and int 4 (pack-quantized)",
    )


_FP8_KINDS = [("float", 8, packing) for packing in ("float-quantized", "naive-quantized")]
_INT4_KINDS = [("int", 4, "pack-quantized")]
_STRATEGIES = "supported are channel and group, of float 8 also tensor and block"


def _block(config: ConfigFields, name: str, size: Any) -> tuple[int, int]:
    if not isinstance(size, list) or len(size) != 2 or any(type(one) is not int or one < 1 for one in size):
        raise config.error(name, f"must be two positive integers, not {shown(size)}")
    return size[0], size[1]


def _strings(config: ConfigFields, name: str) -> list[str]:
    given = config.get(name)
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise config.error(name, f"must be a list of names, not {shown(given)}")
    return given


def _skipped(config: ConfigFields) -> Callable[[str], bool]:
    """Each is a regular expression for the beginning of a name, up to a dot or its end, or a name's end."""
    name = "modules_to_not_convert" if config.has("modules_to_not_convert") else "ignored_layers"
    given = _strings(config, name)
    begins = [_pattern(config, name, rf"(?:{one})(?:(?<=\.)|(?=\.|$))") for one in given if one]
    ends = tuple(one for one in given if one)
    return lambda module: module.endswith(ends) or any(one.match(module) for one in begins)


def _named(config: ConfigFields, name: str) -> Callable[[str], bool]:
    """Names, and regular expressions behind "re:"."""
    given = _strings(config, name)
    names = frozenset(given)
    patterns = [_pattern(config, name, one[3:]) for one in given if one.startswith("re:")]
    return lambda module: module in names or any(one.match(module) for one in patterns)


def _targets(group: ConfigFields) -> Callable[[str], bool]:
    """Classes of modules are there too; of those that models have here, all with a matrix are a Linear."""
    given, named = _strings(group, "targets"), _named(group, "targets")
    return lambda module: "Linear" in given or named(module)


def _pattern(config: ConfigFields, name: str, given: str) -> re.Pattern[str]:
    """HAZARD: some expressions take for ever on a short name: repeated groups, and many repeats behind each other."""
    repeats = re.findall(r"(?<!\\)[*+{]", given)
    if len(given) > _LONGEST_PATTERN or len(repeats) > _MOST_REPEATS or re.search(r"\)[*+{]", given):
        raise config.error(name, f"has an expression that is too long or repeats too much: {shown(given)}")
    try:
        return re.compile(given)
    except (re.error, RecursionError, OverflowError) as error:
        raise config.error(name, f"has no regular expression in {shown(given)}: {error}") from None


_READERS: dict[str, Callable[[ConfigFields], Callable[[str, Piece], Format]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}
assert tuple(_READERS) == METHODS
