import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import guard
from guard import files
from guard.errors import UsageError
from guard.files import locked

ROOT = Path(__file__).resolve().parent.parent


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"")
    assert files.sha256(file) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    file.write_bytes(b"abc" * 1_000_000)
    assert files.sha256(file) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_a_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.json"
    files.write_bytes(file, b"one")
    files.write_text(file, "zwölf")
    assert file.read_bytes() == "zwölf".encode()
    assert names(file.parent) == {"a.json"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    files.write_bytes(file, b"old")

    def write() -> None:
        with files.atomic_open(file) as stream:
            stream.write(b"half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == {"a.json"}


def test_a_write_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.write_bytes(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_partial_name_keeps_the_suffix_and_the_usual_permissions(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "a.npz") as partial:
        assert partial.suffix == ".npz"
        assert partial.parent == tmp_path
        np.savez(partial, x=np.arange(3))
    assert np.load(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a.npz").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_is_swapped_whole(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    with files.atomic_folder(folder) as partial:
        (partial / "a").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("2")
        assert not folder.exists()
    assert (folder / "sub" / "b").read_text() == "2"
    with files.atomic_folder(folder, keep=True) as partial:
        (partial / "a").write_text("3")
        (partial / "c").write_text("4")
        assert (folder / "a").read_text() == "1"
        assert names(folder) == {"a", "sub"}
    assert (folder / "a").read_text() == "3"
    assert names(folder) == {"a", "sub", "c"}
    with files.atomic_folder(folder) as partial:
        (partial / "only").write_text("5")
    assert names(folder) == {"only"}
    assert names(tmp_path) == {"bundle"}


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    with files.atomic_folder(folder) as partial:
        (partial / "a").write_text("old")

    def replace() -> None:
        with files.atomic_folder(folder, keep=True) as partial:
            (partial / "a").write_text("new")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError):
        replace()
    assert (folder / "a").read_text() == "old"
    assert names(tmp_path) == {"bundle"}


def test_a_killed_process_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_text("old")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from guard.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), keep=True) as partial:\n"
        "    (partial / 'a').write_text('ne')\n"
        "    os._exit(9)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert result.returncode == 9
    assert (folder / "a").read_text() == "old"


def test_swap_without_a_kernel_that_exchanges_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    test_a_folder_is_swapped_whole(tmp_path)


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(first: Path, second: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(second))

    monkeypatch.setattr(files, "_exchange", busy)
    folder = tmp_path / "bundle"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "old.png").write_text("old")
    (folder / "manifest.json").write_text("old")
    with files.atomic_folder(folder, keep=True) as partial:
        (partial / "samples" / "old.png").unlink()
        (partial / "samples").rmdir()
        (partial / "new").mkdir()
        (partial / "new" / "z.png").write_text("new")
        (partial / "manifest.json").write_text("new")
    assert sorted(str(one.relative_to(folder)) for one in folder.rglob("*")) == [
        "manifest.json",
        "new",
        "new/z.png",
    ]
    assert (folder / "manifest.json").read_text() == "new"
    assert names(tmp_path) == {"bundle"}


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=r"pipe: is a device or a pipe.* Name a file"):
        files.write_text(pipe, "x")
    assert pipe.is_fifo()


def test_provenance_can_be_stored_and_repeats(tmp_path: Path) -> None:
    arguments = {
        "out": tmp_path / "x",
        "mean": (0.5, np.float64(0.25)),
        "classes": None,
        "eps": float("inf"),
        "flag": True,
    }
    first = files.provenance(arguments, seed=7, data={"digest": "abc", "n": 3})
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first == files.provenance(arguments, seed=7, data={"digest": "abc", "n": 3})
    assert first["arguments"] == {
        "classes": None,
        "eps": "inf",
        "flag": True,
        "mean": [0.5, 0.25],
        "out": str(tmp_path / "x"),
    }
    assert first["seed"] == 7
    assert first["data"] == {"digest": "abc", "n": 3}
    assert first["versions"]["guard"] == guard.__version__
    assert first["versions"]["numpy"] == np.__version__
    assert os.uname().machine in first["platform"]


def test_commit_is_the_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "__file__", str(tmp_path / "guard" / "__init__.py"))
    assert files.provenance({})["commit"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert files.provenance({})["commit"] is None
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = files.provenance({})["commit"]
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert files.provenance({})["commit"] == commit + "+"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        files.write_bytes(tmp_path / "folder", b"x")
    assert caught.value.filename == str(tmp_path / "folder")
    for make in (files.atomic_open, files.atomic_folder):
        with pytest.raises(OSError) as caught, make(Path("/proc/new")):  # no file can be made there
            pass
        assert caught.value.filename == "/proc/new"


def hold(path: Path) -> None:
    """Takes the lock and keeps it: for a process that is killed meanwhile."""
    with locked(path, "in use"):
        sys.stdout.write("held\n")
        sys.stdout.flush()
        time.sleep(60)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with locked(path, "out: another run"):
        assert path.read_text() == f"{os.getpid()}\n"
        with (
            pytest.raises(UsageError, match=rf"^out: another run \(process {os.getpid()}\)\."),
            locked(path, "out: another run"),
        ):
            pass
        assert path.exists()
    assert not path.exists()
    with pytest.raises(ValueError, match="body"), locked(path, "out"):
        raise ValueError("body")
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from tests.test_files import hold; hold(Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=rf"process {other.pid}\)"), locked(path, "out"):
            pass
        other.kill()
    assert path.exists()
    with locked(path, "out"):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_errors_below_a_new_folder_name_the_one_that_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(FileNotFoundError) as raised, files.atomic_folder(target) as partial:
        (partial / "deep" / "a").touch()
    assert raised.value.filename == str(target / "deep" / "a")
