"""A bundle: one folder that holds a classifier, what it expects, and the calibration that belongs to it.

`manifest.json` lists every other file with its sha256; `calibration.json` names the sha256 of the model
and the version of the gradient graph it was made with. Loading checks all of them: nothing serves or
certifies with parts that do not belong together.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from guard.errors import BundleError
from guard.files import check_writable, sha256, write_bytes
from guard.images import Interpolation
from guard.norms import Norm

MODEL = "model.onnx"
MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
CARD = "card.md"

ScoreName = Literal["jacobian", "combined", "radius", "margin-gradient", "jacobian-full"]
Probability = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """Base of everything stored: unknown fields and NaN are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


RecordType = TypeVar("RecordType", bound=Record)


class InputShape(Record):
    """Shape of one model input, without the batch axis."""

    channels: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width


class Preprocessing(Record):
    """How an upload becomes a model input: colour, then resize, then centre crop to the input's size.

    `resize` is the length in pixels that the shorter side gets before cropping; None resizes straight to
    the input's height and width, whatever the aspect ratio.
    """

    colour: Literal["rgb", "grey"] = "rgb"
    resize: Annotated[int, Field(ge=1)] | None = None
    interpolation: Interpolation = "bilinear"


class Manifest(Record):
    """`manifest.json`: what the bundle is and what lies in it."""

    schema_version: Literal[1] = 1
    name: str
    input: InputShape
    class_names: list[str]
    preprocessing: Preprocessing = Preprocessing()
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of every other file, by path")
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        uploads, size = self.preprocessing, self.input
        if (uploads.colour == "rgb") != (size.channels == 3):
            raise ValueError(
                f"preprocessing.colour is {uploads.colour} where input.channels is {size.channels}: expected "
                "rgb with 3, grey with 1"
            )
        largest = max(size.height, size.width)
        if uploads.resize is not None and uploads.resize < largest:
            raise ValueError(
                f"preprocessing.resize is {uploads.resize}, less than the {size.height} x {size.width} "
                f"pixels that are cropped from it: expected {largest} or more, or null"
            )
        return self


class Share(Record):
    """A share measured on n images, with a Clopper-Pearson interval at `level` (one-sided: `upper` only)."""

    count: Annotated[int, Field(ge=0)]
    n: Annotated[int, Field(ge=1)]
    value: Probability
    upper: Probability
    lower: Probability = 0.0
    level: Probability = 0.95


class PredictedShare(Record):
    """The interval the conformal rank predicts for a share on m fresh images (beta-binomial)."""

    lower: Probability
    upper: Probability
    level: Probability
    m: Annotated[int, Field(ge=1)]


class Agreement(Record):
    """How often the served decision equals the full Jacobian's on one set of images."""

    images: str
    n: Annotated[int, Field(ge=1)]
    agree: Annotated[int, Field(ge=0)]


class ScoreThreshold(Record):
    """One test of a `combined` score: reject when its score exceeds its threshold."""

    name: Literal["jacobian", "radius"]
    threshold: Annotated[float, Field(ge=0)]


class Histogram(Record):
    """Clean calibration scores, for plotting: `counts[i]` scores lie in [edges[i], edges[i + 1])."""

    edges: list[float]
    counts: list[int]


class OmegaRecord(Record):
    """The fitted modulus of continuity of one norm: `values[bin][i]` belongs to radius `eps[i]`.

    `conditioned_on` names the quantity whose bin edges are `edges` (empty: one bin). An estimate.
    """

    eps: list[float]
    edges: list[float] = Field(default_factory=list)
    values: list[list[float]]
    conditioned_on: Literal["none", "gradient", "margin", "first-order-radius"] = "none"
    relative: bool = False
    reach: list[float] = Field(default_factory=list, description="largest radius examined, per bin")


class ExtremeFit(Record):
    """A generalized extreme value fit of block maxima and the quantile taken from it (an estimate)."""

    value: float
    method: Literal["gev", "gumbel", "largest"]
    largest: float
    blocks: Annotated[int, Field(ge=1)]
    shape: float
    location: float
    scale: float
    p_value: float


class ConformalScale(Record):
    """Finite-sample scale of a radius: P(some attack of `suite` succeeds inside kappa * radius) <= alpha.

    The last two figures are measured on report images, to which nothing was fitted. The promise is for images
    that the detector accepts, on average over calibration sets, for this scale by itself.
    """

    alpha: Probability
    kappa: Annotated[float, Field(ge=0)]
    n: Annotated[int, Field(ge=1)]
    suite: list[str]
    violations: Share | None = Field(default=None, description="attacked inside, of accepted report images")
    mean_radius: Annotated[float, Field(ge=0)] | None = None


def _listed(value: object) -> object:
    """Of older calibrations: one conformal radius, or null for none."""
    return [] if value is None else value if isinstance(value, list) else [value]


class RadiusCalibration(Record):
    """What was fitted and measured for the radii of one norm (pixels, [0, 1] scale).

    `slope` is typical of the margin, for `guard.certificate.effective_slope`; 0 in older calibrations.
    `mean_radius` is of the accepted images, `mean_distance` of those that an attack reached, and `tightness`
    the ratio of both means over the latter; 0 where there are none.
    """

    lipschitz: Annotated[float, Field(ge=0)]
    slope: Annotated[float, Field(ge=0)] = 0.0
    omega: OmegaRecord
    lipschitz_fit: ExtremeFit | None = None
    omega_fits: list[list[ExtremeFit]] = Field(default_factory=list, description="per bin and eps")
    violations: Share
    mean_radius: Annotated[float, Field(ge=0)]
    mean_distance: Annotated[float, Field(ge=0)]
    tightness: Annotated[float, Field(ge=0)]
    attack: dict[str, Any]
    effort: dict[str, Any]
    ablation: dict[str, float] = Field(default_factory=dict, description="mean L-bound, first-order radius")
    conformal: Annotated[list[ConformalScale], BeforeValidator(_listed)] = Field(
        default_factory=list, description="by alpha, the smallest first"
    )
    histogram: Histogram | None = Field(
        default=None, description="served radii of clean report images; rejected ones count as radius 0"
    )


class Calibration(Record):
    """`calibration.json`: the detector's threshold and the radii's tables, for one model file."""

    schema_version: Literal[1] = 1
    model_sha256: str
    graph_version: int
    score: ScoreName
    guarantee: Literal["marginal", "pac"] = "marginal"
    delta: Probability | None = None
    fpr: Probability
    threshold: Annotated[float, Field(ge=0)]
    tests: list[ScoreThreshold] = Field(default_factory=list)
    n: Annotated[int, Field(ge=1)]
    seed: int
    data: dict[str, Any]
    folds: dict[str, int]
    predicted_fpr: PredictedShare
    realized_fpr: Share
    accuracy: Share | None = None
    row_bound: Annotated[float, Field(ge=0)]
    row_fit: ExtremeFit | None = None
    agreement: list[Agreement] = Field(default_factory=list)
    histogram: Histogram
    l2: RadiusCalibration
    linf: RadiusCalibration
    provenance: dict[str, Any] = Field(default_factory=dict)

    def radii(self, norm: Norm) -> RadiusCalibration:
        """The calibration of one norm."""
        return self.l2 if norm == "l2" else self.linf

    @property
    def caveat(self) -> str | None:
        """What to say wherever its figures stand, if it was made with less than the default effort."""
        effort = self.provenance.get("arguments", {}).get("effort", 1)
        if effort >= 1:
            return None
        return (
            f"Calibrated with --effort {effort:g}, for trying out: its attacks were weak, so the radii are "
            "too large, and broken more often than measured."
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked against its manifest; `calibration` is None until calibrated."""

    path: Path
    manifest: Manifest
    calibration: Calibration | None

    @property
    def model(self) -> Path:
        """The classifier's file."""
        return self.path / MODEL

    @property
    def digest(self) -> str:
        """Digest of the classifier, as answers name it."""
        return f"sha256:{self.manifest.files[MODEL]}"

    def calibrated(self) -> Calibration:
        """The calibration; raises `BundleError` where there is none."""
        if self.calibration is None:
            raise BundleError(
                f"{self.path}: not calibrated (no {CALIBRATION}). Run: guard calibrate {self.path} --val DATA"
            )
        return self.calibration


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but its manifest, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def _parse(kind: type[RecordType], path: Path) -> RecordType:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}). Is this a bundle's folder?") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise BundleError(
            f"{path}: {what}. The file is corrupt or of another version of guard; {_remedy(path.name)}."
        ) from error


def _remedy(name: str) -> str:
    return "run guard calibrate" if name == CALIBRATION else "make the bundle again"


def load(folder: str | Path, *, graph_version: int | None = None, recalibrating: bool = False) -> Bundle:
    """Read and check the bundle in `folder`.

    With `graph_version`, a calibration made with another version of the gradient graph is refused. With
    `recalibrating` the calibration is left out unread, whatever its state: it is about to be replaced.
    Raises `BundleError` naming the file and both digests where anything does not match.
    """
    path = Path(folder)
    if not path.is_dir():
        raise BundleError(
            f"{path}: no such bundle folder. Give a folder made by `guard export` or `guard wrap`, "
            "or set GUARD_MODEL."
        )
    manifest = _parse(Manifest, path / MANIFEST)
    if MODEL not in manifest.files:
        raise BundleError(f"{path / MANIFEST}: lists no {MODEL}; make the bundle again.")
    for name, expected in manifest.files.items():
        if name == CALIBRATION and recalibrating:
            continue
        file = path / name
        if "\0" in name or not file.resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{path / MANIFEST}: lists {name!r}, which lies outside the bundle.")
        if not file.is_file():
            raise BundleError(
                f"{file}: is missing, though {MANIFEST} lists it. Restore the file or {_remedy(name)}."
            )
        found = sha256(file)
        if found != expected:
            raise BundleError(
                f"{file}: does not match the manifest: expected sha256 {expected}, found {found}. "
                f"Restore the file or {_remedy(name)}."
            )
    if recalibrating:
        return Bundle(path, manifest, None)
    if CALIBRATION not in manifest.files:
        if (path / CALIBRATION).exists():
            raise BundleError(
                f"{path / CALIBRATION}: is not listed in the manifest: expected no file, found sha256 "
                f"{sha256(path / CALIBRATION)}. Run guard calibrate to make it anew."
            )
        return Bundle(path, manifest, None)
    calibration = _parse(Calibration, path / CALIBRATION)
    if calibration.model_sha256 != manifest.files[MODEL]:
        raise BundleError(
            f"{path / CALIBRATION}: belongs to another model: made for sha256 {calibration.model_sha256}, "
            f"{MODEL} has {manifest.files[MODEL]}. Run: guard calibrate {path} --val DATA"
        )
    if graph_version is not None and calibration.graph_version != graph_version:
        raise BundleError(
            f"{path / CALIBRATION}: made with gradient graph version {calibration.graph_version}, this guard "
            f"builds version {graph_version}. Run: guard calibrate {path} --val DATA"
        )
    return Bundle(path, manifest, calibration)


def check_target(out: Path) -> None:
    """Raises `BundleError` where a new bundle would overwrite something that is none, and what
    `check_writable` raises.
    """
    if out.exists() and not out.is_dir():
        raise BundleError(f"{out}: is a file; expected a folder for the bundle. Choose a new folder.")
    if out.is_dir() and any(out.iterdir()):
        try:
            _parse(Manifest, out / MANIFEST)  # many other programs have a manifest.json
        except BundleError as error:
            raise BundleError(
                f"{out}: holds files but is no bundle; nothing was changed. Choose a new folder."
            ) from error
    check_writable(out)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Writes and returns the manifest of the files that now lie in `folder`: a bundle's last step."""
    sealed = manifest.model_copy(update={"files": digests(folder)})
    write_bytes(folder / MANIFEST, dump(sealed))
    return sealed


def dump(record: Record) -> bytes:
    """A record as the bytes of its file."""
    return (json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()
