"""The networks we train: sizes, the images they take, the pre-logit sigmoid, and the way to a bundle."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from guard import bundle
from guard.adapt import Outside
from guard.cli import main
from guard.errors import UsageError
from guard.export import compare, export, to_onnx, train_command
from guard.guarded import guarded_model, vjp_model
from guard.runtime import session_of
from guard.training import architectures
from guard.training.architectures import (
    ARCHITECTURES,
    CompactResNet,
    Normalize,
    PreLogitSigmoid,
    ResNet34,
    VerificationCNN,
    build,
)
from guard.training.architectures.from_torchvision import names
from guard.training.architectures.residual import BranchBlock
from guard.training.loop import read_config
from guard.training.settings import Settings
from guard.wrap import wrap
from tests.networks import Array

COLOUR, GREY = (3, 32, 32), (1, 28, 28)


def make(name: str, shape: tuple[int, int, int] = COLOUR, classes: int = 10, **options: Any) -> nn.Module:
    channels, *size = shape
    return build(
        name,
        mean=[0.5] * channels,
        deviation=[0.2] * channels,
        num_classes=classes,
        size=(size[0], size[1]),
        **options,
    )


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "shape", "count"),
        [
            ("compact-resnet", COLOUR, 1_941_546),
            ("preactresnet18", COLOUR, 11_172_170),
            ("resnet34", COLOUR, 489_946),
            ("resnext34-2x32", COLOUR, 3_892_522),
            ("resnext34-4x32", COLOUR, 7_772_202),
            ("allcnn-c", COLOUR, 1_370_986),  # "1.4 million" in its paper
            ("verification-cnn", COLOUR, 272_570),
            ("cw-cnn", GREY, 312_202),
            ("torchvision:resnet18", COLOUR, 11_181_642),
        ],
    )
    def test_parameter_counts(self, name: str, shape: tuple[int, int, int], count: int) -> None:
        assert parameters(make(name, shape)) == count

    def test_verification_cnn_with_the_units_of_its_source(self) -> None:
        model = VerificationCNN([0.5], [0.2], 10, size=(28, 28), hidden=100)
        first, second = 4 * 4 * 1 * 16 + 16, 4 * 4 * 16 * 32 + 32
        assert parameters(model) == first + second + (7 * 7 * 32 + 1) * 100 + 101 * 10

    @pytest.mark.parametrize("name", ["resnet34", "resnext34-2x32", "resnext34-4x32"])
    def test_thirty_four_layers(self, name: str) -> None:
        layers = [layer for layer in make(name).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        assert len(layers) == 34

    def test_compact_resnet_multiply_adds(self) -> None:
        model = make("compact-resnet")
        total = 0

        def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            assert isinstance(layer, nn.Conv2d)
            total += layer.weight.numel() * output.shape[2] * output.shape[3]

        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        model(torch.rand(1, 3, 32, 32))
        assert round(total / 1e6) == 72

    @pytest.mark.parametrize("name", list(ARCHITECTURES))
    def test_width_scales_every_stage(self, name: str) -> None:
        def channels(width: int) -> list[int]:
            model = make(name, width=width)
            return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]

        narrow, wide = channels(2), channels(6)
        assert narrow[0] in {2, 8}  # the stem's; of all branches, where a block comes first
        assert wide == [3 * count for count in narrow]

    def test_the_width_of_its_own_is_the_default(self) -> None:
        assert parameters(make("allcnn-c", width=96)) == parameters(make("allcnn-c"))
        assert parameters(make("resnext34-2x32", width=32)) == parameters(make("resnext34-2x32"))


class TestStateOfOldCheckpoints:
    """Names that runs in users' folders have: a renamed layer could not load them any more."""

    NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    OUTSIDE = ("normalize.mean", "normalize.deviation", "classifier.weight", "classifier.bias")

    def test_compact_resnet(self) -> None:
        convolutions = [f"features.{i}" for i in (0, 1, 3, 5)]
        convolutions += [f"features.{i}.body.{j}" for i in (2, 4, 6) for j in (0, 1)]
        expected = {*self.OUTSIDE, *(f"{name}.0.weight" for name in convolutions)}
        expected |= {f"{name}.1.{entry}" for name in convolutions for entry in self.NORM}
        assert set(make("compact-resnet", width=2).state_dict()) == expected

    def test_preactresnet18(self) -> None:
        blocks = [f"features.{i}" for i in range(1, 9)]
        norms = [f"{block}.{order}_norm" for block in blocks for order in ("first", "second")]
        expected = {*self.OUTSIDE, "features.0.weight"}
        expected |= {f"{block}.{order}.weight" for block in blocks for order in ("first", "second")}
        expected |= {f"features.{i}.shortcut.weight" for i in (3, 5, 7)}
        expected |= {f"{norm}.{entry}" for norm in (*norms, "features.9") for entry in self.NORM}
        assert set(make("preactresnet18", width=2).state_dict()) == expected


class TestImages:
    @pytest.mark.parametrize("name", list(ARCHITECTURES))
    @pytest.mark.parametrize("sigmoid", [False, True])
    @pytest.mark.parametrize(
        ("shape", "classes"), [(COLOUR, 10), (GREY, 10), ((3, 17, 21), 2)], ids=("colour", "grey", "odd")
    )
    def test_logits(self, name: str, shape: tuple[int, int, int], classes: int, sigmoid: bool) -> None:
        model = make(name, shape, classes, width=4, pre_logit_sigmoid=sigmoid)
        images = torch.rand(2, *shape)
        assert model.training
        logits = model(images)
        assert logits.shape == (2, classes)
        assert torch.isfinite(logits).all()
        model.eval()
        assert torch.equal(model(images), model(images))
        torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", [(3, 64, 64), (1, 64, 64), (3, 32, 32)])
    def test_logits_of_torchvision(self, shape: tuple[int, int, int]) -> None:
        model = make("squeezenet1_1", shape, 5, pre_logit_sigmoid=True)
        assert model(torch.rand(2, *shape)).shape == (2, 5)
        assert isinstance(model.get_submodule("network.classifier.1.sigmoid.norm"), nn.BatchNorm2d)

    def test_a_grey_image_is_three_equal_channels_to_torchvision(self) -> None:
        grey = make("squeezenet1_1", (1, 64, 64)).eval()
        colour = make("squeezenet1_1", (3, 64, 64)).eval()
        state = {name: value for name, value in grey.state_dict().items() if "normalize" not in name}
        colour.load_state_dict(state, strict=False)
        images = torch.rand(2, 1, 64, 64)
        assert torch.equal(grey(images), colour(images.expand(-1, 3, -1, -1)))

    @pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
    def test_inceptions_give_logits_alone(self, name: str) -> None:
        with torch.device("meta"):
            model = make(name, (3, 96, 96), 4).train()
            assert model(torch.rand(2, 3, 96, 96)).shape == (2, 4)

    def test_transformers_are_made_for_the_images(self) -> None:
        with torch.device("meta"):
            assert make("vit_b_16", (3, 48, 48), 4)(torch.rand(2, 3, 48, 48)).shape == (2, 4)

    def test_transformers_can_be_differentiated_twice(self) -> None:
        small = partial(models.VisionTransformer, 32, 16, 1, 2, 8, 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "get_model", lambda *_, num_classes, **__: small(num_classes=num_classes))
            model = make("vit_b_16", classes=3).eval()
        nn.init.normal_(model.get_submodule("network.heads.head").get_parameter("weight"))
        images = torch.rand(2, 3, 32, 32, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(images)[:, 0].sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), images)
        assert second.abs().max() > 0

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("allcnn-c", (3, 8, 8), r"allcnn-c does not take images of 8 x 8 pixels \(.*\)\. Bring them to"),
            ("cw-cnn", (1, 12, 12), "cw-cnn does not take images of 12 x 12 pixels"),
            ("verification-cnn", (3, 2, 2), "verification-cnn does not take images of 2 x 2 pixels"),
            ("resnet34", (3, 3, 3), "resnet34 does not take images of 3 x 3 pixels"),
            ("densenet121", (1, 28, 28), "densenet121 does not take images of 28 x 28 pixels"),
            ("vit_b_16", (3, 60, 60), r"60 x 60 pixels \(Input shape indivisible by patch size!\)"),
            ("vit_b_16", (3, 32, 48), "vit_b_16 does not take images of 32 x 48 pixels"),
            ("resnet18", (2, 64, 64), "resnet18 takes images of 1 or 3 channels, these have 2"),
        ],
    )
    def test_refused(self, name: str, shape: tuple[int, int, int], message: str) -> None:
        with torch.device("meta"), pytest.raises(UsageError, match=message):
            make(name, shape)

    def test_too_large_for_an_onnx_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(architectures, "LARGEST", 1000)
        with pytest.raises(UsageError, match="verification-cnn has more than the 2 GiB of weights"):
            make("verification-cnn")


def test_building_draws_nothing_but_the_weights() -> None:
    torch.manual_seed(3)
    made, after = make("compact-resnet", width=2), torch.rand(1)
    torch.manual_seed(3)
    plain = CompactResNet([0.5] * 3, [0.2] * 3, 10, width=2)
    assert torch.equal(after, torch.rand(1))
    for name, value in plain.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)


def test_normalization_is_inside() -> None:
    layer = Normalize([0.5, 0.25], [0.5, 0.25])
    image = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    assert layer(image).flatten().tolist() == [1.0, 1.0]
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "deviation"}  # a checkpoint carries it


@pytest.mark.parametrize("name", [*ARCHITECTURES, "resnet18"])
def test_normalization_comes_first(name: str) -> None:
    """Twice the deviation halves what every other layer sees."""
    options: dict[str, Any] = {"num_classes": 3, "size": (32, 32)}
    torch.manual_seed(0)
    one = build(name, mean=[0.0] * 3, deviation=[1.0] * 3, **options).eval()
    torch.manual_seed(0)
    other = build(name, mean=[0.5] * 3, deviation=[2.0] * 3, **options).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(one(images), other(2 * images + 0.5), rtol=1e-4, atol=1e-5)


class TestBranches:
    def test_are_averaged(self) -> None:
        """Branches with equal weights are as one."""
        torch.manual_seed(0)
        one, many = BranchBlock(4, 1).eval(), BranchBlock(4, 3).eval()
        with torch.no_grad():
            for single, repeated in zip(one.parameters(), many.parameters(), strict=True):
                single.uniform_(-0.5, 0.5)
                repeated.copy_(torch.cat([single] * 3))
        features = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(many(features), one(features))

    def test_read_all_channels_and_nothing_of_one_another(self) -> None:
        block = BranchBlock(2, 2).eval()
        weight = block.first.get_parameter("0.weight")
        with torch.no_grad():
            block.second_norm.weight[2:] = 0  # the second branch is silent
            features = torch.rand(1, 2, 5, 5)
            silent = block(features)
            weight[2:] += 1
            assert torch.equal(block(features), silent)
            weight[:2] += 1
            assert not torch.equal(block(features), silent)

    def test_the_image_is_halved_between_stages(self) -> None:
        model = ResNet34([0.5], [0.2], 2, width=2, blocks=1)
        features = model.features(torch.rand(1, 1, 20, 20))
        assert features.shape == (1, 8, 5, 5)


class TestPreLogitSigmoid:
    def test_is_bounded_and_odd(self) -> None:
        layer = PreLogitSigmoid(3).eval()
        with torch.no_grad():
            layer.scale.fill_(0.7)
        features = 10 * torch.randn(50, 3)
        bounded = layer(features)
        assert bounded.abs().max() <= 0.7
        assert bounded.abs().max() > 0.69
        assert torch.equal(layer(-features), -bounded)
        assert torch.equal(layer(torch.zeros(1, 3)), torch.zeros(1, 3))
        expected = 0.7 * torch.tanh(features / (1 + 1e-5) ** 0.5 / 0.7)
        torch.testing.assert_close(bounded, expected)

    def test_has_one_parameter_that_learns_and_no_slope_above_1(self) -> None:
        layer = PreLogitSigmoid(4)
        ((name, scale),) = layer.named_parameters()
        assert (name, scale.shape, scale.item()) == ("scale", torch.Size([]), 1.0)
        features = torch.randn(20, 4, requires_grad=True)
        layer(features).square().sum().backward()
        u = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
        slope = u.tanh() - u / u.cosh().square()  # of t tanh(u / t) by t, at t = 1
        assert scale.grad is not None
        torch.testing.assert_close(scale.grad, (2 * u.tanh() * slope).sum())
        layer = PreLogitSigmoid(4).eval()
        x = torch.linspace(-3, 3, 101).view(-1, 1).expand(-1, 4).clone().requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert 0 < x.grad.min() < x.grad.max() <= 1

    def test_normalizes_first(self) -> None:
        features = 100 + 50 * torch.randn(200, 2)
        layer = PreLogitSigmoid(2)
        expected = torch.tanh((features - features.mean(0)) / features.std(0, correction=0))
        torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", [*ARCHITECTURES, "resnet18"])
    def test_bounds_the_logits_of_any_architecture(self, name: str) -> None:
        torch.manual_seed(0)
        model = make(name, pre_logit_sigmoid=True).eval()
        (sigmoid,) = (layer for layer in model.modules() if isinstance(layer, PreLogitSigmoid))
        *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
        with torch.no_grad():
            sigmoid.scale.fill_(1e-3)
            largest = 1e-3 * last.weight.abs().sum(1)
            far = model(1e4 * torch.rand(4, 3, 32, 32)) - last.bias
        assert (far.abs() <= largest * (1 + 1e-4)).all()

    def test_weight_decay_leaves_its_scale_alone(self) -> None:
        assert all(weight.dim() <= 1 for weight in PreLogitSigmoid(3).parameters())

    def test_needs_a_last_layer_of_as_many_outputs_as_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ARCHITECTURES, "none", lambda *_: nn.Flatten())
        with pytest.raises(UsageError, match=r"--pre-logit-sigmoid: the last layer.*Choose another --arch"):
            make("none", pre_logit_sigmoid=True)


class TestNames:
    def test_torchvision_with_and_without_prefix(self) -> None:
        with torch.device("meta"):
            plain, prefixed = make("resnet50"), make("torchvision:resnet50")
        assert set(plain.state_dict()) == set(prefixed.state_dict())

    def test_ours_comes_first(self) -> None:
        with torch.device("meta"):
            ours, theirs = make("resnet34"), make("torchvision:resnet34")
        assert isinstance(ours, ResNet34)
        assert parameters(theirs) == 21_289_802

    @pytest.mark.parametrize("name", ["resnet", "torchvision:", "torchvision:cw-cnn", "Resnet50", ""])
    def test_an_unknown_one_lists_the_known(self, name: str) -> None:
        with pytest.raises(UsageError, match=rf"unknown architecture '{name}': expected one of") as caught:
            architectures.check(name)
        text = str(caught.value)
        assert all(known in text for known in (*ARCHITECTURES, *names()))
        assert "\n" not in text

    @pytest.mark.parametrize(
        ("name", "width", "message"),
        [
            ("compact-resnet", 0, "--width is 0: expected 1 channel or more"),
            (
                "resnet50",
                8,
                "--width is 8: resnet50 has no width to choose. compact-resnet, preactresnet18, ",
            ),
        ],
    )
    def test_widths_that_cannot_be(self, name: str, width: int, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Settings(architecture=name, width=width).check()
        with pytest.raises(UsageError, match=message):
            make(name, width=width)

    def test_help_names_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in ARCHITECTURES)
        assert "torchvision:resnet34" in text
        assert "--width" in text
        assert "--pre-logit-sigmoid" in text

    def test_the_help_states_widths_and_sizes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--help"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        for name in ARCHITECTURES:
            (line,) = (words for words in lines if words and words[0] == name)
            assert parameters(make(name, width=int(line[1]))) == parameters(make(name))
            assert f"{parameters(make(name)) / 1e6:.1f}" == line[2]

    def test_torchvision_is_loaded_for_its_own_networks_only(self) -> None:
        code = (
            "import sys\nfrom guard.training.settings import Settings\n"
            "Settings(architecture='resnet34').check()\n"
            "print('torchvision' in sys.modules)\nSettings(architecture='resnet50').check()\n"
            "print('torchvision' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.split() == ["False", "True"]


EXPORTED: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "compact-resnet": ("compact-resnet", (3, 16, 16), {"width": 4}),
    "preactresnet18": ("preactresnet18", (3, 16, 16), {"width": 4}),
    "resnet34": ("resnet34", (3, 16, 16), {"width": 4}),
    "resnext34-2x32": ("resnext34-2x32", (3, 16, 16), {"width": 4}),
    "resnext34-4x32": ("shallow", (3, 16, 16), {"width": 4}),
    "allcnn-c": ("allcnn-c", (3, 20, 20), {"width": 6}),
    "verification-cnn": ("verification-cnn", GREY, {"width": 4}),
    "cw-cnn": ("cw-cnn", GREY, {"width": 4}),
    "sigmoid": ("compact-resnet", (3, 16, 16), {"width": 4, "pre_logit_sigmoid": True}),
    "torchvision": ("squeezenet1_1", (1, 64, 64), {"pre_logit_sigmoid": True}),
}


def settled(name: str, shape: tuple[int, int, int], options: dict[str, Any]) -> nn.Module:
    """A network whose logits differ between random images by about 1, with their running statistics."""
    torch.manual_seed(0)
    model = make(name, shape, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = None  # the mean of all passes
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        model.train()(torch.rand(16, *shape))
        model.eval()
        last.weight /= model(torch.rand(16, *shape)).std(0).mean()
        if isinstance(last, nn.Linear):
            last.bias.sub_(model(torch.rand(16, *shape)).mean(0))
    return model


def rows_by_torch(model: nn.Module, images: Array) -> Array:
    """The Jacobian of the probabilities, (B, K, C, H, W), in float64."""
    double = copy.deepcopy(model).double().eval()
    points = torch.tensor(images, dtype=torch.float64, requires_grad=True)
    probabilities = double(points).softmax(1)
    rows = [
        torch.autograd.grad(probabilities[:, i].sum(), points, retain_graph=True)[0]
        for i in range(probabilities.shape[1])
    ]
    return torch.stack(rows, 1).numpy()


@pytest.mark.parametrize("case", list(EXPORTED))
def test_exports_wraps_and_is_guarded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "shallow", partial(ResNet34, width=32, branches=4, blocks=1))
    name, shape, options = EXPORTED[case]
    model = settled(name, shape, options)
    graph = to_onnx(model, shape)
    assert compare(model, graph, shape) < 1e-4
    onnx.save(graph, tmp_path / "model.onnx")
    wrap(tmp_path / "model.onnx", tmp_path / "bundle", Outside())
    wrapped = onnx.load(bundle.load(tmp_path / "bundle").path / "model.onnx")
    guarded = session_of(guarded_model(wrapped, "jacobian"), threads=1)
    vjp = session_of(vjp_model(wrapped), threads=1)
    rng = np.random.default_rng(0)
    images = rng.random((12, *shape), dtype=np.float32)
    rows = rows_by_torch(model, images)
    jacobian, logits, probabilities = guarded.run(["jacobian", "logits", "probabilities"], {"images": images})
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    top = logits.argsort(1)[:, -2:]
    lengths = np.sqrt((rows**2).sum((2, 3, 4)))
    longest = np.take_along_axis(lengths, top, 1).max(1)
    first = top[:, -1]
    cotangents = np.eye(logits.shape[1], dtype=np.float32)[first] - probabilities
    (gradients,) = vjp.run(["gradient"], {"images": images, "cotangents": cotangents})
    chosen = rows[np.arange(len(images)), first]
    found = gradients * probabilities[np.arange(len(images)), first].reshape(-1, 1, 1, 1)
    errors = np.sqrt(((found - chosen) ** 2).sum((1, 2, 3))) / lengths[np.arange(len(images)), first]
    # A ReLU input within rounding of 0 may switch differently: on few of the images, and by no wrong rule.
    assert np.median(errors) < 1e-4
    assert np.median(np.abs(jacobian / longest - 1)) < 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of 12 x 12 pixels."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "grey.npz"
    contents: dict[str, Any] = {}
    for split in ("train", "test"):
        contents[f"x_{split}"] = rng.integers(0, 256, (40, 12, 12, 1), np.uint8)
        contents[f"y_{split}"] = rng.integers(0, 3, 40)
    np.savez(path, **contents)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--width", "5", "--pre-logit-sigmoid", "--regularizer", "tulip:eps=0.05,weight=0.01"]
    assert main([*command(data, out), *flags]) == 0
    return out


def command(data: Path, out: Path) -> list[str]:
    fixed = ["--epochs", "1", "--batch-size", "10", "--precision", "float32", "--arch", "allcnn-c"]
    return ["train", "--dataset", str(data), "--out", str(out), *fixed]


class TestRuns:
    def test_remember_what_export_needs(self, run: Path, tmp_path: Path) -> None:
        config = read_config(run)
        assert config["settings"]["width"] == 5
        assert config["settings"]["pre_logit_sigmoid"] is True
        words = train_command(config)
        assert "--arch allcnn-c --width 5 --pre-logit-sigmoid" in words
        export(run, tmp_path / "bundle")
        operators = {node.op_type for node in onnx.load(tmp_path / "bundle" / "model.onnx").graph.node}
        assert "Tanh" in operators
        assert "allcnn-c of width 5 with a pre-logit sigmoid" in (tmp_path / "bundle" / "card.md").read_text()

    def test_are_not_resumed_with_another_width(
        self, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--width", "4", "--pre-logit-sigmoid", "--regularizer", "tulip:eps=0.05,weight=0.01"]
        assert main([*command(data, run), *flags, "--resume"]) == 2
        assert "was started with --width 5, now it is 4" in capsys.readouterr().err

    def test_of_before_these_settings_resume_and_export(self, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        words = [*command(data, out), "--arch", "verification-cnn"]
        assert main(words) == 0
        path = out / "config.json"
        config = json.loads(path.read_text())
        del config["settings"]["width"], config["settings"]["pre_logit_sigmoid"]
        path.write_text(json.dumps(config))
        assert main([*words, "--resume"]) == 0
        assert "--width" not in train_command(read_config(out))
        export(out, tmp_path / "bundle")

    def test_that_cannot_be_leave_nothing_behind(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "run"
        assert main([*command(data, out), "--arch", "cw-cnn"]) == 2
        message = capsys.readouterr().err
        assert "cw-cnn does not take images of 12 x 12 pixels" in message
        assert message.count("\n") == 1
        assert not out.exists()
