import contextlib
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from guard.progress import Progress
from guard.stages import PIECE, Arrays, Piece, Stages

INDICES = np.arange(2 * PIECE + 5, dtype=np.int64)[::-1].copy()


class Counted:
    """Squares, and how many images were asked for."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, piece: NDArray[np.int64]) -> Arrays:
        self.images += len(piece)
        return {"square": piece**2, "image": np.zeros((len(piece), 2, 2), np.float32)}


def stages(target: Path, **key: object) -> Stages:
    return Stages(target, key, Progress(0, "test", silent=True))


def test_pieces_come_back_in_order_and_the_scratch_folder_goes(tmp_path: Path) -> None:
    compute = Counted()
    with stages(tmp_path / "net") as run:
        found = run.run("squares", INDICES, compute)
        assert len(list(run.folder.iterdir())) == 3
        assert run.run("none", INDICES[:0], compute) == {}
    assert np.array_equal(found["square"], INDICES**2)
    assert found["image"].shape == (len(INDICES), 2, 2)
    assert found["image"].dtype == np.float32
    assert compute.images == len(INDICES)
    assert not list(tmp_path.iterdir())


def test_finished_pieces_are_taken_from_a_run_that_failed(tmp_path: Path) -> None:
    def fails_late(piece: NDArray[np.int64]) -> Arrays:
        if 0 in piece:
            raise ZeroDivisionError
        return {"square": piece**2, "image": np.zeros((len(piece), 2, 2), np.float32)}

    with pytest.raises(ZeroDivisionError), stages(tmp_path / "net", seed=1) as run:
        run.run("squares", INDICES, fails_late)
    compute = Counted()
    with stages(tmp_path / "net", seed=1) as run:
        found = run.run("squares", INDICES, compute)
    assert compute.images == 5
    assert np.array_equal(found["square"], INDICES**2)


@pytest.mark.parametrize("key", [{"seed": 2}, {"seed": 1, "more": 0}, {}])
def test_another_key_starts_anew(key: dict[str, object], tmp_path: Path) -> None:
    def interrupted() -> None:
        with stages(tmp_path / "net", seed=1) as run:
            run.run("squares", INDICES, Counted())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    compute = Counted()
    with stages(tmp_path / "net", **key) as run:
        run.run("squares", INDICES, compute)
    assert compute.images == len(INDICES)


def test_pieces_of_other_images_and_broken_ones_are_computed_again(tmp_path: Path) -> None:
    with stages(tmp_path / "net") as run:
        run.run("squares", INDICES, Counted())
        for damage in (b"", b"PK\x03\x04 cut off"):
            next(iter(sorted(run.folder.iterdir()))).write_bytes(damage)
            compute = Counted()
            assert np.array_equal(run.run("squares", INDICES, compute)["square"], INDICES**2)
            assert compute.images == PIECE
        compute = Counted()
        others = INDICES + 1
        assert np.array_equal(run.run("squares", others, compute)["square"], others**2)
        assert compute.images == len(others)


def test_pieces_of_another_size_in_a_folder_of_another_name(tmp_path: Path) -> None:
    progress = Progress(0, "test", silent=True)
    with Stages(tmp_path / "net", {}, progress, doing="evaluating") as run:
        found = run.run("squares", INDICES, Counted(), size=100)
        assert len(list(run.folder.iterdir())) == 2
        assert run.folder.name.startswith(".net.evaluating-")
    assert np.array_equal(found["square"], INDICES**2)


def test_kept_pieces_make_the_run_look_no_faster(tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        stream, clock = io.StringIO(), itertools.count(step=60.0)
        with (
            contextlib.suppress(ZeroDivisionError),
            Progress(len(INDICES), "test", stream=stream, clock=clock.__next__) as progress,
            Stages(tmp_path / "net", {}, progress) as run,
        ):
            run.run("squares", INDICES, Counted())
            raise ZeroDivisionError
        written.append(stream.getvalue())
    assert "ETA" in written[0]
    assert "100%" in written[1]
    assert "ETA" not in written[1]


def test_progress_counts_the_cost(tmp_path: Path) -> None:
    progress = Progress(100, "test", silent=True)
    with Stages(tmp_path / "net", {}, progress) as run:
        run.run("squares", INDICES[:10], Counted(), cost=2.5)
    assert progress.count == 25


def test_an_interrupt_tells_where_the_finished_pieces_lie(tmp_path: Path) -> None:
    def interrupted(_: NDArray[np.int64]) -> Arrays:
        raise KeyboardInterrupt

    def work(*stage: Piece) -> None:
        with stages(tmp_path / "net") as run:
            for number, compute in enumerate(stage):
                run.run(str(number), INDICES, compute)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work(interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"lies in .*\.net\.calibrating-.*goes on from there"):
        work(Counted(), interrupted)
