"""Differentiation rules by family; importing the package registers them all."""

from guard.operators import (
    convolution,
    elementwise,
    linear,
    normalization,
    pooling,
    reduction,
    resampling,
    shape,
)
from guard.operators.registry import passes_gradient, rule, rule_for, supported_operators

__all__ = [
    "convolution",
    "elementwise",
    "linear",
    "normalization",
    "passes_gradient",
    "pooling",
    "reduction",
    "resampling",
    "rule",
    "rule_for",
    "shape",
    "supported_operators",
]
