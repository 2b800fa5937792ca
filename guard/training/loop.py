"""The training loop: SGD with Nesterov momentum over augmented batches, under any regularizers, resumable.

It runs in one process or, started by torchrun, in several that share every batch (`distributed`).
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guard import files
from guard.data import Dataset
from guard.errors import DataError, TrainingError, UsageError
from guard.interrupts import stop_requests
from guard.progress import Progress
from guard.training import architectures, checkpoint, curves, distributed, grammar, schedules
from guard.training.batches import Batches, checked, evaluation, prepare, worker_failures
from guard.training.folders import ImageFiles
from guard.training.passes import Passes, compiled
from guard.training.settings import Precision, Settings

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"

CHECKPOINT_SECONDS = 300.0  # between checkpoints inside an epoch

Metrics = dict[str, float]


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its last epoch's metrics, and the accuracy on the test split, if any."""

    folder: Path
    metrics: Metrics
    test_accuracy: float | None


def train(
    dataset: Dataset | ImageFiles,
    settings: Settings,
    out: Path,
    *,
    test: Dataset | ImageFiles | None = None,
    resume: bool = False,
    device: str = "cpu",
    deterministic: bool = False,
    workers: int = 0,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    arguments: Mapping[str, Any] | None = None,
) -> Result:
    """Trains on `dataset`; keeps `config.json`, `checkpoint.pt`, `metrics.jsonl` and `curves.html` in `out`.

    `test` is looked at once, at the end. A run that was stopped anywhere and resumed ends with the same
    weights, bit by bit, as one that was not: on the CPU with the same number of threads, on CUDA with
    `deterministic`, and with the same number of processes. Checkpoints are written after every epoch and
    inside epochs when `checkpoint_seconds` have passed. `workers` processes decode images that do not lie in
    memory. `arguments` go into the provenance. Of several processes (`distributed.processes`) the first one
    writes, and raises the errors of all.

    Raises `UsageError` for settings that make no sense, where `out` holds another run or something else, and
    where another process trains into it, `DataError` for data that cannot be trained on, and `TrainingError`
    where the loss is not finite (the last good checkpoint stays) or a checkpoint cannot be read or written.
    SIGINT and SIGTERM write a checkpoint, then raise `KeyboardInterrupt`.
    """
    with distributed.together():
        settings.check()
        bound = grammar.parse_all(settings.regularizers)
        grammar.check_precision(bound, settings.precision)
        batches = prepare(dataset, settings, device, workers=workers)
        _check_test(test, dataset, batches)
        config = _config(dataset, settings, batches, arguments or {})
    with (
        ExitStack() as held,
        _random_state(settings.seed, device, deterministic=deterministic),
        _no_tf32(),
        worker_failures(),
        closing(batches),
        stop_requests(insistent=distributed.world_size() == 1) as stop,  # torchrun sends several
    ):
        with distributed.together():
            model = _network(config).to(device)
            grammar.check_network(bound, model, batches.shape)
            if distributed.rank() == 0:
                held.enter_context(_alone(out))
                _open(out, config, resume=resume)
        model.to(memory_format=torch.channels_last)
        if distributed.rank() > 0:
            torch.manual_seed(settings.seed + distributed.rank())  # dropout of one's own
        run = Run(model, bound, batches, settings, out / checkpoint.CHECKPOINT)
        with distributed.together():
            if resume and run.path.exists():
                run.restore(checkpoint.load(run.path))
            metrics = [line for line in read_metrics(out) if line.get("epoch", math.inf) <= run.epoch]
        _write(out, config, metrics)
        with Progress(run.total - run.done, f"train {out.resolve().name}") as progress:
            while run.epoch < settings.epochs:
                metrics.append(run.finish_epoch(progress, stop, checkpoint_seconds))
                _write(out, config, metrics)
                run.save()
                if run.epoch < settings.epochs and run.asked_to_stop(stop):
                    raise run.stopped(stop, f"epoch {run.epoch}")
        accuracy = None
        if test is not None:
            accuracy = run.accuracy(test)
            tested = [*metrics, {"test_accuracy": accuracy, "test_images": len(test)}]
            _write(out, config, tested)
    return Result(out, metrics[-1] if metrics else {}, accuracy)


@dataclass(frozen=True)
class Trained:
    """A run's network in evaluation mode on the CPU, the run's config, and the epochs that are done."""

    model: nn.Module
    config: dict[str, Any]
    epochs: int


def trained(run: Path) -> Trained:
    """The network of the run in the folder `run`, with the weights of its checkpoint.

    Raises `TrainingError` where `run` holds no run, or no checkpoint of its network.
    """
    config = read_config(run)
    path = run / checkpoint.CHECKPOINT
    if not path.exists():
        raise TrainingError(f"{run}: has no checkpoint yet. Let guard train go on, with --resume.")
    saved = checkpoint.load(path)
    model = _network(config)
    _take_weights(model, saved, path)
    return Trained(model.eval(), config, saved.epoch)


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
        self.batches = batches
        self.settings = settings
        self.path = path
        self.state: dict[str, Tensor] = {}
        self.epoch = 0
        self.step = 0
        self.sums: Metrics = {}
        self.seconds = 0.0

    @property
    def done(self) -> int:
        """Steps since the start of training."""
        return self.epoch * self.batches.steps + self.step

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.settings.epochs * self.batches.steps

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Takes a checkpoint's state; raises `TrainingError` where it belongs to another run."""
        count = len(saved.processes)
        if count != distributed.world_size():
            raise TrainingError(
                f"{self.path}: was written by {count} processes, now there are {distributed.world_size()}. "
                + (
                    f"Resume with torchrun --nproc_per_node={count}."
                    if count > 1
                    else "Resume without torchrun."
                )
            )
        _take_weights(self.model, saved, self.path)
        self.optimizer.load_state_dict(saved.optimizer)
        own = saved.processes[distributed.rank()]
        torch.set_rng_state(own.random_state)
        if own.cuda_random_state is not None and self.batches.device.type == "cuda":
            torch.cuda.set_rng_state(own.cuda_random_state, self.batches.device)
        self.state = {name: value.to(self.batches.device) for name, value in own.state.items()}
        self.epoch, self.step, self.sums, self.seconds = saved.epoch, saved.step, saved.sums, saved.seconds

    def save(self) -> None:
        """Writes the checkpoint; raises `TrainingError` instead where weights are not finite."""
        for name, value in self.model.state_dict().items():
            if not torch.isfinite(value).all():
                raise distributed.alike(
                    TrainingError(
                        f"{name} is not finite before epoch {self.epoch + 1}, step {self.step + 1}. "
                        f"Lower --learning-rate. {self._what_is_left()}"
                    )
                )
        distributed.check_identical(self.model)
        cuda = self.batches.device.type == "cuda"
        own = checkpoint.ProcessState(
            random_state=torch.get_rng_state(),
            cuda_random_state=torch.cuda.get_rng_state(self.batches.device) if cuda else None,
            state={name: value.detach().cpu() for name, value in self.state.items()},
        )
        saved = checkpoint.Checkpoint(
            epoch=self.epoch,
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            processes=distributed.gather(own),
            sums=self.sums,
            seconds=self.seconds,
        )
        with distributed.together():
            if distributed.rank() == 0:
                checkpoint.save(saved, self.path)

    def _what_is_left(self) -> str:
        """What a run that failed leaves; with other settings it cannot go on."""
        if self.path.exists():
            return "The last good checkpoint is kept; give another --out."
        return "There is no checkpoint yet: start anew."

    def finish_epoch(
        self, progress: Progress, stop: Sequence[signal.Signals], checkpoint_seconds: float
    ) -> Metrics:
        """Trains to the end of the current epoch; returns its metrics.

        Writes a checkpoint every `checkpoint_seconds`, and where `stop` has an entry, raising
        `KeyboardInterrupt` then.
        """
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
            progress.advance(note=f"epoch {self.epoch + 1} of {self.settings.epochs}, loss {loss:.4g}")
            if self.step == self.batches.steps:
                break  # the epoch's own checkpoint follows
            due = distributed.rank() == 0 and clock - saved > checkpoint_seconds
            signals = distributed.max_over_processes(torch.tensor([len(stop), int(due)]))
            if signals.any():
                self.save()
                saved = clock
            if signals[0]:
                raise self.stopped(stop, f"epoch {self.epoch + 1}, step {self.step} of {self.batches.steps}")
        metrics: Metrics = {"epoch": self.epoch + 1, "learning_rate": rate, "seconds": round(self.seconds, 1)}
        metrics |= {name: value / self.step for name, value in self.sums.items()}
        if len(self.batches.held_out):
            metrics["held_out_accuracy"] = self.accuracy(self.batches.held_out)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        return metrics

    def asked_to_stop(self, stop: Sequence[signal.Signals]) -> bool:
        """Whether a signal came, to any process."""
        return bool(distributed.max_over_processes(torch.tensor([len(stop)])).any())

    def stopped(self, stop: Sequence[signal.Signals], where: str) -> BaseException:
        """What a run that was asked to stop, and has saved everything, ends with."""
        name = stop[0].name if stop else "another process"
        return distributed.alike(
            KeyboardInterrupt(f"stopped by {name} after {where}; all is saved: go on with --resume.")
        )

    def one_step(self, learning_rate: float) -> Metrics:
        """One batch: its passes, the weights' gradient, the update; returns the step's metrics."""
        with distributed.together():
            images, labels = self.batches.at(self.epoch, self.step // self.replays)
        self.optimizer.zero_grad(set_to_none=True)
        count = self.settings.accumulate
        sums: dict[str, Tensor] = {}
        for part, batch in enumerate(zip(images.chunk(count), labels.chunk(count), strict=True)):
            passes = self.passes(*batch, part)
            loss, terms = grammar.regularized_loss(self.regularizers, passes)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            for call in passes.after_backward:
                call()
            accuracy = passes.accuracy()
            if accuracy is not None:
                terms["train_accuracy"] = accuracy
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / count
        metrics = distributed.average(self.model, sums)
        if not math.isfinite(metrics["loss"]):
            terms_found = [item for item in metrics.items() if item[0] != "train_accuracy"]
            found = ", ".join(f"{name} {value:.3g}" for name, value in terms_found)
            raise distributed.alike(
                TrainingError(
                    f"the loss is not finite at epoch {self.epoch + 1}, step {self.step + 1} ({found}). "
                    f"Lower --learning-rate or a regularizer's weight. {self._what_is_left()}"
                )
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return metrics

    def passes(self, images: Tensor, labels: Tensor, part: int) -> Passes:
        """The passes over one part of the current batch."""
        return Passes(
            self.model,
            images,
            labels,
            generator=self.batches.draws(self.epoch, self.step, part),
            autocast=torch.bfloat16 if self.settings.precision == "bf16" else None,
            compiled=self.compiled,
            progress=self.progress(),
            state=self.state,
            part=part,
            parts=self.settings.accumulate * distributed.world_size(),
        )

    def learning_rate(self) -> float:
        """The step's rate: the schedule at its middle, so that neither the first nor the last is 0."""
        return self.settings.learning_rate * schedules.share(
            self.settings.schedule, self.progress(), self.settings.warmup
        )

    def progress(self) -> float:
        """The share of training that is done at the middle of the current step."""
        return (self.done + 0.5) / self.total

    @torch.no_grad()
    def accuracy(self, dataset: Dataset | ImageFiles) -> float:
        """The share of images labelled rightly, in evaluation mode and float32."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.batches.device)
        with distributed.together():
            parts = evaluation(dataset, self.batches.device, workers=self.batches.workers)
            for images, labels in parts:
                right += (self.model(images).argmax(1) == labels).sum()
        self.model.train()
        return int(distributed.sum_over_processes(right)) / len(dataset)


def _network(config: Mapping[str, Any]) -> nn.Module:
    """The network that a run's config describes, its weights drawn from torch's global random state."""
    settings, data = config["settings"], config["data"]
    _, height, width = data["shape"]
    return architectures.build(
        settings["architecture"],
        mean=data["mean"],
        deviation=data["deviation"],
        num_classes=len(data["class_names"]),
        size=(height, width),
        width=settings["width"],
        pre_logit_sigmoid=settings["pre_logit_sigmoid"],
    )


def _take_weights(model: nn.Module, saved: checkpoint.Checkpoint, path: Path) -> None:
    try:
        model.load_state_dict(saved.model)
    except RuntimeError as error:
        raise TrainingError(
            f"{path}: belongs to another network ({str(error).splitlines()[0].rstrip(':')})."
        ) from error


def chosen_device(name: str) -> str:
    """`auto` is CUDA where it works, else the CPU; raises `UsageError` for a device that does not work."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {name}: expected cpu or cuda.")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}. Give cpu or cuda.") from error
    return name


def chosen_precision(
    name: Literal["auto", "bf16", "float32"], device: str, regularizers: Sequence[str] = ()
) -> Precision:
    """`auto` is bf16 where the device computes in it and no regularizer's step is too fine, else float32."""
    if name != "auto":
        return name
    if any(regularizer.too_fine_for_bf16 for regularizer in grammar.parse_all(regularizers)):
        return "float32"
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "float32"
    # Without these instructions torch takes bf16 too, and is slower than in float32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, name, bool)() for name in names)
    return "bf16" if native else "float32"


def _check_test(test: Dataset | ImageFiles | None, dataset: Dataset | ImageFiles, batches: Batches) -> None:
    """Raises `DataError` where the test images are not of the training images' shape, or have no labels."""
    if test is None:
        return
    sides = test.images.shape[1:] if isinstance(test, Dataset) else test.shape
    expected = (*batches.shape[1:], batches.shape[0])
    if sides != expected:
        raise DataError(
            f"{test.name}: test images are {sides}, training images {expected} (height, width, channels). "
            "Bring both to one size."
        )
    if isinstance(test, Dataset):
        checked(replace(test, class_names=dataset.class_names))


def _config(
    dataset: Dataset | ImageFiles, settings: Settings, batches: Batches, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    provenance = files.provenance(
        arguments,
        seed=settings.seed,
        threads=torch.get_num_threads(),
        device=str(batches.device),
        processes=distributed.world_size(),
    )
    config = {
        "settings": asdict(settings),
        "data": {
            "name": dataset.name,
            "digest": dataset.digest,
            "class_names": dataset.class_names,
            "shape": batches.shape,
            "resize": dataset.resize if isinstance(dataset, ImageFiles) else None,
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


@contextmanager
def _random_state(seed: int, device: str, *, deterministic: bool) -> Iterator[None]:
    """Inside, torch's global random state starts from `seed`; afterwards the caller's is back."""
    before = torch.are_deterministic_algorithms_enabled()
    cuda = [torch.device(device).index or 0] if device.startswith("cuda") else []
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Inside, float32 convolutions on CUDA are that: TF32 would drown finite differences of a small step.

    Passes in bf16 do not use it, and what is in full precision beside them is to have it.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _alone(out: Path) -> AbstractContextManager[None]:
    """Holds the run's folder against other processes; raises `UsageError` where one trains into it."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; expected the folder of a run, or a new one.")
    return files.locked(out / LOCK, f"--out {out}: another guard train is writing there")


def _open(out: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Writes the run's config, or sees that the one there is the same.

    A run that was stopped before its first checkpoint left nothing to go on with: another takes its place.
    """
    path = out / CONFIG
    if not path.exists():
        for name in (checkpoint.CHECKPOINT, METRICS, curves.CURVES):
            if (out / name).exists():
                raise UsageError(f"--out {out}: holds {name} of something else. Give another --out.")
    if not path.exists() or not (out / checkpoint.CHECKPOINT).exists():
        if path.exists():
            try:
                read_config(out)
            except TrainingError as error:
                raise UsageError(f"--out {out}: its {CONFIG} is of no run. Give another --out.") from error
        _write_text(path, json.dumps(config, indent=1) + "\n")
        return
    if not resume:
        raise UsageError(f"{out}: holds a run already. Give --resume to go on with it, or another --out.")
    for left in out.glob(".*.partial-*"):  # by a process that was killed while it wrote
        left.unlink()
    old = read_config(out)
    for name, value in config["settings"].items():
        if old["settings"][name] != value:
            before, now = (_written(one) for one in (old["settings"][name], value))
            raise UsageError(
                f"{out}: was started with {_flag(name)} {before}, now it is {now}. Resume with the same, or "
                "give another --out."
            )
    for name, value in config["data"].items():
        if old["data"].get(name) != value:
            raise UsageError(
                f"{out}: was started with other data ({name} {old['data'].get(name)!r}, now {value!r}). "
                "Resume with the same, or give another --out."
            )


def _flag(setting: str) -> str:
    """The flag of `guard train` that a setting is given by."""
    other = {"architecture": "arch", "regularizers": "regularizer", "padding": "crop"}
    return "--" + other.get(setting, setting).replace("_", "-")


def _written(value: Any) -> str:
    """A setting's value as it is read on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "left out" if value is None else str(value)


def read_config(run: Path) -> dict[str, Any]:
    """A run's `config.json`, with the defaults of settings that it is older than.

    Raises `TrainingError` where the folder holds no run.
    """
    path = run / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(config["data"], dict):
            raise TypeError
        config["settings"] = asdict(Settings()) | config["settings"]
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


def _write(out: Path, config: Mapping[str, Any], metrics: Sequence[Metrics]) -> None:
    """The metrics and their curves, by the first process."""
    with distributed.together():
        if distributed.rank() == 0:
            _write_text(out / METRICS, "".join(json.dumps(line) + "\n" for line in metrics))
            _write_text(out / curves.CURVES, curves.page(out.resolve().name, config, metrics))


def _write_text(path: Path, text: str) -> None:
    """Writes a file of the run; raises `TrainingError` where that fails, as on a full disk."""
    try:
        files.write_text(path, text)
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}). Make room, then go on with --resume."
        ) from error
