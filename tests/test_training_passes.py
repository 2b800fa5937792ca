"""Passes over a batch: which statistics they use and update, what they record."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from guard.training.grammar import parse, regularized_loss
from guard.training.passes import Passes, compiled, relu_calls
from tests.small_models import WithBatchNorm, batch, two_class_model, weight_gradient


class TestPasses:
    def test_a_few_points_are_normalized_by_themselves(self) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(classes=3, dtype=torch.float32)
        before = [value.clone() for value in model.buffers()]
        passes = Passes(model, images, labels, autocast=torch.bfloat16)
        few = passes.over_few(images[:3], labels[:3])
        for buffer, value in zip(model.buffers(), before, strict=True):
            torch.testing.assert_close(buffer, value)
        torch.testing.assert_close(few.logits, model(images[:3]))

    def test_accuracy_is_that_of_the_clean_pass(self) -> None:
        model, _ = two_class_model()
        images, _ = batch()
        labels = model(images).argmax(1)
        labels[0] = 1 - labels[0]
        passes = Passes(model, images, labels)
        assert passes.accuracy() is None
        assert passes.clean.losses.shape == (6,)
        torch.testing.assert_close(passes.accuracy(), torch.tensor(5 / 6))


class TestMemory:
    @pytest.mark.parametrize(
        ("texts", "most"),
        [
            (["tv-l2:eps=0.1"], 1.0),
            (["tulip:eps=0.1,weight=0.1"], 1.3),  # and double passes over eight of the 60 images
            (["adversarial-linf:eps=0.1,steps=3"], 1.0),
            (["tv-l2:eps=0.1,form=penalty"], 2.0),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_the_clean_pass_is_kept_only_where_the_loss_needs_it(self, texts: list[str], most: float) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(60, classes=3, dtype=torch.float32)
        plain, found = (peak_of_saved(model, images, labels, chosen) for chosen in (["none"], texts))
        assert plain < found * 1.01
        assert found < plain * (most + 0.1)

    def test_a_regularizer_that_needs_it_gets_it(self) -> None:
        """The gradients are those of the parts: one trains elsewhere, one differentiates the clean pass."""
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        images, labels = batch(classes=3, dtype=torch.float32)
        found = []
        for alone in (["tv-l2:eps=0.1", "gradient-penalty-l2:weight=1"], ["tv-l2:eps=0.1"], ["none"]):
            loss, _ = regularized_loss([parse(text) for text in alone], Passes(model, images, labels))
            found.append(weight_gradient(loss, model))
        loss, _ = regularized_loss([parse("gradient-penalty-l2:weight=1")], Passes(model, images, labels))
        penalty = weight_gradient(loss, model) - found[2]
        torch.testing.assert_close(found[0], found[1] + penalty, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("text", ["tv-l2:eps=0.1", "adversarial-linf:eps=0.1,steps=2"])
    def test_compiled_passes_towards_the_images_leave_the_weights_out(self, text: str) -> None:
        torch.manual_seed(3)
        model = WithBatchNorm().train()
        frozen: list[bool] = []

        def forward(points: Tensor) -> Tensor:
            frozen.append(not any(weight.requires_grad for weight in model.parameters()))
            logits: Tensor = model(points)
            return logits

        images, labels = batch(classes=3, dtype=torch.float32)
        regularized_loss([parse(text)], Passes(model, images, labels, compiled=forward))
        assert frozen == [True] * (len(frozen) - 1) + [False]
        assert all(weight.requires_grad for weight in model.parameters())


def peak_of_saved(model: nn.Module, images: Tensor, labels: Tensor, texts: list[str]) -> int:
    """The most numbers that the graphs of a step hold at one time for their backward passes."""
    held, peak = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            self.tensor = tensor
            held += tensor.numel()
            peak = max(held, peak)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss, _ = regularized_loss([parse(text) for text in texts], Passes(model, images, labels))
        loss.backward()  # type: ignore[no-untyped-call]
    return peak


class TestDropout:
    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3)).train()

    def test_passes_of_a_batch_have_the_same_masks(self) -> None:
        model = self.model()
        images, labels = batch(classes=3, dtype=torch.float32)
        passes = Passes(model, images, labels)
        first = passes.clean.logits
        assert torch.equal(passes.at(images).logits, first)
        assert torch.equal(passes.at(images, plain=True, update=False).logits, first)
        assert not torch.equal(passes.at(images + 0.1).logits, first)
        assert not torch.equal(Passes(model, images, labels).clean.logits, first)

    def test_the_random_state_moves_on_by_one_pass(self) -> None:
        model = self.model()
        images, labels = batch(classes=3, dtype=torch.float32)
        torch.manual_seed(4)
        model(images)
        expected = torch.get_rng_state()
        torch.manual_seed(4)
        source = torch.Generator().manual_seed(5)
        passes = Passes(model, images, labels, generator=source)
        regularized_loss([parse("gradient-penalty-l2:weight=1"), parse("stability:weight=1")], passes)
        assert torch.equal(torch.get_rng_state(), expected)

    def test_a_finite_difference_is_of_the_points_alone(self) -> None:
        """Of the network thinned by one set of masks; with two, it came to 300,000 instead of 0.6."""
        model = self.model()
        images, labels = batch(classes=3, dtype=torch.float32)
        passes = Passes(model, images, labels)
        _, terms = regularized_loss([parse("gradient-penalty-l2:weight=1,h=0.001")], passes)
        slopes = passes.gradient.flatten(1).norm(dim=1)
        assert float(terms["gradient_penalty"]) == pytest.approx(float(slopes.square().mean()), rel=0.01)


class ManyReLUs(nn.Module):
    """ReLUs in all the ways they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.convolution(images)
        for relu in (
            self.relu,
            nn.ReLU(),
            functional.relu,
            torch.relu,
            Tensor.relu,
            lambda z: functional.relu(z, True),
            functional.relu6,
            nn.ReLU6(),
            nn.ReLU6(inplace=True),
            functional.leaky_relu,
            nn.Hardtanh(0.0, 1.0),
        ):
            self.seen.append(features.detach().clone())
            features = self.convolution(relu(features)) - 0.2
        return features.flatten(1)[:, :3]


class TestPairs:
    def test_what_goes_into_every_relu_is_recorded(self) -> None:
        torch.manual_seed(0)
        model = ManyReLUs()
        images, labels = batch(classes=3, dtype=torch.float32)
        passes = Passes(model, images, labels)
        passes.recording = True
        plus, minus, corners = passes.pair(0.1)
        assert len(plus.activations) == len(minus.activations) == 11
        for recorded, seen in zip(plus.activations + minus.activations, model.seen, strict=True):
            assert torch.equal(recorded, seen)
            assert recorded.requires_grad
        torch.testing.assert_close(plus.logits, model(images + corners))
        torch.testing.assert_close(minus.logits, model(images - corners))

    def test_what_is_clipped_below_zero_is_no_relu(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Hardtanh(), nn.Hardtanh(min_val=-0.5), nn.ReLU6())
        assert relu_calls(network, (3, 4, 4)) == 1

    def test_corners_are_random_ones_of_the_cube(self) -> None:
        model, _ = two_class_model()
        images, labels = batch()
        passes = Passes(model, images, labels)
        plus, minus, corners = passes.pair(0.25)
        assert corners.shape == images.shape
        assert torch.equal(corners.abs(), torch.full_like(images, 0.25))
        assert 0.3 < (corners > 0).double().mean() < 0.7
        assert not torch.equal(corners[0], corners[1])
        assert not plus.activations
        assert not minus.activations
        assert passes.pair(0.25)[2] is corners  # regularizers share the pair
        assert passes.pair(0.5)[2] is not corners


@pytest.mark.parametrize(
    "texts",
    [
        ["none"],
        ["tv-l2:eps=0.1"],
        ["gradient-penalty-l2:weight=1", "lipschitz:weight=0.1"],
        ["tulip-exact:eps=0.1,weight=0.1"],
        ["stability:weight=1", "hamming:weight=10"],
        ["adversarial-linf:eps=0.1,steps=2"],
        ["free-linf:eps=0.1"],
    ],
    ids=lambda texts: texts[-1].partition(":")[0],
)
def test_a_compiled_model_gives_the_same_gradients(texts: list[str]) -> None:
    torch.manual_seed(3)
    model = WithBatchNorm().train()
    images, labels = batch(classes=3, dtype=torch.float32)
    chosen = [parse(text) for text in texts]
    gradients, statistics = [], []
    for fast in (False, True):
        other = deepcopy(model)
        forward = compiled(other, backend="aot_eager") if fast else None
        generator = torch.Generator().manual_seed(5)
        passes = Passes(other, images, labels, generator=generator, compiled=forward)
        gradients.append(weight_gradient(regularized_loss(chosen, passes)[0], other))
        statistics.append(dict(other.named_buffers()))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*statistics)
