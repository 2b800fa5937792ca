"""Every batch of training by its epoch and number, from memory or from a folder of images.

A batch is a function of the seed, the epoch and the number alone, so that a resumed run sees what the
uninterrupted one would have seen. Several processes take equal, consecutive shares of it.
"""

import math
import os
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from guard import data
from guard.data import Dataset
from guard.errors import DataError, TrainingError, UsageError
from guard.training import augment, distributed, folders
from guard.training.folders import ImageFiles
from guard.training.settings import Settings

EVALUATED = 500  # images per pass of an evaluation
SAMPLED = 500  # images of a folder that its channels' statistics are taken from
PREFETCHED = 4  # batches that every worker prepares ahead
MOST_WORKERS = 16
GRACE = 20  # seconds that a worker lives on after SIGTERM

EVALUATION = -1  # in the place of an epoch: the image as it is served

# The fourth entries of seeds, that of whole batches being 0.
_IMAGE, _STEP = 1, 2

Key = tuple[int, int]  # epoch, image number
Item = tuple[Tensor, int] | DataError


class Batches(ABC):
    """The batches of a run: `steps` an epoch, of `size` images over all processes.

    `shape` is (C, H, W) of an image; `mean` and `deviation` its channels' statistics, in units of [0, 1];
    `held_out` the images that training does not see.
    """

    shape: tuple[int, int, int]
    mean: list[float]
    deviation: list[float]
    held_out: Dataset | ImageFiles
    workers: int = 0

    def __init__(
        self, dataset: Dataset | ImageFiles, labels: NDArray[np.int64], settings: Settings, device: str
    ) -> None:
        order = np.arange(len(labels))
        if (np.diff(labels) >= 0).all():
            # Sorted by class, as folders are: the last images would all be of the last classes.
            order = np.random.default_rng(settings.seed).permutation(len(labels))
        kept = len(labels) - settings.held_out
        if kept < 2:
            raise UsageError(
                f"holding out {settings.held_out} of {len(labels)} training images leaves {max(0, kept)}: "
                "expected 2 or more to train on. Lower --held-out."
            )
        self._kept, self._held = order[:kept], order[kept:]
        _check_classes(labels[self._kept], dataset)
        self.settings = settings
        self.device = torch.device(device)
        self._order = _Order(kept, settings)
        self.size, self.steps = self._order.size, self._order.steps

    @abstractmethod
    def at(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The process's share of a batch: images (B, C, H, W) float32, channels last, and labels (B,).

        Raises `DataError` where a file cannot be decoded.
        """

    def close(self) -> None:  # noqa: B027
        """Ends what works ahead."""

    def draws(self, epoch: int, step: int, part: int = 0) -> torch.Generator:
        """The source of all else that a step draws, another one for each process and part of a batch."""
        return _generator(self.settings.seed, epoch, step, _STEP, part, distributed.rank())


class InMemory(Batches):
    """Images as one array, on the device where they take less than half of its free memory."""

    def __init__(self, dataset: Dataset, settings: Settings, device: str) -> None:
        images, labels = checked(dataset)
        if settings.padding >= min(images.shape[1:3]):
            raise _shifted_too_far(settings.padding, images.shape[1:3])
        super().__init__(dataset, labels, settings, device)
        self.shape = (images.shape[3], images.shape[1], images.shape[2])
        kept = images[self._kept]
        self.mean, self.deviation = channel_statistics(kept)
        home = self.device
        if home.type == "cuda" and kept.nbytes > torch.cuda.mem_get_info(home)[0] / 2:
            home = torch.device("cpu")
        self.images = torch.from_numpy(kept).to(home)
        self.labels = torch.from_numpy(labels[self._kept]).to(home)
        self.held_out = data.take(dataset, self._held)
        self._fill = torch.tensor(self.mean, device=self.device)

    def at(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """As `Batches` says. The draws are those of the whole batch, whatever the number of processes."""
        chosen = self._order.batch(epoch, number).to(self.images.device)
        generator = _generator(self.settings.seed, epoch, number)
        images = augment.crop_and_mirror(
            self.images[chosen].to(self.device),
            generator,
            padding=self.settings.padding,
            mirror=self.settings.mirror,
        )
        floats = to_floats(images)
        if self.settings.cutout:
            floats = augment.cutout(floats, generator, size=self.settings.cutout, fill=self._fill)
        share = self._order.share
        return floats[share], self.labels[chosen][share].to(self.device)


class Streamed(Batches):
    """Images decoded and changed by `workers` processes ahead of their steps, or with 0 by this one."""

    def __init__(self, files: ImageFiles, settings: Settings, device: str, *, workers: int) -> None:
        if files.resize is None and settings.padding >= min(files.shape[:2]):
            raise _shifted_too_far(settings.padding, files.shape[:2])
        super().__init__(files, files.labels, settings, device)
        height, width, channels = files.shape
        self.shape = (channels, height, width)
        kept = folders.take(files, self._kept)
        self.held_out = folders.take(files, self._held)
        self.workers = workers
        self.mean, self.deviation = _sampled_statistics(kept, settings.seed)
        self._keys = _Keys(self._order)  # knows nothing of this object: a cycle would keep workers waiting
        change = partial(
            folders.for_training,
            padding=settings.padding,
            mirror=settings.mirror,
            cutout=settings.cutout,
            fill=[round(255 * mean) for mean in self.mean],
        )
        self._loader = _loader(_Decoded(kept, settings.seed, change), self._keys, workers, device)
        self._batches: Generator[tuple[Tensor, Tensor], None, None] | None = None
        self._next: Key | None = None
        self._last: tuple[Key, tuple[Tensor, Tensor]] | None = None

    def at(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """As `Batches` says. Batches asked for one after another, or the same again, come without a wait."""
        place = (epoch, number)
        if self._last is None or self._last[0] != place:
            if self._batches is None or self._next != place:
                self.close()
                self._keys.start = place
                self._batches = _loaded(self._loader)
            self._last = (place, next(self._batches))
            self._next = self._order.after(epoch, number)
        images, labels = self._last[1]
        return (
            to_floats(images.to(self.device, non_blocking=True)),
            labels.to(self.device, non_blocking=True),
        )

    def close(self) -> None:
        """Ends the workers; the next batch starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def prepare(dataset: Dataset | ImageFiles, settings: Settings, device: str, *, workers: int = 0) -> Batches:
    """The batches of a data set; raises `DataError` and `UsageError` for what cannot be trained on."""
    if isinstance(dataset, Dataset):
        batches = InMemory(dataset, settings, device)
        batches.workers = workers  # a test split may be files all the same
        return batches
    return Streamed(dataset, settings, device, workers=workers)


def evaluation(
    dataset: Dataset | ImageFiles, device: str | torch.device, *, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The process's share of a data set as it is served: images (B, C, H, W) float32 and labels (B,)."""
    device = torch.device(device)
    mine = np.arange(distributed.rank(), len(dataset), distributed.world_size())
    if isinstance(dataset, Dataset):
        images, labels = checked(dataset)
        for start in range(0, len(mine), EVALUATED):
            chosen = mine[start : start + EVALUATED]
            yield (
                to_floats(torch.from_numpy(images[chosen]).to(device)),
                torch.from_numpy(labels[chosen]).to(device),
            )
        return
    keys = [(EVALUATION, int(number)) for number in mine]
    order = [keys[start : start + EVALUATED // 4] for start in range(0, len(keys), EVALUATED // 4)]
    for pixels, numbers in _loaded(_loader(_Decoded(dataset), order, workers, str(device))):
        yield to_floats(pixels.to(device, non_blocking=True)), numbers.to(device, non_blocking=True)


@contextmanager
def worker_failures() -> Iterator[None]:
    """Inside, a worker that is killed, or has no shared memory left, is a `TrainingError`.

    torch raises its error wherever the process happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "DataLoader worker" not in reason:
            raise
        raise TrainingError(
            f"loading images failed ({reason}) Lower --workers or, in a container, raise its shared memory; "
            "then --resume."
        ) from error


def usual_workers() -> int:
    """As many loading processes as this process has cores for, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


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


def _check_classes(labels: NDArray[np.int64], dataset: Dataset | ImageFiles) -> None:
    empty = np.flatnonzero(np.bincount(labels, minlength=len(dataset.class_names)) == 0)
    if len(empty):
        raise DataError(
            f"{dataset.name}: class {dataset.class_names[empty[0]]!r} (number {empty[0]}) has no training "
            "image. Number the classes from 0 without gaps, add images of it, or hold out fewer."
        )


def _shifted_too_far(padding: int, size: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"--crop is {padding}, for images of {size[0]} x {size[1]} pixels: expected less than "
        f"{min(size)} pixels."
    )


def _size(settings: Settings, kept: int) -> int:
    """Images in a batch over all processes: what all parts on all processes can share equally."""
    parts = distributed.world_size() * settings.accumulate
    size = min(settings.batch_size, kept)
    if settings.batch_size % parts or size < 2 * parts:
        raise UsageError(
            f"--batch-size is {settings.batch_size}, of {kept} training images, for "
            f"{distributed.world_size()} processes and --accumulate {settings.accumulate}: expected a "
            f"multiple of {parts}, and {2 * parts} images or more."
        )
    return size - size % parts


def _sampled_statistics(files: ImageFiles, seed: int) -> tuple[list[float], list[float]]:
    count = min(SAMPLED, len(files))
    chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
    return channel_statistics(np.stack([folders.as_served(files, int(number)).numpy() for number in chosen]))


class _Order:
    """Which of `count` images are in which batch, and which of a batch are this process's."""

    def __init__(self, count: int, settings: Settings) -> None:
        self.count = count
        self.size = _size(settings, count)
        self.steps = count // self.size  # images left over sit out the epoch, other ones in each
        self._seed = settings.seed
        share = self.size // distributed.world_size()
        self.share = slice(share * distributed.rank(), share * (distributed.rank() + 1))
        self._epoch: int | None = None
        self._order = torch.empty(0)

    def batch(self, epoch: int, number: int) -> Tensor:
        """The numbers (`size`,) of a batch's images."""
        if self._epoch != epoch:
            self._order = torch.randperm(self.count, generator=_generator(self._seed, epoch))
            self._epoch = epoch
        return self._order[number * self.size : (number + 1) * self.size]

    def after(self, epoch: int, number: int) -> Key:
        """The place of the next batch."""
        return (epoch, number + 1) if number + 1 < self.steps else (epoch + 1, 0)


class _Keys(Sampler[list[Key]]):
    """The process's images of every batch from `start` on, epoch after epoch."""

    def __init__(self, order: _Order) -> None:
        self.start: Key = (0, 0)
        self._order = order

    def __iter__(self) -> Iterator[list[Key]]:
        place = self.start
        while True:
            yield [(place[0], number) for number in self._order.batch(*place)[self._order.share].tolist()]
            place = self._order.after(*place)


class _Decoded(TorchDataset[Item]):
    """Images by their keys; what cannot be decoded comes as the error that says so."""

    def __init__(self, files: ImageFiles, seed: int = 0, change: Any = None) -> None:
        self._files, self._seed, self._change = files, seed, change

    def __getitem__(self, key: Key) -> Item:
        epoch, number = key
        try:
            if epoch == EVALUATION:
                pixels = folders.as_served(self._files, number)
            else:
                pixels = self._change(self._files, number, _generator(self._seed, epoch, number, _IMAGE))
        except DataError as error:
            return error
        return pixels, int(self._files.labels[number])


def _loader(dataset: _Decoded, order: Any, workers: int, device: str) -> DataLoader[Item]:
    with _any_number_of_workers():
        return DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_stacked,
            pin_memory=device.startswith("cuda"),
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCHED if workers else None,
            generator=torch.Generator(),  # for its own use; else it takes from the global random state
        )


def _loaded(loader: DataLoader[Item]) -> Generator[tuple[Tensor, Tensor], None, None]:
    with _any_number_of_workers():
        batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        # An error's traceback may keep the iterator, and its workers, alive until long after.
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()


@contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Inside, torch does not warn of more workers than cores: that is for the user to say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def _stacked(items: Sequence[Item]) -> tuple[Tensor, Tensor] | DataError:
    images, labels = [], []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def _start_worker(_: int) -> None:
    """Signals to stop often reach workers too, which live on for a while: the run has to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def _generator(*key: int) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)
