import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from guard import attacks, bundle, data
from guard.bundle import CALIBRATION, CARD, MANIFEST, MODEL, InputShape, Manifest, Preprocessing
from guard.calibration import fitting
from guard.calibration.fitting import Effort
from guard.calibration.run import calibrate
from guard.calibration.work import Settings
from guard.cli import main
from guard.data import Dataset
from guard.decision import Guard
from guard.errors import BundleError, CalibrationError, DataError, UsageError
from guard.files import provenance, write_bytes
from guard.norms import NORMS
from guard.runtime import Detector
from guard.settings import Policy
from guard.statistics import conformal_rank
from tests import networks
from tests.test_decision import calibration_record

SHAPE = (3, 8, 8)
QUICK = Effort(
    omega_images=40,
    bin_images=20,
    bin_blocks=10,
    blocks=10,
    starts=2,
    steps=3,
    row_images=10,
    row_steps=2,
    violation_images=40,
    violation_steps=3,
    violation_restarts=1,
    distance_images=40,
    distance_steps=8,
    agreement_images=20,
)


def make_bundle(folder: Path, model: onnx.ModelProto, shape: tuple[int, int, int] = SHAPE) -> Path:
    folder.mkdir(parents=True)
    write_bytes(folder / MODEL, model.SerializeToString())
    channels, height, width = shape
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    manifest = Manifest(
        name=folder.name,
        input=InputShape(channels=channels, height=height, width=width),
        preprocessing=Preprocessing(colour="rgb" if channels == 3 else "grey"),
        class_names=[f"class {index}" for index in range(classes)],
        files=bundle.digests(folder),
    )
    write_bytes(folder / MANIFEST, bundle.dump(manifest))
    return folder


def make_data(
    model: onnx.ModelProto, count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0
) -> Dataset:
    """Random images, labelled by the model itself but for one in ten."""
    channels, height, width = shape
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    labels = Detector(model, provider="cpu").logits(data.to_floats(images)).argmax(axis=1).astype(np.int64)
    labels[::10] = (labels[::10] + 1) % 3
    names = tuple(
        f"class {index}" for index in range(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)
    )
    return Dataset("noise", images, labels, names, data.digest_of(images, labels))


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return networks.convolutional(classes=5, scale=20.0)


@pytest.fixture(scope="module")
def noise(network: onnx.ModelProto) -> Dataset:
    return make_data(network, 400)


@pytest.fixture(scope="module")
def calibrated(
    network: onnx.ModelProto, noise: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bundle.Calibration]:
    folder = make_bundle(tmp_path_factory.mktemp("calibrated") / "net", network)
    return folder, calibrate(
        folder, noise, effort=QUICK, arguments={"val": "noise", "fpr": 0.05}, silent=True
    )


def test_record_is_complete_and_loads(calibrated: tuple[Path, bundle.Calibration], noise: Dataset) -> None:
    folder, made = calibrated
    loaded = bundle.load(folder, graph_version=made.graph_version)
    assert loaded.calibration == made
    assert made.folds == {"threshold": 100, "radii": 60, "conformal": 40, "report": 200}
    assert made.data == {"name": "noise", "n": 400, "digest": noise.digest}
    assert made.n == 100
    assert sum(made.histogram.counts) == 100
    assert made.accuracy is not None
    assert made.accuracy.value == pytest.approx(0.9, abs=0.06)
    assert made.provenance["arguments"] == {"val": "noise", "fpr": 0.05}
    assert made.provenance["effort"]["omega_images"] == 40
    assert {entry.images for entry in made.agreement} == {
        "clean",
        "minimum-norm l2",
        "PGD l2 at twice the median distance",
        "third row hidden",
    }
    assert all(entry.n == 20 and entry.agree == 20 for entry in made.agreement)
    for radii in (made.l2, made.linf):
        assert len(radii.omega.values) == 2
        assert (np.diff(radii.omega.values, axis=1) >= 0).all()
        assert radii.violations.n == 40
        assert 0 < radii.mean_radius < radii.mean_distance
        assert radii.ablation["l_bound"] <= radii.ablation["first_order"]
        (conformal,) = radii.conformal  # alpha = 0.01 needs 99 accepted images
        assert conformal.alpha == 0.05
        assert conformal.n <= 40
        assert conformal.violations is not None
        assert conformal.violations.n == 40
    assert not list(folder.parent.glob(".net*"))


def test_threshold_is_the_ranked_full_jacobian_score(
    calibrated: tuple[Path, bundle.Calibration], network: onnx.ModelProto, noise: Dataset
) -> None:
    _, made = calibrated
    part = data.folds(400, 0)["threshold"]
    full = Detector(network, score="jacobian-full", provider="cpu")
    scores = np.sort(full.measure(data.to_floats(noise.images[part])).jacobian.astype(float))
    assert made.threshold == pytest.approx(scores[conformal_rank(100, 0.05) - 1], rel=1e-5)


@pytest.mark.parametrize("score", ["jacobian", "combined"])
def test_threshold_counts_third_rows_of_images_above_the_two_row_threshold(
    score: Any, tmp_path: Path
) -> None:
    # Two classes much alike, and a less probable one whose row is longer than theirs.
    generator = np.random.default_rng(0)
    weight = np.outer([0, 0, 1], generator.normal(size=12) / 3) + 0.1 * generator.normal(size=(3, 12))
    bias = -weight.sum(axis=1) / 2 - [0, 0, 1.5]
    model = networks.linear(weight.astype(np.float32), bias.astype(np.float32), (1, 3, 4))
    dataset = make_data(model, 400, (1, 3, 4))
    folder = make_bundle(tmp_path / "net", model, (1, 3, 4))
    made = calibrate(folder, dataset, Settings(score=score), QUICK, silent=True)
    part = data.to_floats(dataset.images[data.folds(400, 0)["threshold"]])
    full = Detector(model, score="jacobian-full", provider="cpu").measure(part)
    if score == "jacobian":
        scores = np.sort(full.jacobian.astype(float))
        assert made.threshold == pytest.approx(scores[conformal_rank(100, 0.05) - 1], rel=1e-5)
        return
    jacobian, radius = (test.threshold for test in made.tests)
    rejected = (full.jacobian > jacobian * (1 + 1e-6)) | (
        full.gradient_l2 / full.margin > radius * (1 + 1e-6)
    )
    assert rejected.sum() <= 100 - conformal_rank(100, 0.05)


def test_realized_rate_is_that_of_the_served_decisions(
    calibrated: tuple[Path, bundle.Calibration], noise: Dataset
) -> None:
    folder, made = calibrated
    report = data.to_floats(noise.images[data.folds(400, 0)["report"]])
    decisions = Guard.from_bundle(folder, "cpu", policy=Policy()).classify(report)
    assert made.realized_fpr.count == sum(not decision.accepted for decision in decisions)
    assert made.realized_fpr.n == 200
    predicted = made.predicted_fpr
    assert predicted.lower <= made.realized_fpr.value <= predicted.upper


@pytest.mark.parametrize("score", ["combined", "radius", "margin-gradient", "jacobian-full"])
def test_every_score_calibrates_on_itself(
    score: Any, network: onnx.ModelProto, noise: Dataset, tmp_path: Path
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    made = calibrate(folder, noise, Settings(score=score), QUICK, silent=True)
    report = data.to_floats(noise.images[data.folds(400, 0)["report"]])
    decisions = Guard.from_bundle(folder, "cpu", policy=Policy()).classify(report)
    assert made.realized_fpr.count == sum(not decision.accepted for decision in decisions)
    assert 0.005 <= made.realized_fpr.value <= 0.12
    assert bool(made.agreement) == (score == "combined")
    assert [test.name for test in made.tests] == (["jacobian", "radius"] if score == "combined" else [])
    if score == "combined":
        assert made.threshold == 1
        assert all(0 < test.threshold < np.inf for test in made.tests)


def test_pac_rejects_fewer_than_marginal(network: onnx.ModelProto, noise: Dataset, tmp_path: Path) -> None:
    made = calibrate(
        make_bundle(tmp_path / "pac", network),
        noise,
        Settings(guarantee="pac", delta=0.05),
        QUICK,
        silent=True,
    )
    assert made.guarantee == "pac"
    assert made.delta == 0.05
    part = data.folds(400, 0)["threshold"]
    full = Detector(network, score="jacobian-full", provider="cpu")
    scores = np.sort(full.measure(data.to_floats(noise.images[part])).jacobian.astype(float))
    # Wilks: with 93 to 123 images one may lie above.
    assert made.threshold == pytest.approx(scores[98], rel=1e-5)


def test_linear_model_gets_exact_radii(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    model = networks.linear(weight, shape=(1, 3, 4))
    folder = make_bundle(tmp_path / "linear", model, (1, 3, 4))
    made = calibrate(folder, make_data(model, 300, (1, 3, 4)), effort=QUICK, silent=True)
    difference = (weight[0] - weight[1]).astype(float)
    for radii, size in ((made.l2, np.linalg.norm(difference)), (made.linf, np.abs(difference).sum())):
        assert np.array(radii.omega.values) == pytest.approx(0, abs=1e-3)
        assert radii.lipschitz == pytest.approx(size, rel=1e-3)
        assert radii.violations.count == 0
        assert radii.tightness == pytest.approx(1, abs=0.02)
        (conformal,) = radii.conformal
        assert 0.98 <= conformal.kappa <= 1
        assert conformal.violations is not None
        assert conformal.violations.count == 0
        assert conformal.mean_radius == pytest.approx(radii.mean_distance, rel=0.02)


def test_interrupted_run_goes_on_where_it_stopped(
    network: onnx.ModelProto,
    noise: Dataset,
    calibrated: tuple[Path, bundle.Calibration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(attacks, "pgd", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, noise, effort=QUICK, silent=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (scratch,) = tmp_path.glob(".net.calibrating-*")
    finished = {path.name for path in scratch.iterdir()}
    assert any(name.startswith("omega-l2") for name in finished)
    next(iter(scratch.glob("scores-threshold-*"))).write_bytes(b"broken")  # it is computed again

    with monkeypatch.context() as patched:
        patched.setattr(fitting, "longest_rows", stop)  # its stage was finished: not called again
        made = calibrate(folder, noise, effort=QUICK, arguments={"val": "noise", "fpr": 0.05}, silent=True)
    uninterrupted = calibrated[1]
    same = made.provenance | {"commit": uninterrupted.provenance["commit"]}  # others may commit meanwhile
    assert made.model_copy(update={"provenance": same}) == uninterrupted
    assert not list(tmp_path.glob(".net.*"))


def test_unlabelled_images_are_enough(network: onnx.ModelProto, noise: Dataset, tmp_path: Path) -> None:
    unlabelled = Dataset("noise", noise.images, None, (), "0" * 64)
    made = calibrate(make_bundle(tmp_path / "net", network), unlabelled, effort=QUICK, silent=True)
    assert made.accuracy is None


@pytest.mark.parametrize(("count", "message"), [(3, "too few to split"), (75, "at least 76"), (76, "")])
def test_too_few_images(
    count: int, message: str, network: onnx.ModelProto, noise: Dataset, tmp_path: Path
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    few = data.take(noise, slice(count))
    if message:
        with pytest.raises(CalibrationError, match=message):
            calibrate(folder, few, effort=QUICK, silent=True)
    else:
        assert calibrate(folder, few, effort=QUICK, silent=True).n == 19


def test_images_of_another_size_are_refused(network: onnx.ModelProto, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "net", network)
    wrong = Dataset("wide", np.zeros((100, 8, 9, 3), np.uint8), None, (), "")
    with pytest.raises(DataError, match=r"3 x 8 x 9.* takes 3 x 8 x 8"):
        calibrate(folder, wrong, effort=QUICK, silent=True)


def test_a_model_that_gives_nan_is_refused_and_the_bundle_stays(noise: Dataset, tmp_path: Path) -> None:
    broken = networks.convolutional(classes=5)
    for tensor in broken.graph.initializer:
        if tensor.name == "head_bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.nan, np.float32), "head_bias"))
    folder = make_bundle(tmp_path / "net", broken)
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate(folder, noise, effort=QUICK, silent=True)
    assert not (folder / CALIBRATION).exists()
    assert bundle.load(folder).calibration is None


def test_a_changed_model_is_refused(network: onnx.ModelProto, noise: Dataset, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "net", network)
    (folder / MODEL).write_bytes(networks.convolutional(seed=9, classes=5).SerializeToString())
    with pytest.raises(BundleError, match="does not match the manifest"):
        calibrate(folder, noise, effort=QUICK, silent=True)


def test_a_calibration_that_does_not_belong_is_replaced(
    calibrated: tuple[Path, bundle.Calibration], network: onnx.ModelProto, noise: Dataset, tmp_path: Path
) -> None:
    folder = make_bundle(tmp_path / "net", networks.convolutional(seed=9, classes=5, scale=20.0))
    write_bytes(folder / CALIBRATION, (calibrated[0] / CALIBRATION).read_bytes())
    with pytest.raises(BundleError, match="Run guard calibrate"):
        bundle.load(folder)
    made = calibrate(folder, noise, effort=QUICK, silent=True)
    assert bundle.load(folder).calibration == made


def test_a_model_replaced_meanwhile_keeps_its_bundle(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    other = make_bundle(tmp_path / "other", networks.convolutional(seed=9, classes=5))
    whole = {path.name: path.read_bytes() for path in other.iterdir()}

    def replace_model(*values: Any, **more: Any) -> Any:
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        return provenance(*values, **more)

    monkeypatch.setattr("guard.calibration.run.provenance", replace_model)  # the last step before writing
    with pytest.raises(BundleError, match="was replaced during the calibration"):
        calibrate(folder, noise, effort=QUICK, silent=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_conformal_radii_are_served_and_exceeded_by_exactly_their_share_of_the_fold(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    made = calibrate(folder, noise, Settings(alphas=(0.1, 0.3)), QUICK, silent=True)
    part = np.random.default_rng([0, 1])
    folds = {name: part.permutation(rows) for name, rows in data.folds(400, 0).items()}
    images = data.to_floats(noise.images[folds["conformal"]])
    guard = Guard.from_bundle(folder, "cpu", policy=Policy())
    measured = guard.measure(images)
    accepted = guard.ratios(measured) <= 1
    images, measured = images[accepted], measured[accepted]
    for norm in NORMS:
        radii = made.radii(norm)
        assert [scale.alpha for scale in radii.conformal] == [0.1, 0.3]
        distance = attacks.nearest(guard.detector, images, measured.labels, norm=norm, steps=8).distance
        served = dict(guard.radii(measured, norm))
        for scale in radii.conformal:
            (values,) = [v for radius, v in served.items() if radius.alpha == scale.alpha]
            inside = int((distance < values * (1 - 1e-3)).sum())
            assert inside <= int((len(images) + 1) * scale.alpha) - 1
            assert scale.n == len(images)
        assert radii.slope > 0
        small, large = radii.conformal
        assert small.kappa <= large.kappa
        assert (small.mean_radius or 0) <= (large.mean_radius or 0) <= radii.mean_distance


def test_calibrations_with_one_conformal_scale_are_still_read() -> None:
    old = {"alpha": 0.01, "kappa": 0.54, "n": 500, "suite": ["minimum-norm l2"]}
    base = calibration_record("")["l2"]
    assert bundle.RadiusCalibration.model_validate(base | {"conformal": None}).conformal == []
    read = bundle.RadiusCalibration.model_validate(base | {"conformal": old})
    assert [scale.kappa for scale in read.conformal] == [0.54]
    assert read.slope == 0


def test_no_conformal_radius_of_scale_0(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(model: Any, images: Any, labels: Any, **_: Any) -> attacks.Found:
        return attacks.Found(images, np.ones(len(images), bool), np.zeros(len(images)))

    monkeypatch.setattr(attacks, "minimum_norm", at_once)
    folder = make_bundle(tmp_path / "net", network)
    made = calibrate(folder, noise, Settings(alphas=(0.1,)), QUICK, silent=True)
    assert made.l2.conformal == []
    assert made.l2.violations.value == 1


def test_card_names_the_command(calibrated: tuple[Path, bundle.Calibration]) -> None:
    assert "guard calibrate --fpr 0.05 --val noise" in (calibrated[0] / CARD).read_text()


def test_command_line(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    few = data.take(noise, slice(80))
    assert few.labels is not None
    archive = tmp_path / "few.npz"
    np.savez(archive, x_test=few.images, y_test=few.labels, class_names=np.array(few.class_names))
    assert main(["calibrate", str(folder), "--val", str(archive), "--effort", "0.05", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n"] == 20
    assert record["realized_fpr"]["n"] == 40
    assert bundle.load(folder).calibrated().threshold == record["threshold"]
    assert (
        main(["calibrate", str(folder), "--val", str(archive), "--effort", "0.05", "--score", "radius"]) == 0
    )
    out = capsys.readouterr().out
    assert "radius threshold" in out
    # The temporary folder's own path may be longer than a screen is wide.
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 80
    assert main(["calibrate", str(folder), "--val", str(tmp_path / "absent.npz")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["calibrate", str(folder), "--val", str(archive), "--fpr", "5"]) == 2
    assert main(["calibrate", str(folder)]) == 2


def test_what_attacks_did_to_another_calibration_leaves_the_card(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    calibrate(folder, noise, effort=QUICK, silent=True)
    card, manifest = folder / CARD, bundle.load(folder).manifest
    card.write_text(f"{card.read_text()}\n## Attacks\n\nAll are withstood.\n\n## More\n")
    bundle.seal(folder, manifest)
    calibrate(folder, noise, effort=QUICK, silent=True)  # the same comes of it
    assert "withstood" in card.read_text()
    calibrate(folder, noise, Settings(fpr=0.1), effort=QUICK, silent=True)
    assert "withstood" not in card.read_text()
    assert "## Attacks\n\nNot done with this calibration yet" in card.read_text()
    assert "## More" in card.read_text()


def test_a_folder_that_cannot_be_replaced_is_refused_before_any_work(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    monkeypatch.setattr("os.access", lambda name, _: Path(name) != folder)
    monkeypatch.setattr(Detector, "__init__", None)
    with pytest.raises(UsageError, match=f"nothing can be written to {folder}"):
        calibrate(folder, noise, effort=QUICK, silent=True)


def test_a_calibration_for_trying_out_is_called_so_wherever_it_is_shown(
    network: onnx.ModelProto, noise: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_bundle(tmp_path / "net", network)
    made = calibrate(folder, noise, effort=QUICK, silent=True, arguments={"effort": 0.25})
    assert made.caveat is not None
    assert made.caveat.startswith("Calibrated with --effort 0.25, for trying out")
    assert made.caveat in (folder / CARD).read_text()
    assert main(["info", str(folder)]) == 0
    assert made.caveat in " ".join(capsys.readouterr().out.split())
    assert calibrate(folder, noise, effort=QUICK, silent=True, arguments={"effort": 1.0}).caveat is None
