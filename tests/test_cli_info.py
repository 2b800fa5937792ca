"""`guard info` on data sets, and with the bounds that weights give."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from guard.cli import main
from tests.networks import convolutional, model

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    """Training images of one pixel: black, the same with another label, 51 and 102; test images 0 and 255."""
    path = tmp_path / "greys.npz"
    np.savez(
        path,
        x_train=np.array([0, 0, 51, 102], np.uint8).reshape(4, 1, 1, 1),
        y_train=np.array([0, 1, 1, 0]),
        x_test=np.array([0, 255], np.uint8).reshape(2, 1, 1, 1),
        y_test=np.array([0, 1]),
        class_names=np.array(["dark", "light"]),
    )
    return path


def test_facts_of_the_training_split(greys: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "curve.svg"
    assert main(["info", "--dataset", str(greys), "--eps", "1/10", "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["n"], record["classes"], record["split"], record["norm"]) == (4, 2, "train", "l2")
    assert record["closest"] == {
        "images": [0, 1],
        "labels": ["dark", "light"],
        "distance": 0.0,
        "lipschitz": None,
    }
    assert record["conflicting"] == [0, 1]
    assert record["closest_without_conflicting"]["images"] == [2, 3]
    assert record["closest_without_conflicting"]["lipschitz"] == pytest.approx(5)
    assert record["nearest"]["other_label"]["mean"] == pytest.approx(0.1)
    assert record["within"] == {"eps": 0.1, "any_label": 4, "other_label": 4}
    curve = record["stability"]
    assert (curve["reached"][0], curve["reached"][-1]) == (0.5, 1.0)
    assert all(half >= whole for half, whole in zip(curve["halfway"], curve["reached"], strict=True))
    ET.parse(out)


def test_facts_are_one_screen(greys: Path, capsys: Captured) -> None:
    assert main(["info", "--dataset", str(greys)]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "infinite: image 0 (dark) is image 1 (light)" in text
    assert "2 of them one with another label: 0 (dark), 1" in " ".join(text.split())
    assert "without those 5 = 1 / 0.2, the l2 distance of images 2 (light) and 3 (dark)" in " ".join(
        text.split()
    )


def test_facts_of_the_test_split_in_linf(greys: Path, capsys: Captured) -> None:
    words = ["info", "--dataset", str(greys), "--split", "test", "--norm", "linf", "--json"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["closest"]["lipschitz"] == 1
    assert record["conflicting"] == []
    assert record["closest_without_conflicting"] == record["closest"]


def test_a_folder_of_classes(tmp_path: Path, capsys: Captured) -> None:
    for name, grey in (("a", 0), ("b", 51)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (1, 1), (grey, 0, 0)).save(tmp_path / "photos" / name / "one.png")
    assert main(["info", "--dataset", str(tmp_path / "photos"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["closest"]["lipschitz"] == pytest.approx(5)
    assert main(["info", "--dataset", str(tmp_path / "photos" / "a")]) == 1
    assert "the images have no labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "--split is about a data set: give --dataset D with it."),
        (["--out", "x.svg"], "--out is about a data set"),
        (["models/cifar10", "--dataset", "mnist"], "--dataset is about images: give it without BUNDLE"),
        (
            ["--bounds", "--dataset", "mnist"],
            "--dataset is about images: give it without BUNDLE and --bounds",
        ),
        (["--dataset", "mnist", "--out", "x.png"], "--out x.png: expected a name that ends in .svg."),
        (["--dataset", "mnist", "--eps", "1/0"], "argument --eps: expected a positive number"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: Captured) -> None:
    assert main(["info", *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_one_class_is_refused(tmp_path: Path, capsys: Captured) -> None:
    np.savez(tmp_path / "one.npz", x_train=np.zeros((3, 2, 2, 1), np.uint8), y_train=np.zeros(3, np.int64))
    assert main(["info", "--dataset", str(tmp_path / "one.npz")]) == 1
    assert "all 3 images are of one class" in capsys.readouterr().err


def test_bounds_stand_beside_what_is_there(tmp_path: Path, capsys: Captured) -> None:
    onnx.save(convolutional(), tmp_path / "net.onnx")
    assert main(["wrap", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "b"), "--bounds", "--json"]) == 0
    bounds = json.loads(capsys.readouterr().out)["bounds"]
    assert set(bounds) == {"layers", "paths", "lemma"}
    assert bounds["layers"]["l2"]["margin"] > bounds["layers"]["l2"]["logits"] > 0
    assert main(["info", str(tmp_path / "b"), "--bounds"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"product of layer norms {bounds['layers']['l2']['margin']:.3g} (sound, up to rounding)" in text
    assert main(["info", str(tmp_path / "b")]) == 0
    assert "guard info --bounds" in capsys.readouterr().out


def test_operators_without_a_bound_are_named(tmp_path: Path, capsys: Captured) -> None:
    nodes = [
        helper.make_node("Mul", ["images", "images"], ["squared"]),
        helper.make_node("Flatten", ["squared"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"]),
    ]
    onnx.save(model(nodes, {"weight": np.eye(4, 3, dtype=np.float32)}, (1, 2, 2), 3), tmp_path / "net.onnx")
    assert (
        main(["wrap", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "b"), "--outputs", "logits"]) == 0
    )
    assert main(["info", str(tmp_path / "b"), "--bounds"]) == 0
    assert "product of layer norms not computed: Mul" in " ".join(capsys.readouterr().out.split())
