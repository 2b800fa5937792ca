"""The recipes of the papers' tables: one preset for every row that was trained, with what the paper found.

Papers are named as everywhere here: LIP, LIPGEN, SCALE, MANIFOLD, HAMMING. What a paper leaves open is chosen
beside the settings below; `docs/decisions/0059-presets.md` gives the reasons.
"""

import difflib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from guard.errors import UsageError
from guard.training.settings import Settings

_WIDTH = 80


@dataclass(frozen=True)
class Figure:
    """One number of a paper, as printed, in the unit that `MEASURES` has for its `measure`.

    `source` is the table; `at` is the attack or its size, nothing for clean images.
    """

    measure: str
    value: float
    source: str
    at: str = ""


@dataclass(frozen=True)
class Measure:
    """What a figure measures: `label` heads it in a table, `unit` follows it."""

    label: str
    unit: str
    meaning: str


MEASURES: dict[str, Measure] = {
    "error": Measure("error", "%", "misclassified test images, clean or under the attack `at`"),
    "top5_error": Measure("top-5 error", "%", "the same, label not among the five most probable classes"),
    "accuracy": Measure("accuracy", "%", "rightly classified test images, clean or under the attack `at`"),
    "verified": Measure("verified", "%", "test images proven right in the ball `at`"),
    "omega_error": Measure("omega error", "%", "test images with an omega-bound below `at`"),
    "smoothing_error": Measure("smoothing error", "%", "test images not certified by randomized smoothing"),
    "median_l2": Measure("median l2", "", "median smallest l2 distance of an attack"),
    "median_linf": Measure("median linf", "", "median smallest linf distance of an attack"),
    "mean_l2": Measure("mean l2", "", "mean smallest l2 distance of an attack"),
    "l_bound": Measure("L-bound", "", "mean L-bound, l2"),
    "omega_bound": Measure("omega-bound", "", "mean omega-bound, l2"),
    "calls": Measure("calls", "", "median time of a successful attack, in model calls"),
    "rejected": Measure("rejected", "%", "images rejected by the Jacobian norm, of the source `at`"),
    "max_gradient": Measure("max grad", "", "largest l2 norm of the loss's gradient on the test images"),
    "mean_gradient": Measure("mean grad", "", "mean l2 norm of the loss's gradient on the test images"),
    "max_jacobian": Measure("max Jacobian", "", "largest (2, inf) norm of the model's Jacobian"),
    "mean_jacobian": Measure("mean Jacobian", "", "mean (2, inf) norm of the model's Jacobian"),
    "max_margin_gradient": Measure("max margin grad", "", "largest l2 norm of the margin's gradient"),
    "mean_margin_gradient": Measure("mean margin grad", "", "mean l2 norm of the margin's gradient"),
    "omega": Measure("omega", "", "the margin's modulus of continuity at the l2 distance `at`"),
    "hours": Measure("hours", "h", "of training on one GTX 1080 Ti (ImageNet: four)"),
    "minutes": Measure("minutes", "min", "of training on one RTX 1080"),
}


@dataclass(frozen=True)
class Preset:
    """One row of a paper's table: how it was trained, and what came of it.

    `dataset` is None for one that the user has to give as a folder; `source` names the paper and its tables;
    `figures` are empty where the paper only draws curves.
    """

    name: str
    source: str
    settings: Settings
    dataset: str | None
    figures: tuple[Figure, ...] = ()

    @property
    def paper(self) -> str:
        """LIP, LIPGEN, SCALE, MANIFOLD or HAMMING."""
        return self.name.partition("-")[0].upper()


def _figures(source: str, measures: str, values: str) -> tuple[Figure, ...]:
    """One row: values for measures, written `name` or `name@at`; `-` where the row has none."""
    pairs = zip(measures.split(), values.split(), strict=True)
    found = []
    for name, value in pairs:
        measure, _, at = name.partition("@")
        if value != "-":
            found.append(Figure(measure, float(value), source, at))
    return tuple(found)


# What all of them share, and what they leave open: 0.9 is the usual momentum.
_COMMON = Settings(
    batch_size=128,
    learning_rate=0.1,
    warmup=0.0,
    momentum=0.9,
    nesterov=False,
    weight_decay=5e-4,
    padding=4,
    mirror=True,
    cutout=0,
)

# LIP A. Its eps and multiplier are 0.01 and 0.1 where LIPGEN's Table 2 repeats its rows; the weight decay is
# illegible, and here that of the work that cutout comes from.
_LIP = {"cifar10": replace(_COMMON, epochs=200, schedule="fifths", cutout=16)}
_LIP["cifar100"] = replace(_LIP["cifar10"], epochs=300, schedule="tenths", cutout=8)

# FGSM moves by eps in l2 as well (LIP A), so every pixel by eps / sqrt(3 * 32 * 32).
_FGSM = "tv-l1:eps=0.00018"

_RESNEXT = {"cifar10": "resnext34-2x32", "cifar100": "resnext34-4x32"}

# The columns of LIP's Tables 3 and 5; the extracted text has lost the medians of Table 5. Rows: the name's
# ending, the regularizer without and with adversarial training, the pre-logit sigmoid.
_LIP_VARIANTS = (
    ("none", "none", False),
    ("lipschitz", "lipschitz:weight=0.1", False),
    ("sigmoid", "none", True),
    ("lipschitz-sigmoid", "lipschitz:weight=0.1", True),
    ("tv", "tv-l2:eps=0.01", False),
    ("tulip", "tulip:eps=0.01,weight=0.1", False),
    ("tv-sigmoid", "tv-l2:eps=0.01", True),
    ("tulip-sigmoid", "tulip:eps=0.01,weight=0.1", True),
)
_LIP_TABLES = {
    "cifar10": (
        "Table 3",
        "median_l2 error error@l2=0.1",
        {
            "allcnn": "0.13 6.01 38.11, 0.17 6.26 29.27, 0.19 5.41 32.61, 0.21 5.45 25.04, "
            "0.29 5.90 17.09, 0.29 5.84 16.86, 0.38 5.10 16.19, 0.35 5.27 15.00",
            "resnet34": "0.09 6.00 56.00, 0.17 5.43 27.08, 0.20 5.54 34.44, 0.21 6.14 28.66, "
            "0.25 5.57 18.19, 0.28 5.65 16.74, 0.46 5.52 17.45, 0.40 5.81 15.84",
            "resnext34": "0.09 4.07 53.98, 0.21 4.28 19.13, 0.34 4.05 23.97, 0.33 4.18 19.64, "
            "0.30 3.58 13.54, 0.31 4.13 12.52, 0.61 3.80 12.71, 0.56 4.08 12.12",
        },
    ),
    "cifar100": (
        "Table 5",
        "error error@l2=0.1",
        {
            "allcnn": "25.25 63.58, 25.89 56.45, 26.06 64.77, 26.23 56.26, "
            "25.64 53.85, 25.60 50.71, 26.27 54.81, 26.05 53.24",
            "resnet34": "27.42 90.41, 28.18 70.94, 40.72 81.19, 38.61 68.34, "
            "28.21 66.12, 28.21 66.12, 29.19 64.51, 28.01 58.40",
            "resnext34": "21.24 74.18, 21.97 47.64, 21.05 52.28, 21.05 52.28, "
            "21.57 53.77, 21.73 46.79, 21.01 50.33, 21.47 42.58",
        },
    ),
}


def _lip() -> Iterable[Preset]:
    """LIP's Tables 3 and 5, and of Table 1 what they do not have: FGSM, and one median on CIFAR-100."""
    for dataset, (table, measures, rows) in _LIP_TABLES.items():
        prefix = "lip" if dataset == "cifar10" else "lip-cifar100"
        for network, values in rows.items():
            architecture = {"allcnn": "allcnn-c", "resnext34": _RESNEXT[dataset]}.get(network, network)
            for (variant, regularizer, sigmoid), row in zip(_LIP_VARIANTS, values.split(", "), strict=True):
                settings = replace(
                    _LIP[dataset],
                    architecture=architecture,
                    regularizers=(regularizer,),
                    pre_logit_sigmoid=sigmoid,
                )
                source = f"LIP {table}"
                name, figures = f"{prefix}-{network}-{variant}", _figures(source, measures, row)
                if name == "lip-cifar100-resnext34-tulip-sigmoid":
                    figures += _figures("LIP Table 1", "median_l2", "0.136")
                yield Preset(name, source, settings, dataset, figures)
        fgsm = {"cifar10": "0.18 - 24.63", "cifar100": "- 56.34"}[dataset]
        settings = replace(_LIP[dataset], architecture=_RESNEXT[dataset], regularizers=(_FGSM,))
        figures = _figures("LIP Table 1", measures, fgsm)
        yield Preset(f"{prefix}-resnext34-fgsm", "LIP Table 1", settings, dataset, figures)


# LIPGEN 5 says "training hyper-parameters for the CIFAR datasets, and cutout": LIP's, whose rows it repeats.
# The loss is (2.9)'s: differences of h = 1e-3, which need full precision.
def _lipgen_terms(eps: str | None, weight: str | None) -> tuple[str, ...]:
    variation = [f"tv-l2:eps={eps},form=penalty,h=0.001"] if eps else []
    return (*variation, *([f"lipschitz:weight={weight}"] if weight else []))


_LIPGEN_MEASURES = (
    "error median_l2 calls error@l2=0.1 median_linf error@linf=8/255 "
    "max_gradient max_jacobian mean_gradient mean_jacobian"
)
_LIPGEN_2 = (
    ("undefended", ("none",), "4.07 0.09 159 53.98 2.7e-3 100 85.21 13.70 1.90 0.37"),
    ("fgsm", (_FGSM,), "3.87 0.19 301 23.26 5.6e-3 92.74 35.77 6.27 1.10 0.21"),
    ("0.01", _lipgen_terms("0.01", None), "3.58 0.30 471 13.54 9.0e-3 98.34 32.13 5.22 0.59 0.11"),
    ("0.01-0.1", _lipgen_terms("0.01", "0.1"), "4.13 0.31 473 12.52 9.1e-3 98.10 4.10 2.14 0.55 0.10"),
    ("0.1-0.1", _lipgen_terms("0.1", "0.1"), "5.37 0.48 659 10.31 13.7e-3 91.6 31.96 8.93 1.19 0.47"),
    # The linf median is printed as 14.7e-2: beyond 8/255, where 93.7% are misclassified already.
    ("0.1-1", _lipgen_terms("0.1", "1"), "5.98 0.52 698 10.95 14.7e-3 93.7 18.53 4.87 1.02 0.46"),
)
_LIPGEN_3 = (
    ("undefended", ("none",), "21.24 4.7e-2 152 74.18 1.4e-3 81.52 93.83 1.89 5.19 0.14"),
    ("fgsm", (_FGSM,), "22.06 8.8e-2 227 53.09 2.5e-3 63.71 34.60 0.71 2.97 0.08"),
    ("0.01", _lipgen_terms("0.01", None), "21.57 8.6e-2 253 53.77 2.6e-3 61.72 44.81 0.73 2.86 0.08"),
    ("0.01-0.1", _lipgen_terms("0.01", "0.1"), "21.73 11.2e-2 307 46.79 3.2e-3 55.92 27.58 0.46 2.10 0.05"),
)
_LIPGEN_MORE = {
    "lipgen-0.01-0.1": (
        ("LIPGEN Table 1", "error@pgd:l2=100/255 error@cw:l2=1.5 error@i-fgsm:linf=8/255", "59.8 90.8 98.1"),
        # Which model Table 6 detects on is not said; the median distance of PGD, 0.31, is this one's.
        (
            "LIPGEN Table 6",
            "rejected@clean rejected@pgd rejected@boundary rejected@cw rejected@evasive-cw",
            "6 96 100 100 22",
        ),
        (
            "LIPGEN Table 6",
            "median_l2@pgd median_l2@boundary median_l2@cw median_l2@evasive-cw",
            "0.31 0.36 0.34 0.81",
        ),
    ),
    "lipgen-0.1-0.1": (
        ("LIPGEN Table 1", "error@pgd:l2=100/255 error@cw:l2=1.5 error@i-fgsm:linf=8/255", "37.2 91.2 91.6"),
    ),
    "lipgen-0.1-1": (
        ("LIPGEN Table 1", "error@pgd:l2=100/255 error@cw:l2=1.5 error@i-fgsm:linf=8/255", "36.1 84.4 93.7"),
    ),
}


def _lipgen() -> Iterable[Preset]:
    """LIPGEN's Tables 2 and 3, with the figures that Tables 1 and 6 add."""
    for dataset, table, rows in (("cifar10", "Table 2", _LIPGEN_2), ("cifar100", "Table 3", _LIPGEN_3)):
        for ending, regularizers, values in rows:
            name = f"lipgen-{ending}" if dataset == "cifar10" else f"lipgen-{dataset}-{ending}"
            source = f"LIPGEN {table}"
            settings = replace(_LIP[dataset], architecture=_RESNEXT[dataset], regularizers=regularizers)
            more = [figure for row in _LIPGEN_MORE.get(name, ()) for figure in _figures(*row)]
            figures = (*_figures(source, _LIPGEN_MEASURES, values), *more)
            yield Preset(name, source, settings, dataset, figures)


# SCALE 4 says "standard data augmentation and learning rate schedules" and no more. The rest is LIP's, by the
# same authors on the same network, with the schedule of the wide residual networks.
_SCALE = replace(_LIP["cifar10"], architecture="resnext34-2x32", schedule="step")

# ImageNet was trained by the code of a speed contest, on growing images. Here they keep one size (that of the
# folder), and the rest is the usual for ResNet-50, in about the contest's epochs.
_IMAGENET = replace(
    _COMMON,
    architecture="torchvision:resnet50",
    epochs=30,
    batch_size=256,
    schedule="one-cycle",
    warmup=0.2,
    weight_decay=1e-4,
    padding=28,
)

# Name's ending, regularizer, epochs. Seven steps a quarter of eps long are Madry's at 8/255, taken over for
# 2/255.
_SCALE_ROWS = (
    ("undefended", "none", 200),
    ("adversarial-2", "adversarial-linf:eps=2/255,steps=7,step=1/510", 200),
    ("adversarial-8", "adversarial-linf:eps=8/255,steps=7,step=2/255", 200),
    ("free-2", "free-linf:eps=8/255,replays=2", 200),
    ("free-8", "free-linf:eps=8/255,replays=8", 200),
    ("l1-exact-0.1", "gradient-penalty-l1-exact:weight=0.1", 200),
    ("l1-exact-1", "gradient-penalty-l1-exact:weight=1", 200),
    ("l1-0.1", "gradient-penalty-l1:weight=0.1,h=0.01", 200),
    ("l1-1", "gradient-penalty-l1:weight=1,h=0.1", 200),
    ("l1-1-h-0.0001", "gradient-penalty-l1:weight=1,h=0.0001", 200),
    ("l1-1-h-0.001", "gradient-penalty-l1:weight=1,h=0.001", 200),
    ("l1-1-h-0.01", "gradient-penalty-l1:weight=1,h=0.01", 200),
    ("l1-1-h-1", "gradient-penalty-l1:weight=1,h=1", 200),
    ("l2-exact-0.1", "gradient-penalty-l2-exact:weight=0.1", 200),
    ("l2-exact-1", "gradient-penalty-l2-exact:weight=1", 200),
    ("l2-0.1", "gradient-penalty-l2:weight=0.1,h=0.01", 200),
    ("l2-1", "gradient-penalty-l2:weight=1,h=0.01", 200),
    ("imagenet-undefended", "none", 30),
    ("imagenet-l2-0.1", "gradient-penalty-l2:weight=0.1,h=0.01", 30),
    ("imagenet-l2-1", "gradient-penalty-l2:weight=1,h=0.01", 30),
)
_SCALE_TABLES = {
    "Table 1": (
        "error omega_error@linf=2/255 omega_error@linf=8/255 error@linf=2/255 error@linf=8/255 hours",
        {
            "undefended": "4.36 100 100 70.82 98.94 2.06",
            "adversarial-2": "6.17 16.02 100 16.80 53.90 10.82",
            "adversarial-8": "16.33 26.59 58.32 22.86 46.02 12.10",
            "free-2": "6.82 20.08 100 22.61 63.95 1.91",
            "free-8": "19.94 38.52 100 34.09 61.48 2.04",
            "l1-exact-0.1": "6.50 25.69 100 41.63 97.31 9.85",
            "l1-exact-1": "12.62 33.05 99.43 33.95 80.37 9.89",
            "l1-0.1": "6.45 19.40 100 24.92 70.41 5.22",
            "l1-1": "9.02 20.66 55.30 18.47 58.69 5.15",
            "imagenet-undefended": "6.94 100 100 90.21 98.94 20.30",
            "imagenet-l2-0.1": "7.66 74.7 100 70.56 97.53 32.60",
            "imagenet-l2-1": "10.26 63.7 100 52.79 95.93 33.87",
        },
    ),
    "Table 2": (
        "error l_bound omega_bound mean_l2 hours",
        {
            "undefended": "4.36 0.006 0 0.12 2.06",
            "adversarial-2": "6.17 0.05 0.36 0.66 10.82",
            "adversarial-8": "16.33 0.18 0.55 0.74 12.10",
            "free-2": "6.82 0.06 0.35 0.53 1.91",
            "free-8": "19.94 0.03 0.29 0.49 2.04",
            "l2-exact-0.1": "5.91 0.006 0 0.13 9.60",
            "l2-exact-1": "4.35 0.01 0 0.15 9.74",
            "l2-0.1": "8.03 0.14 0.34 0.63 5.18",
            "l2-1": "20.31 0.30 0.50 0.81 5.08",
            "imagenet-undefended": "6.94 3.63e-2 0.5 0.55 20.30",
            "imagenet-l2-0.1": "7.66 0.13 0.96 1.14 32.60",
            "imagenet-l2-1": "10.26 0.26 1.23 1.75 33.87",
        },
    ),
    "Table 3": (
        "mean_margin_gradient max_margin_gradient omega@l2=0.5 omega@l2=1",
        {
            "undefended": "3.05 122.34 1.80 3.13",
            "adversarial-2": "0.63 11.96 0.08 0.32",
            "adversarial-8": "0.40 2.52 0.02 0.06",
            "free-2": "0.75 10.82 0.13 0.35",
            "free-8": "0.93 16.08 0.11 0.31",
            "l2-exact-0.1": "3.38 107.13 1.60 1.40",
            "l2-exact-1": "2.75 56.09 1.31 2.30",
            "l2-0.1": "0.58 4.43 0.08 0.50",
            "l2-1": "0.35 1.33 0.02 0.05",
            "imagenet-undefended": "1.12 17.51 1.7e-2 6.7e-2",
            "imagenet-l2-0.1": "0.46 4.85 5.5e-3 2.2e-2",
            "imagenet-l2-1": "0.27 2.12 3.4e-3 2.1e-2",
        },
    ),
    "Table 4": (
        "error error@linf=2/255 error@linf=8/255",
        {
            "l1-1-h-0.0001": "39.68 50.95 84.20",
            "l1-1-h-0.001": "25.84 38.81 78.65",
            "l1-1-h-0.01": "14.47 26.54 69.91",
            "l1-1-h-1": "5.51 45.93 83.86",
        },
    ),
    "Table 5": (
        " ".join(f"smoothing_error@l2={quarters / 4:g}" for quarters in range(1, 9)),
        {"undefended": "90 92 96 99 100 100 100 100", "l2-1": "47 63 80 90 90 90 90 90"},
    ),
    "Table 6": (
        " ".join(f"omega_error@l2={quarters / 4:g}" for quarters in range(1, 7)),
        {
            "undefended": "100 100 100 100 100 100",
            "adversarial-2": "19 91 100 100 100 100",
            "adversarial-8": "31 47 61 77 100 100",
            "l2-0.1": "22 99 100 100 100 100",
            "l2-1": "33 50 65 80 98 100",
        },
    ),
}


def _scale() -> Iterable[Preset]:
    """SCALE's Tables 1 to 6, but for what they take from elsewhere."""
    for ending, regularizer, epochs in _SCALE_ROWS:
        imagenet = ending.startswith("imagenet")
        settings = replace(_IMAGENET if imagenet else _SCALE, regularizers=(regularizer,), epochs=epochs)
        rows = {
            table: _figures(f"SCALE {table}", measures, values[ending])
            for table, (measures, values) in _SCALE_TABLES.items()
            if ending in values
        }
        figures = tuple(figure for row in rows.values() for figure in row)
        if imagenet:
            figures = tuple(
                replace(figure, measure="top5_error") if figure.measure == "error" else figure
                for figure in figures
            )
        source = f"SCALE {', '.join(rows)}".replace(", Table", ",")
        yield Preset(f"scale-{ending}", source, settings, None if imagenet else "cifar10", figures)


# HAMMING A and MANIFOLD B, which say the same. They leave momentum and augmentation open; both are those of
# the work that the learning rate comes from (0.9; crops and mirror images on CIFAR-10, neither on MNIST).
_HAMMING = replace(_COMMON, architecture="preactresnet18", epochs=100, schedule="three-slopes")
_MNIST = replace(_HAMMING, architecture="cw-cnn", padding=0, mirror=False)


def _stability(weight: str = "0.8..8", eps: str = "2/255..8/255") -> str:
    return f"stability:weight={weight}@0.2..0.8,eps={eps}@0.1..0.35"


def _hamming(weight: str = "2400..24000", eps: str = "2/255..8/255") -> str:
    return f"hamming:weight={weight}@0.2..0.8,alpha=8,eps={eps}@0.1..0.35"


# Weights start as printed and grow "up to a factor of 10". On MNIST eps "scales to 0.3": from a quarter of
# that, as on CIFAR-10. The dense row has batches of 40, and keeps the Hamming term.
_MNIST_EPS = "0.075..0.3"
_HAMMING_SETTINGS = {
    "cifar10": replace(_HAMMING, regularizers=(_stability(), _hamming())),
    "small": replace(
        _HAMMING,
        architecture="verification-cnn",
        regularizers=(_stability("0.4..4"), _hamming("9000..90000")),
    ),
    "stability-only": replace(_HAMMING, regularizers=(_stability(),)),
    "hamming-only": replace(_HAMMING, regularizers=(_hamming(),)),
    "dense": replace(
        _HAMMING,
        batch_size=40,
        regularizers=(_stability().replace("stability", "dense-manifold"), _hamming()),
    ),
    "mnist": replace(_MNIST, regularizers=(_stability(eps=_MNIST_EPS), _hamming(eps=_MNIST_EPS))),
}
_PGD = "accuracy@pgd:linf=8/255 accuracy"
_SMALL = "verified@linf=8/255 accuracy@pgd:linf=8/255 accuracy"
_HAMMING_FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "hamming-cifar10": (
        (
            "HAMMING Table 1",
            "accuracy accuracy@autoattack:linf=8/255 accuracy@autoattack:l2=1 minutes",
            "72.1 36.8 43.4 252",
        ),
        (
            "HAMMING Table 1",
            "accuracy@spatial accuracy@recolor accuracy@jpeg accuracy@nptm",
            "28.4 63.1 34.2 9.1",
        ),
        ("HAMMING Table 3", _PGD, "40.54 72.1"),
        ("HAMMING 6.2", "accuracy@pgd+:linf=8/255", "40.4"),
    ),
    "hamming-small": (("HAMMING Table 2", _SMALL, "21.04 25.56 36.66"),),
    "hamming-stability-only": (("HAMMING Table 3", _PGD, "20.11 34.74"),),
    "hamming-hamming-only": (("HAMMING Table 3", _PGD, "24.87 90.24"),),
    "hamming-dense": (("HAMMING Table 4", _PGD, "35.04 64.08"),),
    "hamming-mnist": (("HAMMING Figure 2", "", ""),),
    "manifold-cifar10": (
        (
            "MANIFOLD Table 1",
            "accuracy accuracy@autoattack:linf=8/255 accuracy@autoattack:l2=0.5 accuracy@wasserstein=0.1",
            "69.95 36.90 57.53 66.02",
        ),
        ("MANIFOLD Table 2", _PGD, "40.54 69.95"),
        ("MANIFOLD C", "accuracy@pgd+:linf=8/255", "40.4"),
    ),
    "manifold-small": (("MANIFOLD Table 2", _SMALL, "21.04 25.56 36.66"),),
    "manifold-stability-only": (("MANIFOLD Table 2", _PGD, "20.11 34.74"),),
    "manifold-hamming-only": (("MANIFOLD Table 2", _PGD, "24.87 90.24"),),
    "manifold-dense": (("MANIFOLD Table 2", _PGD, "35.04 64.08"),),
    "manifold-mnist": (("MANIFOLD Figure 2", "", ""),),
}


def _hamming_and_manifold() -> Iterable[Preset]:
    """HAMMING's Tables 1 to 4 and MANIFOLD's 1 and 2, but for the rows of others; MNIST has only curves."""
    for name, rows in _HAMMING_FIGURES.items():
        paper, _, ending = name.partition("-")
        figures = tuple(figure for row in rows for figure in _figures(*row))
        named = dict.fromkeys(source.partition(" ")[2] for source, *_ in rows)
        tables = ", ".join(place for place in named if place.startswith(("Table", "Figure")))
        source = f"{paper.upper()} {tables}".replace(", Table", ",")
        dataset = "mnist" if ending == "mnist" else "cifar10"
        yield Preset(name, source, _HAMMING_SETTINGS[ending], dataset, figures)


PRESETS: dict[str, Preset] = {
    preset.name: preset for paper in (_lip, _lipgen, _scale, _hamming_and_manifold) for preset in paper()
}


def preset(name: str) -> Preset:
    """The preset of that name; raises `UsageError`, with all names, where there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        near = f" (near it: {', '.join(close)})" if close else ""
        raise UsageError(f"unknown preset {name!r}{near}: expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def chosen(prefix: str) -> list[Preset]:
    """The presets whose names start with `prefix`; raises `UsageError` where none does."""
    found = [entry for name, entry in PRESETS.items() if name.startswith(prefix)]
    if not found:
        papers = ", ".join(dict.fromkeys(entry.paper.lower() for entry in PRESETS.values()))
        raise UsageError(f"no preset's name starts with {prefix!r}: expected one of {papers}.")
    return found


def heading(figure: Figure) -> str:
    """What a figure is, in words: `error at l2=0.1, %`."""
    measure = MEASURES[figure.measure]
    at = f" at {figure.at}" if figure.at else ""
    return f"{measure.label}{at}" + (f", {measure.unit}" if measure.unit else "")


def table(entries: Sequence[Preset]) -> str:
    """The presets under a heading for every paper and data set, each with its regularizers and the paper's
    figures for clean images and distances; `details` has the others.
    """
    lines = []
    for paper, dataset in dict.fromkeys((entry.paper, entry.dataset) for entry in entries):
        lines += ["", f"{paper}, {dataset or 'ImageNet (a folder of yours)'}"]
        rows = [entry for entry in entries if (entry.paper, entry.dataset) == (paper, dataset)]
        longest = max(len(entry.name) for entry in rows)
        for entry in rows:
            sigmoid = " + sigmoid" if entry.settings.pre_logit_sigmoid else ""
            network = f"{entry.settings.architecture}{sigmoid}, {entry.settings.epochs} epochs"
            lines.append(f"  {entry.name:{longest}s}  {network}")
            lines += [f"      {text}" for text in entry.settings.regularizers if text != "none"]
            lines += textwrap.wrap(
                f"{entry.source.partition(' ')[2]}: {_in_short(entry)}",
                _WIDTH,
                initial_indent=6 * " ",
                subsequent_indent=8 * " ",
            )
    return "\n".join(lines[1:])


def _in_short(entry: Preset) -> str:
    telling = ("error", "top5_error", "accuracy", "verified", "median_l2", "mean_l2")
    found = {_column(figure): figure for figure in entry.figures if figure.measure in telling}
    texts = []
    for figure in found.values():
        measure, at = MEASURES[figure.measure], f" at {figure.at}" if figure.at else ""
        texts.append(f"{measure.label}{at} {figure.value:g}{measure.unit}")
    return ", ".join(texts) or "curves only"


def _column(figure: Figure) -> str:
    return f"{figure.measure}@{figure.at}"


def details(entry: Preset) -> str:
    """One preset in full: the settings that are not the general defaults, and all figures of the paper."""
    lines = [("source", entry.source), ("dataset", entry.dataset or "ImageNet, a folder of yours")]
    for name, value in asdict(entry.settings).items():
        if value != getattr(Settings(), name):
            text = " ".join(value) if isinstance(value, tuple) else str(value)
            lines.append((name.replace("_", " "), text))
    lines += [(heading(figure), f"{figure.value:g}  ({figure.source})") for figure in entry.figures]
    return f"{entry.name}\n{_aligned(lines)}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(["", *(cell.ljust(width) for cell, width in zip(line, widths, strict=True))]).rstrip()
        for line in lines
    )
