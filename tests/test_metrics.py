"""Metrics stay usable whatever is counted."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram

from guard import metrics
from tests.serving import ROOT, clean_environment


def test_neither_infinity_nor_nan_spoils_a_sum() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("x", "X.", registry=registry, buckets=(1, 10))
    for value in (0.5, math.inf, math.nan):
        metrics.observe(histogram, value)
    assert registry.get_sample_value("x_sum") == metrics.LARGEST + 0.5
    assert registry.get_sample_value("x_count") == 2


def test_exposition_is_the_text_format() -> None:
    text, media_type = metrics.exposition()
    assert media_type.startswith("text/plain")
    assert b"# TYPE guard_requests_total counter" in text


def test_processes_of_one_server_add_up_and_another_servers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "from guard import metrics; metrics.ACCEPTED.inc(); print(metrics.exposition()[0].decode())"

    def process(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        environment = clean_environment() | {
            "GUARD_METRICS_DIR": str(folder),
            "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "guard_accepted_total 1.0" in process(tmp_path / "one")
    assert "guard_accepted_total 2.0" in process(tmp_path / "one")
    assert "guard_accepted_total 1.0" in process(tmp_path / "two")


def test_uploads_of_a_killed_process_are_no_longer_in_progress(tmp_path: Path) -> None:
    def process(code: str) -> str:
        environment = clean_environment() | {"GUARD_METRICS_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", f"import os; from guard import metrics; {code}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    process("metrics.IN_PROGRESS.inc(3); metrics.ACCEPTED.inc(); os.kill(os.getpid(), 9)")
    text = process("metrics.IN_PROGRESS.inc(); print(metrics.exposition()[0].decode())")
    assert "guard_uploads_in_progress 1.0" in text
    assert "guard_accepted_total 1.0" in text


def test_a_server_gets_a_folder_that_goes_with_it() -> None:
    code = (
        "import os; from guard import metrics; metrics.own_folder(); print(os.environ['GUARD_METRICS_DIR'])"
    )
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()
    assert not os.path.lexists(done.stdout.strip())
