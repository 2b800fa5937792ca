"""Progress of long work on standard error: one updating line on a terminal, now and then a line elsewhere."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self, TextIO, TypeVar

_Item = TypeVar("_Item")

_TERMINAL_INTERVAL = 0.1  # seconds between redraws of a terminal's line
_PLAIN_INTERVAL = 10.0  # seconds between lines of a log
_WIDTH = 80
_BAR = 16

_silenced: ContextVar[bool] = ContextVar("guard_progress_silenced", default=False)


@contextmanager
def silenced() -> Iterator[None]:
    """Every `Progress` entered inside this block stays silent."""
    token = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(token)


class Progress:
    """Counts `total` steps of the work named `label` and says how far it is and how long it may still take.

    Use as a context manager and call `advance` after each step. A total of 0, and more steps than announced,
    are allowed. Nothing is written where `silent` is true or inside `silenced()`.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        silent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = max(0, int(total))
        self.label = label
        self.count = 0
        self._free = 0
        self._note = ""
        self._silent = silent
        self._stream = stream
        self._clock = clock
        self._started = clock()
        self._written = self._started
        self._terminal = False

    def __enter__(self) -> Self:
        self._silent = self._silent or _silenced.get()
        self._stream = self._stream or sys.stderr
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._started = self._written = self._clock()
        if self._terminal:
            self._write(self._line(self._started))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = self._clock() - self._started
        outcome = "done in" if error is None else "stopped after"
        parts = [f"{self.count}/{self.total} {outcome} {duration(elapsed)}", self._note]
        self._write(_joined(self.label, parts))
        if self._terminal and not self._silent and self._stream is not None:
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, n: int = 1, note: str = "", *, free: bool = False) -> None:
        """Counts `n` further steps; `note` (a loss, a file name) ends the line until the next one.

        Steps that took no work, because an earlier run did it or none was needed, are `free`: they count in
        how far the work is, not in how fast it goes.
        """
        self.count += n
        self._free += n * free
        self._note = note or self._note
        now = self._clock()
        if now - self._written >= (_TERMINAL_INTERVAL if self._terminal else _PLAIN_INTERVAL):
            self._write(self._line(now))
            self._written = now

    def _line(self, now: float) -> str:
        elapsed = now - self._started
        share = min(1.0, self.count / self.total) if self.total else 0.0
        parts = [f"{self.count}/{self.total} {int(100 * share):3d}%"]
        if self._terminal:
            filled = int(_BAR * share)
            parts[0] = f"[{'#' * filled}{'-' * (_BAR - filled)}] {parts[0]}"
        worked = self.count - self._free
        if worked and elapsed > 0:
            rate = worked / elapsed
            parts.append(f"{rate:.3g}/s" if rate < 1000 else f"{rate:.0f}/s")
            if self.count <= self.total:
                parts.append(f"ETA {duration((self.total - self.count) / rate)}")
        parts.append(self._note)
        return _joined(self.label, parts)

    def _write(self, line: str) -> None:
        if self._silent or self._stream is None:
            return
        if self._terminal:
            width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns) - 1
            line = line if len(line) <= width else line[: max(0, width - 1)] + "…"
            self._stream.write(f"\r{line}\x1b[K")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def track(
    items: Iterable[_Item], label: str, *, total: int | None = None, silent: bool = False
) -> Iterator[_Item]:
    """Yields the items, counting each; `total` is the items' own length where they have one."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with Progress(total, label, silent=silent) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """Seconds in the shortest plain form: `0.4 s`, `42 s`, `3:07`, `1:02:03`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _joined(label: str, parts: list[str]) -> str:
    return "  ".join([label, *(part for part in parts if part)])
