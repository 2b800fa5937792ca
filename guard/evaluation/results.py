"""What `guard evaluate` leaves in its folder: `results.json`, and per-image arrays of every attack.

settings.json         what the run hangs on: it goes on only where all of this is the same
results.json          `Results`
clean.npz             `CLEAN` arrays of all evaluated images, in the order of `Results.images`
attacks/NAME.npz      `ARRAYS` of one attack at one budget, over the images it was run on
scores/SCORE.json     `Calibration` of a score that the bundle does not serve
masking.npz           `guard.evaluation.masking.probe`, of which rows and at which `budget-NORM`
masking-detector.npz  the same of `probe_detector`
radii-NORM.npz        `distance` (N,): the nearest of the attacks aimed at radii, inf: none; their `restarts`
omega-random-NORM.npz `guard.evaluation.audit.random_remainders` of images of the radii fold

results.json is written anew before every attack and at the end, so that a run that was stopped can be read
too.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from scipy import optimize, special

from guard.attacks import Labels
from guard.bundle import Record, ScoreName, Share
from guard.errors import DataError
from guard.evaluation.attack import Knowledge
from guard.norms import Norm
from guard.shares import share
from guard.stages import Arrays

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]

RESULTS = "results.json"
SETTINGS = "settings.json"
CLEAN_FILE = "clean.npz"
ATTACKS_FOLDER = "attacks"
GALLERY = 12
"""Attacked images kept per attack, for looking at."""

MEASURED = ("logits", "margin", "gradient_l2", "gradient_l1", "jacobian")
"""Fields of `guard.runtime.Measurement` that are kept for clean and for attacked images."""

CLEAN = ("index", "label", "image", "radius_l2", "radius_linf", "omega_l2", "omega_linf", *MEASURED)
"""Dataset index (N,), true class (N,), the first `GALLERY` images (C, H, W) float32, the strongest served
radii and the omega-bounds (N,), before a rejection sets them to 0, measurements (N, ...); and
`accepted_SCORE`, `ratio_SCORE` (N,) for every score judged: the score over its threshold."""

ARRAYS = ("row", "success", "wrong", "distance", "l2", "linf", "passes", "image", *MEASURED)
"""`row` (n,) numbers the attacked images among those of `clean.npz`; `success` (n,) as the attack counts it,
where the served decision confirms it; `wrong` (n,): the image it returned, whatever it says of it, is
predicted as another class; `distance` (n,) as measured in its norm, else in the attack's own measure, inf:
failed; `l2`, `linf` (n,) of the perturbation; `passes` (n,) forward passes as `Found` counts them; `image`
float32 the attacked ones of the rows below `GALLERY`; measurements of the attacked image (n, ...), NaN where
it is neither a success nor wrong; and `accepted_SCORE` (n,; False there), `ratio_SCORE` (n,; NaN there). Of
controls, which know nothing of the model, all images have these."""

ROUNDING = 1e-6
"""How far beyond its budget, relatively or in pixel values, float32 may have carried a perturbation."""


class Summary(Record):
    """Of n finite values: mean with its standard error, median with an interval of two order statistics that
    holds it with probability 95% or more (below 6 values: all of them, which hold it less often).
    """

    n: int
    mean: float
    standard_error: float
    median: float
    median_lower: float
    median_upper: float


class Detection(Record):
    """How a score does on an attack's successes: the share rejected, and the AUROC against clean images with
    its approximate 95% interval: the outer ends of `auroc_interval` and `paired_interval`.
    """

    rejected: Share
    auroc: float
    auroc_lower: float = 0.0
    auroc_upper: float = 1.0


class AttackResult(Record):
    """One attack at one budget (None: nearest). Shares are of the n images it was run on: those classified
    rightly, less, for `aware` attacks, those that the guard rejects already, and less those of
    `settings["skipped"]`, which cheaper attacks had broken: of a dear attack that knows the detector the
    share is one of what was left, the harder images. Where none was left, n is 0 and `success` None.

    `in_files`: of the successes, the share that are one when rounded to 8 bits a value, as image files are,
    whether or not rounding carries them beyond the budget; None where there are none.
    `false_alarms`, of controls alone: of the images that are still right, the share that each score rejects.
    """

    name: str
    title: str
    norm: Norm | None
    unit: str
    budget: float | None
    knowledge: Knowledge
    aware: ScoreName | None
    source: str
    settings: dict[str, Any] = Field(default_factory=dict)
    n: int
    success: Share | None
    distance: Summary | None
    passes: float
    seconds: float
    in_files: Share | None = None
    detection: dict[ScoreName, Detection] = Field(default_factory=dict)
    false_alarms: dict[ScoreName, Share] = Field(default_factory=dict)
    file: str


class Subset(Record):
    """Of the first `images`, on which `attacks` were run too: what stands under these and all others that
    were run on so many, what is accepted and right without attack, and what stands `alone`, without the
    detector. `added` is the share that `attacks` brought down of those that the others left standing; None:
    they left none.
    """

    images: int
    attacks: list[str]
    standing: Share
    clean: Share
    alone: Share
    added: Share | None


class Standing(Record):
    """Robust accuracy with rejection at a budget: of all n images, those that are accepted and right when
    clean, and for which no attack of the run found an accepted image of another class within the budget.

    `clean` is the share that is accepted and right without attack. `fallen` counts, by attack, the images
    that it brought down, whatever others did, and `meant` those accepted and right that it was meant for;
    `worst` brought down the largest share of them. `alone` is what stands without the detector: images that
    are right, and for which no attack found one of another class, accepted or not. Where dear attacks were
    run on fewer images, all of this counts the rest as if they had failed there; `subsets`, largest first,
    say what stands where they were run.
    """

    score: ScoreName
    norm: Norm
    budget: float
    standing: Share
    clean: Share
    worst: str | None
    fallen: dict[str, int]
    meant: dict[str, int]
    alone: Share | None = None
    subsets: list[Subset] = Field(default_factory=list)


CheckVerdict = Literal["passed", "failed", "undecided", "not run"]


class Check(Record):
    """One sign of gradient masking: `verdict`, what was expected, what was found.

    Undecided: no image fell to the attack that would tell. Not run: there are none to compare.
    """

    name: str
    verdict: CheckVerdict
    expected: str
    found: str
    numbers: dict[str, float] = Field(default_factory=dict)


class RadiusAudit(Record):
    """A radius under the union of all attacks: the share of images attacked strictly inside, and tightness
    (mean radius over mean smallest distance that any attack found) with the standard error of that ratio.

    Means and tightness are over the `found` images for which an attack was found and the radius is finite.
    """

    norm: Norm
    kind: str
    method: str
    served: bool
    violations: Share
    found: int | None = None
    mean_radius: float
    mean_distance: float
    tightness: float
    tightness_error: float = 0.0
    alpha: float | None = None


class LeftOut(Record):
    """An attack of the run that cannot take the model or its images, or whose package is not installed."""

    name: str
    reason: str


class Results(Record):
    """`results.json`.

    `bundle` holds `name` and `digest`, and may hold `class_names` and `thresholds` by score; `data` holds
    `name`. `outstanding` names the attacks that the run has not finished, with their budgets, and what it
    ends with; empty: it is finished.
    """

    schema_version: Literal[1] = 1
    command: str
    hardware: str
    seconds: float
    bundle: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    images: int
    accuracy: Share
    scores: list[ScoreName]
    served: ScoreName
    rejected: dict[ScoreName, Share]
    jacobian: Summary
    attacks: list[AttackResult]
    standing: list[Standing]
    over_rejection: list[AttackResult] = Field(default_factory=list)
    outstanding: list[str] = Field(default_factory=list)
    left_out: list[LeftOut] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    radii: list[RadiusAudit] = Field(default_factory=list)
    provenance: dict[str, Any]

    def sought(
        self, norm: Norm, budget: float | None = None, *, aware: ScoreName | None = None, on_all: bool = True
    ) -> bool:
        """Whether an attack looked for the nearest image in a norm or, given a budget, was run at this one.

        Otherwise the smallest distances found are those of attacks that stopped elsewhere, and say nothing;
        so an attack on the first images only does not count, but where it need not be `on_all`.
        Counted are attacks on the classifier alone or, with `aware`, those that know this score.
        """
        return any(
            one.norm == norm
            and one.aware == aware
            and one.knowledge != "nothing"
            and (not on_all or one.settings.get("images", self.images) >= self.images)
            and (one.budget is None or (budget is not None and same(one.budget, budget)))
            for one in self.attacks
        )


@dataclass(frozen=True)
class Finished:
    """One attack at one budget and its `ARRAYS`."""

    result: AttackResult
    arrays: Arrays

    def within(self, norm: Norm, budget: float) -> Flags:
        """Which of the attacked images (n,) it got wrong within `budget` by the perturbation's own norm."""
        return np.asarray(self.arrays["wrong"] & reaches(self.arrays[norm], budget), np.bool_)


def reaches(distances: NDArray[Any], budget: float) -> NDArray[np.bool_]:
    """Which distances (n,) are within a budget, up to rounding."""
    return np.asarray(distances <= farthest(budget), np.bool_)


def farthest(budget: float) -> float:
    """The distance that counts as within a budget, up to rounding."""
    return budget * (1 + ROUNDING) + ROUNDING


def same(one: float | None, other: float | None) -> bool:
    """Whether two budgets are the same number, up to rounding."""
    if one is None or other is None:
        return one is other
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


def summary(values: Values) -> Summary | None:
    """Of the finite ones among values (n,); None where fewer than two are finite."""
    finite = np.sort(values[np.isfinite(values)].astype(np.float64))
    n = len(finite)
    if n < 2:
        return None
    low = median_rank(n)
    return Summary(
        n=n,
        mean=float(finite.mean()),
        standard_error=float(finite.std(ddof=1) / math.sqrt(n)),
        median=float(np.median(finite)),
        median_lower=float(finite[low]),
        median_upper=float(finite[n - 1 - low]),
    )


def median_rank(n: int) -> int:
    """How many of n ordered values lie outside the median's 95% interval on either side."""
    spread = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a binomial count at 1/2
    return max(0, math.floor(n / 2 - spread) - 1)


def detection(accepted: Flags, attacked: Values, clean: Values, rows: Labels) -> Detection:
    """How a score does on n >= 1 images: `accepted` (n,), and their scores (n,) against those of clean images
    (m,), of which the `rows` (n,) are what they were made from.
    """
    found, rejected = auroc(attacked, clean), share(~accepted)
    apart = auroc_interval(found, len(attacked), len(clean))
    paired = paired_interval(attacked, clean, rows)
    lower, upper = min(apart[0], paired[0]), max(apart[1], paired[1])
    return Detection(rejected=rejected, auroc=found, auroc_lower=lower, auroc_upper=upper)


def auroc(attacked: Values, clean: Values) -> float:
    """Probability that an attacked image's score lies above a clean one's, ties counted half; NaN as inf."""
    return float(_above(attacked, clean).mean())


def _above(scores: Values, others: Values) -> Values:
    """Of each score (n,) the share of the others that it lies above, ties counted half; NaN as inf."""
    ordered = np.sort(np.where(np.isnan(others), np.inf, others))
    asked = np.where(np.isnan(scores), np.inf, scores)
    below, ties = np.searchsorted(ordered, asked, "left"), np.searchsorted(ordered, asked, "right")
    return np.asarray((below + ties) / (2 * len(ordered)), np.float64)


def paired_interval(attacked: Values, clean: Values, rows: Labels) -> tuple[float, float]:
    """Approximate 95% confidence interval of the AUROC where attacked images (n,) were made from the clean
    ones' `rows` (n,), so that both scores of an image vary together.

    The variance is the sum of the squares of what each image adds to the area, as both (DeLong et al. 1988;
    in clusters Obuchowski 1997); ends by the logit. An area of 0 or 1, and one image, have no width here.
    """
    value = auroc(attacked, clean)
    adds = (1 - _above(clean, attacked) - value) / len(clean)
    np.add.at(adds, rows, (_above(attacked, clean) - value) / len(attacked))
    if not 0 < value < 1:
        return value, value
    spread = 1.96 * float(np.sqrt((adds**2).sum())) / (value * (1 - value))
    middle = special.logit(value)
    return float(special.expit(middle - spread)), float(special.expit(middle + spread))


def auroc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """Approximate 95% confidence interval of the AUROC of two samples, n >= 1 each.

    Its ends lie 1.96 standard errors off, by the variance that an area of their own size would have for
    exponential scores (Hanley & McNeil 1982) of two samples of the mean size; so there is a width at 0 and 1
    too. Source: Newcombe 2006, method 5.
    """
    others = (positives + negatives) / 2 - 1

    def excess(area: float) -> float:
        spread = area * (1 - area) * (1 + others * ((1 - area) / (2 - area) + area / (1 + area)))
        return abs(area - value) - 1.96 * math.sqrt(spread / (positives * negatives))

    inside = min(max(value, 1e-12), 1 - 1e-12)  # an area of 0 or 1 has no variance
    lower = optimize.brentq(excess, 0.0, inside) if value > 0 else 0.0
    upper = optimize.brentq(excess, inside, 1.0) if value < 1 else 1.0
    return float(lower), float(upper)


def load(folder: str | Path) -> Results:
    """`results.json` of a results folder; raises `DataError` where there is none or it is not sound."""
    path = Path(folder) / RESULTS
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{folder}: holds no {RESULTS} that can be read ({error.strerror}). Make it with: guard evaluate "
            f"--val DATA --out {folder}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}. Evaluate again into a new folder.") from error


def load_arrays(path: Path, needed: Sequence[str] = ()) -> Arrays:
    """The arrays of one file; raises `DataError` where it is broken, missing, or lacks a `needed` one."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = dict(archive)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: is missing. Run the same guard evaluate again: it goes on where it stopped."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: is no .npz file that can be read ({error}). Delete it and run the same guard evaluate "
            "again."
        ) from error
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: holds no {', '.join(missing)}. Delete it and run the same guard evaluate again."
        )
    return arrays
