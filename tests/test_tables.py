import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from guard.decision import Guard
from guard.norms import Norm
from guard.settings import Policy
from guard.tables import COLUMNS, Format, flatten, writer
from tests.serving import write_bundle

FAILED = {"path": "bad.png", "error": {"code": "corrupt_image", "message": 'Damaged; cut off, "so"\nto say.'}}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """An accepted image, a rejected one, and one that cannot be read."""
    bundle = write_bundle(tmp_path_factory.mktemp("tables") / "b")
    guard = Guard.from_bundle(bundle, "cpu", policy=Policy())
    red, grey = np.zeros((3, 8, 8), np.float32), np.full((3, 8, 8), 0.5, np.float32)
    red[0] = 1
    decisions = guard.classify(np.stack([red, grey]))
    assert [decision.accepted for decision in decisions] == [True, False]
    answers = [
        {"path": f"{i}.png"} | decision.model_dump(mode="json") for i, decision in enumerate(decisions)
    ]
    return [*answers, FAILED]


def written(records: list[dict[str, Any]], kind: Format) -> bytes:
    stream = io.BytesIO()
    with writer(stream, kind) as write:
        for record in records:
            write(record)
    return stream.getvalue()


def test_json_lines_are_the_answers_themselves(records: list[dict[str, Any]]) -> None:
    assert [json.loads(line) for line in written(records, "jsonl").splitlines()] == records


def test_csv(records: list[dict[str, Any]]) -> None:
    rows = list(csv.DictReader(io.StringIO(written(records, "csv").decode(), newline="")))
    accepted, rejected, failed = rows
    assert list(accepted) == list(COLUMNS)
    assert (accepted["path"], accepted["class_name"], accepted["accepted"]) == ("0.png", "cat", "True")
    assert float(accepted["l2_radius"]) == records[0]["certificate"]["l2"]["radius"]
    assert json.loads(accepted["top"]) == records[0]["top"]
    assert accepted["index"] == accepted["error_code"] == accepted["reasons"] == ""
    assert (rejected["reasons"], rejected["linf_radius"]) == ("jacobian_norm", "0.0")
    assert failed["error_message"] == FAILED["error"]["message"]  # type: ignore[index]
    assert failed["label"] == failed["accepted"] == ""


def test_parquet(records: list[dict[str, Any]]) -> None:
    many = [*records, *[{"index": i} | records[0] for i in range(2000)]]
    table = pyarrow.parquet.read_table(io.BytesIO(written(many, "parquet")))
    assert table.column_names == list(COLUMNS)
    assert table.num_rows == 2003
    accepted, rejected, failed, *rest = table.to_pylist()
    assert accepted["accepted"] is True
    assert accepted["label"] == 0
    assert rejected["reasons"] == "jacobian_norm"
    assert failed["label"] is None
    assert [row["index"] for row in rest] == list(range(2000))
    assert accepted == flatten(records[0])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_nothing_written_is_still_a_file(kind: Format) -> None:
    content = written([], kind)
    if kind == "jsonl":
        assert content == b""
    elif kind == "csv":
        assert content.decode().strip() == ",".join(COLUMNS)
    else:
        assert pyarrow.parquet.read_table(io.BytesIO(content)).num_rows == 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_unbounded_radius_is_infinite(records: list[dict[str, Any]], norm: Norm) -> None:
    record: dict[str, Any] = json.loads(json.dumps(records[0]))
    record["certificate"][norm] |= {"radius": None, "unbounded": True}
    assert flatten(record)[f"{norm}_radius"] == math.inf


def test_every_value_of_an_answer_has_a_column(tmp_path: Path) -> None:
    conformal = {"alpha": 0.05, "kappa": 0.5, "n": 100, "suite": ["pgd"]}
    tests = [{"name": "jacobian", "threshold": 9.0}, {"name": "radius", "threshold": 9.0}]
    plain = write_bundle(tmp_path / "plain")
    l2 = json.loads((plain / "calibration.json").read_text())["l2"] | {"conformal": conformal}
    bundle = write_bundle(tmp_path / "b", score="combined", threshold=1.0, tests=tests, l2=l2)
    (decision,) = Guard.from_bundle(bundle, "cpu", policy=Policy()).classify(
        np.eye(3, 3 * 64, dtype=np.float32)[:1].reshape(1, 3, 8, 8)
    )
    flat = flatten(decision.model_dump(mode="json"))
    assert {name for name, value in flat.items() if value is None} == {
        "path",
        "index",
        "error_code",
        "error_message",
        "l2_violation_rate",
        "l2_violation_upper",
        "linf_alpha",
    }
    assert len(json.loads(flat["detector_tests"])) == 2
    assert json.loads(flat["l2_others"])[0]["kind"] == "estimate"


def test_paths_that_are_no_text(records: list[dict[str, Any]]) -> None:
    path = os.fsdecode(b"caf\xe9.png")
    odd = [records[0] | {"path": path}]
    assert json.loads(written(odd, "jsonl"))["path"] == path
    (row,) = csv.DictReader(io.StringIO(written(odd, "csv").decode(), newline=""))
    assert row["path"] == r"caf\udce9.png"
    table = pyarrow.parquet.read_table(io.BytesIO(written(odd, "parquet")))
    assert table["path"].to_pylist() == [r"caf\udce9.png"]
