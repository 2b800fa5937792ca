"""Two processes do what one does, and what one of them cannot do, none does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guard.errors import DataError, GuardError, TrainingError, UsageError
from guard.training import architectures, checkpoint, distributed
from guard.training.batches import InMemory
from guard.training.loop import Metrics, Run, train
from tests import colours, processes
from tests.colours import TINY, dataset

REGULARIZERS = (
    "tv-l2:eps=0.1",
    "lipschitz:weight=0.5",
    "gradient-penalty-l2:weight=0.5",
    "tulip:eps=0.1,weight=0.5",
)
PLAIN = replace(TINY, architecture="plain", epochs=1, held_out=0)


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "checkpoint.pt").model


def equal(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def _networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", colours.WithDropout)
    monkeypatch.setitem(architectures.ARCHITECTURES, "plain", colours.Plain)


def functions() -> dict[str, Any]:
    rank = distributed.rank()
    values = torch.tensor([rank + 1.0, -rank])
    tie = torch.tensor(2.0)
    mine = torch.tensor(float(3 - rank))
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1.0 + rank)
    model[1].running_mean.fill_(rank)  # type: ignore[operator]
    terms = distributed.average(
        model, {"loss": torch.tensor(4.0 * rank), "nan": torch.tensor([1, np.nan][rank])}
    )
    return {
        "world_size": distributed.world_size(),
        "max": distributed.max_over_processes(values).tolist(),
        "sum": distributed.sum_over_processes(values).tolist(),
        "shares": [distributed.share_of_maximum(value).item() for value in (mine, -mine, tie)],
        "gather": distributed.gather(f"process {rank}"),
        "gradients": [
            weight.grad.flatten().tolist() for weight in model.parameters() if weight.grad is not None
        ],
        "mean": model[1].running_mean.tolist(),  # type: ignore[operator]
        "terms": {name: str(value) for name, value in terms.items()},
    }


def test_functions_of_values() -> None:
    first, second = processes.run(functions)
    assert first["shares"] == [2, 0, 2]
    assert second["shares"] == [0, 2, 0]
    for found in (first, second):
        assert found["world_size"] == 2
        assert found["max"] == [2, 0]
        assert found["sum"] == [3, -1]
        assert found["gather"] == ["process 0", "process 1"]
        assert found["gradients"] == [[1.5, 1.5], [1.5], [1.5], [1.5]]
        assert found["mean"] == [0.5]
        assert found["terms"] == {"loss": "2.0", "nan": "nan"}


def test_functions_of_values_in_a_single_process() -> None:
    values = torch.tensor([2.0, -1.0])
    assert torch.equal(distributed.max_over_processes(values), values)
    assert torch.equal(distributed.sum_over_processes(values), values)
    assert distributed.share_of_maximum(values[0]) == 1
    assert distributed.gather(3) == [3]
    assert (distributed.world_size(), distributed.rank()) == (1, 0)


def train_each(folder: Path) -> None:
    for number, regularizer in enumerate(REGULARIZERS):
        train(dataset(), replace(PLAIN, regularizers=(regularizer,)), folder / str(number))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Eight steps: the same but for the order in which float32 numbers are added."""
    assert processes.run(train_each, tmp_path / "two") == [None, None]
    train_each(tmp_path / "one")
    for number in range(len(REGULARIZERS)):
        one, two = tmp_path / "one" / str(number), tmp_path / "two" / str(number)
        for name, expected in weights(one).items():
            torch.testing.assert_close(weights(two)[name], expected, rtol=1e-4, atol=1e-5)
        lines = [json.loads((out / "metrics.jsonl").read_text()) for out in (one, two)]
        assert set(lines[0]) == set(lines[1])
        for name in set(lines[0]) - {"seconds"}:
            assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-3), name


def interrupted_then_resumed(folder: Path) -> list[bool]:
    """What process 1 keeps in `Run.state`, and whether the interruption was as it should be."""
    one_step, found = Run.one_step, []

    def counted(run: Run, learning_rate: float) -> Metrics:
        metrics = one_step(run, learning_rate)
        run.state["count"] = run.state.get("count", torch.zeros(1)) + 1 + distributed.rank()
        return metrics

    pytest.MonkeyPatch().setattr(Run, "one_step", counted)
    train(dataset(), TINY, folder / "whole")

    def stopped(run: Run, learning_rate: float) -> Metrics:
        if run.done == 3:
            raise ZeroDivisionError
        return counted(run, learning_rate)

    pytest.MonkeyPatch().setattr(Run, "one_step", stopped)
    try:
        train(dataset(), TINY, folder / "run", checkpoint_seconds=0.0)
    except ZeroDivisionError:
        found.append(True)
    pytest.MonkeyPatch().setattr(Run, "one_step", counted)
    train(dataset(), TINY, folder / "run", resume=True)
    return found


def test_resumes_bit_by_bit(tmp_path: Path) -> None:
    """With BatchNorm, and dropout of each process's own; that weights are alike is checked at every save."""
    assert processes.run(interrupted_then_resumed, tmp_path) == [[True], [True]]
    assert equal(tmp_path / "whole", tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert [one.state["count"].item() for one in state.processes] == [14, 28]
    assert not torch.equal(state.processes[0].random_state, state.processes[1].random_state)
    with pytest.raises(
        TrainingError, match=r"was written by 2 processes, now there are 1\. Resume with torchrun"
    ):
        train(dataset(), TINY, tmp_path / "run", resume=True)


def weights_apart() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    distributed.check_identical(model)
    nn.init.constant_(model.weight, 1 + 2e-7 * distributed.rank())
    distributed.check_identical(model)


def one_fails() -> None:
    with distributed.together():
        pass
    with distributed.together():
        if distributed.rank() == 1:
            raise DataError("b.png: is damaged")


def one_is_unlucky(folder: Path) -> None:
    at = InMemory.at

    def broken(batches: InMemory, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        images, labels = at(batches, epoch, number)
        return images * (np.nan if (epoch, number, distributed.rank()) == (1, 2, 1) else 1), labels

    pytest.MonkeyPatch().setattr(InMemory, "at", broken)
    train(dataset(), replace(PLAIN, epochs=2), folder / "run")


def one_is_asked_to_stop(folder: Path) -> None:
    one_step = Run.one_step

    def asked(run: Run, learning_rate: float) -> Metrics:
        if run.done == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), 15)
        return one_step(run, learning_rate)

    pytest.MonkeyPatch().setattr(Run, "one_step", asked)
    train(dataset(), PLAIN, folder / "run")


def sizes_do_not_share() -> None:
    train(dataset(), replace(PLAIN, batch_size=9), Path("nowhere"))


def fails(function: Any, *arguments: Any) -> GuardError:
    first, second = processes.run(function, *arguments)
    assert isinstance(second, SystemExit)
    assert second.code == 1
    assert isinstance(first, GuardError)
    return first


class TestOneForAll:
    def test_an_error_of_one_is_raised_by_the_first(self) -> None:
        error = fails(one_fails)
        assert isinstance(error, DataError)
        assert str(error) == "b.png: is damaged"

    def test_weights_that_differ_are_noticed(self) -> None:
        assert "weights differ" in str(fails(weights_apart))

    def test_a_nan_of_one_stops_all_and_keeps_the_checkpoint(self, tmp_path: Path) -> None:
        message = str(fails(one_is_unlucky, tmp_path))
        assert "not finite at epoch 2, step 3 (loss nan" in message
        assert message.endswith("The last good checkpoint is kept; give another --out.")
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
        assert (state.epoch, state.step) == (1, 0)
        assert all(torch.isfinite(value).all() for value in state.model.values())

    def test_a_signal_to_one_stops_all_with_a_checkpoint(self, tmp_path: Path) -> None:
        first, second = processes.run(one_is_asked_to_stop, tmp_path)
        assert isinstance(first, KeyboardInterrupt)
        assert "after epoch 1, step 3 of 8; all is saved: go on with --resume" in str(first)
        assert isinstance(second, SystemExit)
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
        assert (state.epoch, state.step) == (0, 3)

    def test_a_batch_that_cannot_be_shared(self) -> None:
        error = fails(sizes_do_not_share)
        assert isinstance(error, UsageError)
        assert "--batch-size is 9, of 70 training images, for 2 processes" in str(error)


def test_only_the_first_writes_and_talks(tmp_path: Path) -> None:
    data = dataset()
    np.savez(tmp_path / "a.npz", x_train=data.images, y_train=data.labels)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "guard", "train", "--dataset", str(tmp_path / "a.npz"), "--json"]
    command += ["--out", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "16", "--crop", "1"]
    command += ["--device", "cpu", "--threads", "1"]
    port = str(processes._free_port())
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [
        subprocess.Popen(
            command,
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    (said, shown), (nothing, none) = [one.communicate(timeout=120) for one in pair]
    assert [one.returncode for one in pair] == [0, 0], shown + none
    assert json.loads(said)["epoch"] == 1
    assert "train run  3/3" in shown
    assert nothing == ""
    assert "train" not in none
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["provenance"]["processes"] == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curves.html",
        "metrics.jsonl",
    ]
