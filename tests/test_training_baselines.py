"""Adversarial training, its free form, and noise, on models whose strongest attack is known."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from guard.training.grammar import parse, regularized_loss
from guard.training.passes import Passes
from tests.small_models import batch, margins, two_class_model


def interior() -> tuple[Tensor, Tensor]:
    """Images far from the edges of [0, 1]."""
    images, labels = batch()
    return 0.4 + 0.2 * images, labels


class TestAdversarial:
    @pytest.mark.parametrize(("name", "order"), [("adversarial-linf", 1), ("adversarial-l2", 2)])
    def test_reaches_the_strongest_attack_on_a_linear_model(self, name: str, order: int) -> None:
        model, difference = two_class_model()
        images, labels = interior()
        loss, _ = regularized_loss(
            [parse(f"{name}:eps=0.02,steps=20,step=0.02")], Passes(model, images, labels)
        )
        worst = margins(images, labels, difference) - 0.02 * torch.linalg.vector_norm(difference, ord=order)
        torch.testing.assert_close(loss, functional.softplus(-worst).mean())

    @pytest.mark.parametrize("name", ["adversarial-linf", "adversarial-l2"])
    def test_stays_in_the_ball_and_in_range(self, name: str) -> None:
        seen: list[Tensor] = []
        model, _ = two_class_model()
        model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        images, labels = batch()
        images[0, 0] = 0.0
        images[1, 0] = 1.0
        regularized_loss([parse(f"{name}:eps=0.3,steps=3")], Passes(model, images, labels))
        assert len(seen) == 4
        for points in seen:
            shift = (points - images).flatten(1)
            norms = shift.abs().amax(1) if name.endswith("linf") else shift.norm(dim=1)
            assert (norms <= 0.3 + 1e-9).all()
            assert points.min() >= 0
            assert points.max() <= 1
        assert not torch.equal(seen[0], images)  # a random start

    def test_no_radius_is_no_attack(self) -> None:
        model, _ = two_class_model()
        images, labels = interior()
        plain, _ = regularized_loss([parse("none")], Passes(model, images, labels))
        for name in ("adversarial-linf", "adversarial-l2", "free-linf"):
            loss, _ = regularized_loss([parse(f"{name}:eps=0")], Passes(model, images, labels))
            torch.testing.assert_close(loss, plain)


class TestFree:
    def test_each_backward_pass_moves_the_perturbation(self) -> None:
        model, difference = two_class_model()
        images, labels = interior()
        state: dict[str, Tensor] = {}
        chosen = [parse("free-linf:eps=0.02")]
        margin = margins(images, labels, difference)
        for worst in (
            margin,
            margin - 0.02 * difference.abs().sum(),
        ):  # first at the images, then one step off
            passes = Passes(model, images, labels, state=state)
            loss, _ = regularized_loss(chosen, passes)
            torch.testing.assert_close(loss, functional.softplus(-worst).mean())
            loss.backward()  # type: ignore[no-untyped-call]
            for call in passes.after_backward:
                call()
        assert state["free_perturbation_0"].abs().max() <= 0.02
        assert not state["free_perturbation_0"].requires_grad


class TestGaussian:
    def test_trains_on_noisy_images(self) -> None:
        seen: list[Tensor] = []
        model, _ = two_class_model()
        model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        images, labels = batch(count=200)
        regularized_loss([parse("gaussian:sigma=0.3")], Passes(model, images, labels))
        assert len(seen) == 1
        noise = seen[0] - images
        assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
        assert abs(float(noise.mean())) < 0.02
