"""Stability, Hamming and dense regularizers against their formulas written out."""

import math

import pytest
import torch
from torch import Tensor, nn

from guard.errors import UsageError
from guard.training.architectures import build
from guard.training.grammar import check_network, parse, regularized_loss
from guard.training.manifold import hamming, stability
from guard.training.passes import Passes
from tests.small_models import Linear, batch, margins, two_class_model


def passes(model: nn.Module, images: Tensor, labels: Tensor, *, parts: int = 1) -> Passes:
    return Passes(model, images, labels, generator=torch.Generator().manual_seed(7), parts=parts)


def penalty(text: str, model: nn.Module, images: Tensor, labels: Tensor, *, parts: int = 1) -> Tensor:
    with_it = regularized_loss([parse(text)], passes(model, images, labels, parts=parts))[0]
    return (with_it - regularized_loss([parse("none")], passes(model, images, labels))[0]).detach()


def corners(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    return passes(model, images, labels).pair(eps).corners


class TestStability:
    def test_closed_form(self) -> None:
        model, difference = two_class_model()
        images, labels = batch()
        shift = corners(model, images, labels, 0.05)
        above, below = (
            torch.sigmoid(margins(points, labels, difference)) for points in (images + shift, images - shift)
        )
        expected = 0.3 * (2 * (above - below).square()).sum()  # both classes' probabilities move alike
        torch.testing.assert_close(penalty("stability:weight=0.3,eps=0.05", model, images, labels), expected)

    def test_is_a_sum_over_the_whole_batch(self) -> None:
        model, _ = two_class_model()
        images, labels = batch()
        alone = penalty("stability:weight=0.3", model, images, labels)
        torch.testing.assert_close(penalty("stability:weight=0.3", model, images, labels, parts=4), 4 * alone)


class TestHamming:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 2)
        ).double()

    def test_the_formula(self) -> None:
        model = self.model()
        images, labels = batch()
        shift = corners(model, images, labels, 0.05)
        layers = []
        for cut in (2, 4):
            above, below = model[:cut](images + shift), model[:cut](images - shift)  # type: ignore[index]
            delta = torch.tanh(6 * above) - torch.tanh(6 * below)
            layers.append(float(delta.detach().norm()) / (2 * delta.numel()))
        found = penalty("hamming:weight=10,alpha=6,eps=0.05", model, images, labels)
        assert float(found) == pytest.approx(10 * (layers[0] + layers[1]) / 2)

    def test_large_alpha_counts_flipped_relus(self) -> None:
        model = self.model()
        images, labels = batch()
        shift = corners(model, images, labels, 0.05)
        flipped = 0.0
        for cut in (2, 4):
            above, below = model[:cut](images + shift), model[:cut](images - shift)  # type: ignore[index]
            flips = ((above > 0) != (below > 0)).sum().item()
            assert flips > 0
            flipped += math.sqrt(4 * flips) / (2 * above.numel()) / 2
        found = penalty("hamming:weight=1,alpha=1e9,eps=0.05", model, images, labels)
        assert float(found) == pytest.approx(flipped)

    def test_survives_equal_patterns(self) -> None:
        model = self.model()
        images, labels = batch()
        loss, _ = regularized_loss([parse("hamming:weight=1,eps=0")], passes(model, images, labels))
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(
            torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None
        )

    def test_equal_parts_average_to_the_whole(self) -> None:
        model = self.model()
        images, labels = batch()
        whole = penalty("hamming:weight=1", model, images, labels)
        # Two copies of a batch: sqrt(2) times the norm over twice the numbers.
        part = penalty("hamming:weight=1", model, images, labels, parts=2)
        torch.testing.assert_close(part, whole / math.sqrt(2))

    def test_balances_stability_at_initialization(self) -> None:
        """At the papers' ratios of the weights, 100 to 500, on a batch of 128 (MANIFOLD, appendix B)."""
        torch.manual_seed(0)
        model = build("preactresnet18", mean=[0.5] * 3, deviation=[0.25] * 3, num_classes=10, size=(32, 32))
        images = torch.rand(128, 3, 8, 8)
        images = nn.functional.interpolate(images, 32, mode="bilinear")  # neighbours alike, as in photographs
        drawn = passes(model, images, torch.zeros(128, dtype=torch.long))
        drawn.recording = True
        with torch.no_grad():
            first = stability(drawn, weight=1).terms["stability"]
            second = hamming(drawn, weight=1).terms["hamming"]
        assert 100 < first / second < 500

    def test_a_network_without_relus_is_refused(self) -> None:
        model, _ = two_class_model()
        with pytest.raises(UsageError, match=r"hamming compares .* has none"):
            check_network([parse("hamming:weight=1")], model.float(), (3, 4, 4))


class TestDense:
    def brute_force(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, scale: float
    ) -> float:
        shift = corners(model, images, labels, eps)
        points = [*(images + shift), *(images - shift)]
        outputs = [model(point[None]).softmax(1)[0] for point in points]
        total = 0.0
        for i in range(len(points)):
            for j in range(i):
                distance = float((points[i] - points[j]).square().sum())
                kernel = math.exp(-distance / scale) / math.exp(-4 * 48 * eps**2 / scale)
                total += kernel * float((outputs[i] - outputs[j]).detach().square().sum())
        return total

    @pytest.mark.parametrize(("setting", "scale"), [("", 48 * 0.1**2), (",scale=3", 3.0)])
    def test_the_formula(self, setting: str, scale: float) -> None:
        model, _ = two_class_model()
        images, labels = batch()
        images = 0.5 + 0.1 * images  # near enough to each other to count
        found = penalty(f"dense-manifold:weight=0.5,eps=0.1{setting}", model, images, labels)
        expected = 0.5 * self.brute_force(model, images, labels, 0.1, scale)
        assert float(found) == pytest.approx(expected)
        own = penalty("stability:weight=0.5,eps=0.1", model, images, labels)
        assert float(found) > 1.5 * float(own)

    def test_is_stability_where_images_lie_far_apart(self) -> None:
        model, _ = two_class_model()
        images, labels = batch()
        dense = penalty("dense-manifold:weight=0.5,eps=0.01", model, images, labels)
        torch.testing.assert_close(dense, penalty("stability:weight=0.5,eps=0.01", model, images, labels))

    def test_no_radius_is_no_penalty(self) -> None:
        """As where a ramp of eps starts at 0."""
        model, _ = two_class_model()
        assert penalty("dense-manifold:weight=1,eps=0", model, *batch()) == 0

    def test_equal_images_have_finite_gradients(self) -> None:
        model = Linear(torch.randn(2, 48, dtype=torch.float64))
        images, labels = batch()
        images = images[:1].repeat(6, 1, 1, 1)
        loss, _ = regularized_loss([parse("dense-manifold:weight=1,eps=0.01")], passes(model, images, labels))
        loss.backward()  # type: ignore[no-untyped-call]
        assert model.weight.grad is not None
        assert torch.isfinite(model.weight.grad).all()
