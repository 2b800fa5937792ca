"""Known data sets, fetched from a server of our own in their publishers' formats."""

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from guard import archives
from guard.archives import ARCHIVES, fetch
from guard.data import load
from guard.errors import DataError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server, and the folder it serves."""
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/", folder
        running.shutdown()
        thread.join()


def publish(
    monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path], name: str, files: dict[str, bytes]
) -> None:
    address, folder = server
    for file, content in files.items():
        (folder / file).write_bytes(content)
    checksums = {address + f: f"sha256:{hashlib.sha256(content).hexdigest()}" for f, content in files.items()}
    monkeypatch.setitem(ARCHIVES, name, replace(ARCHIVES[name], files=checksums))


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"inside/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def records(label_bytes: list[list[int]]) -> bytes:
    """CIFAR records: label bytes, then 1024 red, green and blue values; here red counts pixels."""
    planes = np.zeros((3, 1024), np.uint8)
    planes[0] = np.arange(1024) % 256
    planes[1], planes[2] = 7, 9
    return b"".join(bytes(labels) + planes.tobytes() for labels in label_bytes)


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes())


def cifar10() -> bytes:
    files = {f"data_batch_{i}.bin": records([[i], [0]]) for i in range(1, 6)}
    names = "".join(f"class{i}\n" for i in range(10)) + "\n"
    return tar(files | {"test_batch.bin": records([[9]]), "batches.meta.txt": names.encode()})


def test_cifar10_is_fetched_once(
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(monkeypatch, server, "cifar10", {"cifar.tar.gz": cifar10()})
    monkeypatch.setenv("GUARD_DATA", str(tmp_path / "cache"))
    train = load("cifar10", "train")
    assert train.labels is not None
    assert train.labels.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert train.class_names == tuple(f"class{i}" for i in range(10))
    assert train.images.shape == (10, 32, 32, 3)
    assert train.images[0, 1, 2].tolist() == [34, 7, 9]
    (server[1] / "cifar.tar.gz").unlink()
    assert load("cifar10", "test").labels is not None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cifar10.npz"]
    captured = capsys.readouterr()
    assert "fetch cifar.tar.gz" in captured.err
    assert captured.out == ""


def test_cifar100_takes_fine_labels(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "".join(f"fine{i}\n" for i in range(100)).encode()
    files = {"train.bin": records([[3, 42]]), "test.bin": records([[1, 99]]), "fine_label_names.txt": names}
    files["coarse_label_names.txt"] = b"coarse\n"
    publish(monkeypatch, server, "cifar100", {"cifar.tar.gz": tar(files)})
    fetch("cifar100", tmp_path / "cifar100.npz")
    train = load(tmp_path / "cifar100.npz", "train")
    assert train.labels is not None
    assert train.labels.tolist() == [42]
    assert train.class_names[42] == "fine42"


def test_mnist(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    files = {}
    for prefix in ("train", "t10k"):
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(np.array([7, 3], np.uint8))
    publish(monkeypatch, server, "mnist", files)
    fetch("mnist", tmp_path / "mnist.npz")
    found = load(tmp_path / "mnist.npz")
    np.testing.assert_array_equal(found.images[..., 0], images)
    assert found.labels is not None
    assert found.labels.tolist() == [7, 3]
    assert found.class_names == tuple("0123456789")


def test_a_changed_file_is_refused(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, server, "cifar10", {"cifar.tar.gz": cifar10()})
    (server[1] / "cifar.tar.gz").write_bytes(cifar10()[:-10])
    with pytest.raises(DataError, match=r"not the published one .*Put the data at .*cifar10\.npz"):
        fetch("cifar10", tmp_path / "cifar10.npz")
    assert not (tmp_path / "cifar10.npz").exists()


def test_no_network(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, server, "cifar10", {"cifar.tar.gz": cifar10()})
    (server[1] / "cifar.tar.gz").unlink()
    monkeypatch.setenv("GUARD_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load("cifar10")
    message = str(caught.value)
    for part in ("cannot be reached", str(tmp_path / "cifar10.npz"), "x_train", "GUARD_DATA"):
        assert part in message
    unreachable = replace(ARCHIVES["cifar10"], files={"http://127.0.0.1:9/a.tar.gz": "sha256:0"})
    monkeypatch.setitem(ARCHIVES, "cifar10", unreachable)
    with pytest.raises(DataError, match="cannot be reached"):
        load("cifar10")


def test_every_published_file_is_pinned() -> None:
    assert set(ARCHIVES) == {"cifar10", "cifar100", "mnist", "fashion-mnist"}
    for archive in ARCHIVES.values():
        for address, checksum in archive.files.items():
            algorithm, _, digest = checksum.partition(":")
            assert len(digest) == {"sha256": 64, "md5": 32}[algorithm]
            # A weaker checksum only where nothing but plain arrays is read.
            assert algorithm == "sha256" or address.endswith("ubyte.gz")
    assert archives.FORMAT.startswith("x_train")
