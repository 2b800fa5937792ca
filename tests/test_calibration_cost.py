from pathlib import Path

import onnx
import pytest

from guard.calibration import cost, run
from guard.calibration.fitting import Effort
from guard.calibration.work import folds_of
from guard.progress import Progress
from tests import networks
from tests.test_calibration_run import make_bundle, make_data

MODEST = Effort(
    omega_images=100,
    bin_images=50,
    bin_blocks=25,
    blocks=25,
    starts=2,
    steps=4,
    row_images=20,
    row_steps=2,
    violation_images=100,
    violation_steps=4,
    distance_images=100,
    distance_steps=8,
    agreement_images=20,
)


@pytest.fixture
def network() -> onnx.ModelProto:
    return networks.convolutional(classes=5, scale=20.0)


def test_a_calibration_takes_about_what_was_said(
    network: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Progress] = []

    def kept(total: int, label: str, *, silent: bool) -> Progress:
        made.append(Progress(total, label, silent=silent))
        return made[-1]

    monkeypatch.setattr(run, "Progress", kept)
    noise = make_data(network, 400)
    run.calibrate(make_bundle(tmp_path / "net", network), noise, effort=MODEST, silent=True)
    (progress,) = made
    assert progress.total == cost.whole(MODEST, folds_of(noise, 0), 5)
    assert 0.8 * progress.total < progress.count < 1.2 * progress.total
