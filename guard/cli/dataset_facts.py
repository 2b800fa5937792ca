"""What `guard info --dataset` shows: how far apart labelled images lie."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard import data
from guard.cli.options import check_output, class_list, emit, screen_lines
from guard.errors import UsageError
from guard.files import atomic_open
from guard.neighbours import Nearest, Pair, Separation, lipschitz, separation, stability
from guard.stability_curve import picture

_LISTED = 5  # conflicting images named on the screen
_POINTS = 101  # of the stability curve


def run(arguments: argparse.Namespace) -> int:
    """Checks the options that go with `--dataset`, computes and shows."""
    if arguments.bundle is not None or arguments.bounds:
        raise UsageError("--dataset is about images: give it without BUNDLE and --bounds.")
    if arguments.out is not None:
        if arguments.out.suffix != ".svg":
            raise UsageError(f"--out {arguments.out}: expected a name that ends in .svg.")
        check_output("--out", arguments.out, ".svg")
    split: data.Split = arguments.split or "train"
    dataset = data.load(arguments.dataset, split)
    found = separation(dataset.images, dataset.labels, arguments.norm or "l2")
    record = _facts(dataset, split, found, arguments.eps)
    if arguments.out is not None:
        _draw(arguments.out, record)
    emit(arguments, record, "\n".join(_data_screen(dataset, record)))
    return 0


def _facts(dataset: data.Dataset, split: str, found: Separation, eps: float | None) -> dict[str, Any]:
    nearest = found.nearest
    grid = np.linspace(0, nearest.other_label.max(), _POINTS)
    record: dict[str, Any] = {
        "dataset": dataset.name,
        "split": split,
        "digest": f"sha256:{dataset.digest}",
        "n": len(dataset),
        "shape": list(dataset.images.shape[1:]),
        "classes": len(set(_labels(dataset).tolist())),
        "norm": nearest.norm,
        "closest": _pair(dataset, found.closest),
        "duplicates": found.duplicates,
        "conflicting": list(found.conflicting),
        "closest_without_conflicting": None if found.apart is None else _pair(dataset, found.apart),
        "nearest": {"any_label": _spread(nearest.any_label), "other_label": _spread(nearest.other_label)},
        "stability": stability(nearest.other_label, grid),
    }
    if eps is not None:
        record["within"] = _within(nearest, eps)
    return record


def _within(nearest: Nearest, eps: float) -> dict[str, float]:
    """Counts and shares of images with a neighbour within 2 eps, where their balls meet."""
    counts = {
        "any_label": int((nearest.any_label <= 2 * eps).sum()),
        "other_label": int((nearest.other_label <= 2 * eps).sum()),
    }
    return {"eps": eps, **counts}


def _labels(dataset: data.Dataset) -> NDArray[Any]:
    return np.zeros(0, np.int64) if dataset.labels is None else dataset.labels


def _pair(dataset: data.Dataset, pair: Pair) -> dict[str, Any]:
    """JSON has no infinity: the constant of a pair 0 apart is null."""
    constant = lipschitz(pair)
    return {
        "images": [pair.first, pair.second],
        "labels": [dataset.class_names[_labels(dataset)[image]] for image in (pair.first, pair.second)],
        "distance": pair.distance,
        "lipschitz": constant if math.isfinite(constant) else None,
    }


def _spread(distances: NDArray[Any]) -> dict[str, float]:
    ten, median = (float(value) for value in np.quantile(distances, (0.1, 0.5)))
    return {
        "mean": float(distances.mean()),
        "median": median,
        "tenth_percentile": ten,
        "smallest": float(distances.min()),
        "largest": float(distances.max()),
    }


def _data_screen(dataset: data.Dataset, record: dict[str, Any]) -> list[str]:
    height, width, channels = record["shape"]
    facts = [
        ("images", f"{record['n']} of {record['split']}, {channels} x {height} x {width}, pixels in [0, 1]"),
        ("classes", class_list(dataset.class_names)),
        ("lipschitz", _constant(record["closest"], record["norm"])),
        ("duplicates", _duplicates(dataset, record)),
    ]
    if record["conflicting"]:
        apart = record["closest_without_conflicting"]
        text = "no two classes" if apart is None else _constant(apart, record["norm"])
        facts.append(("without those", text))
    for name, title in (("any_label", "nearest"), ("other_label", "other class")):
        spread = record["nearest"][name]
        text = (
            f"mean {spread['mean']:.4g}, median {spread['median']:.4g}, tenth percentile "
            f"{spread['tenth_percentile']:.4g}, {spread['smallest']:.4g} to {spread['largest']:.4g}"
        )
        facts.append((title, text))
    if "within" in record:
        within = record["within"]
        text = (
            f"eps {within['eps']:.4g}: {_count(within['any_label'], record['n'])} of another image, "
            f"{_count(within['other_label'], record['n'])} of one of another class"
        )
        facts.append(("within 2 eps", text))
    return screen_lines(f"{record['dataset']}, {record['norm']} distances", facts)


def _count(count: int, total: int) -> str:
    return f"{count} ({count / total:.2%})"


def _constant(pair: dict[str, Any], norm: str) -> str:
    (first, second), (one, other) = pair["images"], pair["labels"]
    if pair["lipschitz"] is None:
        return f"infinite: image {first} ({one}) is image {second} ({other})"
    return (
        f"{pair['lipschitz']:.4g} = 1 / {pair['distance']:.4g}, the {norm} distance of images {first} "
        f"({one}) and {second} ({other})"
    )


def _duplicates(dataset: data.Dataset, record: dict[str, Any]) -> str:
    text = f"{record['duplicates']} images have an identical twin"
    if record["conflicting"]:
        images = record["conflicting"]
        named = [f"{image} ({dataset.class_names[_labels(dataset)[image]]})" for image in images[:_LISTED]]
        more = f" and {len(images) - _LISTED} more (--json lists all)" if len(images) > _LISTED else ""
        text += f", {len(images)} of them one with another label: {', '.join(named)}{more}"
    return text


def _draw(path: Path, record: dict[str, Any]) -> None:
    curve = record["stability"]
    shares = {
        "turned into an image of another class": curve["reached"],
        "taken half-way to one": curve["halfway"],
    }
    title = f"Data stability of {record['dataset']}, {record['split']}, {record['n']} images"
    text = picture(title, f"length of the perturbation, {record['norm']}", curve["eps"], shares)
    with atomic_open(path) as file:
        file.write(text.encode())
