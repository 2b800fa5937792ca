"""The Carlini-Wagner attack in the l2 norm (Carlini & Wagner 2017, section V-B)."""

import numpy as np
from numpy.typing import NDArray

from guard.attacks import FORWARD, GRADIENT, Floats, Found, Labels, column, misclassified
from guard.evaluation.best import Best
from guard.evaluation.target import Classifier

BETA_1, BETA_2, ADAM_TINY = 0.9, 0.999, 1e-8
INSIDE = np.float32(0.97)
"""Where in (-1, 1) the ends of [0, 1] lie: nearer to 1, pixels of exactly 0 or 1 could hardly move."""


def carlini_wagner(
    model: Classifier,
    images: Floats,
    labels: Labels,
    *,
    steps: int = 200,
    searches: int = 5,
    rate: float = 0.01,
    constant: float = 0.1,
    confidence: float = 0.0,
) -> Found:
    """The nearest misclassified image in the l2 norm, by Adam on ||δ||² + c max(z_y - max_{i≠y} z_i, -κ).

    The image is (tanh w / 0.97 + 1) / 2, clipped to [0, 1]; the paper's (tanh w + 1) / 2 has its ends at
    infinity, where tanh is flat and images of many black or white pixels stay unbroken. c starts at
    `constant`; it is multiplied by ten until an image breaks and then bisected (geometrically), `searches`
    times in all. A search ends early for an image whose objective has not fallen by 0.01% within a tenth of
    the steps. κ, `confidence`, asks for a logit margin beyond the boundary; an image counts as broken only
    with it. Source: Carlini & Wagner 2017, V-B, VI-A.
    """
    count = len(images)
    best = Best(images, "l2")
    everyone = np.arange(count)
    logits = model.logits(images)
    best.offer(everyone, images, _beyond(images, logits, labels, confidence), FORWARD)
    todo = everyone[~best.broken]
    start = np.arctanh((2 * images - 1) * INSIDE)
    low, high = np.zeros(count), np.full(count, np.inf)
    weight = np.full(count, constant)
    patience = max(1, steps // 10)
    for _ in range(searches if len(todo) else 0):
        rows = todo
        inner = start[rows]
        first, second = np.zeros_like(inner), np.zeros_like(inner)
        broke = np.zeros(count, dtype=np.bool_)
        lowest = np.full(len(rows), np.inf)
        for step in range(1, steps + 1):
            squashed = np.tanh(inner)
            points = np.clip((squashed / INSIDE + 1) / 2, 0.0, 1.0, dtype=np.float32)
            logits, margin, gradient = model.loss_gradient(points, labels[rows], "margin")
            beyond = _beyond(points, logits, labels[rows], confidence)
            best.offer(rows, points, beyond, GRADIENT)
            broke[rows] |= beyond
            shift = points - images[rows]
            hinge = np.maximum(-margin.astype(np.float64), -confidence)
            objective = np.einsum("bchw,bchw->b", shift, shift) + weight[rows] * hinge
            if step % patience == 1 or patience == 1:
                still = objective <= lowest * np.where(lowest > 0, 1 - 1e-4, 1 + 1e-4)
                lowest = np.minimum(lowest, objective)
                rows, inner, first, second = rows[still], inner[still], first[still], second[still]
                squashed, shift, gradient = squashed[still], shift[still], gradient[still]
                margin, lowest = margin[still], lowest[still]
                if not len(rows):
                    break
            active = column(weight[rows] * (margin < confidence))
            downhill = (2 * shift - active * gradient) * (1 - squashed**2) / (2 * INSIDE)
            first = BETA_1 * first + (1 - BETA_1) * downhill
            second = BETA_2 * second + (1 - BETA_2) * downhill**2
            adam = (first / (1 - BETA_1**step)) / (np.sqrt(second / (1 - BETA_2**step)) + ADAM_TINY)
            inner = np.asarray(inner - rate * adam, dtype=np.float32)
        high[todo] = np.where(broke[todo], np.minimum(high[todo], weight[todo]), high[todo])
        low[todo] = np.where(broke[todo], low[todo], np.maximum(low[todo], weight[todo]))
        bracketed = np.isfinite(high) & (low > 0)
        with np.errstate(invalid="ignore"):
            weight = np.where(
                bracketed, np.sqrt(low * high), np.where(np.isfinite(high), high / 10, low * 10)
            )
    return best.found()


def _beyond(points: Floats, logits: Floats, labels: Labels, confidence: float) -> NDArray[np.bool_]:
    """Whether points (B, C, H, W) are of another class that leads the label by at least `confidence` (B,)."""
    others = logits.copy()
    row = np.arange(len(labels))
    others[row, labels] = -np.inf
    lead = others.max(axis=1) - logits[row, labels]
    return np.asarray(misclassified(points, logits, labels) & (lead >= confidence), dtype=np.bool_)
