"""Regularizers against closed forms on linear models, and against autograd on smooth ones."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.errors import UsageError
from guard.training.grammar import REGULARIZERS, parse, parse_all, regularized_loss
from guard.training.passes import Passes
from guard.training.regularizers import image_norms

ALL = (
    "none",
    "tv-l2:eps=0.1",
    "tv-l2:eps=0.1,form=penalty",
    "lipschitz:weight=0.1",
    "lipschitz:weight=0.1,h=0.01",
    "tulip:eps=0.1,weight=0.1",
    "gradient-penalty-l2:weight=0.1",
    "gradient-penalty-l1:weight=0.1",
)


class Linear(nn.Module):
    """Logits W x of flattened images; for two classes everything has a closed form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def batch(count: int = 6, classes: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 4, 4, generator=generator, dtype=dtype)
    return images, torch.arange(count) % classes


def two_class_model() -> tuple[Linear, Tensor]:
    """The model, and the difference w_0 - w_1 of its rows."""
    weight = torch.randn(2, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Linear(weight)
    return model, weight[0] - weight[1]


def margins(images: Tensor, labels: Tensor, difference: Tensor) -> Tensor:
    """Logit of the label minus the other one's: L = log(1 + exp(-margin))."""
    return (images.flatten(1) @ difference) * (1 - 2 * labels)


def smooth_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def weight_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


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
        ("text", "order"),
        [
            ("tv-l2:eps=1,form=penalty,h={h}", 2),
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

    def test_directions_are_not_differentiated(self) -> None:
        model = smooth_model()
        images, labels = batch(classes=3)
        passes = Passes(model, images, labels)
        loss, _ = regularized_loss([parse("tv-l2:eps=0.5")], passes)
        gradient = passes.gradient
        points = images + 0.5 * gradient / image_norms(gradient).view(-1, 1, 1, 1)
        expected = functional.cross_entropy(model(points.detach()), labels)
        torch.testing.assert_close(weight_gradient(loss, model), weight_gradient(expected, model))


@pytest.mark.parametrize("text", ALL)
class TestEveryOne:
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

    def test_updates_batchnorm_once_from_the_images(self, text: str) -> None:
        torch.manual_seed(3)
        model, alone = WithBatchNorm().train(), WithBatchNorm().train()
        alone.load_state_dict(model.state_dict())
        images, labels = batch(classes=3, dtype=torch.float32)
        loss, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        loss.backward()  # type: ignore[no-untyped-call]
        alone(images)
        for name, value in alone.named_buffers():
            torch.testing.assert_close(dict(model.named_buffers())[name], value)
        norm = model.layers[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.track_running_stats
        assert all(layer.training for layer in model.modules())

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
        exact, _ = regularized_loss([parse(text)], Passes(model, images, labels))
        passes = Passes(model, images, labels, autocast=torch.bfloat16)
        loss, terms = regularized_loss([parse(text)], passes)
        assert loss.dtype == passes.clean.logits.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in terms.values())
        torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.01)


class TestCombinations:
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
        images, labels = batch()
        texts = ("lipschitz:weight=1", "gradient-penalty-l2:weight=1", "gradient-penalty-l1:weight=1")
        regularized_loss([parse(text) for text in texts], Passes(model, images, labels))
        assert calls == [6, 1, 6, 6]  # the images, the steepest one, one shift per penalty

    def test_two_replacements_of_the_images_are_refused(self) -> None:
        with pytest.raises(UsageError, match="choose one"):
            parse_all(["tv-l2:eps=1", "tulip:eps=1,weight=1"])


class TestPasses:
    def test_a_few_points_are_normalized_as_served(self) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        model.layers[0].eval()  # a frozen layer stays frozen
        images, labels = batch(classes=3, dtype=torch.float32)
        passes = Passes(model, images, labels, autocast=torch.bfloat16)
        served = passes.as_served(images[:1], labels[:1])
        assert model.layers[1].training
        assert not model.layers[0].training
        torch.testing.assert_close(served.logits, model.eval()(images[:1]))

    def test_accuracy_is_that_of_the_clean_pass(self) -> None:
        model, _ = two_class_model()
        images, _ = batch()
        labels = model(images).argmax(1)
        labels[0] = 1 - labels[0]
        passes = Passes(model, images, labels)
        assert passes.accuracy() is None
        assert passes.clean.losses.shape == (6,)
        torch.testing.assert_close(passes.accuracy(), torch.tensor(5 / 6))


class TestParse:
    def test_every_regularizer_says_what_it_needs(self) -> None:
        for name in set(REGULARIZERS) - {"none"}:
            with pytest.raises(UsageError, match=f"{name} needs .* as in {name}:"):
                parse(name)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "tulp:eps=1",
                "'tulp': expected one of none, tv-l2, tv-l1, lipschitz, tulip",
            ),
            ("tulip:eps=1,lambda=1", "no hyperparameter 'lambda': it takes eps, weight, h"),
            ("none:eps=1", "it takes none"),
            ("tulip:eps=1", "needs weight"),
            ("tulip:eps=1,weight=x", "weight is 'x', not a number of 0 or more"),
            ("tulip:eps=-1,weight=1", "eps is '-1'"),
            ("tulip:eps=nan,weight=1", "eps is 'nan'"),
            ("tulip:eps=inf,weight=1", "eps is 'inf'"),
            ("tulip:eps=1,eps=2,weight=1", "gives eps twice"),
            ("tulip:eps=1,weight=1,h=0", "h is '0', not a number above 0"),
            ("tv-l2:eps=1,form=other", "form is 'other', not step or penalty"),
            ("", "unknown regularizer ''"),
        ],
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            parse(text)
