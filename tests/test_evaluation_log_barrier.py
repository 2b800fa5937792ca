"""The LogBarrier attack beyond what all gradient attacks are tested for."""

import numpy as np

from guard.evaluation.log_barrier import log_barrier
from guard.runtime import Detector
from tests import networks


def test_a_class_that_no_noise_leaves_is_a_failure() -> None:
    constant = np.zeros((2, 12), np.float32)
    model = Detector(networks.linear(constant, np.array([1, 0], np.float32), (1, 3, 4)), provider="cpu")
    images = networks.images(3, (1, 3, 4))
    found = log_barrier(model, images, np.zeros(3, np.int64), norm="l2")
    assert not found.success.any()
    assert np.isinf(found.distance).all()
    assert np.array_equal(found.images, images)


def test_it_needs_no_gradient_where_the_model_has_none() -> None:
    """A model whose probabilities are saturated: it comes nearer all the same, by its way back alone."""
    weight = np.zeros((2, 12), np.float32)
    weight[1] = 1e4
    model = Detector(networks.linear(weight, np.array([7e4, 0], np.float32), (1, 3, 4)), provider="cpu")
    images = np.full((2, 1, 3, 4), 0.5, np.float32)
    assert (model.logits(images).argmax(axis=1) == 0).all()
    found = log_barrier(model, images, np.zeros(2, np.int64), norm="l2")
    assert found.success.all()
    # The boundary is 1 / sqrt(12) = 0.29 away; noise alone that crosses it is several times as far.
    assert (found.distance < 1.0).all()


def test_the_seed_decides_the_noise() -> None:
    model = Detector(networks.convolutional(scale=20.0), provider="cpu", threads=1)
    images = networks.images(3)
    labels = model.logits(images).argmax(axis=1)
    first, again, other = (
        log_barrier(model, images, labels, norm="linf", outer=1, inner=1, seed=seed).images
        for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
