"""Log lines are one JSON object each."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from guard.logs import JsonFormatter


def line(message: str, *arguments: Any, **more: Any) -> dict[str, Any]:
    record = logging.LogRecord(
        "guard.test", logging.WARNING, "x.py", 1, message, arguments, more.pop("exc_info", None)
    )
    record.__dict__.update(more)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_record_becomes_time_level_logger_and_message() -> None:
    found = line("cannot read %s", "a file")
    assert found.pop("time").endswith("+00:00")
    assert found == {"level": "warning", "logger": "guard.test", "message": "cannot read a file"}


def test_fields_stand_beside_the_message_whatever_they_hold() -> None:
    found = line("request", fields={"status": 200, "path": "/a\n{}", "file": Path("x"), "score": math.inf})
    assert (found["status"], found["path"], found["file"], found["score"]) == (200, "/a\n{}", "x", "inf")


def test_an_exception_brings_its_traceback_in_the_same_line() -> None:
    try:
        raise ValueError("reason")
    except ValueError:
        found = line("failed", exc_info=sys.exc_info())
    assert "ValueError: reason" in found["traceback"]
