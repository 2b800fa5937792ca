"""A results folder as `guard evaluate` leaves it, checked, and what follows from its arrays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from guard.bundle import ScoreName, Share
from guard.errors import DataError
from guard.evaluation.results import (
    ARRAYS,
    CLEAN,
    CLEAN_FILE,
    RESULTS,
    AttackResult,
    Results,
    load,
    load_arrays,
    same,
)
from guard.norms import NORMS, Norm
from guard.shares import share_of

Arrays = Mapping[str, NDArray[Any]]
Flags = NDArray[np.bool_]
Values = NDArray[np.float64]

MANY_CLASSES = 1000
"""From so many classes on, SCALE counts an image as wrong where its class is not among the top five."""


@dataclass(frozen=True)
class Attacked:
    """One attack at one budget: what `results.json` says of it, and its arrays over its n images."""

    result: AttackResult
    arrays: Arrays

    @property
    def n_considered(self) -> int:
        """How many of the evaluated images these stand for: an attack that was given the first k ran on those
        of them that were right.
        """
        return int(self.result.settings["images"])

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers (n,) of the attacked images among the evaluated ones."""
        return np.asarray(self.arrays["row"], np.int64)

    @property
    def success(self) -> Flags:
        """Which attacks succeeded, as the attack counts it (n,)."""
        return np.asarray(self.arrays["success"], np.bool_)

    @property
    def wrong(self) -> Flags:
        """Which images it returned are of another class (n,), whether the attack counts them or not."""
        return np.asarray(self.arrays["wrong"], np.bool_)

    def lengths(self, norm: Norm) -> Values:
        """How far the wrong images it returned lie in a norm (n,), infinite for others."""
        return np.where(self.wrong, np.asarray(self.arrays[norm], np.float64), np.inf)

    def distance(self) -> Values:
        """The attack's own distance (n,), infinite where it failed."""
        return np.where(self.success, np.asarray(self.arrays["distance"], np.float64), np.inf)

    def accepted(self, score: ScoreName) -> Flags:
        """Which attacked images are wrong and accepted under a score (n,)."""
        return self.wrong & np.asarray(self.arrays[f"accepted_{score}"], np.bool_)

    def standing(self) -> Share:
        """The share of the considered images that are right and stay so under this attack alone.

        For an attack that knows the detector: right and accepted, and no wrong and accepted image found.
        """
        return share_of(len(self.rows) - int(self.success.sum()), self.n_considered)

    def errors_within(self, eps: Iterable[float]) -> list[float]:
        """The share of considered images that are lost at distance eps: wrong already, or attacked within."""
        lost = np.sort(self.distance()[self.success])
        before = self.n_considered - len(self.rows)
        return [(before + int(np.searchsorted(lost, e, "right"))) / self.n_considered for e in eps]


@dataclass(frozen=True)
class Evaluation:
    """A results folder in memory; `attacks` are in the order of `results.attacks`, `denials` in that of
    `results.over_rejection`.

    `aimed` holds by norm the smallest distances (N,) of the attacks aimed at radii, inf where none succeeded;
    a run that was stopped before has none.
    """

    folder: Path
    results: Results
    clean: Arrays
    attacks: tuple[Attacked, ...]
    denials: tuple[Attacked, ...] = ()
    aimed: Mapping[Norm, Values] = field(default_factory=dict)

    def same_images(self, other: "Evaluation") -> bool:
        """Whether both are of the same images of the same data."""
        same_data = self.results.data.get("digest") == other.results.data.get("digest")
        return same_data and np.array_equal(self.clean["index"], other.clean["index"])

    @cached_property
    def right(self) -> Flags:
        """Which evaluated images are classified rightly (N,)."""
        return np.asarray(self.clean["logits"].argmax(axis=1) == self.clean["label"], np.bool_)

    def accepted(self, score: ScoreName) -> Flags:
        """Which evaluated images a score accepts (N,)."""
        return np.asarray(self.clean[f"accepted_{score}"], np.bool_)

    @property
    def classes(self) -> int:
        """How many classes the model tells apart."""
        return int(self.clean["logits"].shape[1])

    def attacked_in(self, norm: Norm) -> bool:
        """Whether any attack of the run was made for a norm."""
        return any(attack.result.norm == norm for attack in self.attacks)

    def nearest(self, norm: Norm) -> Values:
        """Smallest distance at which any attack found another class (N,): 0 where wrong already, else inf."""
        return self._smallest(norm, None)

    def fallen(self, norm: Norm, score: ScoreName) -> Values:
        """Smallest distance of a wrong image that the score accepts (N,): 0 where wrong or rejected clean."""
        return self._smallest(norm, score)

    def _smallest(self, norm: Norm, score: ScoreName | None) -> Values:
        lost = ~self.right if score is None else ~(self.right & self.accepted(score))
        smallest = np.where(lost, 0.0, np.inf)
        for attack in (*self.attacks, *self.denials):
            lengths = attack.lengths(norm)
            if score is not None:
                lengths = np.where(attack.accepted(score), lengths, np.inf)
            np.minimum.at(smallest, attack.rows, lengths)
        return smallest

    def radius(self, norm: Norm) -> Values:
        """The strongest served radius of each evaluated image (N,)."""
        return np.asarray(self.clean[f"radius_{norm}"], np.float64)

    def omega_bound(self, norm: Norm) -> Values:
        """The omega-bound of each evaluated image (N,), an estimate."""
        return np.asarray(self.clean[f"omega_{norm}"], np.float64)

    def threshold(self) -> float | None:
        """The threshold of the Jacobian norm, if the run judged it."""
        known: dict[ScoreName, float] = self.results.bundle.get("thresholds", {})
        return known.get("jacobian")

    def last_of_each(self) -> list[Attacked]:
        """Every attack once, at its largest budget."""
        last: dict[str, Attacked] = {}
        for attack in self.attacks:
            known = last.get(attack.result.name)
            if known is None or (attack.result.budget or 0.0) > (known.result.budget or 0.0):
                last[attack.result.name] = attack
        return list(last.values())

    def find(
        self, *prefixes: str, norm: Norm | None = None, budget: float | Literal["any"] | None = "any"
    ) -> list[Attacked]:
        """The attacks whose name starts with one of the prefixes, by the order of these."""
        found = []
        for prefix in prefixes:
            for attack in self.attacks:
                result = attack.result
                fits = plain(result.name).startswith(plain(prefix)) and norm in (None, result.norm)
                if fits and (budget == "any" or same(result.budget, budget)) and attack not in found:
                    found.append(attack)
        return found


def plain(name: str) -> str:
    """A name without the signs that people put into it in different ways."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def read(folder: Path) -> Evaluation:
    """Reads and checks a results folder; raises `DataError` that says which part is missing or broken."""
    results, path = load(folder), folder / RESULTS
    judged = tuple(f"accepted_{score}" for score in results.scores)
    clean = load_arrays(folder / CLEAN_FILE, (*CLEAN, *judged))
    count = len(clean["label"])
    if count != results.images:
        raise DataError(
            f"{folder / CLEAN_FILE}: holds {count} images, {path} speaks of {results.images}. They belong to "
            "different runs; run guard evaluate again."
        )
    attacks, denials = (
        tuple(_attacked(folder, result, count, judged) for result in some)
        for some in (results.attacks, results.over_rejection)
    )
    return Evaluation(folder, results, clean, attacks, denials, _aimed(folder, count))


def _attacked(folder: Path, result: AttackResult, count: int, judged: Sequence[str]) -> Attacked:
    """One attack with its arrays; raises `DataError` where they are not those of the results."""
    arrays = load_arrays(folder / result.file, (*ARRAYS, *judged))
    rows = arrays["row"]
    if len(rows) != result.n or (len(rows) and not 0 <= rows.min() <= rows.max() < count):
        raise DataError(
            f"{folder / result.file}: its rows are not the {result.n} of {count} images that "
            f"{folder / RESULTS} speaks of. They belong to different runs; run guard evaluate again."
        )
    return Attacked(result, arrays)


def _aimed(folder: Path, count: int) -> dict[Norm, Values]:
    found: dict[Norm, Values] = {}
    for norm in NORMS:
        path = folder / f"radii-{norm}.npz"
        if path.is_file():
            found[norm] = np.asarray(load_arrays(path, ("distance",))["distance"], np.float64)
            if len(found[norm]) != count:
                raise DataError(
                    f"{path}: holds {len(found[norm])} images, {folder / RESULTS} speaks of {count}. They "
                    "belong to different runs; run guard evaluate again."
                )
    return found
