"""DeepFool: steps onto the boundary of the nearest class as linearized (Moosavi-Dezfooli et al. 2016)."""

import numpy as np

from guard.attacks import (
    FORWARD,
    GRADIENT,
    TINY,
    Floats,
    Found,
    Labels,
    column,
    dual_length,
    misclassified,
    steepest,
)
from guard.evaluation.best import Best
from guard.evaluation.target import Classifier
from guard.norms import Norm


def deepfool(
    model: Classifier,
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    steps: int = 50,
    classes: int = 10,
    overshoot: float = 0.02,
) -> Found:
    """The nearest other class by repeated linearization, among the `classes` most probable at the image.

    At each step every rival k lies at distance (z_y - z_k) / ||∇(z_y - z_k)||_dual; the image moves onto the
    nearest rival's boundary, and its whole way is lengthened by `overshoot` to cross it. A step costs one
    forward pass and, for every rival, one gradient. Images stay in [0, 1]; distance 0 where an image is
    wrong to begin with. Source: Moosavi-Dezfooli et al. 2016, Algorithm 2 and its remark on other norms.
    """
    best = Best(images, norm)
    rows = np.arange(len(images))
    shift = np.zeros_like(images)
    rivals = np.empty((0, 0), dtype=np.int64)
    for step in range(steps + 1):
        points = np.clip(images[rows] + np.float32(1 + overshoot) * shift, 0.0, 1.0)
        logits = model.logits(points).astype(np.float64)
        flipped = misclassified(points, logits, labels[rows])
        best.offer(rows, points, flipped, FORWARD)
        if step == 0:
            order = np.argsort(-logits, axis=1, kind="stable")
            others = order[order != labels[:, None]].reshape(len(images), -1)
            rivals = others[:, : classes - 1]
        still = ~flipped
        rows, shift, points = rows[still], shift[still], points[still]
        logits, rivals = logits[still], rivals[still]
        if not len(rows) or step == steps:
            break
        best.charge(rows, GRADIENT * rivals.shape[1])
        nearest = np.full(len(rows), np.inf)
        move = np.zeros_like(shift)
        for rival in rivals.T:
            each = np.arange(len(rows))
            cotangents = np.zeros(logits.shape, np.float32)
            cotangents[each, rival] = 1
            cotangents[each, labels[rows]] = -1
            towards = model.vjp(points, cotangents)[1]
            gap = logits[each, labels[rows]] - logits[each, rival]
            reach = (gap + 1e-4) / np.maximum(dual_length(towards, norm), TINY)
            nearer = reach < nearest
            nearest = np.where(nearer, reach, nearest)
            move = np.where(nearer.reshape(-1, 1, 1, 1), column(reach) * steepest(towards, norm), move)
        shift = shift + move
    return best.found()
