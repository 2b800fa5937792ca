"""Stability regularizers: outputs and activation patterns that stay the same around every training image.

Both papers' points are x + rho and x - rho, rho a random corner of the cube of half side `eps`; they are not
clipped to [0, 1], so that each image stays their middle.
"""

import math
import sys

import torch
from torch import Tensor

from guard.training.passes import Passes, RegularizedLoss

EPS = 8 / 255


def stability(passes: Passes, *, weight: float, eps: float = EPS) -> RegularizedLoss:
    """Probabilities that stay the same: weight * sum_i ||p(x_i + rho_i) - p(x_i - rho_i)||_2^2.

    HAMMING 16, MANIFOLD 11. A sum over the batch beside a mean cross-entropy, as printed: twice the batch is
    twice the weight.
    """
    plus, minus, _ = passes.pair(eps)
    term = (plus.logits.softmax(1) - minus.logits.softmax(1)).square().sum() * passes.parts
    return RegularizedLoss(weight * term, terms={"stability": term.detach()})


def hamming(passes: Passes, *, weight: float, alpha: float = 8.0, eps: float = EPS) -> RegularizedLoss:
    """How far the ReLUs' activation patterns at x + rho and x - rho lie apart, softened.

    With Delta = tanh(alpha z+) - tanh(alpha z-) over one layer's pre-activations of the batch, m numbers, the
    term is weight * mean over layers of ||Delta||_2 / (2 m) (MANIFOLD 5.4, its words taken literally). The
    network must have ReLUs: `grammar.check_network` sees to it.
    """
    plus, minus, _ = passes.pair(eps)
    layers = [
        _soft_difference(above, below, alpha)
        for above, below in zip(plus.activations, minus.activations, strict=True)
    ]
    # Parts of a batch have the square root of their number times its norm per element.
    term = torch.stack(layers).mean() / math.sqrt(passes.parts)
    return RegularizedLoss(weight * term, terms={"hamming": term.detach()})


def dense_manifold(
    passes: Passes, *, weight: float, eps: float = EPS, scale: float | None = None
) -> RegularizedLoss:
    """`stability` over all pairs of the batch's points x_i + rho_i and x_i - rho_i, not each image's own.

    The term is weight * sum over pairs {u, v} of k(u, v) ||p(u) - p(v)||_2^2, where the heat kernel k is
    exp(-||u - v||_2^2 / s) divided by its value for the two points of one image, and s is `scale`, N eps^2
    where not given (the ablation of MANIFOLD's Table 2).
    """
    plus, minus, corners = passes.pair(eps)
    points = torch.cat([passes.images + corners, passes.images - corners]).flatten(1)
    probabilities = torch.cat([plus.logits, minus.logits]).softmax(1)
    pixels = points.shape[1]
    if scale is None:
        scale = max(pixels * eps**2, sys.float_info.min)  # 0 / 0 is the weight of an image's own pair else
    own = 4 * pixels * eps**2
    kernel = torch.exp((own - _squared_distances(points.double())) / scale).to(probabilities.dtype)
    term = (kernel * _squared_distances(probabilities)).triu(1).sum() * passes.parts
    return RegularizedLoss(weight * term, terms={"dense_manifold": term.detach()})


def _soft_difference(above: Tensor, below: Tensor, alpha: float) -> Tensor:
    # In the activations' own type, bf16 too: see docs/decisions/0014.
    delta = torch.tanh(alpha * above) - torch.tanh(alpha * below)
    wide = torch.promote_types(delta.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(delta, dtype=wide)
    return norm / (2 * delta.numel())


def _squared_distances(points: Tensor) -> Tensor:
    """(M, D) -> (M, M), without the square root whose slope at 0 is infinite."""
    squares = points.square().sum(1)
    return (squares[:, None] + squares - 2 * points @ points.T).clamp_min(0)
