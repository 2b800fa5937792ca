import io
import sys
from collections.abc import Iterator

import pytest

from guard.progress import Progress, duration, silenced, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands still until told to move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(written: str) -> list[str]:
    """What a terminal shows after the written characters: each line's last state."""
    return [line.split("\r")[-1].replace("\x1b[K", "") for line in written.split("\n")]


def test_log_gets_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(60, "images", stream=stream, clock=clock) as progress:
        for _ in range(60):
            clock.now += 0.5
            progress.advance()
    assert stream.getvalue().splitlines() == [
        "images  20/60  33%  2/s  ETA 20 s",
        "images  40/60  66%  2/s  ETA 10 s",
        "images  60/60 100%  2/s  ETA 0.0 s",
        "images  60/60 done in 30 s",
    ]


def test_steps_that_took_no_work_make_nothing_look_faster() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(60, "images", stream=stream, clock=clock) as progress:
        clock.now += 10.0
        progress.advance(20, free=True)
        clock.now += 10.0
        progress.advance(20)
    assert stream.getvalue().splitlines()[:2] == ["images  20/60  33%", "images  40/60  66%  1/s  ETA 20 s"]


def test_terminal_line_is_redrawn_in_place() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(4, "images", stream=stream, clock=clock) as progress:
        for _ in range(2):
            clock.now += 1.0
            progress.advance(note="a.png")
        assert screen(stream.getvalue()) == ["images  [########--------] 2/4  50%  1/s  ETA 2.0 s  a.png"]
        clock.now += 0.01
        before = stream.getvalue()
        progress.advance()
        assert stream.getvalue() == before, "two redraws within a tenth of a second"
    assert screen(stream.getvalue()) == ["images  3/4 done in 2.0 s  a.png", ""]


def test_terminal_line_fits_80_columns() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(10**9, "a label " * 10, stream=stream, clock=clock) as progress:
        clock.now += 1000.0
        progress.advance(12_345_678, note="x" * 200)
    lines = [
        line.replace("\x1b[K", "") for part in stream.getvalue().split("\n") for line in part.split("\r")
    ]
    assert max(map(len, lines)) == 79
    assert any(line.endswith("…") for line in lines)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_total_of_zero_and_too_many_steps(stream: io.StringIO) -> None:
    clock = Clock()
    with Progress(0, "nothing", stream=stream, clock=clock):
        pass
    with Progress(1, "more", stream=stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 20.0
            progress.advance()
    assert "nothing  0/0 done in 0.0 s" in stream.getvalue()
    assert "3/1 100%" in stream.getvalue()
    assert "more  3/1 done in 1:00" in stream.getvalue()


def test_an_error_ends_the_line_and_passes_on() -> None:
    stream, clock = Terminal(), Clock()

    def work() -> None:
        with Progress(5, "work", stream=stream, clock=clock) as progress:
            progress.advance()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert screen(stream.getvalue()) == ["work  1/5 stopped after 0.0 s", ""]


def test_silence() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(1, "flag", silent=True, stream=stream) as progress:
            progress.advance()
        with silenced(), Progress(1, "block", stream=stream) as progress:
            progress.advance()
        assert stream.getvalue() == ""
        with Progress(1, "spoken", stream=stream):
            pass
        assert "spoken" in stream.getvalue()


def test_progress_goes_to_standard_error_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(1, "now"):
        pass
    assert stream.getvalue().startswith("now  0/1 done in")


def test_track_yields_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "items")) == [1, 2, 3]

    def generated() -> Iterator[int]:
        yield 1

    assert list(track(generated(), "unsized")) == [1]
    captured = capsys.readouterr()
    assert "items  3/3 done" in captured.err
    assert "unsized  1/0 done" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (3599.6, "1:00:00"),
        (187, "3:07"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_time_is_promised_beyond_the_announced_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(20, "images", stream=stream, clock=clock) as progress:
        for _ in range(40):
            clock.now += 0.5
            progress.advance()
    assert stream.getvalue().splitlines() == [
        "images  20/20 100%  2/s  ETA 0.0 s",
        "images  40/20 100%  2/s",
        "images  40/20 done in 20 s",
    ]
