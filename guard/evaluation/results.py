"""What `guard evaluate` leaves in its folder: `results.json`, and per-image arrays of every attack.

results.json          `Results`
clean.npz             `CLEAN` arrays of all evaluated images, in the order of `Results.images`
attacks/NAME.npz      `ARRAYS` of one attack at one budget, over the images it was run on
"""

from typing import Any, Literal

from pydantic import Field

from guard.attacks import Norm
from guard.bundle import Record, ScoreName, Share
from guard.evaluation.attack import Knowledge

SCHEMA = 1
RESULTS = "results.json"
CLEAN_FILE = "clean.npz"
ATTACKS_FOLDER = "attacks"
GALLERY = 12
"""Attacked images kept per attack, for looking at."""

MEASURED = ("logits", "margin", "gradient_l2", "gradient_l1", "jacobian")
"""Fields of `guard.runtime.Measurement` that are kept for clean and for attacked images."""

CLEAN = ("index", "label", "image", *MEASURED)
"""Dataset index (N,), true class (N,), the first `GALLERY` images (C, H, W) float32, measurements (N, ...);
and `accepted_SCORE` (N,) for every score judged. `radius_l2` and `radius_linf` (N,), the served radii before
rejection, may be there."""

ARRAYS = ("row", "success", "distance", "l2", "linf", "passes", "image", *MEASURED)
"""`row` (n,) numbers the attacked images among those of `clean.npz`; `success` (n,) as the attack counts it;
`distance` (n,) in the attack's own measure, inf: failed; `l2`, `linf` (n,) of the perturbation; `passes` (n,)
forward passes spent on each image; `image` float32 the attacked ones of the rows below `GALLERY`;
measurements of the attacked image (n, ...), NaN where the attack failed; and `accepted_SCORE` (n,)."""


class Summary(Record):
    """Of n finite values: mean with its standard error, median with its 95% interval (order statistics)."""

    n: int
    mean: float
    standard_error: float
    median: float
    median_lower: float
    median_upper: float


class Detection(Record):
    """How a score does on an attack's successes: the share rejected, and the AUROC against clean images."""

    rejected: Share
    auroc: float


class AttackResult(Record):
    """One attack at one budget (None: nearest). Shares are of the images it was run on: those classified
    rightly, less, for `aware` attacks, those that the guard rejects already.
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
    success: Share
    distance: Summary | None
    passes: float
    seconds: float
    detection: dict[ScoreName, Detection] = Field(default_factory=dict)
    file: str


class Standing(Record):
    """Robust accuracy with rejection at a budget: of all n images, those that are accepted and right when
    clean, and for which no attack of the run found an accepted image of another class within the budget.

    `fallen` counts, by attack, the images that it brought down, whatever others did; `clean` is the share
    that is accepted and right without attack.
    """

    score: ScoreName
    norm: Norm
    budget: float
    standing: Share
    clean: Share
    worst: str | None
    fallen: dict[str, int]


class Check(Record):
    """One sign of gradient masking: `verdict`, what was expected, what was found."""

    name: str
    verdict: Literal["passed", "failed", "not run"]
    expected: str
    found: str
    numbers: dict[str, float] = Field(default_factory=dict)


class RadiusAudit(Record):
    """A radius under the union of all attacks: the share of images attacked strictly inside, and tightness
    (mean radius over mean smallest distance that any attack found).
    """

    norm: Norm
    kind: str
    method: str
    served: bool
    violations: Share
    mean_radius: float
    mean_distance: float
    tightness: float
    alpha: float | None = None


class Results(Record):
    """`results.json`.

    `bundle` holds `name` and `digest`, and may hold `class_names` and `thresholds` by score; `data` holds
    `name`.
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
    checks: list[Check] = Field(default_factory=list)
    radii: list[RadiusAudit] = Field(default_factory=list)
    provenance: dict[str, Any]
