"""What a command writes never takes the place of what it read, or of a part of a bundle or of results."""

import os
import shutil
from pathlib import Path

import pytest

from guard.cli import main
from tests.results_folder import planted
from tests.serving import write_bundle

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "models" / "cifar10" / "samples" / "cat.png"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "small")


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "card.md"])
@pytest.mark.parametrize("command", ["graph", "certify"])
def test_a_bundle_is_not_written_over(
    bundle: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = bundle / name
    target.touch()
    before = target.read_bytes()
    images = [str(SAMPLE)] if command == "certify" else []
    assert main([command, str(bundle), *images, "--out", str(target)]) == 2
    assert "would be lost. Give another name ending in" in capsys.readouterr().err
    assert target.read_bytes() == before


def test_an_image_is_not_written_over(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(shutil.copy(SAMPLE, tmp_path / "cat.png"))
    assert main(["certify", str(bundle), str(image), "--out", str(image)]) == 2
    assert "holds something of another kind, which would be lost" in capsys.readouterr().err
    assert image.read_bytes() == SAMPLE.read_bytes()


def test_what_was_written_before_is_written_again(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "guarded.onnx"
    assert main(["graph", str(bundle), "--out", str(out)]) == 0
    out.write_bytes(b"an older one")
    assert main(["graph", str(bundle), "--out", str(out)]) == 0
    assert out.stat().st_size > 100


@pytest.mark.parametrize("command", [["graph"], ["certify", str(SAMPLE)], ["info", "--dataset", "none.npz"]])
def test_what_cannot_be_written_is_said_before_any_work(
    bundle: Path,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GUARD_MODEL", str(bundle))
    suffix = {"graph": "onnx", "certify": "csv", "info": "svg"}[command[0]]
    (tmp_path / "file").touch()
    target = tmp_path / "file" / f"out.{suffix}"
    assert main([*command, "--out", str(target)]) == 2
    assert f"nothing can be written to {tmp_path / 'file'}. Choose another" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main([*command, "--out", str(tmp_path / "deep" / "er" / f"out.{suffix}")]) == 2
    assert f"nothing can be written to {tmp_path}. Choose another" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


def test_a_picture_does_not_replace_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "curve.svg"
    folder.mkdir()
    assert main(["info", "--dataset", "none.npz", "--out", str(folder)]) == 2
    assert "is a folder: give the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["results.json", "clean.npz"])
def test_results_are_not_written_over_by_their_report(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = planted(tmp_path / "results").path / name
    before = target.read_bytes()
    assert main(["report", str(target.parent), "--out", str(target)]) == 2
    assert "would be lost. Give another name ending in .html" in capsys.readouterr().err
    assert target.read_bytes() == before
