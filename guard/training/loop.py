"""The training loop: SGD with Nesterov momentum over augmented batches, under any regularizers, resumable.

Every batch is a function of the seed, the epoch and the step alone, so that a resumed run sees what the
uninterrupted one would have seen.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guard import files
from guard.data import Dataset
from guard.errors import DataError, TrainingError, UsageError
from guard.progress import Progress
from guard.training import architectures, augment, checkpoint, curves, grammar, schedules
from guard.training.passes import Passes, compiled

CONFIG = "config.json"
METRICS = "metrics.jsonl"

CHECKPOINT_SECONDS = 300.0  # between checkpoints inside an epoch

Precision = Literal["float32", "bf16"]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """All that decides the trained weights, beside the data, the thread count and the device.

    `width` is the architecture's number of channels in its first stage, None for its own;
    `pre_logit_sigmoid` bounds the features before its last layer; `regularizers` are written as on the
    command line; `learning_rate` is the peak, reached after the share
    `warmup` of training; `weight_decay` is for weights of more than one axis; `padding` is the furthest shift
    of a crop and `cutout` the side of the painted square, in pixels; `held_out` is how many of the last
    training images are kept for the log's accuracy (random ones, by the seed, where images come sorted by
    class); `precision` is what convolutions and products are computed in.
    """

    architecture: str = "compact-resnet"
    width: int | None = None
    pre_logit_sigmoid: bool = False
    regularizers: tuple[str, ...] = ("none",)
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 0.2
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    warmup: float = 0.2
    padding: int = 4
    mirror: bool = True
    cutout: int = 8
    held_out: int = 1000
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises `UsageError` for what makes no sense, naming the flag of `guard train`."""

        def demand(holds: bool, flag: str, value: object, expected: str) -> None:
            if not holds:
                raise UsageError(f"{flag} is {value}: expected {expected}.")

        architectures.check(self.architecture, self.width)
        grammar.parse_all(self.regularizers)
        demand(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        demand(self.batch_size >= 2, "--batch-size", self.batch_size, "2 or more")
        rate = self.learning_rate
        demand(0 < rate < math.inf, "--learning-rate", rate, "a number above 0")
        demand(0 <= self.momentum < 1, "--momentum", self.momentum, "0 or more, below 1")
        demand(
            0 <= self.weight_decay < math.inf,
            "--weight-decay",
            self.weight_decay,
            "a number of 0 or more",
        )
        schedules.named(self.schedule)
        demand(0 <= self.warmup < 1, "--warmup", self.warmup, "a share of training, below 1")
        demand(self.padding >= 0, "--crop", self.padding, "0 pixels or more")
        demand(self.cutout >= 0, "--cutout", self.cutout, "0 pixels or more")
        demand(self.held_out >= 0, "--held-out", self.held_out, "0 images or more")
        demand(self.seed >= 0, "--seed", self.seed, "0 or more")


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its last epoch's metrics, and the accuracy on the test split, if any."""

    folder: Path
    metrics: Metrics
    test_accuracy: float | None


def train(
    dataset: Dataset,
    settings: Settings,
    out: Path,
    *,
    test: Dataset | None = None,
    resume: bool = False,
    device: str = "cpu",
    deterministic: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Result:
    """Trains on `dataset`; keeps `config.json`, `checkpoint.pt`, `metrics.jsonl` and `curves.html` in `out`.

    `test` is looked at once, at the end. A run that was stopped anywhere and resumed ends with the same
    weights, bit by bit, as one that was not: on the CPU with the same number of threads, on CUDA with
    `deterministic`. `arguments` go into the provenance.

    Raises `UsageError` for settings that make no sense and where `out` holds another run, `DataError` for
    data that cannot be trained on, and `TrainingError` where the loss is not finite (the last good checkpoint
    stays) or a checkpoint cannot be read or written.
    """
    settings.check()
    bound = grammar.parse_all(settings.regularizers)
    batches = Batches(dataset, settings, device)
    if test is not None and test.images.shape[1:] != dataset.images.shape[1:]:
        raise DataError(
            f"{test.name}: test images are {test.images.shape[1:]}, training images "
            f"{dataset.images.shape[1:]} (height, width, channels). Bring both to one size."
        )
    config = _config(dataset, settings, batches, arguments or {})
    with _random_state(settings.seed, device, deterministic=deterministic):
        model = architectures.build(
            settings.architecture,
            mean=batches.mean,
            deviation=batches.deviation,
            num_classes=len(dataset.class_names),
            size=batches.shape[1:],
            width=settings.width,
            pre_logit_sigmoid=settings.pre_logit_sigmoid,
        ).to(device)
        _open(out, config, resume=resume)
        model.to(memory_format=torch.channels_last)
        run = Run(model, bound, batches, settings, out / checkpoint.CHECKPOINT)
        if resume and run.path.exists():
            run.restore(checkpoint.load(run.path))
        metrics = read_metrics(out)[: run.epoch]
        _write_curves(out, config, metrics)
        done = run.epoch * batches.steps + run.step
        with Progress(settings.epochs * batches.steps - done, f"train {out.name}") as progress:
            while run.epoch < settings.epochs:
                metrics.append(run.finish_epoch(progress))
                _write_metrics(out, metrics)
                _write_curves(out, config, metrics)
                run.save()
        accuracy = None
        if test is not None:
            images, labels = checked(test)
            accuracy = run.accuracy(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))
            tested = [*metrics, {"test_accuracy": accuracy, "test_images": len(labels)}]
            _write_metrics(out, tested)
            _write_curves(out, config, tested)
    return Result(out, metrics[-1] if metrics else {}, accuracy)


class Batches:
    """The training images on the device, and every batch by its epoch and step."""

    def __init__(self, dataset: Dataset, settings: Settings, device: str) -> None:
        images, labels = checked(dataset)
        if (np.diff(labels) >= 0).all():
            # Sorted by class, as folders are: the last images would all be of the last classes.
            order = np.random.default_rng(settings.seed).permutation(len(labels))
            images, labels = images[order], labels[order]
        kept = len(images) - settings.held_out
        if kept < 2:
            raise UsageError(
                f"holding out {settings.held_out} of {len(images)} training images leaves {max(0, kept)}: "
                "expected 2 or more to train on. Lower --held-out."
            )
        if settings.padding >= min(images.shape[1:3]):
            raise UsageError(f"crops shift by {settings.padding} pixels: more than the images' size allows.")
        self.images = torch.from_numpy(images[:kept]).to(device)
        self.labels = torch.from_numpy(labels[:kept]).to(device)
        self.held_out = (
            torch.from_numpy(images[kept:]).to(device),
            torch.from_numpy(labels[kept:]).to(device),
        )
        self.settings = settings
        self.size = min(settings.batch_size, kept)
        self.steps = kept // self.size  # images left over sit out the epoch, other ones in each
        self.shape = (images.shape[3], images.shape[1], images.shape[2])
        self.mean, self.deviation = channel_statistics(images[:kept])
        self._fill = torch.tensor(self.mean, device=device)
        self._order: tuple[int, Tensor] | None = None

    def at(self, epoch: int, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images (B, C, H, W) float32, channels last; labels (B,); the source of the step's other draws."""
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.images), generator=_generator(self.settings.seed, epoch))
            self._order = (epoch, order.to(self.images.device))
        chosen = self._order[1][step * self.size : (step + 1) * self.size]
        generator = _generator(self.settings.seed, epoch, step)
        images = augment.crop_and_mirror(
            self.images[chosen], generator, padding=self.settings.padding, mirror=self.settings.mirror
        )
        floats = to_floats(images)
        if self.settings.cutout:
            floats = augment.cutout(floats, generator, size=self.settings.cutout, fill=self._fill)
        return floats, self.labels[chosen], generator


class Run:
    """A model on its way through training, from any checkpoint to the next."""

    def __init__(
        self,
        model: nn.Module,
        bound: Sequence[grammar.Regularizer],
        batches: Batches,
        settings: Settings,
        path: Path,
    ) -> None:
        self.model = model
        self.optimizer = _optimizer(model, settings)
        self.regularizers = bound
        self.replays = max((regularizer.replays for regularizer in bound), default=1)
        self.compiled = compiled(model) if settings.compile else None
        self.state: dict[str, Tensor] = {}
        self.batches = batches
        self.settings = settings
        self.path = path
        self.epoch = 0
        self.step = 0
        self.sums: Metrics = {}
        self.seconds = 0.0

    def restore(self, state: checkpoint.Checkpoint) -> None:
        """Takes a checkpoint's state."""
        try:
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"{self.path}: belongs to another network ({str(error).splitlines()[0]})."
            ) from error
        torch.set_rng_state(state.random_state)
        if state.cuda_random_state is not None and self.batches.images.is_cuda:
            torch.cuda.set_rng_state(state.cuda_random_state)
        self.epoch, self.step, self.sums, self.seconds = state.epoch, state.step, state.sums, state.seconds
        self.state = {name: value.to(self.batches.images.device) for name, value in state.state.items()}

    def save(self) -> None:
        """Writes the checkpoint; raises `TrainingError` instead where weights are not finite."""
        for name, value in self.model.state_dict().items():
            if not torch.isfinite(value).all():
                raise TrainingError(
                    f"{name} is not finite before epoch {self.epoch + 1}, step {self.step + 1}. Lower "
                    "--learning-rate. The last good checkpoint is kept."
                )
        cuda = torch.cuda.get_rng_state() if self.batches.images.is_cuda else None
        state = checkpoint.Checkpoint(
            epoch=self.epoch,
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            random_state=torch.get_rng_state(),
            sums=self.sums,
            seconds=self.seconds,
            state=self.state,
            cuda_random_state=cuda,
        )
        checkpoint.save(state, self.path)

    def finish_epoch(self, progress: Progress) -> Metrics:
        """Trains to the end of the current epoch; returns its metrics."""
        self.model.train()
        rate = 0.0
        clock = saved = time.monotonic()
        while self.step < self.batches.steps:
            rate = self.learning_rate()
            for name, value in self.one_step(rate).items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.step += 1
            before, clock = clock, time.monotonic()
            self.seconds += clock - before
            loss = self.sums["loss"] / self.step
            progress.advance(note=f"epoch {self.epoch + 1} of {self.settings.epochs}, loss {loss:.3f}")
            if clock - saved > CHECKPOINT_SECONDS and self.step < self.batches.steps:
                self.save()
                saved = clock
        metrics: Metrics = {"epoch": self.epoch + 1, "learning_rate": rate, "seconds": round(self.seconds, 1)}
        metrics |= {name: value / self.step for name, value in self.sums.items()}
        if len(self.batches.held_out[0]):
            metrics["held_out_accuracy"] = self.accuracy(*self.batches.held_out)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        return metrics

    def one_step(self, learning_rate: float) -> Metrics:
        """One batch: its passes, the weights' gradient, the update; returns the step's metrics."""
        images, labels, generator = self.batches.at(self.epoch, self.step // self.replays)
        autocast = torch.bfloat16 if self.settings.precision == "bf16" else None
        passes = Passes(
            self.model,
            images,
            labels,
            generator=generator,
            autocast=autocast,
            compiled=self.compiled,
            progress=self.progress(),
            state=self.state,
        )
        loss, terms = grammar.regularized_loss(self.regularizers, passes)
        metrics = {name: value.item() for name, value in terms.items()}
        if not math.isfinite(metrics["loss"]):
            found = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            raise TrainingError(
                f"the loss is not finite at epoch {self.epoch + 1}, step {self.step + 1} ({found}). Lower "
                "--learning-rate or a regularizer's weight. The last good checkpoint is kept."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for call in passes.after_backward:
            call()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        accuracy = passes.accuracy()
        if accuracy is not None:
            metrics["train_accuracy"] = accuracy.item()
        return metrics

    def learning_rate(self) -> float:
        """The step's rate: the schedule at its middle, so that neither the first nor the last is 0."""
        return self.settings.learning_rate * schedules.share(
            self.settings.schedule, self.progress(), self.settings.warmup
        )

    def progress(self) -> float:
        """The share of training that is done at the middle of the current step."""
        done = self.epoch * self.batches.steps + self.step + 0.5
        return done / (self.settings.epochs * self.batches.steps)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images (N, H, W, C) uint8 labelled rightly, in evaluation mode and float32."""
        self.model.eval()
        right = 0
        for start in range(0, len(images), 500):
            logits = self.model(to_floats(images[start : start + 500]))
            right += int((logits.argmax(1) == labels[start : start + 500]).sum())
        self.model.train()
        return right / len(labels)


def chosen_device(name: str) -> str:
    """`auto` is CUDA where it works, else the CPU; raises `UsageError` for a device that does not work."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}. Give cpu or cuda.") from error
    return name


def chosen_precision(name: Literal["auto", "bf16", "float32"], device: str) -> Precision:
    """`auto` is bf16 where the device computes in it, else float32."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    # Without these instructions torch takes bf16 too, and is slower than in float32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, name, bool)() for name in names)
    return "bf16" if native else "float32"


def to_floats(images: Tensor) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div_(255).contiguous(memory_format=torch.channels_last)


def channel_statistics(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of (N, H, W, C), in units of [0, 1]."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[3]):
        shares = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = float(shares @ values)
        means.append(mean)
        # One grey level everywhere has no deviation to divide by; half a level leaves it as it is.
        deviations.append(max(math.sqrt(float(shares @ (values - mean) ** 2)), 0.5 / 255))
    return means, deviations


def checked(dataset: Dataset) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, H, W, C) uint8 and labels (N,); raises `DataError` where there is no learning from them."""
    images, labels, classes = dataset.images, dataset.labels, len(dataset.class_names)
    if labels is None:
        raise DataError(f"{dataset.name}: has no labels. Put the images into one folder per class.")
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise DataError(
            f"{dataset.name}: the images are {images.dtype} {images.shape}; expected uint8 (N, H, W, C)."
        )
    if len(labels) != len(images):
        raise DataError(f"{dataset.name}: has {len(images)} images but {len(labels)} labels.")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"{dataset.name}: labels run from {labels.min()} to {labels.max()}; expected numbers of "
            f"{classes} classes, from 0."
        )
    if classes < 2:
        raise DataError(f"{dataset.name}: has {classes} class; expected two or more.")
    return images, labels


def _config(
    dataset: Dataset, settings: Settings, batches: Batches, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    provenance = files.provenance(
        arguments, seed=settings.seed, threads=torch.get_num_threads(), device=str(batches.images.device)
    )
    config = {
        "settings": asdict(settings),
        "data": {
            "name": dataset.name,
            "digest": dataset.digest,
            "class_names": dataset.class_names,
            "shape": batches.shape,
            "mean": batches.mean,
            "deviation": batches.deviation,
        },
        "provenance": provenance,
    }
    plain: dict[str, Any] = json.loads(json.dumps(config))  # tuples as the file will have them
    return plain


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
    )


def _generator(*key: int) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)


@contextmanager
def _random_state(seed: int, device: str, *, deterministic: bool) -> Iterator[None]:
    """Inside, torch's global random state starts from `seed`; afterwards the caller's is back."""
    before = torch.are_deterministic_algorithms_enabled()
    cuda = [torch.cuda.current_device()] if device.startswith("cuda") else []
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _open(out: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Writes the run's config, or sees that the one there is the same."""
    path = out / CONFIG
    if not path.exists():
        files.write_text(path, json.dumps(config, indent=1) + "\n")
        return
    if not resume:
        raise UsageError(f"{out}: holds a run already. Give --resume to go on with it, or another --out.")
    old = read_config(out)
    old["settings"] = asdict(Settings()) | old["settings"]  # a run from before a setting had its default
    for part in ("settings", "data"):
        for key, value in config[part].items():
            if old[part].get(key) != value:
                raise UsageError(
                    f"{out}: was started with {key} {old[part].get(key)!r}, now it is {value!r}. Resume with "
                    "the same, or give another --out."
                )


def read_config(run: Path) -> dict[str, Any]:
    """A run's `config.json`; raises `TrainingError` where the folder holds no run."""
    path = run / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(config["settings"], dict) or not isinstance(config["data"], dict):
            raise TypeError
    except OSError as error:
        raise TrainingError(
            f"{run}: is no run ({CONFIG} is missing). Give a folder of guard train."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: is damaged. Train anew into another folder.") from error
    return config


def read_metrics(run: Path) -> list[Metrics]:
    """The lines of a run's `metrics.jsonl`: one per epoch, then that of the test split.

    Raises `TrainingError` where it is damaged.
    """
    path = run / METRICS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise TrainingError(f"{path}: is damaged. Delete it to go on; the weights do not need it.") from error


def _write_metrics(out: Path, metrics: Sequence[Metrics]) -> None:
    files.write_text(out / METRICS, "".join(json.dumps(line) + "\n" for line in metrics))


def _write_curves(out: Path, config: Mapping[str, Any], metrics: Sequence[Metrics]) -> None:
    files.write_text(out / curves.CURVES, curves.page(out.name, config, metrics))
