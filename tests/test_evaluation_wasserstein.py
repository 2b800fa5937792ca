"""ART's attack in a Wasserstein ball: the transport is ART's own, and mass moves no farther than it may."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from guard.evaluation import libraries, wasserstein
from guard.evaluation.target import Target
from guard.runtime import Detector
from tests import networks

SHAPE = (2, 6, 6)


@pytest.fixture(scope="module")
def target() -> Target:
    weight = np.random.default_rng(0).normal(size=(3, 72)).astype(np.float32)
    model = networks.linear(weight, -weight.sum(axis=1) / 2, shape=SHAPE)
    return Target(Detector(model, provider="cpu", threads=1))


def test_importing_art_leaves_home_and_logging_as_they_are(tmp_path: Path) -> None:
    code = """
import logging
from guard.evaluation import wasserstein
wasserstein._classes()
assert not logging.getLogger("tests").handlers and not logging.getLogger("art").handlers
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert not (tmp_path / ".art").exists()


def test_transport_is_that_of_art(target: Target) -> None:
    estimator, attack = wasserstein._classes()
    rng = np.random.default_rng(0)
    kernels, images = rng.random((3, 1, 5, 5)), rng.random((3, *SHAPE))
    slow = attack.__mro__[1]._local_transport(attack(estimator(target.model)), kernels, images, 5)
    assert wasserstein.local_transport(kernels, images) == pytest.approx(slow, rel=1e-12)


def cost(before: networks.Array, after: networks.Array) -> float:
    """Least mass times way that turns one image (C, H, W), divided by its mass, into the other, within
    channels; mass may leave over the edge of the image, one pixel beyond the nearest.
    """
    channels, height, width = before.shape
    places = np.stack(np.meshgrid(range(height), range(width), indexing="ij"), -1).reshape(-1, 2)
    ways = np.linalg.norm(places[:, None] - places[None], axis=2)
    edge = 1 + np.minimum(places, [height - 1, width - 1] - places).min(axis=1)
    total, count = 0.0, len(places)
    for channel in range(channels):
        have, want = (image[channel].ravel().astype(float) / before.sum() for image in (before, after))
        # From every pixel to every pixel, and from every pixel out.
        prices = np.concatenate([ways.ravel(), edge])
        leave = np.concatenate([np.kron(np.eye(count), np.ones(count)), np.eye(count)], axis=1)
        arrive = np.concatenate([np.kron(np.ones(count), np.eye(count)), np.zeros((count, count))], axis=1)
        plan = linprog(prices, A_eq=leave, b_eq=have, A_ub=arrive, b_ub=want * (1 + 1e-6) + 1e-9)
        assert plan.fun is not None
        total += plan.fun
    return total


def test_mass_moves_by_no_more_than_the_budget_and_breaks_what_it_can(target: Target) -> None:
    images = 0.2 + 0.6 * networks.images(6, SHAPE)
    labels = target.model.logits(images).argmax(axis=1)
    found = libraries.with_wasserstein(target, images, labels, 0.3, 0, steps=15)
    assert found.success.any()
    assert (found.distance[found.success] == 0.3).all()
    assert (target.model.logits(found.images).argmax(axis=1) != labels)[found.success].all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    for before, after, hit in zip(images, found.images, found.success, strict=True):
        if hit:
            assert cost(before, after) <= 0.3
            # What is added where nothing was taken from costs nothing: there must be none.
            mass = after.sum(axis=(1, 2)) / before.sum(axis=(1, 2))
            assert ((mass > 0.98) & (mass < 1.0001)).all()
    less = libraries.with_wasserstein(target, images, labels, 1e-4, 0, steps=5)
    assert less.success.sum() < found.success.sum()


def test_black_images_count_as_not_broken(target: Target) -> None:
    black = np.zeros((1, *SHAPE), np.float32)
    labels = target.model.logits(black).argmax(axis=1)
    found = libraries.with_wasserstein(target, black, labels, 0.1, 0, steps=2)
    assert not found.success.any()
    assert np.array_equal(found.images, black)
