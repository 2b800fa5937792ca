import re
from pathlib import Path

import pytest

import guard
from guard.errors import UsageError
from guard.settings import VARIABLES, Policy, bundle_path

ROOT = Path(__file__).resolve().parent.parent


def test_bundle_is_the_given_one_then_the_environments_then_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guard, "__file__", str(tmp_path / "source" / "guard" / "__init__.py"))
    assert bundle_path("a", {"GUARD_MODEL": "b"}) == Path("a")
    assert bundle_path(None, {"GUARD_MODEL": "b"}) == Path("b")
    assert bundle_path(None, {"GUARD_MODEL": ""}) == Path("models/cifar10")
    beside_source = tmp_path / "source" / "models" / "cifar10"
    beside_source.mkdir(parents=True)
    assert bundle_path(None, {}) == beside_source
    Path("models/cifar10").mkdir(parents=True)
    assert bundle_path(None, {}) == Path("models/cifar10")


def test_policy_is_off_by_default() -> None:
    assert Policy.from_environment({}) == Policy(None, None, expose_scores=True)
    assert Policy.from_environment({"GUARD_MIN_RADIUS_L2": " ", "GUARD_EXPOSE_SCORES": ""}) == Policy()
    assert Policy.from_environment({"GUARD_MIN_RADIUS_L2": "0"}) == Policy()


def test_policy_is_read() -> None:
    environment = {
        "GUARD_MIN_RADIUS_L2": "0.25",
        "GUARD_MIN_RADIUS_LINF": "1e-3",
        "GUARD_EXPOSE_SCORES": "0",
    }
    assert Policy.from_environment(environment) == Policy(0.25, 0.001, expose_scores=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GUARD_MIN_RADIUS_L2", "a quarter"),
        ("GUARD_MIN_RADIUS_L2", "-1"),
        ("GUARD_MIN_RADIUS_LINF", "nan"),
        ("GUARD_MIN_RADIUS_LINF", "inf"),
        ("GUARD_EXPOSE_SCORES", "maybe"),
    ],
)
def test_a_misspelt_policy_is_an_error(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        Policy.from_environment({name: value})


def test_a_misspelt_name_is_an_error_and_other_peoples_names_are_not() -> None:
    with pytest.raises(UsageError, match=r"GUARD_MIN_RADUIS_L2 .*Is GUARD_MIN_RADIUS_L2 meant"):
        Policy.from_environment({"GUARD_MIN_RADUIS_L2": "0.1"})
    for name in ("GUARD_EXPOSE_SCORE", "GUARD_MIN_RADIUS", "GUARD_WORKER"):
        with pytest.raises(UsageError, match=f"{name} is no setting"):
            Policy.from_environment({name: "1"})
    kubernetes = ("GUARD_PORT", "GUARD_SERVICE_HOST", "GUARD_PORT_3000_TCP_ADDR", "GUARD_MODEL_SERVICE_PORT")
    assert Policy.from_environment(dict.fromkeys(kubernetes, "x")) == Policy()


def test_all_settings_are_documented() -> None:
    documents = [(ROOT / name).read_text() for name in ("docs/http.md", "README.md")]
    documented = set(re.findall(r"GUARD_[A-Z0-9_]+", " ".join(documents)))
    assert VARIABLES - {"GUARD_METRICS_DIR"} == documented  # that one is the server's own
