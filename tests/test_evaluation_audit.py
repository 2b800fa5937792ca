"""Radii audited on models whose nearest other class is known in closed form."""

from pathlib import Path

import numpy as np
import pytest

from guard import attacks
from guard.attacks import Floats, Found
from guard.bundle import Bundle
from guard.certificate import Radius
from guard.decision import Guard
from guard.evaluation import audit
from guard.evaluation.audit import attacks_inside, audited, random_omega, random_remainders
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.runtime import Detector
from guard.settings import Policy
from tests import networks
from tests.test_attacks import exact_distance
from tests.test_decision import write_bundle

NORMS: tuple[Norm, Norm] = ("l2", "linf")
WEIGHT = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
IMAGES = networks.images(40, (1, 2, 2), seed=3)


def target_of(folder: Path, *, kappa: float = 0.5, threshold: float = 9.0) -> tuple[Target, Bundle]:
    """A linear classifier served with omega 0 (up to its reach of 10), and a conformal radius in l2."""
    omega = {"eps": [0.25, 1.0], "edges": [], "values": [[0.0, 0.0]], "reach": [10.0], "relative": True}
    base = {
        "lipschitz": 5.0,
        "omega": omega,
        "violations": {"count": 0, "n": 100, "value": 0.0, "upper": 0.03},
        "mean_radius": 0.2,
        "mean_distance": 0.4,
        "tightness": 0.5,
        "attack": {},
        "effort": {},
    }
    conformal = {"alpha": 0.05, "kappa": kappa, "n": 100, "suite": ["pgd"]}
    model = networks.linear(WEIGHT)
    path = write_bundle(folder, model, threshold=threshold, l2=base | {"conformal": conformal}, linf=base)
    guard = Guard.from_bundle(path, "cpu", policy=Policy())
    return Target(guard.detector, {"jacobian": guard}), guard.bundle


def exact(norm: Norm) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return exact_distance(IMAGES, WEIGHT.astype(np.float64), norm)


def test_counts_means_and_bound_by_hand() -> None:
    stated = Radius(radius=np.nan, kind="conformal", method="m", alpha=0.05)
    found = audited(
        stated,
        np.array([1.0, 2.0, 3.0, np.inf]),
        np.array([1.0, 1.5, np.inf, 4.0]),
        norm="l2",
        served=True,
    )
    assert (found.kind, found.method, found.alpha, found.served) == ("conformal", "m", 0.05, True)
    assert (found.violations.count, found.violations.n) == (2, 4), "at the radius itself nothing is broken"
    assert found.violations.upper == pytest.approx(0.9024, abs=1e-4)
    assert (found.mean_radius, found.mean_distance) == (1.5, 1.25), "over the first two"
    assert found.tightness == pytest.approx(1.2)
    # Residuals of the ratio: 1 - 1.2 and 2 - 1.8, of standard deviation 0.2 sqrt 2.
    assert found.tightness_error == pytest.approx(0.2 * 2**0.5 / 2**0.5 / 1.25)


def test_no_attack_at_all() -> None:
    stated = Radius(radius=np.nan, kind="estimate", method="m")
    found = audited(stated, np.array([1.0]), np.array([np.inf]), norm="l2", served=True)
    assert (found.violations.count, found.mean_distance, found.tightness) == (0, 0.0, 0.0)


def test_every_radius_against_exact_distances(tmp_path: Path) -> None:
    target, bundle = target_of(tmp_path / "b", kappa=1.5)
    clean = target.guards["jacobian"].measure(IMAGES)
    distances = {norm: exact(norm) * 1.0001 for norm in NORMS}  # ties are not broken
    tables = {norm: random_omega(random_remainders(target.model, IMAGES, norm)) for norm in NORMS}
    found = audit.radii(target, bundle, clean, distances, random=tables)
    l2 = {one.method: one for one in found if one.norm == "l2"}
    assert list(l2) == [
        "scaled-first-order",
        "omega-bound",
        "L-bound",
        "first-order",
        "omega-bound, random perturbations",
    ]
    assert [one.served for one in l2.values()] == [True, True, False, False, False]
    assert [one.kind for one in l2.values()] == ["conformal"] + 4 * ["estimate"]
    # The nearest class is not always the runner-up, so the first-order radius of the runner-up is too large.
    third = int((distances["l2"] < clean.margin / clean.gradient_l2).sum())
    assert l2["scaled-first-order"].violations.value == 1
    assert l2["scaled-first-order"].alpha == 0.05
    assert l2["first-order"].violations.count == third > 0
    assert l2["first-order"].mean_radius == pytest.approx(float((clean.margin / clean.gradient_l2).mean()))
    assert l2["L-bound"].mean_radius == pytest.approx(float(clean.margin.mean()) / 5)
    assert l2["L-bound"].mean_distance == pytest.approx(float(distances["l2"].mean()))
    assert {one.method for one in found if one.norm == "linf"} == set(l2) - {"scaled-first-order"}


def test_only_accepted_images_count(tmp_path: Path) -> None:
    probe, _ = target_of(tmp_path / "probe")
    clean = probe.guards["jacobian"].measure(IMAGES)
    target, bundle = target_of(tmp_path / "b", threshold=float(np.median(clean.jacobian)))
    distances: dict[Norm, np.ndarray[tuple[int], np.dtype[np.float64]]] = {"l2": np.zeros(len(IMAGES))}
    (first, *_) = audit.radii(target, bundle, clean, distances)
    assert (first.violations.count, first.violations.n) == (20, 20)
    target, bundle = target_of(tmp_path / "none", threshold=0.0)
    assert audit.radii(target, bundle, clean, distances) == []
    assert np.isinf(attacks_inside(target, bundle, IMAGES, clean, "l2")).all()


def test_distances_and_attacks_from_inside(tmp_path: Path) -> None:
    target, bundle = target_of(tmp_path / "b", kappa=3.0)
    clean = target.guards["jacobian"].measure(IMAGES)
    found = attacks_inside(target, bundle, IMAGES, clean, "l2", restarts=1)
    assert found == pytest.approx(exact("l2"), rel=0.01)
    (conformal, estimate, *_) = audit.radii(target, bundle, clean, {"l2": found})
    assert conformal.violations.value == 1
    assert estimate.violations.value < 1
    assert conformal.mean_distance == pytest.approx(float(exact("l2").mean()), rel=0.01)


def test_what_the_first_attack_misses_is_looked_for_inside_every_radius(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(model: object, images: Floats, labels: object, **_: object) -> Found:
        return Found(images, np.zeros(len(images), bool), np.full(len(images), np.inf))

    monkeypatch.setattr(attacks, "nearest", blind)
    target, bundle = target_of(tmp_path / "b", kappa=1.5)
    clean = target.guards["jacobian"].measure(IMAGES)
    assert attacks_inside(target, bundle, IMAGES, clean, "l2") == pytest.approx(exact("l2"), rel=0.05)
    assert np.isinf(attacks_inside(target, bundle, IMAGES, clean, "l2", restarts=0)).all()
    tight, bundle = target_of(tmp_path / "tight", kappa=0.01)
    found = attacks_inside(tight, bundle, IMAGES, clean, "l2")
    assert np.isinf(found[clean.margin / clean.gradient_l2 < 1.0001 * exact("l2")]).all()


def test_of_random_directions_the_largest_remainder_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Detector(networks.convolutional(classes=3, scale=20.0), provider="cpu")
    four = random_remainders(model, networks.images(20), "l2")["remainder"]
    monkeypatch.setattr(audit, "DIRECTIONS", 1)
    first = random_remainders(model, networks.images(20), "l2")["remainder"]
    assert (first >= 0).all()
    assert (four >= first).all()
    assert (four > first).any(axis=1).mean() > 0.5, "three more directions, and one of them is worse"


def test_random_perturbations_see_next_to_nothing_of_omega() -> None:
    model = Detector(networks.convolutional(classes=3, scale=20.0), provider="cpu")
    table = random_omega(random_remainders(model, networks.images(40), "l2"))
    assert table.relative
    assert (np.diff(table.values, axis=1) >= 0).all()
    assert 0 < table.values[0, -1] < 0.5
    again = random_omega(random_remainders(model, networks.images(40), "l2"))
    assert (again.values == table.values).all()
    detector = Detector(networks.linear(WEIGHT[:2]), provider="cpu")
    linear = random_omega(random_remainders(detector, IMAGES, "linf"))
    assert linear.values == pytest.approx(0, abs=1e-4)
