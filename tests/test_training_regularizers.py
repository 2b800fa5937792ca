"""Regularizers against closed forms on linear models, and against autograd on smooth ones."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.training import regularizers
from guard.training.grammar import parse, regularized_loss
from guard.training.passes import Passes
from guard.training.regularizers import image_norms
from tests.small_models import (
    Linear,
    WithBatchNorm,
    batch,
    margins,
    smooth_model,
    two_class_model,
    weight_gradient,
)

IMAGES = (  # these make a pass over the images themselves
    "none",
    "tv-l2:eps=0.1",
    "tv-l2:eps=0.1,form=penalty",
    "tv-l1:eps=0.01",
    "tv-l1:eps=0.01,form=penalty",
    "lipschitz:weight=0.1",
    "lipschitz:weight=0.1,h=0.01",
    "tulip:eps=0.1,weight=0.1",
    "gradient-penalty-l2:weight=0.1",
    "gradient-penalty-l1:weight=0.1",
    "tv-l2-exact:eps=0.1",
    "tv-l1-exact:eps=0.01",
    "lipschitz-exact:weight=0.1",
    "tulip-exact:eps=0.1,weight=0.1",
    "gradient-penalty-l2-exact:weight=0.1",
    "gradient-penalty-l1-exact:weight=0.1",
    "stability:weight=0.1",
    "hamming:weight=1",
    "dense-manifold:weight=0.1",
)
ELSEWHERE = (
    "adversarial-linf:eps=0.1",
    "adversarial-l2:eps=0.1",
    "free-linf:eps=0.1",
    "gaussian:sigma=0.1",
)
ALL = IMAGES + ELSEWHERE


class TestClosedForms:
    def test_gradient_rows_are_of_each_image_alone(self) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        gradient = Passes(model, images, labels).gradient
        slope = -torch.sigmoid(-margins(images, labels, difference)) * (1 - 2 * labels)
        torch.testing.assert_close(gradient.flatten(1), slope[:, None] * difference)
        assert not gradient.requires_grad

    def test_tv_l2_trains_on_the_loss_one_step_further(self) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        loss, terms = regularized_loss([parse("tv-l2:eps=0.3")], Passes(model, images, labels))
        shifted = margins(images, labels, difference) - 0.3 * difference.norm()
        torch.testing.assert_close(loss, functional.softplus(-shifted).mean())
        norms = torch.sigmoid(-margins(images, labels, difference)) * difference.norm()
        torch.testing.assert_close(terms["gradient_l2"], norms.mean())

    def test_tv_l2_as_a_penalty(self) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        loss, _ = regularized_loss([parse("tv-l2:eps=0.3,form=penalty,h=0.2")], Passes(model, images, labels))
        margin = margins(images, labels, difference)
        losses = functional.softplus(-margin)
        rise = (functional.softplus(-margin + 0.2 * difference.norm()) - losses) / 0.2
        torch.testing.assert_close(loss, losses.mean() + 0.3 * rise.mean())

    def test_tv_l1_as_a_penalty_steps_by_a_length_in_l2(self) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        loss, _ = regularized_loss([parse("tv-l1:eps=0.3,form=penalty,h=0.2")], Passes(model, images, labels))
        margin, root = margins(images, labels, difference), images[0].numel() ** 0.5
        losses = functional.softplus(-margin)
        rise = (functional.softplus(-margin + 0.2 * difference.abs().sum() / root) - losses) / 0.2
        torch.testing.assert_close(loss, losses.mean() + 0.3 * root * rise.mean())

    def test_the_difference_of_lipschitz_goes_along_its_own_gradient(self) -> None:
        torch.manual_seed(2)
        model = WithBatchNorm().double().train()
        images, labels = batch(30, classes=3)  # more than are normalized together
        found = []
        for text in ("lipschitz:weight=1", "lipschitz:weight=1,h=1e-6"):
            penalty = parse(text)(Passes(deepcopy(model), images, labels)).penalty
            assert penalty is not None
            found.append(penalty.detach())
        torch.testing.assert_close(*found, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("h", [None, 0.2])
    def test_lipschitz_is_the_steepest_image_of_the_batch(self, h: float | None) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        setting = "" if h is None else f",h={h}"
        loss, terms = regularized_loss(
            [parse(f"lipschitz:weight=0.5{setting}")], Passes(model, images, labels)
        )
        margin = margins(images, labels, difference)
        losses = functional.softplus(-margin)
        if h is None:
            slopes = torch.sigmoid(-margin) * difference.norm()
        else:
            slopes = (functional.softplus(-margin + h * difference.norm()) - losses) / h
        torch.testing.assert_close(terms["lipschitz"], slopes.max())
        torch.testing.assert_close(loss, losses.mean() + 0.5 * slopes.max())
        # Not the norm of the summed gradient, nor its mean.
        assert slopes.max() > 1.05 * slopes.mean()

    @pytest.mark.parametrize(("name", "power"), [("gradient-penalty-l2", 2), ("gradient-penalty-l1", 1)])
    def test_gradient_penalty(self, name: str, power: int) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        loss, terms = regularized_loss([parse(f"{name}:weight=0.5,h=0.1")], Passes(model, images, labels))
        # How fast the margin falls along d = g / ||g||_2, and along d = sign(g) / sqrt(N).
        rate = difference.norm() if power == 2 else difference.abs().sum() / math.sqrt(48)
        margin = margins(images, labels, difference)
        losses = functional.softplus(-margin)
        slopes = (functional.softplus(-margin + 0.1 * rate) - losses) / 0.1
        torch.testing.assert_close(terms["gradient_penalty"], slopes.square().mean())
        torch.testing.assert_close(loss, losses.mean() + 0.5 * slopes.square().mean())

    def test_tv_l1_trains_on_the_fast_gradient_sign_step(self) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        loss, terms = regularized_loss([parse("tv-l1:eps=0.03")], Passes(model, images, labels))
        shifted = margins(images, labels, difference) - 0.03 * difference.abs().sum()
        torch.testing.assert_close(loss, functional.softplus(-shifted).mean())
        norms = torch.sigmoid(-margins(images, labels, difference)) * difference.abs().sum()
        torch.testing.assert_close(terms["gradient_l1"], norms.mean())

    @pytest.mark.parametrize(
        "text",
        [
            "tv-l2-exact:eps=0.3",
            "tv-l1-exact:eps=0.3",
            "lipschitz-exact:weight=0.3",
            "tulip-exact:eps=0.3,weight=0.2",
            "gradient-penalty-l2-exact:weight=0.3",
            "gradient-penalty-l1-exact:weight=0.3",
        ],
    )
    def test_exact_ones(self, text: str) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        margin = margins(images, labels, difference)
        l2 = torch.sigmoid(-margin) * difference.norm()
        l1 = torch.sigmoid(-margin) * difference.abs().sum()
        expected = {
            "tv-l2-exact": 0.3 * l2.mean(),
            "tv-l1-exact": 0.3 * l1.mean(),
            "lipschitz-exact": 0.3 * l2.max(),
            "tulip-exact": 0.3 * l2.mean() + 0.2 * l2.max(),
            "gradient-penalty-l2-exact": 0.3 * l2.square().mean(),
            "gradient-penalty-l1-exact": 0.3 * l1.square().mean() / 48,
        }[text.partition(":")[0]]
        torch.testing.assert_close(loss, functional.softplus(-margin).mean() + expected)

    def test_none_is_the_mean_cross_entropy(self) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        loss, terms = regularized_loss([parse("none")], Passes(model, images, labels))
        torch.testing.assert_close(loss, functional.cross_entropy(model(images), labels))
        assert set(terms) == {"loss", "data"}


class TestAgainstAutograd:
    def exact_norms(self, model: nn.Module, images: Tensor, labels: Tensor, order: int) -> Tensor:
        points = images.detach().requires_grad_()
        losses = functional.cross_entropy(model(points), labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), points, create_graph=True)
        norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), ord=order, dim=1)
        return norms

    @pytest.mark.parametrize("text", ["lipschitz:weight=1", "tulip:eps=0,weight=1"])
    def test_lipschitz_differentiates_the_norm_exactly(self, text: str) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        expected = functional.cross_entropy(model(images), labels)
        expected = expected + self.exact_norms(model, images, labels, 2).max()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(weight_gradient(loss, model), weight_gradient(expected, model))

    @pytest.mark.parametrize(
        "text", ["lipschitz:weight=1", "lipschitz:weight=1,h=0.01", "lipschitz-exact:weight=1"]
    )
    def test_lipschitz_gains_nothing_from_smaller_weights_before_batchnorm(self, text: str) -> None:
        # Normalized by fixed statistics it would: shrunken, the network is flatter, until they catch up.
        torch.manual_seed(4)
        model = WithBatchNorm().double().train()
        convolution, normalization = model.layers[0], model.layers[1]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(normalization, nn.BatchNorm2d)
        normalization.eps = 1e-12
        images, labels = batch(12, classes=3)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        (gradient,) = torch.autograd.grad(loss, convolution.weight)
        weight = convolution.weight.detach()
        assert gradient.norm() > 0.01
        assert (gradient * weight).sum().abs() < 1e-6 * gradient.norm() * weight.norm()

    @pytest.mark.parametrize(
        ("text", "order"),
        [
            ("tv-l2:eps=1,form=penalty,h={h}", 2),
            ("tv-l1:eps=1,form=penalty,h={h}", 1),
            ("lipschitz:weight=1,h={h}", 2),
            ("gradient-penalty-l2:weight=1,h={h}", 2),
            ("gradient-penalty-l1:weight=1,h={h}", 1),
        ],
    )
    def test_finite_differences_approach_it(self, text: str, order: int) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        norms = self.exact_norms(model, images, labels, order)
        if "penalty-l" in text:
            exact = (norms.square() / (48 if order == 1 else 1)).mean()
        else:
            exact = norms.max() if "lipschitz" in text else norms.mean()
        exact = exact + functional.cross_entropy(model(images), labels)
        expected = weight_gradient(exact, model)
        errors = []
        for h in (1e-2, 1e-3, 1e-4):
            loss, _ = regularized_loss([parse(text.format(h=h))], Passes(model, images, labels))
            values = abs(float(loss.detach() - exact.detach()))
            gradients = float((weight_gradient(loss, model) - expected).norm())
            errors.append((values, gradients))
        for coarse, fine in pairwise(errors):
            assert fine[0] < 0.2 * coarse[0]  # the error is of first order in h
            assert fine[1] < 0.2 * coarse[1]

    @pytest.mark.parametrize("text", [text for text in ALL if "exact" in text])
    def test_exact_ones_by_gradcheck(self, text: str) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        names = [name for name, _ in model.named_parameters()]

        def loss(*weights: Tensor) -> Tensor:
            state = dict(zip(names, weights, strict=True))

            class Replaced(nn.Module):
                def forward(self, images: Tensor) -> Tensor:
                    logits: Tensor = torch.func.functional_call(model, state, images)
                    return logits

            return regularized_loss([parse(text)], Passes(Replaced(), images, labels))[0]

        weights = tuple(weight.detach().requires_grad_() for weight in model.parameters())
        assert torch.autograd.gradcheck(loss, weights)

    def test_directions_are_not_differentiated(self) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        passes = Passes(model, images, labels)
        loss, _ = regularized_loss([parse("tv-l2:eps=0.5")], passes)
        gradient = passes.gradient
        points = images + 0.5 * gradient / image_norms(gradient).view(-1, 1, 1, 1)
        expected = functional.cross_entropy(model(points.detach()), labels)
        torch.testing.assert_close(weight_gradient(loss, model), weight_gradient(expected, model))


def source() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("text", [text for text in ALL if not text.startswith("hamming")])
class TestOnLinearModels:
    def test_survives_a_gradient_of_zero(self, text: str) -> None:
        model = Linear(torch.zeros(2, 48, dtype=torch.float64))
        images, labels = batch()
        loss, terms = regularized_loss([parse(text)], Passes(model, images, labels))
        torch.testing.assert_close(loss, torch.tensor(math.log(2), dtype=torch.float64))
        assert torch.isfinite(weight_gradient(loss, model)).all()
        assert all(torch.isfinite(value) for value in terms.values())

    def test_survives_saturation(self, text: str) -> None:
        model = Linear(torch.full((2, 48), 300.0) * torch.tensor([[1.0], [-1.0]]))
        images, labels = batch(dtype=torch.float32)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, 0 * labels))
        assert float(loss.detach()) == 0
        assert torch.isfinite(weight_gradient(loss, model)).all()


@pytest.mark.parametrize("text", ALL)
class TestEveryOne:
    def test_updates_batchnorm_once(self, text: str) -> None:
        torch.manual_seed(3)
        model, alone = WithBatchNorm().train(), WithBatchNorm().train()
        alone.load_state_dict(model.state_dict())
        images, labels = batch(classes=3, dtype=torch.float32)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = model.layers[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_batches_tracked == 1
        assert norm.track_running_stats
        assert all(layer.training for layer in model.modules())
        if text in IMAGES:
            alone(images)
            for name, value in alone.named_buffers():
                torch.testing.assert_close(dict(model.named_buffers())[name], value)

    def test_every_weight_gets_a_gradient_and_images_none(self, text: str) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(classes=3, dtype=torch.float32)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(weight.grad is not None for weight in model.parameters())
        assert images.grad is None

    def test_losses_are_float32_under_bf16(self, text: str) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(classes=3, dtype=torch.float32)
        exact, _ = regularized_loss([parse(text)], Passes(model, images, labels, generator=source()))
        passes = Passes(model, images, labels, generator=source(), autocast=torch.bfloat16)
        loss, terms = regularized_loss([parse(text)], passes)
        assert loss.dtype == passes.clean.logits.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in terms.values())
        torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.01)

    def test_images_in_channels_last_memory(self, text: str) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(classes=3, dtype=torch.float32)
        other = deepcopy(model)  # a pass moves running statistics
        expected, _ = regularized_loss([parse(text)], Passes(other, images, labels, generator=source()))
        images = images.contiguous(memory_format=torch.channels_last)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels, generator=source()))
        torch.testing.assert_close(loss, expected)

    def test_the_generator_decides_all_draws(self, text: str) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(classes=3, dtype=torch.float32)
        losses = []
        for other in (1, 2):
            torch.manual_seed(other)  # the global state has no say
            passes = Passes(deepcopy(model), images, labels, generator=source())
            losses.append(regularized_loss([parse(text)], passes)[0])
        assert torch.equal(*losses)


@pytest.mark.parametrize(
    "text",
    [
        "gradient-penalty-l2:weight=1",
        "gradient-penalty-l1:weight=1",
        "tv-l2:eps=1,form=penalty",
        "tv-l1:eps=1,form=penalty",
    ],
)
def test_finite_differences_under_bf16_are_no_rounding(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient of the penalty alone, beside the same step in float32: 0.01 has a cosine of 0.15."""
    monkeypatch.setattr(regularizers, "FULL_PRECISION_STEP", regularizers.HALF_PRECISION_STEP)
    torch.manual_seed(3)
    model = WithBatchNorm().train()
    images, labels = batch(count=64, classes=3, dtype=torch.float32)
    found = []
    for autocast in (None, torch.bfloat16):
        passes = Passes(deepcopy(model), images, labels, autocast=autocast)
        penalty = parse(text)(passes).penalty
        assert penalty is not None
        found.append((penalty.item(), weight_gradient(penalty, passes.model)))
    (exact, gradient), (rounded, other) = found
    assert rounded == pytest.approx(exact, rel=0.05)
    assert functional.cosine_similarity(gradient, other, dim=0) > 0.85
    assert float(other.norm() / gradient.norm()) == pytest.approx(1, abs=0.1)


class TestCombinations:
    def test_terms_of_one_name_are_all_logged(self) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        texts = ["gradient-penalty-l2:weight=1", "gradient-penalty-l1:weight=1"]
        _, terms = regularized_loss([parse(text) for text in texts], Passes(model, images, labels))
        for name, text in zip(("gradient_penalty", "gradient_penalty_2"), texts, strict=True):
            _, alone = regularized_loss([parse(text)], Passes(model, images, labels))
            torch.testing.assert_close(terms[name], alone["gradient_penalty"])

    def test_tulip_is_its_two_parts(self) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        together, _ = regularized_loss([parse("tulip:eps=0.2,weight=0.7")], Passes(model, images, labels))
        parts = [parse("tv-l2:eps=0.2"), parse("lipschitz:weight=0.7")]
        apart, _ = regularized_loss(parts, Passes(model, images, labels))
        torch.testing.assert_close(together, apart)

    def test_penalties_add_up(self) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)

        def loss(*texts: str) -> Tensor:
            return regularized_loss([parse(text) for text in texts], Passes(model, images, labels))[0]

        first, second = "gradient-penalty-l2:weight=1", "lipschitz:weight=1"
        torch.testing.assert_close(loss(first, second), loss(first) + loss(second) - loss("none"))

    def test_passes_are_shared(self) -> None:
        calls = []

        class Counting(Linear):
            def forward(self, images: Tensor) -> Tensor:
                calls.append(len(images))
                return super().forward(images)

        model = Counting(two_class_model()[0].weight.detach())
        images, labels = batch(12)
        texts = ("lipschitz:weight=1", "gradient-penalty-l2:weight=1", "gradient-penalty-l1:weight=1")
        regularized_loss([parse(text) for text in texts], Passes(model, images, labels))
        # The images, the steepest one with its companions, one shift per penalty.
        assert calls == [12, 8, 12, 12]
