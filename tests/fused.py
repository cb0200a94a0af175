"""Fused multiply-adds in NVIDIA's assembly: which of them do not round as a product and a sum would."""

from __future__ import annotations

import re

# 1, -2, -0.5 and the high part of -ln 2: the kernels multiply by these only what leaves the product exact.
EXACT_FACTORS = {"0f3F800000", "0fC0000000", "0fBF000000", "0fBF318000"}
ROOTS = r"rsqrt\.approx(?:\.ftz)?\.f32"  # each begins a correctly rounded root, which has two of its own


def unexplained_fusions(assembly: str) -> list[str]:
    """The operands of those in float32 without an exact factor, if they are not the two of every root."""
    constants = dict(re.findall(r"mov\.(?:f32|b32)\s+(%\w+), (0f[0-9A-F]{8});", assembly))
    fused = re.findall(r"\b(?:fma|mad)\.\S*f32\s+([^;]*);", assembly)
    others = [
        operands
        for operands in fused
        if not EXACT_FACTORS & {constants.get(name, name) for name in operands.split(", ")[1:3]}
    ]
    return others if len(others) != 2 * len(re.findall(ROOTS, assembly)) else []
