"""From a run to a bundle: the ONNX model says what torch says."""

import argparse
import json
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from guard import bundle
from guard.cli import main
from guard.cli.train import add_parser
from guard.errors import BundleError, ModelError, TrainingError
from guard.export import compare, export, to_onnx, train_command
from guard.files import sha256
from guard.training import architectures, checkpoint
from guard.training.architectures import CompactResNet, PreActResNet18
from guard.training.loop import read_config, read_metrics
from guard.training.settings import Settings


class Small(CompactResNet):
    def __init__(self, mean: list[float], deviation: list[float], num_classes: int) -> None:
        super().__init__(mean, deviation, num_classes, width=4)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, "small", Small)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    contents: dict[str, Any] = {"class_names": np.array(["red", "green", "blue"])}
    for split, count in (("train", 60), ("test", 20)):
        labels = rng.integers(0, 3, count)
        images = rng.integers(0, 120, (count, 12, 12, 3))
        images[np.arange(count), :, :, labels] += 130
        contents |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    with path.open("wb") as file:
        np.savez(file, **contents)
    return path


def train_arguments(data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--arch", "small", "--batch-size", "10", "--held-out", "10", "--crop", "1", "--cutout", "2"]
    return ["train", "--dataset", str(data), "--out", str(out), "--epochs", "1", *fixed, *more]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_arguments(data, out, "--regularizer", "tulip:eps=0.05,weight=0.01")) == 0
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "colours"
    assert main(["export", str(run), "--out", str(out)]) == 0
    return out


def trained_model(run: Path) -> torch.nn.Module:
    config = json.loads((run / "config.json").read_text())["data"]
    model = Small(config["mean"], config["deviation"], 3)
    model.load_state_dict(checkpoint.load(run / "checkpoint.pt").model)
    return model.eval()


class TestBundle:
    def test_is_one(self, exported: Path, run: Path) -> None:
        found = bundle.load(exported)
        assert found.manifest.name == "colours"
        assert found.manifest.class_names == ["red", "green", "blue"]
        assert found.manifest.input == bundle.InputShape(channels=3, height=12, width=12)
        assert found.manifest.preprocessing == bundle.Preprocessing(colour="rgb", resize=12)
        assert found.calibration is None
        assert set(found.manifest.files) == {"model.onnx", "card.md"}
        made = found.manifest.provenance
        assert made["training"]["settings"]["regularizers"] == ["tulip:eps=0.05,weight=0.01"]
        assert len(made["training"]["data"]["digest"]) == 64
        assert made["epochs"] == {"done": 1, "planned": 1}
        assert made["seed"] == 0

    def test_says_what_torch_says(self, exported: Path, run: Path) -> None:
        session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
        model = trained_model(run)
        for size in (1, 4, 13):
            images = np.random.default_rng(size).random((size, 3, 12, 12), dtype=np.float32)
            (logits,) = session.run(["logits"], {"images": images})
            with torch.no_grad():
                expected = model(torch.from_numpy(images)).numpy()
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    def test_has_the_form_of_all_bundles(self, exported: Path) -> None:
        model = onnx.load(exported / "model.onnx")
        (images,), (logits,) = model.graph.input, model.graph.output
        assert (images.name, logits.name) == ("images", "logits")
        batch, *sides = images.type.tensor_type.shape.dim
        assert batch.dim_param
        assert [side.dim_value for side in sides] == [3, 12, 12]
        assert model.opset_import[0].version >= 17
        operators = {node.op_type for node in model.graph.node}
        assert "BatchNormalization" not in operators
        assert {entry.domain for entry in model.opset_import} == {""}

    def test_tells_nothing_of_the_machine(self, exported: Path) -> None:
        content = (exported / "model.onnx").read_bytes()
        assert b".py" not in content
        assert str(Path(torch.__file__).parent).encode() not in content

    def test_card(self, exported: Path, run: Path, data: Path) -> None:
        card = (exported / "card.md").read_text()
        *_, tested = read_metrics(run)
        for part in (
            "# colours",
            f"guard train --dataset {data.name} --arch small --regularizer tulip:eps=0.05,weight=0.01",
            f"{tested['test_accuracy']:.2%} of 20 clean images",
            "| held out | 10 training images |",
        ):
            assert part in card

    def test_the_card_names_the_command_that_makes_the_weights(self, run: Path) -> None:
        config = read_config(run)
        settings = {"schedule": "cosine", "mirror": False, "padding": 0, "momentum": 0.5, "nesterov": False}
        config["settings"] |= settings
        config["provenance"]["arguments"]["dataset"] = "/some/where/my photos"
        words = shlex.split(train_command(config))
        assert words[:2] == ["guard", "train"]
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        given = parser.parse_args([*words[1:], "--out", "x"])
        assert given.dataset == "my photos"
        assert (given.schedule, given.mirror, given.padding, given.momentum) == ("cosine", False, 0, 0.5)
        assert given.regularizers == ["tulip:eps=0.05,weight=0.01"]
        config["provenance"]["processes"] = 2
        assert train_command(config).startswith("torchrun --nproc_per_node=2 -m guard train --dataset")
        # Every setting has its flag, which may be left out where it is the default.
        defaults = asdict(Settings())
        for name, value in config["settings"].items():
            assert vars(given)[name] == value or (vars(given)[name] is None and value == defaults[name]), name

    def test_takes_no_other_folder(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(BundleError, match="holds files but is no bundle"):
            export(run, tmp_path)
        with pytest.raises(BundleError, match="is a file"):
            export(run, tmp_path / "notes.txt")

    def test_needs_a_run_with_a_checkpoint(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="is no run"):
            export(tmp_path / "nowhere", tmp_path / "out")
        (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
        with pytest.raises(TrainingError, match="has no checkpoint yet"):
            export(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_of_a_run_from_before_most_settings(self, exported: Path, run: Path, tmp_path: Path) -> None:
        older = Path(shutil.copytree(run, tmp_path / "run"))
        config = json.loads((run / "config.json").read_text())
        first = (
            "architecture",
            "regularizers",
            "epochs",
            "batch_size",
            "held_out",
            "seed",
            "padding",
            "cutout",
        )
        config["settings"] = {name: config["settings"][name] for name in first}
        (older / "config.json").write_text(json.dumps(config))
        export(older, tmp_path / "bundle")
        assert sha256(tmp_path / "bundle" / "model.onnx") == sha256(exported / "model.onnx")
        assert "--schedule one-cycle --warmup 0.2" in (tmp_path / "bundle" / "card.md").read_text()

    def test_of_a_checkpoint_of_another_network_is_refused(self, run: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run, tmp_path / "run"))
        config = json.loads((run / "config.json").read_text())
        config["data"]["class_names"].append("yellow")
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(TrainingError, match="belongs to another network"):
            export(other, tmp_path / "bundle")


def test_preactresnet_and_weights_that_differ() -> None:
    model = PreActResNet18([0.4], [0.2], 5, width=4)
    model(torch.rand(32, 1, 8, 8))  # running statistics other than 0 and 1
    graph = to_onnx(model, (1, 8, 8))
    assert compare(model, graph, (1, 8, 8)) < 1e-5
    with torch.no_grad():
        model.classifier.bias.add_(0.01)
    with pytest.raises(
        ModelError, match=r"differs from torch by 0\.\d+ of the largest logit at batch size 1"
    ):
        compare(model, graph, (1, 8, 8))
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="differs from torch by nan"):
        compare(model, graph, (1, 8, 8))


class TestCommands:
    def test_train_and_resume(
        self, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "run"
        flags = ("--regularizer", "tulip:eps=0.05,weight=0.01", "--json")
        assert main(train_arguments(data, out, *flags)) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["run"] == str(out)
        assert record["epoch"] == 1
        assert 0 <= record["test_accuracy"] <= 1
        assert main(train_arguments(data, out, *flags)) == 2
        assert "holds a run already. Give --resume" in capsys.readouterr().err
        assert main(train_arguments(data, out, *flags, "--resume")) == 0
        one, other = (checkpoint.load(folder / "checkpoint.pt").model for folder in (run, out))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_export_over_a_bundle(
        self, exported: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = Path(shutil.copytree(exported, tmp_path / "bundle"))
        assert main(["export", str(run), "--out", str(out), "--name", "again", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["name"] == bundle.load(out).manifest.name == "again"
        assert record["difference"] < 1e-4
        assert record["sha256"] == sha256(out / "model.onnx") == sha256(exported / "model.onnx")

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            (["train", "--out", "x"], 2, "--dataset"),
            (["train", "--dataset", "cifar11", "--out", "x"], 1, "'cifar11' is neither"),
            (["train", "--dataset", "DATA", "--out", "x", "--arch", "vgg"], 2, "unknown architecture 'vgg'"),
            (["train", "--dataset", "DATA", "--out", "x", "--regularizer", "tulip"], 2, "tulip needs eps"),
            (["train", "--dataset", "DATA", "--out", "x", "--epochs", "0"], 2, "--epochs is 0"),
            (["train", "--dataset", "DATA", "--out", "x", "--device", "tpu9"], 2, "--device tpu9"),
            (["train", "--dataset", "DATA", "--out", "x", "--threads", "0"], 2, "--threads is 0"),
            (["export", "nowhere", "--out", "x"], 1, "nowhere: is no run"),
        ],
    )
    def test_refuse_in_one_line(
        self,
        arguments: list[str],
        status: int,
        message: str,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main([str(data) if word == "DATA" else word for word in arguments]) == status
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
