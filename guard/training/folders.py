"""Folders of images that stay on the disk: too large for memory, or of differing sizes, as photographs are.

They are listed and looked at once, before training; the pixels are decoded whenever a batch needs them.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from guard import data
from guard import images as uploads
from guard.archives import FORMAT
from guard.data import Dataset, Split
from guard.errors import DataError, ImageError, UsageError
from guard.interrupts import interruptible
from guard.progress import track
from guard.training import augment

IN_MEMORY = 4 * 2**30  # bytes of pixels; larger folders are decoded batch by batch
USUAL_SIZE = 224  # pixels, for images of differing sizes
LARGEST_SIZE = 4096

# A folder of one's own may hold larger files than strangers may upload.
LIMITS = uploads.Limits(bytes=256 * 2**20, pixels=80 * uploads.MEGAPIXEL, aspect=1000)


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images as files.

    `labels` is int64 (N,), numbers of `class_names`; `shape` is (height, width, 3) of a decoded image. With
    `resize` the shorter side gets that many pixels and the centre is cropped to `shape` (in training, a
    random part is); None where all images have that shape. `digest` is the sha256 of the paths inside the
    folder and the files' sizes, not of their content: reading all that would take as long as an epoch.
    """

    name: str
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    digest: str
    shape: tuple[int, int, int]
    resize: int | None

    def __len__(self) -> int:
        return len(self.paths)


def load(
    source: str | Path, split: Split = "train", *, image_size: int | None = None, in_memory: int = IN_MEMORY
) -> Dataset | ImageFiles:
    """One split of a data set to train on: `data.load`, and folders of images of any sizes.

    A folder whose images have one size becomes a `Dataset` where they fit into `in_memory` bytes. With
    `image_size`, and where sizes differ, images are brought to `image_size` x `image_size` pixels (default:
    224) by a crop.

    Raises `DataError` as `data.load` does, where there are no labels, and where a file is no image;
    `UsageError` for an `image_size` that the images of an array cannot have.
    """
    if image_size is not None and not 8 <= image_size <= LARGEST_SIZE:
        raise UsageError(f"--image-size is {image_size}: expected 8 to {LARGEST_SIZE} pixels.")
    path = Path(source)
    if not path.is_dir():
        dataset = data.load(source, split)
        if dataset.labels is None:
            raise DataError(f"{source}: has no labels, the array 'y_{split}'. Expected {FORMAT}.")
        height, width = dataset.images.shape[1:3]
        if image_size is not None and (height, width) != (image_size, image_size):
            raise UsageError(
                f"--image-size is {image_size}, but the images of {dataset.name} are arrays of "
                f"{height} x {width} pixels. Leave it out; it is for folders of images."
            )
        return dataset
    folder = data.split_folder(path, split) or path
    paths, labels, class_names = _listing(folder)
    sizes = _sizes(paths, path.name)
    width, height = next(iter(sizes))
    resize = None
    if len(sizes) > 1 or (image_size is not None and (height, width) != (image_size, image_size)):
        height = width = image_size or USUAL_SIZE
        resize = evaluation_resize(height)
    elif height * width * 3 * len(paths) <= in_memory:
        return data.load(source, split)
    return ImageFiles(
        path.name or "images",
        tuple(paths),
        labels,
        class_names,
        _digest(folder, paths),
        (height, width, 3),
        resize,
    )


def test_split(source: str | Path, training: Dataset | ImageFiles) -> Dataset | ImageFiles | None:
    """The labelled test split beside a training split, at its size; None where there is none of its own.

    Raises what `load` raises.
    """
    if isinstance(training, Dataset) or training.resize is None or not Path(source).is_dir():
        return data.test_split(source, training.class_names)
    folder = data.split_folder(Path(source), "test")
    if folder is None:
        return None
    paths, labels, class_names = data.listing(folder)
    if labels is None:
        return None
    _sizes(paths, folder.name)
    names = data.aligned_labels(training.name, labels, class_names, training.class_names)
    return replace(training, paths=tuple(paths), labels=names, digest=_digest(folder, paths))


def _listing(folder: Path) -> tuple[list[Path], NDArray[np.int64], tuple[str, ...]]:
    """As `data.listing`, with labels."""
    paths, labels, class_names = data.listing(folder)
    if labels is None:
        raise DataError(f"{folder}: has no labels. Put the images into one folder per class.")
    return paths, labels, class_names


def evaluation_resize(size: int) -> int:
    """The shorter side before the centre of `size` pixels is cropped: 256 for 224."""
    return round(size * 256 / 224)


def take(files: ImageFiles, numbers: Sequence[int] | NDArray[np.int64]) -> ImageFiles:
    """The images with these numbers; the digest stays that of the whole."""
    chosen = np.asarray(numbers, dtype=np.int64)
    return replace(files, paths=tuple(files.paths[n] for n in chosen), labels=files.labels[chosen])


def as_served(files: ImageFiles, number: int) -> Tensor:
    """One image as a server would see it: uint8 (H, W, 3). Raises `DataError` for a damaged file."""
    height, width, channels = files.shape
    pixels = _readable(
        files.paths[number],
        lambda content: uploads.decode(
            content, (channels, height, width), resize=files.resize, limits=LIMITS
        ),
    )
    return torch.from_numpy(np.rint(pixels.transpose(1, 2, 0) * 255).astype(np.uint8))


def for_training(
    files: ImageFiles,
    number: int,
    generator: torch.Generator,
    *,
    padding: int,
    mirror: bool,
    cutout: int,
    fill: Sequence[int],
) -> Tensor:
    """One image changed at random: uint8 (H, W, 3). Raises `DataError` for a damaged file.

    Where images are resized, a part of 8 to 100% of the area and an aspect ratio of 3/4 to 4/3 becomes the
    image (arXiv 1409.4842, section 6); else it is shifted by up to `padding` pixels. Then it may be mirrored
    and get a square of `cutout` pixels in the colour `fill`.
    """
    if files.resize is None:
        pixels = as_served(files, number)
    else:
        picture = _readable(files.paths[number], lambda content: uploads.open_picture(content, limits=LIMITS))
        pixels = _random_part(picture, files.shape[:2], generator)
        padding = 0
    pixels = augment.crop_and_mirror(pixels[None], generator, padding=padding, mirror=mirror)
    if cutout:
        colour = torch.tensor(fill, dtype=torch.uint8)
        planes = augment.cutout(pixels.permute(0, 3, 1, 2), generator, size=cutout, fill=colour)
        pixels = planes.permute(0, 2, 3, 1)
    return pixels[0].contiguous()


def _random_part(picture: Image.Image, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    seed = int(torch.randint(2**62, (1,), generator=generator))
    from torchvision.transforms import RandomResizedCrop  # seconds to import

    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global random state
        torch.default_generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3))
    box = (left, top, left + width, top + height)
    part = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(part))


def _readable(path: Path, decode: Any) -> Any:
    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise DataError(
            f"{path}: {error} Replace or remove it; then, where it is a training image, train anew into "
            "another folder, and where it is a test image, go on with --resume."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _sizes(paths: Sequence[Path], name: str) -> set[tuple[int, int]]:
    """The sizes (width, height) that occur, from the headers of all files."""
    with ThreadPoolExecutor(16) as pool:
        return set(track(interruptible(pool.map(_size, paths)), f"look at {name}", total=len(paths)))


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP", "BMP"]) as picture:
            # Pillow would decode a whole PNG to find its orientation; hardly any has one.
            return picture.size if picture.format == "PNG" else uploads.upright_size(picture)
    except Exception as error:  # whatever a decoder trips over
        raise DataError(
            f"{path}: is no PNG, JPEG, WebP or BMP image, or is damaged. Replace or remove it."
        ) from error


def _digest(folder: Path, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()
