"""A network in torch and the same one in ONNX: the same gradients, whichever way they are wrapped."""

import logging
import sys
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from guard.attacks import Loss
from guard.errors import ModelError
from guard.evaluation.torch_models import TorchModel, as_module, isolated
from guard.export import to_onnx
from guard.runtime import Detector
from tests import networks

SHAPE = (3, 8, 8)


class Network(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, stride=2),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.Conv2d(6, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 5),
        )


@pytest.fixture(scope="module")
def pair() -> tuple[TorchModel, Detector]:
    network = Network()
    return TorchModel(network, SHAPE), Detector(to_onnx(Network(), SHAPE), provider="cpu", threads=1)


@pytest.fixture
def images() -> networks.Array:
    return networks.images(7, SHAPE)


def test_a_network_in_torch_is_the_classifier_that_its_export_is(
    pair: tuple[TorchModel, Detector], images: networks.Array
) -> None:
    torch_model, detector = pair
    labels = np.arange(7) % 5
    cotangents = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    assert (torch_model.input_shape, torch_model.num_classes) == (detector.input_shape, detector.num_classes)
    assert torch_model.logits(images) == pytest.approx(detector.logits(images), abs=1e-5)
    for ours, other in zip(
        torch_model.vjp(images, cotangents), detector.vjp(images, cotangents), strict=True
    ):
        assert ours == pytest.approx(other, abs=1e-5)
    for loss in get_args(Loss):
        for ours, other in zip(
            torch_model.loss_gradient(images, labels, loss),
            detector.loss_gradient(images, labels, loss),
            strict=True,
        ):
            assert ours == pytest.approx(other, abs=1e-5)
            assert ours.flags.c_contiguous


def test_gradients_of_a_bundle_in_torch_equal_autograd(
    pair: tuple[TorchModel, Detector], images: networks.Array
) -> None:
    labels = torch.arange(7) % 5
    found = []
    for module in (Network().eval(), as_module(pair[1]), as_module(pair[0])):
        points = torch.from_numpy(images).requires_grad_()
        loss = nn.functional.cross_entropy(3 * module(points), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        found.append((float(loss.detach()), gradient))
    (value, exact), (other, outside), (_, inside) = found
    assert other == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(outside, exact, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(inside, exact, atol=1e-5, rtol=1e-4)
    assert inside.view(7, -1).shape == (7, 192)  # libraries call view()


@pytest.mark.parametrize("which", [0, 1])
def test_passes_are_counted_in_images(
    pair: tuple[TorchModel, Detector], images: networks.Array, which: int
) -> None:
    module = as_module(pair[which])
    with torch.no_grad():
        module(torch.from_numpy(images))
    assert (module.forwards, module.backwards) == (7, 0)
    points = torch.from_numpy(images[:3]).requires_grad_()
    logits = module(points)
    assert (module.forwards, module.backwards) == (10, 0)
    logits[:, 0].sum().backward(retain_graph=True)
    logits[:, 1].sum().backward()
    assert (module.forwards, module.backwards) == (10, 6)
    assert not module.training


def test_an_empty_batch_is_an_empty_answer(pair: tuple[TorchModel, Detector]) -> None:
    for classifier in pair:
        points = torch.zeros(0, *SHAPE, requires_grad=True)
        logits = as_module(classifier)(points)
        assert logits.shape == (0, 5)
        assert torch.autograd.grad(logits.sum(), points)[0].shape == points.shape


def test_second_derivatives_are_refused_in_so_many_words_outside_torch(
    pair: tuple[TorchModel, Detector], images: networks.Array
) -> None:
    def second(classifier: TorchModel | Detector) -> torch.Tensor:
        points = torch.from_numpy(images).requires_grad_()
        loss = as_module(classifier)(points).logsumexp(1).sum()
        (gradient,) = torch.autograd.grad(loss, points, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), points)[0]

    with pytest.raises(ModelError, match="no second derivatives"):
        second(pair[1])
    assert second(pair[0]).abs().sum() > 0


def test_what_libraries_change_for_everyone_is_put_back() -> None:
    def trace(*_: object) -> None:
        return None

    def misbehave() -> float:
        warnings.simplefilter("ignore")
        logging.info("sets the root logger up")
        sys.settrace(None)
        torch.manual_seed(0)
        return float(torch.rand(()))

    handlers, filters, before = list(logging.root.handlers), list(warnings.filters), torch.get_rng_state()
    old = sys.gettrace()
    sys.settrace(trace)
    try:
        with isolated(3):
            drawn = float(torch.rand(()))
            misbehave()
        assert sys.gettrace() is trace
    finally:
        sys.settrace(old)
    assert logging.root.handlers == handlers
    assert list(warnings.filters) == filters
    assert torch.equal(torch.get_rng_state(), before)
    with isolated(3):
        assert float(torch.rand(())) == drawn
