"""Rows of answers as JSON lines, CSV or Parquet, written as they come."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, Literal

Format = Literal["jsonl", "csv", "parquet"]
Record = Mapping[str, Any]

_RADIUS: dict[str, type] = {
    "radius": float,
    "kind": str,
    "method": str,
    "violation_rate": float,
    "violation_upper": float,
    "alpha": float,
    "others": str,
}

COLUMNS: dict[str, type] = {
    "path": str,
    "index": int,
    "label": int,
    "class_name": str,
    "probability": float,
    "accepted": bool,
    "reasons": str,
    "detector_name": str,
    "detector_score": float,
    "detector_threshold": float,
    "detector_fpr": float,
    "detector_tests": str,
    "margin": float,
    **{f"{norm}_{name}": kind for norm in ("l2", "linf") for name, kind in _RADIUS.items()},
    "top": str,
    "model_name": str,
    "model_digest": str,
    "error_code": str,
    "error_message": str,
}
"""Columns of CSV and Parquet. Lists of objects are JSON text, reasons are joined by `;`, an unbounded radius
is infinite, and what an answer leaves out is empty. Bytes of a path that are no text appear as `\\udcXX`."""

_ROW_GROUP = 1024


def flatten(record: Record) -> dict[str, Any]:
    """An answer's values by column; None where it has none."""
    certificate, error = record.get("certificate", {}), record.get("error", {})
    detector, model = record.get("detector", {}), record.get("model", {})
    flat: dict[str, Any] = {name: record.get(name) for name in COLUMNS}
    if flat["path"] is not None:
        flat["path"] = flat["path"].encode(errors="backslashreplace").decode()
    flat["reasons"] = ";".join(record["reasons"]) if "reasons" in record else None
    flat["top"] = _text(record.get("top"))
    flat |= {f"detector_{name}": detector.get(name) for name in ("name", "score", "threshold", "fpr")}
    flat["detector_tests"] = _text(detector.get("tests"))
    flat["margin"] = certificate.get("margin")
    for norm in ("l2", "linf"):
        radius = certificate.get(norm, {})
        flat |= {f"{norm}_{name}": radius.get(name) for name in _RADIUS}
        flat[f"{norm}_others"] = _text(radius.get("others"))
        if radius.get("unbounded"):
            flat[f"{norm}_radius"] = math.inf
    flat |= {"model_name": model.get("name"), "model_digest": model.get("digest")}
    flat |= {"error_code": error.get("code"), "error_message": error.get("message")}
    return flat


def writer(stream: BinaryIO, kind: Format) -> AbstractContextManager[Callable[[Record], None]]:
    """A context that gives a function writing one record to the stream.

    Parquet needs the package `pyarrow`, which the extra `parquet` installs, and holds back up to 1,024 rows.
    """
    if kind == "jsonl":
        return nullcontext(lambda record: _write_line(stream, record))
    return _Csv(stream) if kind == "csv" else _Parquet(stream)


def _write_line(stream: BinaryIO, record: Record) -> None:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # A path may hold bytes that are no text: JSON has an escape for each, and readers give them back.
    stream.write(line.encode(errors="backslashreplace") + b"\n")


def _text(value: Iterable[Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)


class _Csv(AbstractContextManager[Callable[[Record], None]]):
    def __init__(self, stream: BinaryIO) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        self._rows = csv.DictWriter(self._text, list(COLUMNS))

    def __enter__(self) -> Callable[[Record], None]:
        self._rows.writeheader()
        return lambda record: self._rows.writerow(flatten(record))

    def __exit__(self, *error: object) -> None:
        self._text.flush()
        self._text.detach()  # the stream is the caller's to close


class _Parquet(AbstractContextManager[Callable[[Record], None]]):
    def __init__(self, stream: BinaryIO) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
        self._schema = pa.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
        self._table = pa.Table
        self._file = parquet.ParquetWriter(stream, self._schema)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Callable[[Record], None]:
        return self._write

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._file.close()

    def _write(self, record: Record) -> None:
        self._rows.append(flatten(record))
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._table.from_pylist(self._rows, self._schema))
            self._rows.clear()
