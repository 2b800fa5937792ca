import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest

from guard.cli import COMMANDS, info, main
from guard.decision import Guard
from guard.runtime import Detector
from guard.settings import Policy
from tests.networks import convolutional, images
from tests.serving import CAT, GREY, clean_environment, free_port, write_bundle

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("cli") / "colours")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GUARD_MODEL", "GUARD_EXPOSE_SCORES", "GUARD_MIN_RADIUS_L2", "GUARD_MIN_RADIUS_LINF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def one_line_error(captured: Captured) -> str:
    """The error message, after checking that nothing else was said."""
    out, err = captured.readouterr()
    lines = err.strip().splitlines()
    assert out == ""
    assert len([line for line in lines if line.startswith("guard: error: ")]) == 1, err
    assert "Traceback" not in err
    return lines[-1].removeprefix("guard: error: ")


def test_help_lists_all_commands_in_80_columns(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{summary}$", out, re.MULTILINE)
    assert "example:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: Captured) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert f"example:\n  guard {name}" in out
    assert "--json" in out
    assert "--debug" in out


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"guard \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND (see guard --help)"),
        (["fly"], "'fly' is no command: expected train, "),
        (["info", "--fast"], "unexpected --fast (see guard info --help)"),
        (["info", "a", "b"], "unexpected b (see guard info --help)"),
        (["wrap", "model.onnx"], "the following arguments are required: --out (see guard wrap --help)"),
        (["wrap", "m", "--out", "b", "--size", "0x3"], "argument --size: expected 224 or 224x160"),
        (["wrap", "m", "--out", "b", "--layout", "chw"], "argument --layout: invalid choice: 'chw'"),
        (["certify", "x.png", "--threads", "-1"], "argument --threads: expected a whole number"),
        (["calibrate", "--val", "x", "--threads", "2.5"], "argument --threads: expected a whole number"),
        (["certify", "x.png", "--threads", "1025"], "argument --threads: expected a whole number up to 1024"),
        (["serve", "--port", "70000"], "argument --port: expected a port from 1 to 65535, not '70000'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], message: str, capsys: Captured) -> None:
    assert main(words) == 2
    assert one_line_error(capsys).startswith(message)


def test_failures_are_one_line_and_status_1(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["info", "nowhere"]) == 1
    assert one_line_error(capsys).startswith("nowhere: no such bundle folder.")
    (tmp_path / "file").write_text("")
    assert main(["graph", "nowhere", "--out", "x.onnx"]) == 1
    assert one_line_error(capsys).startswith("nowhere: no such bundle folder.")
    monkeypatch.setenv("GUARD_MODEL", "elsewhere")
    assert main(["info"]) == 1
    assert one_line_error(capsys).startswith("elsewhere: no such bundle folder.")


def test_the_shipped_bundle_is_the_default(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARD_MODEL", raising=False)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["name"] == "cifar10"


def test_debug_shows_the_traceback(capsys: Captured) -> None:
    assert main(["info", "nowhere", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("guard: error: nowhere: ")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero (this is a defect of guard"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x"), 1, "x: No space left on device"),
        (OSError("odd"), 1, "odd"),
        (ModuleNotFoundError("no", name="torch.nn"), 1, "this command needs torch, which is not installed."),
        (ModuleNotFoundError("No module named 'other'", name="other"), 1, "unexpected ModuleNotFoundError"),
    ],
)
def test_whatever_happens_is_said_in_one_line(
    error: BaseException, status: int, message: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == status
    assert one_line_error(capsys).startswith(message)


def test_bundle_comes_from_the_environment(
    bundle: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GUARD_MODEL", str(bundle))
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == str(bundle)
    monkeypatch.delenv("GUARD_MODEL")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "cifar10").symlink_to(bundle)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == "models/cifar10"


def test_info_is_one_screen(bundle: Path, capsys: Captured) -> None:
    assert main(["info", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # The temporary folder's own path may be longer than a screen is wide.
    assert max(len(line) for line in lines if str(bundle) not in line) <= 80
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert "3: cat, dog, ship" in text
    assert "jacobian <= 0.2, set on 100 images of colours" in text
    assert main(["info", str(bundle), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["calibration"]["threshold"] == 0.2
    assert record["manifest"]["class_names"] == ["cat", "dog", "ship"]


def test_info_does_not_round_what_is_promised(tmp_path: Path, capsys: Captured) -> None:
    strict = write_bundle(tmp_path / "strict", fpr=0.0004, guarantee="pac", delta=0.001)
    assert main(["info", str(strict)]) == 0
    assert "at most 0.04% (pac, with probability 99.9%)" in capsys.readouterr().out


def test_info_refuses_what_was_changed(tmp_path: Path, capsys: Captured) -> None:
    broken = write_bundle(tmp_path / "broken")
    with (broken / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(["info", str(broken)]) == 1
    assert re.search(
        r"model\.onnx: .*expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}", one_line_error(capsys)
    )


def test_wrap_then_info_then_certify_says_what_is_next(tmp_path: Path, capsys: Captured) -> None:
    onnx.save(convolutional(), tmp_path / "net.onnx")
    assert main(["wrap", "net.onnx", "--out", "bundle", "--mean", "0.5", "--std", "0.25"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote bundle\n")
    assert out.endswith("next: guard calibrate bundle --val DATA\n")
    assert main(["info", "bundle"]) == 0
    assert "none yet: guard calibrate bundle --val DATA" in capsys.readouterr().out
    assert main(["certify", "bundle", "net.onnx"]) == 1
    assert "not calibrated" in one_line_error(capsys)
    assert main(["serve", "bundle"]) == 1
    assert "not calibrated" in one_line_error(capsys)


def test_wrap_json(tmp_path: Path, capsys: Captured) -> None:
    onnx.save(convolutional(), tmp_path / "net.onnx")
    assert main(["wrap", "net.onnx", "--out", "b", "--name", "net", "--stretch", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["name"] == "net"
    assert record["input"] == {"channels": 3, "height": 8, "width": 8}
    assert record["preprocessing"]["resize"] is None
    assert record["outputs"] == "logits"
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["files"]["model.onnx"] == record["sha256"]
    assert manifest["provenance"]["arguments"]["stretch"] is True
    assert "json" not in manifest["provenance"]["arguments"]


def test_wrap_refuses_in_one_line(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    assert main(["wrap", "x.onnx", "--out", "b"]) == 1
    assert "x.onnx: not an ONNX model" in one_line_error(capsys)
    onnx.save(convolutional(), tmp_path / "net.onnx")
    assert main(["wrap", "net.onnx", "--out", "b", "--mean", "123"]) == 2
    assert "--range 0-255" in one_line_error(capsys)
    assert not (tmp_path / "b").exists()


def test_certify_to_standard_output(
    bundle: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "red.png").write_bytes(CAT)
    (tmp_path / "grey.png").write_bytes(GREY)
    assert main(["certify", str(bundle), "red.png", "grey.png", "--json"]) == 0
    out, err = capsysbinary.readouterr()
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["path"], first["class_name"], first["accepted"]) == ("red.png", "cat", True)
    assert (second["path"], second["reasons"]) == ("grey.png", ["jacobian_norm"])
    assert second["certificate"]["l2"]["radius"] == 0
    assert err.splitlines()[-1] == b"1 accepted, 1 rejected"


def test_certify_to_a_file_by_its_name(
    bundle: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARD_MODEL", str(bundle))
    (tmp_path / "red.png").write_bytes(CAT)
    (tmp_path / "bad.png").write_bytes(CAT[:50])
    assert main(["certify", "--out", "out.csv", "red.png", "bad.png"]) == 1
    assert capsys.readouterr().out == "wrote out.csv: 1 accepted, 0 rejected, 1 could not be read\n"
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert main(["certify", "red.png", "--format", "parquet", "--out", "out.data"]) == 0
    assert (tmp_path / "out.data").read_bytes()[:4] == b"PAR1"
    assert main(["certify", "--format", "jsonl", "red.png", "--out", "out.x"]) == 0
    assert json.loads((tmp_path / "out.x").read_text())["label"] == 0
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_certify_takes_images_on_both_sides_of_an_option(
    bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "red.png").write_bytes(CAT)
    assert main(["certify", str(bundle), "--out", "o.jsonl", "red.png"]) == 0
    assert json.loads((tmp_path / "o.jsonl").read_text())["path"] == "red.png"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "parquet"], "--format parquet needs --out FILE"),
        (["--json", "--out", "x"], "--json is JSON lines on standard output"),
        (["--json", "--format", "csv"], "--json is JSON lines on standard output"),
        (["--out", "."], "--out . is a folder"),
    ],
)
def test_certify_usage(bundle: Path, words: list[str], message: str, capsys: Captured) -> None:
    assert main(["certify", str(bundle), "red.png", *words]) == 2
    assert one_line_error(capsys).startswith(message)


def test_certify_without_images(bundle: Path, capsys: Captured) -> None:
    assert main(["certify", str(bundle)]) == 2
    assert "is the bundle, but no images were given" in one_line_error(capsys)


def test_certify_follows_the_operators_policy(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "red.png").write_bytes(CAT)
    monkeypatch.setenv("GUARD_EXPOSE_SCORES", "0")
    monkeypatch.setenv("GUARD_MIN_RADIUS_L2", "1000")
    assert main(["certify", str(bundle), "red.png", "--out", "o.jsonl"]) == 0
    answer = json.loads((tmp_path / "o.jsonl").read_text())
    assert answer["reasons"] == ["min_radius"]
    assert "score" not in answer["detector"]


def test_graph_computes_what_the_detector_measures(tmp_path: Path, capsys: Captured) -> None:
    onnx.save(convolutional(), tmp_path / "net.onnx")
    assert main(["wrap", "net.onnx", "--out", "b"]) == 0
    assert main(["graph", "b", "--out", "g.onnx", "--score", "radius"]) == 0
    assert "wrote g.onnx" in capsys.readouterr().out
    model = onnx.load(tmp_path / "g.onnx")
    onnx.checker.check_model(model)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    x = images(5)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": x}), strict=True))
    measured = Detector(tmp_path / "b" / "model.onnx", score="radius", provider="cpu").measure(x)
    for name in ("logits", "margin", "gradient_l2", "gradient_l1"):
        np.testing.assert_allclose(found[name], getattr(measured, name), rtol=1e-4, atol=1e-6)


def test_graph_carries_the_calibration(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["graph", str(bundle), "--out", "g.onnx", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = onnx.load(tmp_path / "g.onnx")
    stored = {entry.key: entry.value for entry in model.metadata_props}
    assert stored["guard.score"] == "jacobian"
    assert float(stored["guard.threshold"]) == 0.2
    assert float(stored["guard.row_bound"]) == 2.0
    assert stored["guard.model_digest"].startswith("sha256:")
    assert record["metadata"] == {name.removeprefix("guard."): value for name, value in stored.items()}
    assert main(["graph", str(bundle), "--out", "other.onnx", "--score", "margin-gradient"]) == 0
    names = {entry.key for entry in onnx.load(tmp_path / "other.onnx").metadata_props}
    assert "guard.threshold" not in names, "a threshold belongs to its score"


def test_graph_says_how_to_decide_by_its_outputs(tmp_path: Path, capsys: Captured) -> None:
    tests = [{"name": "jacobian", "threshold": 0.25}, {"name": "radius", "threshold": 3.5}]
    both = write_bundle(tmp_path / "both", score="combined", threshold=1.0, tests=tests)
    assert main(["graph", str(both), "--out", "g.onnx"]) == 0
    out = capsys.readouterr().out
    assert "reject   where not jacobian <= 0.25 and gradient_l2 / margin <= 3.5\n" in out
    one = write_bundle(tmp_path / "one", score="margin-gradient")
    assert main(["graph", str(one), "--out", "g.onnx"]) == 0
    assert "reject   where not gradient_l2 / (1 + cosh(margin)) <= 0.2\n" in capsys.readouterr().out
    assert main(["graph", str(one), "--out", "g.onnx", "--score", "radius"]) == 0
    assert "reject" not in capsys.readouterr().out


def test_graph_refuses_more_rows_than_it_can_hold(tmp_path: Path, capsys: Captured) -> None:
    onnx.save(convolutional(classes=40, scale=1.5), tmp_path / "net.onnx")
    assert main(["wrap", "net.onnx", "--out", "b"]) == 0
    capsys.readouterr()
    assert main(["graph", "b", "--out", "g.onnx", "--score", "jacobian-full"]) == 2
    assert one_line_error(capsys).startswith(
        "score jacobian-full needs all 40 rows, and one graph holds at most 32."
    )
    assert not (tmp_path / "g.onnx").exists()


def guard_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "guard", *words]


def run_environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return clean_environment() | {"PYTHONPATH": root, "BENTOML_DO_NOT_TRACK": "1"}


def test_an_interrupted_certify_leaves_what_was_there(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", x_test=np.zeros((200_000, 8, 8, 3), np.uint8))
    (tmp_path / "out.jsonl").write_text("old")
    command = guard_command("certify", str(bundle), "many.npz", "--out", "out.jsonl")
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=run_environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not [path for path in tmp_path.iterdir() if "partial" in path.name]:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "guard: error: interrupted"
    assert "Traceback" not in err
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.npz", "out.jsonl"]


def test_a_reader_that_goes_away_is_no_error(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", x_test=np.zeros((20_000, 8, 8, 3), np.uint8))
    command = guard_command("certify", str(bundle), "many.npz", "--json")
    with subprocess.Popen(
        command, cwd=tmp_path, env=run_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        err = process.stderr.read()
    assert b"Traceback" not in err
    assert b"guard: error" not in err
    assert process.returncode == 1


def test_missing_packages_are_named_with_their_extra(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(CAT)
    words = ["certify", str(bundle), "red.png", "--out", "x.parquet"]
    code = f"import sys\nsys.modules['pyarrow'] = None\nfrom guard.cli import main\nsys.exit(main({words!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=run_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "needs pyarrow, which is not installed" in result.stderr
    assert "pip install -e '.[parquet]'" in result.stderr
    assert not (tmp_path / "x.parquet").exists()


def test_serve_answers_as_certify_does(bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    command = guard_command("serve", str(bundle), "--port", str(port), "--json")
    environment = run_environment() | {"BENTOML_HOME": str(tmp_path / "home")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert started == {"bundle": str(bundle), "url": f"http://localhost:{port}"}
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while True:
            try:
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answer = httpx.post(f"{url}/classify", content=CAT, headers={"content-type": "image/png"}).json()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)
    answer.pop("request_id")
    red = np.zeros((1, 3, 8, 8), np.float32)
    red[:, 0] = 1
    (decision,) = Guard.from_bundle(bundle, "cpu", policy=Policy()).classify(red)
    assert answer == decision.model_dump(mode="json")


def test_serve_says_that_a_port_is_taken(bundle: Path, capsys: Captured) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(bundle), "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in one_line_error(capsys)


def test_serve_refuses_settings_that_mean_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name, value in {"GUARD_TIMEOUT": "0", "GUARD_MIN_RADIUS_L2": "a", "GUARD_WORKER": "2"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert main(["serve", str(bundle)]) == 2
        assert one_line_error(capsys).startswith(f"{name} is ")


def test_delta_without_the_guarantee_that_it_belongs_to_is_refused(bundle: Path, capsys: Captured) -> None:
    assert main(["calibrate", str(bundle), "--val", "none.npz", "--delta", "0.1"]) == 2
    assert one_line_error(capsys) == "--delta is about --guarantee pac: give both."
