"""The norms of perturbations."""

from typing import Literal

Norm = Literal["l2", "linf"]
NORMS: tuple[Norm, Norm] = ("l2", "linf")
