"""The data sets known by name: fetched from their publishers once, checked, and kept as one `.npz` each."""

import gzip
import io
import logging
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.errors import DataError
from guard.files import atomic_open
from guard.progress import Progress

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Archive:
    """Where a data set is published: `files` maps each address to the checksum that its file must have.

    `convert` makes the arrays of the `.npz` file from the contents of the published ones, by file name.
    """

    files: Mapping[str, str]
    convert: Callable[[Mapping[str, bytes]], Arrays]


def fetch(name: str, target: Path) -> None:
    """Downloads the known data set `name`, checks it, and writes it to `target` as `.npz`, in one move.

    Raises `DataError` where there is no network, a file is not the published one, or `target` cannot be
    written.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    archive = ARCHIVES[name]
    advice = (
        f"Put the data at {target} ({FORMAT}), or set GUARD_DATA to the folder that holds {target.name}, "
        "or run this again where the network reaches the publisher."
    )
    contents: dict[str, bytes] = {}
    with TemporaryDirectory() as folder:
        for address, checksum in archive.files.items():
            file = address.rpartition("/")[2]
            try:
                pooch.retrieve(address, checksum, fname=file, path=folder, downloader=_download)
                contents[file] = (Path(folder) / file).read_bytes()
            except requests.RequestException as error:
                raise DataError(
                    f"the data set {name!r} is not in {target.parent}, and {address} cannot be reached "
                    f"({type(error).__name__}). {advice}"
                ) from error
            except ValueError as error:  # pooch's word for a checksum that differs
                raise DataError(
                    f"{address}: the file that came is not the published one (its checksum is not "
                    f"{checksum}). {advice}"
                ) from error
    arrays = archive.convert(contents)
    try:
        with atomic_open(target) as output:
            np.savez(output, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}). {advice}") from error


FORMAT = (
    "x_train, y_train, x_test, y_test: uint8 images (N, H, W, C) and integer labels; optional class_names"
)


def _download(address: str, output: str, _: object) -> None:
    """A pooch downloader that shows our progress and leaves no connection open."""
    import requests

    with requests.get(address, stream=True, timeout=30) as response, Path(output).open("wb") as file:
        response.raise_for_status()
        size = int(response.headers.get("content-length", 0))
        with Progress(size, f"fetch {address.rpartition('/')[2]}") as progress:
            for chunk in response.iter_content(1 << 18):
                file.write(chunk)
                progress.advance(len(chunk))


def cifar(contents: Mapping[str, bytes]) -> Arrays:
    """The binary version of CIFAR-10 or CIFAR-100 (fine labels); the Python one holds pickled objects."""
    ((_, archive),) = contents.items()
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        files = {
            Path(member.name).name: stream.read()
            for member in tar
            if (stream := tar.extractfile(member)) is not None
        }
    if "train.bin" in files:
        parts, label_bytes, names = {"train": ["train.bin"], "test": ["test.bin"]}, 2, "fine_label_names.txt"
    else:
        parts = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
        label_bytes, names = 1, "batches.meta.txt"
    arrays: Arrays = {"class_names": np.array(files[names].decode().split())}
    for split, members in parts.items():
        records = np.frombuffer(b"".join(files[member] for member in members), np.uint8)
        records = records.reshape(-1, label_bytes + 3 * 32 * 32)
        planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        arrays[f"x_{split}"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"y_{split}"] = records[:, label_bytes - 1].astype(np.int64)
    return arrays


def idx(contents: Mapping[str, bytes], class_names: tuple[str, ...]) -> Arrays:
    """The four gzipped IDX files of MNIST and its relatives."""
    arrays: Arrays = {"class_names": np.array(class_names)}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"x_{split}"] = _idx_array(contents[f"{prefix}-images-idx3-ubyte.gz"])[..., np.newaxis]
        arrays[f"y_{split}"] = _idx_array(contents[f"{prefix}-labels-idx1-ubyte.gz"]).astype(np.int64)
    return arrays


def _idx_array(compressed: bytes) -> NDArray[np.uint8]:
    """Two zero bytes, the element type (8: uint8), the number of axes, their lengths, the elements."""
    raw = gzip.decompress(compressed)
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", count=axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _idx_files(folder: str, checksums: tuple[str, str, str, str]) -> dict[str, str]:
    names = [
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    return {folder + name: checksum for name, checksum in zip(names, checksums, strict=True)}


_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

ARCHIVES: dict[str, Archive] = {
    "cifar10": Archive(
        {
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": (
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
            )
        },
        cifar,
    ),
    "cifar100": Archive(
        {
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz": (
                "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
            )
        },
        cifar,
    ),
    "mnist": Archive(
        _idx_files(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            (
                "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        lambda contents: idx(contents, tuple("0123456789")),
    ),
    "fashion-mnist": Archive(
        _idx_files(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            (
                "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "md5:25c81989df183df01b3e8a0aad5dffbe",
                "md5:bef4ecab320f06d8554ea6380940ec79",
                "md5:bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        lambda contents: idx(contents, _FASHION),
    ),
}
