"""Adversarial images that move an image's mass by little: PGD in a Wasserstein ball, as ART has it.

Wong, Schmidt, Kolter 2019: an image whose pixels are divided by their sum is a distribution; moving a share m
of it by d pixels costs m d. Mass stays in its channel and moves by at most two pixels either way. Steps go
along the gradient of the cross-entropy and are projected onto the ball by Sinkhorn iterations, up to their
entropic regularization; a last clipping to [0, 1] may lose mass.
"""

import logging.config
import os
import tempfile
import warnings
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from guard.attacks import Floats, Labels
from guard.evaluation.target import Classifier

REGULARIZATION = 3000 / 3072  # per value of an image


def attack(
    model: Classifier, images: Floats, labels: Labels, *, budget: float, steps: int = 100
) -> tuple[Floats, int]:
    """Attacked images (B, C, H, W), and what they took in forward passes; what is not broken within `steps`
    comes back as it was.

    `budget` is in shares of mass times pixels. Settings: steps of 0.1 in every pixel, by the gradient's sign;
    Euclidean cost, 5 x 5 transport plans, regularization 3000 for the 3,072 values of a CIFAR image and in
    proportion for others, since it weighs pixels as shares of the mass. The budget stays what it is, where
    Wong et al.'s grows until the attack succeeds, and so 100 steps do for their 400.
    """
    estimator, attack = _classes()
    attacked = estimator(model)
    sinkhorn = attack(
        attacked,
        regularization=REGULARIZATION * images[0].size,
        p=2,
        kernel_size=5,
        norm="inf",
        ball="wasserstein",
        eps=budget,
        eps_iter=steps + 1,  # never: the budget is fixed
        max_iter=steps,
        batch_size=len(images),
        eps_step=budget,
        verbose=False,
    )
    sinkhorn.eps_step = 0.1  # ART demands a step within the budget, but the two are in different units
    # Exponentials of the regularized problem overflow where an image's mass is in few pixels; such images end
    # as NaN, and count as not broken.
    with np.errstate(all="ignore"):
        return np.asarray(sinkhorn.generate(images, labels), np.float32), attacked.passes


def local_transport(kernels: NDArray[np.float64], images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each image (B, C, H, W) correlated with its own kernel (B, 1, k, k), k odd, padded with zeros."""
    size = kernels.shape[-1]
    height, width = images.shape[-2:]
    edge = size // 2
    padded = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    total = np.zeros(images.shape)
    for row in range(size):
        for at in range(size):
            weight = kernels[:, :, row, at, None, None]
            total += weight * padded[:, :, row : row + height, at : at + width]
    return total


@cache
def _classes() -> tuple[Any, Any]:
    """A classifier as ART wants it, and ART's attack.

    On import ART writes a folder into the user's home and sets up logging for the whole process: here the
    home is a temporary folder for that moment, and logging stays as it is. Its transport copies the patches
    of an image one by one, most of the attack's time; `local_transport` gives the same numbers.
    """
    with (
        tempfile.TemporaryDirectory() as home,
        mock.patch.dict(os.environ, {"HOME": home, "USERPROFILE": home}),
        mock.patch.object(logging.config, "dictConfig"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # ART imports all it has, deprecated or not
        from art.attacks.evasion.wasserstein import Wasserstein
        from art.estimators.classification.classifier import ClassifierMixin
        from art.estimators.estimator import BaseEstimator, LossGradientsMixin

    class Estimator(LossGradientsMixin, ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        def __init__(self, model: Classifier) -> None:
            super().__init__(model=model, clip_values=(0.0, 1.0))
            self.classifier = model
            self.nb_classes = model.num_classes
            self.channels_first = True
            self.passes = 0

        @property
        def input_shape(self) -> tuple[int, int, int]:
            return self.classifier.input_shape

        def predict(self, x: Floats, **_: Any) -> Floats:
            self.passes += len(x)
            return self.classifier.logits(x.astype(np.float32))

        def loss_gradient(self, x: Floats, y: Floats, **_: Any) -> Floats:
            self.passes += 3 * len(x)
            labels = y.argmax(axis=1)
            return self.classifier.loss_gradient(x.astype(np.float32), labels, "cross-entropy")[2]

        def fit(self, x: Any, y: Any, **_: Any) -> None:
            raise NotImplementedError

    class Fast(Wasserstein):  # type: ignore[misc]
        def _local_transport(self, var_k: Any, x: Any, kernel_size: int) -> Any:  # noqa: ARG002
            return local_transport(var_k, x)

    return Estimator, Fast
