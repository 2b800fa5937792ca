"""Files that a crash cannot leave half-written, their digests, and where they came from."""

import ctypes
import errno
import hashlib
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import guard
from guard.errors import UsageError

_PACKAGES = (
    "bentoml",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "pillow",
    "pydantic",
    "scipy",
    "torch",
    "torchvision",
)


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields the name of a file beside `path` to write; it becomes `path` when the block ends well.

    The old file stays as it was, whole, until then and whenever the block raises. The name keeps the suffix
    of `path`, for writers that look at it. Missing parent folders are made. Raises `UsageError` where `path`
    is a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        raise UsageError(f"{target}: is a device or a pipe, which a file would replace. Name a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target)
    try:
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)
    except OSError as error:
        _name(error, partial, target)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """`atomic_path`, opened for writing bytes."""
    with atomic_path(path) as partial, partial.open("xb") as file:
        yield file


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a whole file at once: afterwards `path` holds either its old content or `data`."""
    with atomic_open(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def atomic_folder(path: str | Path, *, keep: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path` to fill; it takes the place of `path` when the block ends well.

    With `keep` it starts as a copy of the old one. The swap is one system call where the kernel exchanges two
    names (Linux); elsewhere the old folder is renamed away first and back if the second rename fails. Files
    that the block wrote are on the disk before the swap. What cannot be renamed, such as a mount point, is
    filled file by file, in the order they were written.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target)
    try:
        if keep and target.is_dir():
            shutil.copytree(target, partial)
        else:
            partial.mkdir()
        yield partial
        for name in partial.rglob("*"):
            _sync(name)
        _sync(partial)
        if target.exists():
            try:
                _exchange(partial, target)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EXDEV):
                    raise
                _fill(target, partial)
        else:
            partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        _name(error, partial, target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: Path, named: str | None = None) -> None:
    """Raises `UsageError`, which calls the path what it is `named`, where no file or folder can be put there.

    To be called before any work.
    """
    target = Path(os.path.realpath(path))
    folder = next(parent for parent in target.parents if parent.exists())
    for name in (folder, target) if target.is_dir() else (folder,):
        if not name.is_dir() or not os.access(name, os.W_OK | os.X_OK):
            raise UsageError(f"{named or path}: nothing can be written to {name}. Choose another folder.")


@contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """Holds the lock file `path`, in which this process's id stands, until the block ends.

    The kernel lets go of it when a process ends, however it does, so that a file left behind is taken over.
    Raises `UsageError`, which begins with `holder` and the process's id, where it is held already. On Windows
    nothing is held.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(
                f"{holder} (process {file.read().strip()}). Wait until it has ended, or end it."
            ) from error
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise UsageError(f"{holder}, which has just ended. Run the same command again.")
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
        finally:
            path.unlink()


def provenance(arguments: Mapping[str, Any], *, seed: int | None = None, **more: Any) -> dict[str, Any]:
    """What made an artifact: arguments, seed, package versions, the source's commit, and the platform.

    It holds no date, so that the same inputs give the same file. Paths and other values that JSON does not
    know become text. `more` adds entries, such as the data's digest.
    """
    return {
        "arguments": {name: _plain(value) for name, value in sorted(arguments.items())},
        "seed": seed,
        "versions": _versions(),
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _plain(value) for name, value in more.items()},
    }


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.stem}.partial-{secrets.token_hex(4)}{target.suffix}")


def _name(error: OSError, partial: Path, target: Path) -> None:
    """Lets an error name the file that was asked for instead of the one in its place."""
    if error.filename is None:
        return
    name = Path(os.fsdecode(error.filename))
    if name.is_relative_to(partial):
        error.filename = str(target / name.relative_to(partial))


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        with suppress(OSError):  # some network file systems refuse to sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swaps what two names in one folder stand for."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        at_fdcwd, exchange = -100, 2
        if rename is not None:
            if rename(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), exchange) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(code, os.strerror(code), str(second))
    aside = _beside(second)
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)


def _fill(target: Path, source: Path) -> None:
    """Lets a folder hold what another one does, one whole file after another, the last written last."""
    files = [name for name in source.rglob("*") if name.is_file()]
    for name in sorted(files, key=lambda name: name.stat().st_mtime_ns):
        with atomic_path(target / name.relative_to(source)) as partial:
            shutil.copy2(name, partial)
    for name in sorted(target.rglob("*"), reverse=True):  # what a folder holds before the folder
        if not (source / name.relative_to(target)).exists():
            name.rmdir() if name.is_dir() and not name.is_symlink() else name.unlink()


def _plain(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def _versions() -> dict[str, str]:
    versions = {"guard": guard.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _commit() -> str | None:
    """The commit of a source checkout (`+` where tracked files differ from it); None where installed."""
    root = Path(guard.__file__).resolve().parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    try:
        commit = _run_git(git, root, "rev-parse", "HEAD").strip()
        changed = _run_git(git, root, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _run_git(git: str, root: Path, *arguments: str) -> str:
    command = [git, "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout  # noqa: S603
