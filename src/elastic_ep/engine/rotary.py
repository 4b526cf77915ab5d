"""Angles of rotary embeddings: position times frequency, frequencies scaled as the model was trained with."""

from __future__ import annotations

import math

import torch

from elastic_ep.models.spec import LinearScaling, Llama3Scaling, LongScaling, Rotary, Temperature, YarnScaling


def rotary_table(rotary: Rotary, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [max_len, dim / 2] float32 of an engine that serves texts of up to `max_len` tokens."""
    frequencies, factor = _frequencies(rotary, max_len)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    return (cosines, sines) if factor == 1 else (cosines * factor, sines * factor)


def temperatures(kind: Temperature, max_len: int) -> torch.Tensor:
    """Of positions up to `max_len` [max_len] float32: by what queries are multiplied."""
    steps = torch.floor((torch.arange(max_len, dtype=torch.float32) + 1) / kind.floor)
    return torch.log1p(steps) * kind.scale + 1


def _frequencies(rotary: Rotary, max_len: int) -> tuple[torch.Tensor, float]:
    """[dim / 2] float32, and what cosines and sines are multiplied by.

    Angles grow to thousands, so a rounding here is a visible angle there: this is the order that the checkpoints' own
    training code rounds in.
    """
    waves = rotary.theta ** (torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim)
    match rotary.scaling:
        case None:
            return 1.0 / waves, 1.0
        case LinearScaling(factor):
            return 1.0 / waves / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(1.0 / waves, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(waves, rotary, scaling), scaling.attention
        case LongScaling() as scaling:
            long = max_len > scaling.original
            factors = torch.tensor(scaling.long if long else scaling.short, dtype=torch.float32)
            return 1.0 / (factors * waves), scaling.long_attention if long else scaling.short_attention


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    lengths = 2 * math.pi / frequencies
    width = scaling.high - scaling.low or 1.0  # of none at all: nothing lies between
    share = (scaling.original / lengths - scaling.low) / width
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    stretched = torch.where(lengths > scaling.original / scaling.low, frequencies / scaling.factor, between)
    return torch.where(lengths < scaling.original / scaling.high, frequencies, stretched)


def _yarn(waves: torch.Tensor, rotary: Rotary, scaling: YarnScaling) -> torch.Tensor:
    def place(turns: float) -> float:
        """Of the frequency that turns so often in the first training's positions, as an index."""
        return rotary.dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = place(scaling.fast), place(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp = (torch.arange(len(waves), dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * waves) * (1 - kept) + 1.0 / waves * kept
