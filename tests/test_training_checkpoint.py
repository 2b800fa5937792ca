"""What a run leaves behind: whatever stops it, it goes on to the same weights, bit by bit."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guard import bundle
from guard.cli import main
from guard.errors import TrainingError
from guard.training import architectures, checkpoint
from guard.training.checkpoint import CHECKPOINT, Checkpoint, ProcessState
from guard.training.loop import Metrics, Run, train
from tests import processes
from tests.colours import TINY, WithDropout, dataset


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", WithDropout)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """`guard train` of eight steps an epoch."""
    data = dataset()
    np.savez(tmp_path / "a.npz", x_train=data.images, y_train=data.labels)  # type: ignore[arg-type]
    command = ["train", "--dataset", str(tmp_path / "a.npz"), "--regularizer", "tulip:eps=0.1,weight=0.1"]
    command += ["--batch-size", "8", "--epochs", "2", "--held-out", "0", "--crop", "1", "--cutout", "2"]
    return [*command, "--threads", "1", "--device", "cpu", "--precision", "float32", "--debug"]


def equal(first: Path, second: Path) -> bool:
    one, other = (checkpoint.load(out / CHECKPOINT).model for out in (first, second))
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    one_step = Run.one_step

    def stopped(run: Run, learning_rate: float) -> Metrics:
        if run.done == step:
            signal.raise_signal(number)
        return one_step(run, learning_rate)

    monkeypatch.setattr(Run, "one_step", stopped)


def test_killed_inside_an_epoch(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "guard", *arguments, "--out", str(tmp_path / "run")]
    process = subprocess.Popen([*command, "--checkpoint-seconds", "0"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / CHECKPOINT).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    state = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert (state.epoch, 0 < state.step < 8) == (0, True)
    assert main([*arguments, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert equal(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*"))


def test_asked_to_stop_where_an_epoch_is_one_step(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[arguments.index("--batch-size") + 1] = "64"
    arguments[arguments.index("--epochs") + 1] = "6"
    with monkeypatch.context() as patch:
        stop_at(2, patch, signal.SIGTERM)
        assert main([*arguments[:-1], "--out", str(tmp_path / "run")]) == 130
    assert "stopped by SIGTERM after epoch 3; all is saved: go on with" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / CHECKPOINT).epoch == 3
    assert main([*arguments, "--out", str(tmp_path / "run"), "--resume"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(
    number: signal.Signals,
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(10, patch, number)
        assert main([*arguments[:-1], "--out", str(tmp_path / "run")]) == 130
    (line,) = re.findall("guard: error.*", capsys.readouterr().err)
    assert line == (
        f"guard: error: stopped by {number.name} after epoch 2, step 3 of 8; all is saved: go on with "
        "--resume."
    )
    assert before == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    state = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert (state.epoch, state.step) == (1, 3)
    assert main([*arguments, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert equal(tmp_path / "run", tmp_path / "whole")


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(2, monkeypatch, signal.SIGINT)
    stop_at(2, monkeypatch, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        train(dataset(), TINY, tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def killed_while_writing(out: Path) -> None:
    save, calls = torch.save, 0

    def half(content: object, path: Path) -> None:
        nonlocal calls
        calls += 1
        save(content, path)
        if calls == 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    pytest.MonkeyPatch().setattr(torch, "save", half)
    train(dataset(), TINY, out, checkpoint_seconds=0.0)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    assert processes.run(killed_while_writing, tmp_path / "run", count=1) == [-signal.SIGKILL]
    state = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert (state.epoch, state.step) == (0, 2)
    assert len(list((tmp_path / "run").glob(".*.partial-*"))) == 1
    torch.set_num_threads(1)
    train(dataset(), TINY, tmp_path / "run", resume=True)
    train(dataset(), TINY, tmp_path / "whole")
    assert equal(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_step, limits = Run.one_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(run: Run, learning_rate: float) -> Metrics:
        if run.done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return one_step(run, learning_rate)

    monkeypatch.setattr(Run, "one_step", fills)
    try:
        with pytest.raises(
            TrainingError, match=r"cannot be written.*before it is whole: make room"
        ) as caught:
            train(dataset(), TINY, tmp_path / "run", checkpoint_seconds=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Run, "one_step", one_step)
    state = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert (state.epoch, state.step) == (0, 3)
    train(dataset(), TINY, tmp_path / "run", resume=True)
    train(dataset(), TINY, tmp_path / "whole")
    assert equal(tmp_path / "run", tmp_path / "whole")


def test_all_comes_back(tmp_path: Path) -> None:
    own = ProcessState(torch.get_rng_state(), None, {"delta": torch.arange(3.0)})
    saved = Checkpoint(3, 4, {"weight": torch.ones(2)}, {"state": {}}, [own, own], {"loss": 0.5}, 7.0)
    checkpoint.save(saved, tmp_path / CHECKPOINT)
    found = checkpoint.load(tmp_path / CHECKPOINT)
    assert (found.epoch, found.step, found.sums, found.seconds) == (3, 4, {"loss": 0.5}, 7.0)
    assert len(found.processes) == 2
    assert torch.equal(found.processes[1].state["delta"], torch.arange(3.0))
    assert torch.equal(found.processes[0].random_state, own.random_state)


def test_what_regularizers_keep_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_step, seen = Run.one_step, []

    def counted(run: Run, learning_rate: float) -> Metrics:
        run.state["steps"] = run.state.get("steps", torch.zeros(1)) + 1
        seen.append(int(run.state["steps"]))
        return one_step(run, learning_rate)

    monkeypatch.setattr(Run, "one_step", counted)
    train(dataset(), replace(TINY, epochs=1), tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / CHECKPOINT).processes[0].state["steps"] == 7
    assert seen == list(range(1, 8))


def test_from_before_there_could_be_several_processes(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    train(dataset(), replace(TINY, epochs=1), tmp_path)
    content = torch.load(path, weights_only=True)
    (own,) = content.pop("processes")
    torch.save(content | own, path)
    (found,) = checkpoint.load(path).processes
    assert torch.equal(found.random_state, own["random_state"])
    del own["state"], own["cuda_random_state"]
    torch.save(content | own, path)
    assert checkpoint.load(path).processes[0].state == {}


def test_another_version_is_refused(tmp_path: Path) -> None:
    for content in ({"epoch": 1}, [1], {"processes": 3}):
        torch.save(content, tmp_path / CHECKPOINT)
        with pytest.raises(TrainingError, match="is damaged, or a checkpoint of another version"):
            checkpoint.load(tmp_path / CHECKPOINT)


def test_photographs_from_training_to_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, resumed, exported: the bundle resizes and crops as the evaluation did."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for name, channel in (("blue", 2), ("red", 0)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, (20 + index, 30, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{index}.png")
    arguments = ["train", "--dataset", str(tmp_path / "photos"), "--image-size", "16", "--epochs", "2"]
    arguments += ["--batch-size", "4", "--cutout", "2", "--device", "cpu", "--threads", "1", "--arch", "tiny"]
    arguments += ["--workers", "1", "--out"]
    with monkeypatch.context() as patch:
        stop_at(5, patch, signal.SIGTERM)
        assert main([*arguments, str(tmp_path / "run")]) == 130
    assert main([*arguments, str(tmp_path / "run"), "--resume"]) == 0
    assert main([*arguments, str(tmp_path / "whole"), "--workers", "0"]) == 0
    assert equal(tmp_path / "run", tmp_path / "whole")
    assert "of the test images" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "run"), "--resume", "--image-size", "24"]) == 2
    assert "other data (shape [3, 16, 16], now [3, 24, 24])" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]) == 0
    manifest = bundle.load(tmp_path / "bundle").manifest
    assert manifest.input == bundle.InputShape(channels=3, height=16, width=16)
    assert manifest.preprocessing == bundle.Preprocessing(colour="rgb", resize=18, interpolation="bilinear")
    assert "--image-size 16" in (tmp_path / "bundle" / "card.md").read_text()
