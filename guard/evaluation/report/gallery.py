"""Attacked images beside their originals, with the difference made visible."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard.evaluation.report.reading import Attacked, Evaluation

_ATTACKS = 8
_IMAGES = 4
_SMALL = 96  # pixels across; of larger images one is shown, or the page would be too heavy


@dataclass(frozen=True)
class Twin:
    """Three pictures as data URIs, the classes before and after, how far apart, and the scores' verdicts."""

    original: str
    attacked: str
    difference: str
    before: str
    after: str
    l2: float
    linf: float
    accepted: tuple[str, ...]
    rejected: tuple[str, ...]


@dataclass(frozen=True)
class Exhibit:
    """The successes of one attack; differences are multiplied by `gain` around grey."""

    attack: Attacked
    gain: float
    twins: tuple[Twin, ...]


def exhibits(evaluation: Evaluation) -> list[Exhibit]:
    """At most eight attacks (of several budgets the largest) with at most four images each."""
    aware_first = sorted(evaluation.last_of_each(), key=lambda one: one.result.aware is None)
    found = [exhibit for attack in aware_first if (exhibit := _exhibit(evaluation, attack)) is not None]
    return found[:_ATTACKS]


def _exhibit(evaluation: Evaluation, attack: Attacked) -> Exhibit | None:
    originals = evaluation.clean["image"]
    kept = np.flatnonzero(attack.rows < len(originals))[: len(attack.arrays["image"])]
    shown = [place for place in range(len(kept)) if attack.success[kept[place]]][
        : _IMAGES if originals.shape[-1] <= _SMALL else 1
    ]
    if not shown:
        return None
    images = attack.arrays["image"]
    rows = attack.rows[kept]
    differences = [images[place] - originals[rows[place]] for place in shown]
    largest = max(float(np.abs(one).max()) for one in differences)
    gain = max(1.0, float(f"{0.5 / max(largest, 1e-6):.1g}"))
    twins = tuple(
        _twin(evaluation, attack, int(kept[place]), images[place], difference, gain)
        for place, difference in zip(shown, differences, strict=True)
    )
    return Exhibit(attack, gain, twins)


def _twin(
    evaluation: Evaluation,
    attack: Attacked,
    place: int,
    image: NDArray[Any],
    difference: NDArray[Any],
    gain: float,
) -> Twin:
    row = int(attack.rows[place])
    scores = evaluation.results.scores
    verdicts = {score: bool(attack.arrays[f"accepted_{score}"][place]) for score in scores}
    return Twin(
        original=data_uri(evaluation.clean["image"][row]),
        attacked=data_uri(image),
        difference=data_uri(0.5 + gain * difference),
        before=class_name(evaluation, int(evaluation.clean["label"][row])),
        after=class_name(evaluation, int(np.argmax(attack.arrays["logits"][place]))),
        l2=float(attack.arrays["l2"][place]),
        linf=float(attack.arrays["linf"][place]),
        accepted=tuple(_names(verdicts, kept=True)),
        rejected=tuple(_names(verdicts, kept=False)),
    )


def _names(verdicts: dict[Any, bool], *, kept: bool) -> Iterable[str]:
    return (str(score) for score, accepted in verdicts.items() if accepted == kept)


def class_name(evaluation: Evaluation, label: int) -> str:
    """A class by its name, where the run knows it."""
    names = evaluation.results.bundle.get("class_names")
    return str(names[label]) if isinstance(names, list) and 0 <= label < len(names) else f"class {label}"


def data_uri(image: NDArray[Any]) -> str:
    """An image (C, H, W) in [0, 1], grey or RGB, as a PNG inside the page; other channels are averaged."""
    pixels = np.rint(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.mean(axis=2).astype(np.uint8))
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
