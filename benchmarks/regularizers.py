"""Every regularizer and baseline at one scale: trained, then measured and attacked alike.

    python -m benchmarks.regularizers --runs runs/regularizers --out benchmarks/results/regularizers

All rows share network, epochs, batch and learning rate (`Scale`); only the regularizers differ. A preset of
`guard train --presets` is a row too, where `--rows` names it: with its own network, schedule and epochs.
Training and measuring go on where they stopped: finished runs in the folder of `--runs` and finished entries
of OUT.json are kept. `--rows` names some of the rows, `--measure` leaves out what is not trained yet. Writes
OUT.json after every entry, and OUT.md.

Measured on the test split: accuracy on all of it; on images of the report fold, gradient norms of the loss
(true label) and of all probabilities, radii whose omega and L are fitted on the radii fold, and what attacks
do to the images classified rightly. Attacks stay in [0, 1]; PGD takes 20 steps from the image on the margin
loss. Robust accuracy counts all attacked images, right or wrong.

Under bf16 finite differences step by 0.1 (docs/decisions/0012), where SCALE's l2 rows step by 0.01.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from guard import attacks, data
from guard.bundle import Share
from guard.calibration import fitting
from guard.certificate import l_bound, omega_radius
from guard.data import Dataset, folds, to_floats
from guard.evaluation.report import words
from guard.evaluation.results import summary
from guard.evaluation.torch_models import TorchModel
from guard.export import to_onnx
from guard.files import write_text
from guard.norms import Norm
from guard.progress import Progress
from guard.runtime import Detector
from guard.shares import share
from guard.training import checkpoint, presets
from guard.training.loop import chosen_precision, read_config, read_metrics, train, trained
from guard.training.settings import Settings

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Values = NDArray[np.float64]

Budget = tuple[Norm, float, str]

BUDGETS: tuple[Budget, ...] = (
    ("l2", 0.25, "0.25"),
    ("l2", 0.5, "0.5"),
    ("l2", 1.0, "1.0"),
    ("linf", 2 / 255, "2/255"),
    ("linf", 8 / 255, "8/255"),
)
DIGITS: tuple[Budget, ...] = (
    ("l2", 1.0, "1.0"),
    ("l2", 2.0, "2.0"),
    ("linf", 0.1, "0.1"),
    ("linf", 0.2, "0.2"),
    ("linf", 0.3, "0.3"),
)
BATCH = 128

# The digits' network has no batch normalization: at the rate of the others it stops learning once eps is 0.3.
# Their images are not changed, as in HAMMING.
DIGITS_CHANGE: dict[str, Any] = {"learning_rate": 0.02, "padding": 0, "cutout": 0, "mirror": False}


@dataclass(frozen=True)
class Row:
    """One row of the table: its regularizers, and the figures that the papers have beside it."""

    regularizers: tuple[str, ...]
    paper: str = ""
    dataset: str = "cifar10"
    architecture: str = "compact-resnet"
    seeds: int = 1
    budgets: tuple[Budget, ...] = BUDGETS
    preset: Settings | None = None


# The papers' weights grow tenfold on the way, over 100 epochs; at a tenth of the steps that leaves little of
# the data term, so that only one row does it.
_EPS = "eps=2/255..8/255@0.1..0.35"
_STABILITY, _HAMMING = f"weight=0.8,{_EPS}", f"hamming:weight=2400,{_EPS}"

ROWS = {
    "undefended": Row(("none",), "LIPGEN T2: error 4.07%, median l2 0.09; SCALE T2: mean l2 0.12", seeds=2),
    "tv-l1": Row(("tv-l1:eps=2/255",), "LIPGEN T2: 3.87%, 0.19"),
    "tv-l2": Row(("tv-l2:eps=0.1",), "LIPGEN T2 (eps 0.01): 3.58%, 0.30", seeds=2),
    "lipschitz": Row(("lipschitz:weight=0.1",)),
    "tulip-0.01-0.1": Row(("tulip:eps=0.01,weight=0.1",), "LIPGEN T2: 4.13%, 0.31"),
    "tulip-0.1-1": Row(("tulip:eps=0.1,weight=1",), "LIPGEN T2: 5.98%, 0.52"),
    "gradient-penalty-l2-0.1": Row(
        ("gradient-penalty-l2:weight=0.1",), "SCALE T2: 8.03%; L 0.14, omega 0.34, mean l2 0.63"
    ),
    "gradient-penalty-l2-1": Row(
        ("gradient-penalty-l2:weight=1",), "SCALE T2: 20.31%; L 0.30, omega 0.50, mean l2 0.81"
    ),
    "gradient-penalty-l1-1": Row(
        ("gradient-penalty-l1:weight=1",), "SCALE T1 (h 0.1): 9.02%; linf error 18.47%, 58.69%"
    ),
    "gradient-penalty-l2-exact-0.1": Row(
        ("gradient-penalty-l2-exact:weight=0.1",), "SCALE T2: 5.91%; L 0.006, omega 0, mean l2 0.13"
    ),
    "stability": Row((f"stability:{_STABILITY}",), "HAMMING T3: 65.26%; PGD linf 8/255 accuracy 20.11%"),
    "hamming": Row((_HAMMING,), "HAMMING T3: 9.76%; PGD linf 8/255 accuracy 24.87%"),
    "stability-hamming": Row(
        (f"stability:{_STABILITY}", _HAMMING), "MANIFOLD T2: 30.05%; PGD linf 8/255 accuracy 40.54%"
    ),
    "stability-hamming-ramped": Row(
        (
            f"stability:weight=0.8..8@0.2..0.8,{_EPS}",
            f"hamming:weight=2400..24000@0.2..0.8,{_EPS}",
        ),
        "the papers' weights; as the row above",
    ),
    "dense": Row(
        (f"dense-manifold:{_STABILITY}", _HAMMING), "MANIFOLD T2: 35.92%; PGD linf 8/255 accuracy 35.04%"
    ),
    "adversarial-linf": Row(
        ("adversarial-linf:eps=8/255",), "SCALE T1, T2: 16.33%; linf error 22.86%, 46.02%; mean l2 0.74"
    ),
    "free-linf": Row(
        ("free-linf:eps=8/255,replays=4",), "SCALE T1 (m = 8): 19.94%; linf error 34.09%, 61.48%"
    ),
    "gaussian": Row(("gaussian:sigma=0.1",)),
    "cifar100-undefended": Row(("none",), "LIPGEN T3: 21.24%, median l2 0.047", dataset="cifar100"),
    "cifar100-tulip-0.01-0.1": Row(
        ("tulip:eps=0.01,weight=0.1",), "LIPGEN T3: 21.73%, 0.112", dataset="cifar100"
    ),
}

_DIGITS = "eps=2/255..0.3@0.1..0.35"
ROWS |= {
    f"mnist-{name}": Row(texts, paper, dataset="mnist", architecture="cw-cnn", budgets=DIGITS)
    for name, texts, paper in (
        ("undefended", ("none",), ""),
        (
            "stability-hamming",
            (
                f"stability:weight=0.8,{_DIGITS}",
                f"hamming:weight=2400,{_DIGITS}",
            ),
            "MANIFOLD and HAMMING plot its robustness curves only",
        ),
        (
            "stability-hamming-ramped",
            (
                f"stability:weight=0.8..8@0.2..0.8,{_DIGITS}",
                f"hamming:weight=2400..24000@0.2..0.8,{_DIGITS}",
            ),
            "the papers' weights; as the row above",
        ),
        ("adversarial-linf", ("adversarial-linf:eps=0.3",), ""),
    )
}

TABLE = list(ROWS)

ROWS |= {
    name: Row(
        preset.settings.regularizers,
        f"{preset.source}: {'; '.join(f'{presets.heading(one)} {one.value:g}' for one in preset.figures)}",
        dataset=preset.dataset,
        architecture=preset.settings.architecture,
        budgets=DIGITS if preset.dataset == "mnist" else BUDGETS,
        preset=preset.settings,
    )
    for name, preset in presets.PRESETS.items()
    if preset.dataset is not None
}


@dataclass(frozen=True)
class Scale:
    """What all rows share, and how many images are measured."""

    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 0.1
    measured: int = 1000
    attacked: int = 500
    omega_images: int = 250


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=TABLE, metavar="ROW")
    parser.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, help="(default: 8 on the CPU, 30 on CUDA; a preset's own)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--hardware", default=platform.processor() or platform.machine())
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    scale = Scale(epochs=given.epochs or (30 if given.device.startswith("cuda") else 8))
    target = given.out.with_suffix(".json")
    result: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {"entries": {}}
    result |= {
        "command": "python -m benchmarks.regularizers " + " ".join(sys.argv[1:]),
        "scale": asdict(scale),
    }
    for row, seed in [(one, seed) for one in given.rows for seed in range(ROWS[one].seeds)]:
        name = f"{row}-{seed}"
        if result["entries"].get(name, {}).get("scale") == asdict(scale):
            continue
        run = given.runs / name
        settings = settings_of(ROWS[row], seed, scale, given.epochs, given.device)
        if not finished(run, settings):
            if given.measure:
                continue
            train_row(ROWS[row], settings, run, given.device)
        entry = measure(ROWS[row], run, scale, given.device)
        entry |= {"scale": asdict(scale), "row": row, "seed": seed, "hardware": given.hardware}
        result["entries"][name] = entry
        write_text(target, json.dumps(result, indent=1) + "\n")
        write_text(given.out.with_suffix(".md"), markdown(result))
    write_text(given.out.with_suffix(".md"), markdown(result))


def finished(run: Path, settings: Settings) -> bool:
    """Whether the run has ended, with these settings; its precision is that of the device it was made on."""
    path = run / checkpoint.CHECKPOINT
    if not path.exists() or checkpoint.load(path).epoch != settings.epochs:
        return False
    made = read_config(run)["settings"]
    return bool(made == json.loads(json.dumps(asdict(settings))) | {"precision": made["precision"]})


def settings_of(row: Row, seed: int, scale: Scale, epochs: int | None, device: str) -> Settings:
    """A preset's own, its epochs replaced by `epochs` where given, else those that all rows share."""
    if row.preset is not None:
        return replace(row.preset, seed=seed, epochs=epochs or row.preset.epochs)
    settings = Settings(
        architecture=row.architecture,
        regularizers=row.regularizers,
        epochs=scale.epochs,
        batch_size=scale.batch_size,
        learning_rate=scale.learning_rate,
        precision=chosen_precision("auto", device),
        seed=seed,
    )
    return replace(settings, **DIGITS_CHANGE) if row.dataset == "mnist" else settings


def train_row(row: Row, settings: Settings, run: Path, device: str) -> None:
    dataset = data.load(row.dataset, "train")
    train(
        dataset,
        settings,
        run,
        test=data.test_split(row.dataset, dataset.class_names),
        resume=True,
        device=device,
        arguments={"command": "python -m benchmarks.regularizers"},
    )


class Model(attacks.Differentiable, Protocol):
    """What is measured: logits, loss gradients and Jacobian norms in float32."""

    def jacobian_norms(self, images: Floats) -> Values:
        """The largest row l2 norm of the Jacobian of all probabilities (B,), the detector's score."""
        ...


class OnnxModel(Detector):
    """In onnxruntime: on the CPU about three times as fast as torch."""

    def __init__(self, network: nn.Module, shape: tuple[int, int, int], threads: int) -> None:
        graph = to_onnx(network, shape)
        super().__init__(graph, provider="cpu", threads=threads)
        self._all_rows = Detector(graph, score="jacobian-full", provider="cpu", threads=threads)

    def jacobian_norms(self, images: Floats) -> Values:
        """Largest row norms (B,)."""
        return self._all_rows.measure(images).jacobian.astype(np.float64)


class AllRows(TorchModel):
    """In torch, on an accelerator."""

    def jacobian_norms(self, images: Floats) -> Values:
        """Largest row norms (B,)."""
        points = self.tensor(images).requires_grad_()
        probabilities = self.module(points).softmax(1)
        rows = [
            torch.autograd.grad(column.sum(), points, retain_graph=True)[0].flatten(1).norm(dim=1)
            for column in probabilities.unbind(1)
        ]
        norms: Values = torch.stack(rows).amax(0).double().cpu().numpy()
        return norms


def measure(row: Row, run: Path, scale: Scale, device: str) -> dict[str, Any]:
    """All of a row's figures but its name."""
    source = trained(run)
    shape = tuple(source.config["data"]["shape"])
    model: Model = (
        OnnxModel(source.model, shape, torch.get_num_threads())
        if device == "cpu"
        else AllRows(source.model, shape, device)
    )
    test = data.load(row.dataset, "test")
    assert test.labels is not None
    parts = folds(len(test), 0)
    predicted = np.concatenate(
        [
            model.logits(to_floats(test.images[at : at + 500])).argmax(axis=1)
            for at in range(0, len(test), 500)
        ]
    )
    epochs = [line for line in read_metrics(run) if "epoch" in line]
    order = np.random.default_rng([0, 1])
    report = order.permutation(parts["report"])[: scale.measured]
    radii = order.permutation(parts["radii"])[: scale.omega_images]
    right = predicted == test.labels
    begun = time.perf_counter()
    with Progress(5 + len(row.budgets), run.name) as progress:
        jacobian, slopes = norms(model, test, report)
        progress.advance(1, "norms")
        entry = {
            "regularizers": row.regularizers,
            "paper": row.paper,
            "accuracy": share(right).model_dump(),
            "mean_jacobian_norm": dumped(jacobian),
            "largest_jacobian_norm": float(jacobian.max()),
            "mean_loss_gradient": dumped(slopes),
            "largest_loss_gradient": float(slopes.max()),
            "precision": source.config["settings"]["precision"],
            "train_seconds": epochs[-1]["seconds"],
            "train_accuracy": epochs[-1].get("train_accuracy"),
            "provenance": source.config["provenance"],
        }
        entry["radii"] = mean_radii(model, test, radii, report)
        progress.advance(2, "radii")
        few = report[: scale.attacked]
        images, truth = to_floats(test.images[few]), test.labels[few]
        kept = right[few]
        entry["robust_accuracy"] = {}
        for norm, eps, name in row.budgets:
            standing = kept.copy()
            for rows in pieces(np.flatnonzero(kept)):
                standing[rows] &= ~attacks.pgd(
                    model, images[rows], truth[rows], eps, norm=norm, restarts=1, clip=True
                ).success
            entry["robust_accuracy"][f"{norm} {name}"] = share(standing).model_dump()
            progress.advance(1, f"PGD {norm} {name}")
        entry["accuracy_at_corners"] = {
            name: share(at_corners(model, images, eps).argmax(axis=1) == truth).model_dump()
            for norm, eps, name in row.budgets
            if norm == "linf"
        }
        entry["distance"] = {}
        for norm in ("l2", "linf"):
            found = [
                attacks.minimum_norm(model, images[rows], truth[rows], norm=norm, clip=True).distance
                for rows in pieces(np.flatnonzero(kept))
            ]
            entry["distance"][norm] = dumped(np.concatenate(found))
            progress.advance(1, f"minimum norm {norm}")
    entry["measure_seconds"] = time.perf_counter() - begun
    return entry


def at_corners(model: Model, images: Floats, eps: float) -> Floats:
    """Logits (B, K) at random corners of the cube around each image, where `stability` and `hamming` look."""
    corner = np.random.default_rng(0).choice(np.array([-eps, eps], np.float32), size=images.shape)
    return np.concatenate(
        [model.logits(images[rows] + corner[rows]) for rows in pieces(np.arange(len(images)))]
    )


def pieces(rows: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]


def norms(model: Model, test: Dataset, chosen: NDArray[np.int64]) -> tuple[Values, Values]:
    """Of the Jacobian, and of the loss's gradient at the true label, (B,) each."""
    assert test.labels is not None
    jacobian, slopes = [], []
    for rows in pieces(chosen):
        images = to_floats(test.images[rows])
        jacobian.append(model.jacobian_norms(images))
        slopes.append(
            attacks.length(model.loss_gradient(images, test.labels[rows], "cross-entropy")[2], "l2")
        )
    return np.concatenate(jacobian), np.concatenate(slopes)


def mean_radii(
    model: Model, test: Dataset, fold: NDArray[np.int64], report: NDArray[np.int64]
) -> dict[str, float]:
    """Mean l2 omega- and L-radius of the report images, on the logit margin, both fitted on `fold`."""
    effort = replace(fitting.Effort(), omega_images=len(fold), bin_images=len(fold), bin_blocks=25, kept=0.5)
    images = to_floats(test.images[fold])
    screened = [
        fitting.screen(model, images[rows], "l2", effort, np.random.default_rng([0, int(rows[0])]))
        for rows in pieces(np.arange(len(images)))
    ]
    margin, slope, value, steepest, shift = (np.concatenate(column) for column in zip(*screened, strict=True))
    radius = np.where(slope > 0, margin / np.maximum(slope, 1e-12), 0.0)
    plan = fitting.layout(radius, effort)
    kept = fitting.survivors(plan, value, effort)
    values = np.zeros((len(images), len(fitting.EPS)))
    longest = steepest.copy()
    for rows in pieces(kept):
        values[rows], longest[rows] = fitting.remainders(model, images[rows], "l2", effort, shift[rows])
    table = fitting.omega(plan, values).table
    lipschitz = fitting.bound(np.fmax(longest, steepest), effort.blocks).value
    bases = [fitting.base_of(model, to_floats(test.images[rows]), "l2") for rows in pieces(report)]
    margins = np.concatenate([base.margin for base in bases])
    slopes = np.concatenate([base.slope for base in bases])
    return {
        "omega_l2": float(omega_radius(margins, slopes, table).mean()),
        "lipschitz_l2": float(l_bound(margins, lipschitz).mean()),
        "lipschitz_constant": lipschitz,
        "omega_images": len(fold),
        "images": len(report),
    }


def dumped(values: Values) -> dict[str, float]:
    """`summary` of values (n,), of which two or more are finite."""
    found = summary(values)
    if found is None:
        raise ValueError(f"fewer than two of {len(values)} values are finite")
    return found.model_dump()


def markdown(result: dict[str, Any]) -> str:
    """The tables, of the entries made at the scale that their heading states."""
    scale = result["scale"]
    entries: dict[str, dict[str, Any]] = {
        name: result["entries"][name]
        for name in (f"{row}-{seed}" for row in ROWS for seed in range(ROWS[row].seeds))
        if result["entries"].get(name, {}).get("scale") == scale
    }
    shared = f"{scale['epochs']} epochs, batches of {scale['batch_size']}, rate {scale['learning_rate']}"
    shared += f" (MNIST: {DIGITS_CHANGE['learning_rate']}, images neither cropped nor cut out)"
    columns = (
        "row",
        "regularizers",
        "clean accuracy",
        "Jacobian norm: mean, largest",
        "loss gradient: mean, largest",
        "mean L-radius, omega-radius (l2)",
        "median distance (l2)",
        "mean (l2)",
        "median (linf)",
        "training, min",
    )
    lines = [
        "# Regularizers at one scale",
        "",
        f"`{result['command']}`: {shared}. 95% intervals in brackets.",
    ]
    lines += ["", f"| {' | '.join(columns)} |", f"|{len(columns) * '---|'}"]
    for name, entry in entries.items():
        radii, distance = entry["radii"], entry["distance"]
        lines.append(
            f"| {name} | `{' '.join(entry['regularizers'])}` | {words.share(Share(**entry['accuracy']))} "
            f"| {entry['mean_jacobian_norm']['mean']:.3f}, {entry['largest_jacobian_norm']:.2f} "
            f"| {entry['mean_loss_gradient']['mean']:.2f}, {entry['largest_loss_gradient']:.1f} "
            f"| {radii['lipschitz_l2']:.3f}, {radii['omega_l2']:.3f} "
            f"| {distance['l2']['median']:.3f} [{distance['l2']['median_lower']:.3f}, "
            f"{distance['l2']['median_upper']:.3f}] | {distance['l2']['mean']:.3f} "
            f"| {distance['linf']['median']:.4f} | {entry['train_seconds'] / 60:.0f} |"
        )
    made: dict[str, list[str]] = {}
    for name, entry in entries.items():
        made.setdefault(f"{entry['hardware']}, trained in {entry['precision']}", []).append(name)
    lines += ["", *(f"- {how}: {', '.join(names)}" for how, names in made.items())]
    lines += ["", "Robust accuracy under PGD-20 alone, and what the papers have:"]
    for budgets in (BUDGETS, DIGITS):
        names = [f"{norm} {name}" for norm, _, name in budgets]
        rows = {name: entry for name, entry in entries.items() if list(entry["robust_accuracy"]) == names}
        if rows:
            lines += ["", f"| row | {' | '.join(names)} | in the papers |", f"|{(len(names) + 2) * '---|'}"]
        for name, entry in rows.items():
            cells = [words.share(Share(**found)) for found in entry["robust_accuracy"].values()]
            lines.append(f"| {name} | {' | '.join(cells)} | {entry['paper']} |")
    looked = {
        name: entry["accuracy_at_corners"]
        for name, entry in entries.items()
        if "accuracy_at_corners" in entry
    }
    if looked:
        lines += [
            "",
            "Accuracy at random corners of the cube of half-width eps around each image (n as above):",
            "",
        ]
        lines += [
            f"- {name}: {', '.join(f'{eps}: {words.share(Share(**found))}' for eps, found in one.items())}"
            for name, one in looked.items()
        ]
    lines += [
        "",
        "How much farther away attacks are than on the undefended network: as LIPGEN's Table 5 predicts",
        "it from mean and largest Jacobian norms, and as it is (median l2 distance).",
        "",
        "| row | by the mean norm | by the largest norm | actual |",
        "|---|---|---|---|",
    ]
    for name, entry in entries.items():
        prefix = next((one for one in ("cifar100-", "mnist-") if name.startswith(one)), "")
        base = entries.get(f"{prefix}undefended-0")
        if base is not None and base is not entry and ROWS[entry["row"]].preset is None:
            lines.append(
                f"| {name} "
                f"| {base['mean_jacobian_norm']['mean'] / entry['mean_jacobian_norm']['mean']:.2f} "
                f"| {base['largest_jacobian_norm'] / entry['largest_jacobian_norm']:.2f} "
                f"| {entry['distance']['l2']['median'] / base['distance']['l2']['median']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
