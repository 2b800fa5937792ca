import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest

from guard import bundle, data
from guard.attacks import Floats, Found, Labels, length, pgd
from guard.bundle import ScoreName
from guard.calibration import cost
from guard.calibration.fitting import EPS
from guard.calibration.run import calibrate, rescored
from guard.calibration.work import Settings as CalibrationSettings
from guard.data import Dataset
from guard.errors import DataError, UsageError
from guard.evaluation.attack import Attack, Task, tasks_of
from guard.evaluation.audit import RANDOM_PASSES
from guard.evaluation.report import findings, markdown
from guard.evaluation.report.page import page
from guard.evaluation.report.reading import read
from guard.evaluation.results import ARRAYS, CLEAN, AttackResult, Results, detection, load, load_arrays
from guard.evaluation.run import VERSION, Settings, evaluate
from guard.evaluation.target import Target
from guard.progress import Progress
from guard.stages import Stages
from tests.networks import convolutional
from tests.serving import GAIN, ROOT, write_bundle
from tests.test_calibration_run import QUICK, make_bundle, make_data

# Red over green by so many 255ths of an image whose other channel is black, and whose margin is 12/255 times
# that. In l2 the boundary lies the margin over 1.5 sqrt 2 away, and behind it a strip of 1.01 in which the
# detector of `tests.serving` rejects.
NARROW, NEAR, FAR, FARTHEST = 20, 60, 80, 110
KINDS = (NARROW, NEAR, FAR, FARTHEST, NEAR)
WRONG = 4


def colours(count: int = 20) -> Dataset:
    """Images of one colour each, of the five kinds in turn; every fifth has a wrong label."""
    images = np.zeros((count, 8, 8, 3), np.uint8)
    images[..., 0] = 180
    for index in range(count):
        images[index, ..., 1] = 180 - KINDS[index % 5]
    labels = np.array([1 if index % 5 == WRONG else 0 for index in range(count)], np.int64)
    return Dataset("colours", images, labels, ("cat", "dog", "ship"), data.digest_of(images, labels))


def straight(
    target: Target, images: Floats, labels: Labels, budget: float | None, seed: int, *, moved: float = 0.0
) -> Found:
    """Goes straight from red to green as far as the budget, or `moved`, and claims success."""
    shift = np.zeros_like(images)
    shift[:, 0], shift[:, 1] = -1, 1
    attacked = images + shift * np.float32((moved or budget or 0.0) / np.sqrt(128))
    return Found(attacked, np.ones(len(images), np.bool_), length(attacked - images, "l2"))


def attack(run: Any = straight, **changes: Any) -> Attack:
    fields: dict[str, Any] = {
        "name": "straight-l2",
        "title": "Straight",
        "run": run,
        "norm": "l2",
        "knowledge": "gradients",
        "passes": 10,
        "source": "closed form",
        "budgets": (2.0, 2.5, 3.0),
    }
    return Attack(**(fields | changes))


TRANSFER = attack(name="transfer-l2", knowledge="another network")
BUDGETS: Any = {"l2": (2.0, 2.5, 3.0)}
SETTINGS = Settings(budgets=BUDGETS, quick=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = colours()
    known = {"name": dataset.name, "digest": dataset.digest, "n": len(dataset)}
    return write_bundle(tmp_path_factory.mktemp("evaluated") / "colours", data=known)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on other data: all images are evaluated."""
    return write_bundle(tmp_path_factory.mktemp("evaluated") / "other")


def evaluated(
    folder: Path,
    out: Path,
    *attacks: Attack,
    denials: Sequence[Attack] = (),
    twin: str | None = None,
    joined: Sequence[Path] = (),
    **changes: Any,
) -> Results:
    with patch("guard.evaluation.run.FEWEST", 4):  # the few images of a test in several pieces
        return evaluate(
            folder,
            colours(),
            out,
            tasks_of(attacks, denials),
            replace(SETTINGS, **changes),
            provider="cpu",
            threads=1,
            twin=twin,
            joined=joined,
            silent=True,
        )


def broken_by(result: AttackResult) -> int:
    assert result.success is not None
    return result.success.count


def test_the_headline_is_what_the_closed_form_says(other_folder: Path, tmp_path: Path) -> None:
    results = evaluated(other_folder, tmp_path / "out", attack())
    assert (results.images, results.accuracy.count) == (20, 16)
    assert results.rejected["jacobian"].count == 4
    standing = {one.budget: one for one in results.standing}
    assert [standing[budget].standing.count for budget in (2.0, 2.5, 3.0)] == [12, 8, 4]
    assert {one.clean.count for one in results.standing} == {12}
    assert standing[3.0].fallen == {"straight-l2": 8}
    assert standing[3.0].worst == "straight-l2"
    assert standing[2.0].worst is None
    assert standing[2.0].subsets == []
    # The detector sees what has just crossed the boundary, and nothing of what is deep.
    by_budget = {one.budget: one for one in results.attacks}
    assert [broken_by(by_budget[budget]) for budget in (2.0, 2.5, 3.0)] == [12, 16, 16]
    assert by_budget[2.0].detection["jacobian"].rejected.value == 8 / 12
    files = {budget: one.in_files for budget, one in by_budget.items()}
    assert {budget: one and one.n for budget, one in files.items()} == {2.0: 12, 2.5: 16, 3.0: 16}
    assert by_budget[3.0].n == 16
    assert by_budget[3.0].distance is None


def test_files_hold_what_they_should(other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = evaluated(other_folder, out, attack())
    assert load(out) == results
    clean = load_arrays(out / "clean.npz", CLEAN)
    assert sorted(clean["index"]) == list(range(20))
    assert clean["accepted_jacobian"].sum() == 16
    assert clean["image"].shape == (12, 3, 8, 8)
    # The omega of this bundle is 0: the radius is the distance to the boundary, but ends with the table.
    margin = GAIN / 255 * np.array([KINDS[index % 5] for index in clean["index"]])
    assert np.allclose(clean["radius_l2"], np.minimum(margin / (1.5 * np.sqrt(2)), 2), rtol=1e-4)
    assert np.array_equal(clean["omega_l2"], clean["radius_l2"])
    assert {one.standing().n for one in read(out).attacks} == {results.images} == {20}
    for one in results.attacks:
        arrays = load_arrays(out / one.file, (*ARRAYS, "accepted_jacobian", "ratio_jacobian"))
        assert arrays["logits"].shape == (16, 3)
        assert (arrays["image"].shape[0] == (arrays["row"] < 12).sum()) > 0
        assert one.budget is not None
        assert np.allclose(arrays["l2"], one.budget, rtol=1e-5)
        assert np.allclose(arrays["linf"], one.budget / np.sqrt(128), rtol=1e-5)
        assert (np.isfinite(arrays["jacobian"]) == arrays["success"]).all() or one.budget == 2.0
        assert (clean["label"][arrays["row"]] == clean["logits"][arrays["row"]].argmax(axis=1)).all()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_attacks_word_is_not_taken(other_folder: Path, tmp_path: Path) -> None:
    def still(target: Target, images: Floats, *_: Any) -> Found:
        return Found(images, np.ones(len(images), np.bool_), np.zeros(len(images)))

    too_far = attack(partial(straight, moved=3.0), name="too-far-l2", budgets=(2.5,))
    results = evaluated(other_folder, tmp_path / "out", attack(still, name="still-l2"), too_far)
    by_name = {one.name: one for one in results.attacks}
    assert broken_by(by_name["still-l2"]) == 0
    assert by_name["still-l2"].settings["unconfirmed"] == 16
    assert broken_by(by_name["too-far-l2"]) == 0
    # What it found beyond its budget counts where that budget is given.
    standing = {one.budget: one.standing.count for one in results.standing}
    assert standing == {2.0: 12, 2.5: 12, 3.0: 4}


def test_distances_are_measured(other_folder: Path, tmp_path: Path) -> None:
    def modest(*given: Any) -> Found:
        return replace(straight(*given, moved=2.0), distance=np.zeros(len(given[1])))

    own = attack(modest, name="own", norm=None, unit="steps", budgets=None)
    results = evaluated(other_folder, tmp_path / "out", attack(modest, budgets=None), own)
    in_steps, in_l2 = (one.distance for one in results.attacks)
    assert in_l2 is not None
    assert in_steps is not None
    assert in_l2.median == pytest.approx(2.0, rel=1e-5)
    assert in_steps.median == 0


def test_what_is_no_number_breaks_nothing_and_hides_nothing(other_folder: Path, tmp_path: Path) -> None:
    def broken(*given: Any) -> Found:
        found = straight(*given)
        return replace(found, images=np.full_like(found.images, np.nan))

    known = colours()
    assert known.labels is not None
    # The class of what is no number is 0, which these are not.
    green = replace(known, images=known.images[..., [1, 0, 2]], labels=1 - known.labels)
    given = partial(evaluate, settings=SETTINGS, provider="cpu", threads=1, silent=True)
    bare = given(other_folder, green, tmp_path / "bare", [])
    results = given(other_folder, green, tmp_path / "out", tasks_of([attack(broken)]))
    for one in results.attacks:
        assert (one.n, broken_by(one), one.settings["unconfirmed"]) == (16, 0, 16)
        assert not load_arrays(tmp_path / "out" / one.file)["wrong"].any()
    assert results.radii == bare.radii
    assert bare.radii[0].mean_distance > 0


def test_images_outside_the_range_are_brought_back(other_folder: Path, tmp_path: Path) -> None:
    results = evaluated(other_folder, tmp_path / "out", attack(partial(straight, moved=100.0), budgets=None))
    arrays = load_arrays(tmp_path / "out" / results.attacks[0].file)
    assert arrays["image"].min() >= 0
    assert arrays["image"].max() <= 1
    assert results.attacks[0].distance is not None


def test_budgets_however_close_are_two_and_the_same_one_twice_is_one(
    other_folder: Path, tmp_path: Path
) -> None:
    close = (2.5, 2.50001)
    out = tmp_path / "out"
    results = evaluated(other_folder, out, attack(budgets=(*close, 2.5)), budgets={"l2": close})
    assert [one.budget for one in results.attacks] == list(close)
    for one, budget in zip(results.attacks, close, strict=True):
        assert np.allclose(load_arrays(out / one.file)["l2"], budget, rtol=1e-6, atol=0)
    assert len(evaluated(other_folder, out, attack(budgets=(2.500001,))).attacks) == 3


def test_failures_are_judged_too(other_folder: Path, tmp_path: Path) -> None:
    def modest(*given: Any) -> Found:
        return replace(straight(*given), success=np.zeros(len(given[1]), np.bool_))

    results = evaluated(other_folder, tmp_path / "out", attack(modest))
    assert [broken_by(one) for one in results.attacks] == [0, 0, 0]
    assert [one.standing.count for one in results.standing] == [12, 8, 4]


def test_controls_count_right_images_that_are_rejected(other_folder: Path, tmp_path: Path) -> None:
    control = attack(name="noise-l2", knowledge="nothing", budgets=(0.01, 2.0, 3.0))
    results = evaluated(other_folder, tmp_path / "out", control, attack(budgets=(2.0,)))
    by_budget = {one.budget: one for one in results.attacks if one.name == "noise-l2"}
    still, moved, gone = (by_budget[budget].false_alarms for budget in (0.01, 2.0, 3.0))
    assert (still["jacobian"].count, still["jacobian"].n) == (4, 16), "as without noise"
    assert (moved["jacobian"].count, moved["jacobian"].n) == (4, 4), "the farthest, before the boundary"
    assert gone == {}, "none is right"
    arrays = load_arrays(tmp_path / "out" / by_budget[0.01].file)
    assert arrays["accepted_jacobian"].sum() == 12
    assert np.isfinite(arrays["ratio_jacobian"]).all()
    assert [one.false_alarms for one in results.attacks if one.name != "noise-l2"] == [{}]


def test_aware_attacks_get_what_is_accepted_and_dear_ones_what_is_left(
    other_folder: Path, tmp_path: Path
) -> None:
    seen: list[int] = []

    def counting(target: Target, images: Floats, *rest: Any) -> Found:
        seen.append(len(images))
        return straight(target, images, *rest)

    dear = attack(counting, name="dear-l2", aware="jacobian", passes=2000, budgets=(3.0,))
    cheap = attack(counting, name="cheap-l2", aware="jacobian", passes=20, budgets=(3.0,))
    results = evaluated(other_folder, tmp_path / "out", dear, attack(budgets=(2.5,)), cheap)
    by_name = {one.name: one for one in results.attacks}
    assert (by_name["cheap-l2"].n, broken_by(by_name["cheap-l2"])) == (12, 8)
    assert (by_name["dear-l2"].n, broken_by(by_name["dear-l2"])) == (4, 0)
    assert by_name["dear-l2"].settings["skipped"] == 8
    assert sum(seen) == 16
    assert results.standing[-1].standing.count == 4


def test_an_attack_with_no_image_left_was_run(other_folder: Path, tmp_path: Path) -> None:
    cheap = attack(partial(straight, moved=4.0), name="cheap-l2", aware="jacobian", budgets=(4.5,))
    dear = attack(refusing, name="dear-l2", aware="jacobian", passes=2000, budgets=(4.5,))
    out = tmp_path / "out"
    results = evaluated(other_folder, out, cheap, dear)
    spared = results.attacks[1]
    assert (spared.name, spared.n, spared.success, spared.detection) == ("dear-l2", 0, None, {})
    assert spared.settings["skipped"] == results.attacks[0].n == 12
    assert evaluated(other_folder, out, cheap, dear).attacks == results.attacks
    found = read(out)
    assert findings.unknowing(found.results, "jacobian") == ""
    row = "| dear-l2 4.5 | gradients, evades jacobian | all 12 broken before | – |"
    assert row in markdown.section(found)
    assert "all 12 broken before" in page(found)


def test_denial_counts_rejections_and_leaves_the_headline_alone(other_folder: Path, tmp_path: Path) -> None:
    # Every accepted image meets the strip on its way, one at a distance of its own.
    denial = attack(name="denial-l2", aware="jacobian", budgets=(2.0,))
    results = evaluated(other_folder, tmp_path / "out", denials=[denial])
    (found,) = results.over_rejection
    assert (found.n, broken_by(found)) == (12, 12)
    assert results.attacks == []
    assert results.standing == []


def test_what_a_denial_makes_wrong_and_accepted_counts_too(other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    idle = attack(partial(straight, moved=0.01), name="idle-l2", budgets=(2.5,))
    denial = attack(name="denial-l2", aware="jacobian", budgets=(2.5,))
    tasks = tasks_of([idle], [denial])
    results = evaluate(other_folder, colours(), out, tasks, SETTINGS, provider="cpu", threads=1, silent=True)
    (standing,) = results.standing
    assert (standing.standing.count, standing.fallen) == (8, {"denial-l2": 4})
    assert int((read(out).fallen("l2", "jacobian") > 2.5).sum()) == 8


def test_there_is_no_headline_where_nothing_aimed(other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    budgets: dict[str, tuple[float, ...]] = {"l2": (2.0, 3.0), "linf": (0.1,)}
    noise = attack(name="noise-linf", norm="linf", knowledge="nothing", budgets=(0.1,))
    results = evaluated(other_folder, out, attack(budgets=(3.0,)), noise, budgets=budgets)
    assert [(one.norm, one.budget) for one in results.standing] == [("l2", 3.0)]
    results = evaluated(other_folder, out, budgets=budgets | {"l2": (3.0, 5.0)})
    assert [one.budget for one in results.standing] == [3.0], "nothing tried at 5"
    results = evaluated(other_folder, out, attack(name="near-l2", budgets=None), budgets=budgets)
    assert [(one.norm, one.budget) for one in results.standing] == [("l2", 2.0), ("l2", 3.0)]


def test_dear_attacks_and_queries_get_fewer_images(other_folder: Path, tmp_path: Path) -> None:
    dear = attack(name="dear-l2", passes=5000, budgets=(3.0,))
    query = attack(name="query-l2", knowledge="decisions", budgets=(3.0,))
    results = evaluated(
        other_folder, tmp_path / "out", dear, query, images=18, dear_images=10, query_images=5
    )
    clean = load_arrays(tmp_path / "out" / "clean.npz")
    right = clean["logits"].argmax(axis=1) == clean["label"]
    assert results.images == 18
    assert {one.name: one.n for one in results.attacks} == {
        "dear-l2": int(right[:10].sum()),
        "query-l2": int(right[:5].sum()),
    }
    for one in results.standing:
        assert one.standing.n == 18
        assert [some.images for some in one.subsets] == ([] if one.budget < 3 else [10, 5])


def test_the_report_fold_of_the_calibrations_data(folder: Path, other_folder: Path, tmp_path: Path) -> None:
    results = evaluated(folder, tmp_path / "out", attack())
    index = load_arrays(tmp_path / "out" / "clean.npz")["index"]
    assert sorted(index) == data.folds(20, 0)["report"].tolist()
    assert results.data["fold"] == "report"
    again = evaluated(folder, tmp_path / "again", attack(), images=4)
    assert load_arrays(tmp_path / "again" / "clean.npz")["index"].tolist() == index[:4].tolist()
    assert again.images == 4
    shuffled = evaluated(folder, tmp_path / "seed", attack(), seed=1)
    assert load_arrays(tmp_path / "seed" / "clean.npz")["index"].tolist() != index.tolist()
    assert shuffled.images == len(index)


def test_other_data_are_warned_of(
    other_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = evaluated(other_folder, tmp_path / "out", attack())
    assert results.data["fold"] == "all"
    assert "is not the data that" in caplog.text
    with pytest.raises(UsageError, match="other scores cannot be calibrated"):
        evaluated(other_folder, tmp_path / "two", attack(), scores=("radius",))


def test_training_images_are_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "net")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["provenance"] = {"training": {"data": {"digest": colours().digest}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"these are the images that .* was trained on"):
        evaluated(folder, tmp_path / "out", attack())


def test_images_without_labels_too_few_or_of_another_size_are_refused(
    other_folder: Path, tmp_path: Path
) -> None:
    bare = replace(colours(), labels=None)
    with pytest.raises(DataError, match="has no labels"):
        evaluate(other_folder, bare, tmp_path / "out", [], SETTINGS, provider="cpu", silent=True)
    with pytest.raises(DataError, match="1 of its images would be evaluated; expected at least 2"):
        evaluated(other_folder, tmp_path / "out", attack(), images=1)
    small = replace(colours(), images=colours().images[:, :4])
    with pytest.raises(DataError, match="images are 3 x 4 x 8, the model"):
        evaluate(other_folder, small, tmp_path / "out", [], SETTINGS, provider="cpu", silent=True)


def test_attacks_added_later_leave_finished_ones_alone(other_folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def counting(target: Target, images: Floats, *rest: Any) -> Found:
        seen.append(len(images))
        return straight(target, images, *rest)

    out = tmp_path / "out"
    first = evaluated(other_folder, out, attack(counting))
    count = len(seen)
    second = evaluated(other_folder, out, attack(counting), attack(name="later-l2"))
    assert len(seen) == count
    assert [one.name for one in second.attacks[:3]] == ["later-l2"] * 3, "they come by name"
    assert second.attacks[3:] == first.attacks
    third = evaluated(other_folder, out)
    assert third.attacks == second.attacks
    assert third.standing == second.standing


def test_attacks_made_elsewhere_are_joined(other_folder: Path, tmp_path: Path) -> None:
    def never(*_: Any) -> Found:
        raise AssertionError("it was made elsewhere")

    def run(name: str, *attacks: Attack, denials: Sequence[Attack] = (), **options: Any) -> Results:
        return evaluated(other_folder, tmp_path / name, *attacks, denials=denials, quick=False, **options)

    first, second, denial = attack(), attack(name="later-l2", aware="jacobian"), attack(name="denial-l2")
    run("one", first, attack(refusing, name="queer-l2"))
    run("two", first, second, denials=[denial])
    both = run("both", first, second, denials=[denial])
    *attacks, last = (replace(one, run=never) for one in (first, second, denial))
    joined = run("one", *attacks, denials=[last], joined=[tmp_path / "two"])
    assert [(one.name, one.budget) for one in joined.attacks] == [
        (one.name, one.budget) for one in both.attacks
    ]
    assert [one.name for one in joined.over_rejection] == ["denial-l2"] * 3
    assert (joined.standing, joined.radii) == (both.standing, both.radii)
    assert [one.name for one in joined.left_out] == ["queer-l2"]
    shutil.rmtree(tmp_path / "two")
    assert run("one").attacks == joined.attacks
    new = run("new", *attacks, denials=[last], joined=[tmp_path / "one", tmp_path / "both"])
    assert new.standing == both.standing


def test_a_file_that_is_broken_here_is_taken_from_elsewhere(other_folder: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for out in (here, there):
        results = evaluated(other_folder, out, attack())
    (here / results.attacks[1].file).write_bytes(b"PK")
    joined = evaluated(other_folder, here, attack(refusing), joined=[there])
    assert {one.budget for one in joined.attacks} == {2.0, 2.5, 3.0}
    assert evaluated(other_folder, here).standing == results.standing


def test_what_cannot_be_joined_is_refused_and_nothing_written(other_folder: Path, tmp_path: Path) -> None:
    def join(*names: str, twin: str | None = None) -> None:
        folders = [tmp_path / name for name in names]
        evaluated(other_folder, tmp_path / "out", attack(), joined=folders, twin=twin)

    for name in ("one", "two"):
        transfer = replace(TRANSFER, name=f"transfer-{name}-l2")
        evaluated(other_folder, tmp_path / name, transfer, twin=f"sha256:{name}")
    evaluated(other_folder, tmp_path / "seed", attack(), seed=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"^--join .*empty: holds no evaluation\. Give the --out of another"):
        join("one", "empty")
    with pytest.raises(UsageError, match=r"^--join .*seed: holds an evaluation with other seed: 1, now 0"):
        join("one", "seed")
    with pytest.raises(UsageError, match=r"^--join .*two: .* another twin: sha256:two, now sha256:one"):
        join("one", "two")
    with pytest.raises(UsageError, match=r"^--join .*one: .* another twin: sha256:one, now sha256:two"):
        join("one", twin="sha256:two")
    assert not (tmp_path / "out").exists()


def test_only_what_is_not_done_yet_is_announced(
    other_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "guard")
    out = tmp_path / "out"
    evaluated(other_folder, out, attack())
    assert "attacks to run: 1, each at its budgets" in caplog.text
    caplog.clear()
    evaluate(other_folder, colours(), out, tasks_of([attack()]), SETTINGS, provider="cpu", threads=1)
    assert f"{out}: nothing is left to run" in caplog.text
    assert "attacks to run" not in caplog.text
    assert capsys.readouterr().err == ""
    evaluated(other_folder, out, attack(name="later-l2", passes=30))
    assert "attacks to run: 1, each at its budgets; at most 2e+03 forward passes" in caplog.text


@pytest.mark.parametrize("content", [None, b"PK"])
def test_an_attack_whose_file_is_lost_or_broken_is_run_again(
    other_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    out = tmp_path / "out"
    first = evaluated(other_folder, out, attack())
    lost = out / first.attacks[0].file
    lost.unlink()
    if content is not None:
        lost.write_bytes(content)
    assert len(evaluated(other_folder, out).attacks) == 2
    assert "straight-l2 counts no longer, and is run again where it is asked for" in caplog.text
    again = evaluated(other_folder, out, attack())
    assert sorted(one.budget or 0 for one in again.attacks) == [2.0, 2.5, 3.0]
    assert again.standing == first.standing


def test_a_run_stopped_early_speaks_of_no_audit_of_fewer_attacks(other_folder: Path, tmp_path: Path) -> None:
    def interrupted(*given: Any) -> Found:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    first = evaluated(other_folder, out, attack(budgets=(2.0,)))
    assert first.radii
    assert first.checks
    later = attack(name="later-l2", budgets=(3.0,)), attack(interrupted, name="last-l2", passes=20)
    with pytest.raises(KeyboardInterrupt):
        evaluated(other_folder, out, *later)
    stopped = load(out)
    assert [one.name for one in stopped.attacks] == ["later-l2", "straight-l2"]
    assert stopped.radii == []
    assert stopped.checks == []
    assert stopped.outstanding == [
        *(f"last-l2 {budget}" for budget in ("2", "2.5", "3")),
        "signs of masked gradients",
        "audit of the radii",
    ]
    assert first.outstanding == []
    assert evaluated(other_folder, out, *later[:1]).outstanding == []
    with pytest.raises(KeyboardInterrupt):
        evaluated(other_folder, out, later[1])
    assert load(out).outstanding[0] == "last-l2 2", "before it has finished anything"


def test_an_attack_stopped_between_budgets_stays_outstanding(other_folder: Path, tmp_path: Path) -> None:
    def interrupted(target: Target, images: Floats, labels: Any, budget: float | None, seed: int) -> Found:
        if budget == 3.0:
            raise KeyboardInterrupt
        return straight(target, images, labels, budget, seed)

    half, whole = tmp_path / "half", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        evaluated(other_folder, half, attack(interrupted))
    other = attack(name="other-l2", budgets=(3.0,))
    assert evaluated(other_folder, half, other).outstanding == ["straight-l2 3"]
    assert evaluated(other_folder, half, attack(budgets=(2.0,))).outstanding == ["straight-l2 3"]
    narrow = tmp_path / "narrow"
    evaluated(other_folder, narrow, attack(budgets=(2.0,)))
    for at, folders in enumerate(([half], [half, narrow], [narrow, half])):
        joined = evaluated(other_folder, tmp_path / f"joined {at}", other, joined=folders)
        assert joined.outstanding == ["straight-l2 3"]
    evaluated(other_folder, whole, attack())
    for folders in ([half, whole], [whole, half]):
        out = tmp_path / f"after {folders[0].name}"
        both = evaluated(other_folder, out, other, joined=folders)
        assert both.outstanding == []
        assert {one.budget for one in both.attacks if one.name == "straight-l2"} == {2.0, 2.5, 3.0}
    assert evaluated(other_folder, half, attack()).outstanding == []


def refusing(target: Target, images: Floats, *_: Any) -> Found:
    raise UsageError("needs larger images.")


def test_an_attack_that_cannot_take_the_model_is_left_out(
    other_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    refused = attack(refusing, name="refusing-l2", passes=1)
    results = evaluated(other_folder, out, attack(), refused)
    assert [one.name for one in results.attacks] == ["straight-l2"] * 3
    (left_out,) = results.left_out
    assert (left_out.name, left_out.reason) == ("refusing-l2", "needs larger images.")
    assert caplog.text.count("refusing-l2 is left out: needs larger images.") == 1
    assert results.radii
    assert not list(tmp_path.glob(".out*"))
    assert evaluated(other_folder, out).left_out == results.left_out, "what was refused before is still said"
    assert evaluated(other_folder, out, attack(name="refusing-l2"), attack()).left_out == []


def test_an_attack_whose_package_is_not_installed_is_left_out(
    other_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanting = attack(refusing, name="wanting-l2", needs="a_package_that_nobody_has")
    results = evaluated(other_folder, tmp_path / "out", attack(), wanting)
    (left_out,) = results.left_out
    assert left_out.reason.startswith("needs a_package_that_nobody_has, which is not installed.")
    assert caplog.text.count("wanting-l2 is left out") == 1
    assert results.outstanding == []


def test_a_budget_that_holds_all_images_is_refused(other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"budget 8 holds all images .*: expected less than 1 in linf"):
        evaluated(other_folder, out, attack(name="pgd-linf", norm="linf", budgets=(8.0,)))
    with pytest.raises(UsageError, match=r"budget 300 holds all images .* in l2, such as 0\.25"):
        evaluated(other_folder, out, attack(budgets=(0.25, 300.0)))
    assert not out.exists()


def test_the_only_attack_asked_for_says_why_it_cannot_run(other_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs larger images"):
        evaluated(other_folder, tmp_path / "out", attack(refusing, name="refusing-l2"))


def test_other_settings_are_refused(
    other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    evaluated(other_folder, out, attack())
    with pytest.raises(UsageError, match=r"holds an evaluation with other seed: 0, now 1. Choose another"):
        evaluated(other_folder, out, attack(), seed=1)
    with pytest.raises(UsageError, match="with other images: 20, now 7"):
        evaluated(other_folder, out, attack(), images=7)
    monkeypatch.setattr("guard.evaluation.run.VERSION", VERSION + 1)
    with pytest.raises(UsageError, match=f"with other version: {VERSION}, now {VERSION + 1}"):
        evaluated(other_folder, out, attack())
    kept = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(kept | {"provider": "cuda", "version": VERSION + 1}))
    with pytest.raises(UsageError, match="with other provider: cuda, now cpu"):
        evaluated(other_folder, out, attack())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="holds files but no evaluation"):
        evaluated(other_folder, tmp_path / "mine", attack())


def test_no_two_attacks_share_a_seed(other_folder: Path, tmp_path: Path) -> None:
    seeds = []

    def noting(*given: Any) -> Found:
        seeds.append(given[-1])
        return straight(*given)

    evaluated(other_folder, tmp_path / "out", attack(noting), attack(noting, name="other-l2"))
    assert len(set(seeds)) == len(seeds) == 6
    again, seeds[:] = seeds[:], []
    evaluated(other_folder, tmp_path / "again", attack(noting), attack(noting, name="other-l2"))
    assert seeds == again


def test_one_folder_is_written_by_one_run_at_a_time(other_folder: Path, tmp_path: Path) -> None:
    def second(*given: Any) -> Found:
        with pytest.raises(UsageError, match=r"out: another guard evaluate is writing there \(process \d"):
            evaluated(other_folder, tmp_path / "out", attack(name="other-l2"))
        evaluated(other_folder, tmp_path / "elsewhere")
        return straight(*given)

    results = evaluated(other_folder, tmp_path / "out", attack(second, budgets=(2.0,)))
    assert [one.name for one in results.attacks] == ["straight-l2"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_broken_settings_are_named(other_folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_bytes(content)
    with pytest.raises(DataError, match=r"settings\.json: holds no settings that can be read.* new folder"):
        evaluated(other_folder, tmp_path / "out", attack())


def test_an_attack_on_a_score_that_is_not_judged_is_refused(other_folder: Path, tmp_path: Path) -> None:
    knowing = attack(name="joint-radius-l2", aware="radius")
    with pytest.raises(UsageError, match=r"joint-radius-l2 knows the score radius.* jacobian"):
        evaluated(other_folder, tmp_path / "out", knowing)
    assert not (tmp_path / "out").exists()


def test_an_attack_of_the_same_name_with_other_settings_is_refused(
    other_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluated(other_folder, out, attack(partial(straight, moved=2.0)))
    with pytest.raises(
        UsageError, match=r"holds straight-l2 with other moved: 2.0, now 3.0\. Choose another"
    ):
        evaluated(other_folder, out, attack(partial(straight, moved=3.0)))


def test_a_joined_attack_with_other_settings_is_named_before_anything_is_written(
    other_folder: Path, tmp_path: Path
) -> None:
    evaluated(other_folder, tmp_path / "other", attack(partial(straight, moved=2.0)))
    with pytest.raises(UsageError, match=r"^--join .*other: holds straight-l2 with other moved: 2.0"):
        evaluated(
            other_folder,
            tmp_path / "out",
            attack(partial(straight, moved=3.0)),
            joined=[tmp_path / "other"],
        )
    assert not (tmp_path / "out").exists()


def test_another_policy_is_another_evaluation(
    other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(other_folder, tmp_path / "out", attack())
    monkeypatch.setenv("GUARD_MIN_RADIUS_L2", "0.01")
    with pytest.raises(UsageError, match="holds an evaluation with other policy"):
        evaluated(other_folder, tmp_path / "out", attack())


def test_a_quick_run_leaves_stronger_attacks_on_radii(other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(other_folder, out, attack(), quick=False)
    probed = load_arrays(out / "masking.npz")["row"]
    evaluated(other_folder, out, attack(name="more-l2"), quick=True)
    assert load_arrays(out / "radii-l2.npz")["restarts"] == 2
    assert load_arrays(out / "masking.npz")["row"].tolist() == probed.tolist()


def test_the_end_of_a_run_is_told_of_its_attacks(other_folder: Path, tmp_path: Path) -> None:
    def none(_: Any, __: Any, images: Floats, *___: object, **____: object) -> Any:
        return np.full(len(images), np.inf)

    queries = attack(name="walk-l2", knowledge="decisions", budgets=(2.0,))
    near = attack(partial(straight, moved=0.5), budgets=(2.0,))
    with patch("guard.evaluation.audit.attacks_inside", none):
        results = evaluated(other_folder, tmp_path / "out", near, queries)
    verdicts = {one.name: one.verdict for one in results.checks}
    assert verdicts["gradients beat search by queries, l2"] != "not run"
    audited = next(one for one in results.radii if one.norm == "l2" and one.served)
    assert audited.found
    arrays = load_arrays(tmp_path / "out" / results.attacks[0].file)
    clean = load_arrays(tmp_path / "out" / "clean.npz")
    success = arrays["success"]
    found = detection(
        arrays["accepted_jacobian"][success],
        arrays["ratio_jacobian"][success],
        clean["ratio_jacobian"],
        arrays["row"][success],
    )
    assert results.attacks[0].detection["jacobian"] == found


def test_attacks_made_on_another_network_keep_to_it(other_folder: Path, tmp_path: Path) -> None:
    results = evaluated(other_folder, tmp_path / "out", TRANSFER, twin="sha256:1")
    assert {one.settings["twin"] for one in results.attacks} == {"sha256:1"}
    with pytest.raises(UsageError, match="holds attacks made on another twin: sha256:1, now sha256:2"):
        evaluated(other_folder, tmp_path / "out", TRANSFER, twin="sha256:2")


def slow(folder: Path, out: Path) -> None:
    """Evaluates with an attack that takes a while: for a process that is killed meanwhile."""

    def run(*given: Any) -> Found:
        time.sleep(0.1)
        return straight(*given)

    evaluated(folder, out, attack(), attack(run, name="dear-l2", passes=10**5, budgets=(3.0,)))


def test_a_killed_run_goes_on_where_it_was(other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from tests.test_evaluation_run import slow; "
        "slow(*map(Path, sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(other_folder), str(out)], cwd=ROOT)
    finished = 0
    while finished < 2:
        assert process.poll() is None
        time.sleep(0.01)
        with suppress(FileNotFoundError):  # the folder of an attack before, gone while it is listed
            finished = len(list(tmp_path.glob(".out.evaluating-*/dear-l2-*.npz")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [one.name for one in load(out).attacks] == ["straight-l2"] * 3
    finished = len(list(tmp_path.glob(".out.evaluating-*/dear-l2-*.npz")))
    assert finished < 4

    seen: list[int] = []

    def counting(target: Target, images: Floats, *rest: Any) -> Found:
        seen.append(len(images))
        return straight(target, images, *rest)

    dear = attack(counting, name="dear-l2", passes=10**5, budgets=(3.0,))
    resumed = evaluated(other_folder, out, attack(counting), dear)
    assert seen == [4] * (4 - finished)
    whole = evaluated(other_folder, tmp_path / "whole", attack(), dear)
    for one, other in zip(resumed.attacks, whole.attacks, strict=True):
        assert one.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})
        first, second = load_arrays(out / one.file), load_arrays(tmp_path / "whole" / other.file)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)
    assert resumed.standing == whole.standing
    assert not list(tmp_path.glob(".out*"))


def test_a_finished_attack_is_kept_where_the_results_cannot_be_written(
    other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(*given: Any) -> Found:
        calls.append(1)
        return straight(*given)

    def dump(record: Results) -> bytes:
        if record.attacks:
            raise OSError(28, "No space left on device")
        return whole(record)

    whole = bundle.dump
    with monkeypatch.context() as patched:
        patched.setattr("guard.bundle.dump", dump)
        with pytest.raises(OSError, match="No space left"):
            evaluated(other_folder, tmp_path / "out", attack(counting))
    done = len(calls)
    assert done > 0
    (first, *_) = evaluated(other_folder, tmp_path / "out", attack(counting)).attacks
    assert first.budget == 2.0
    assert len(calls) == 3 * done


def test_an_interrupted_piece_is_lost_alone(other_folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupted(*given: Any) -> Found:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return straight(*given)

    dear = partial(attack, interrupted, name="dear-l2", passes=10**5, budgets=(3.0,))
    with pytest.raises(KeyboardInterrupt):
        evaluated(other_folder, tmp_path / "out", dear())
    results = evaluated(other_folder, tmp_path / "out", dear())
    assert len(calls) == 3 + 2
    assert results.attacks[0].n == 16


# --- several scores


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return convolutional(classes=5, scale=20.0)


@pytest.fixture(scope="module")
def noise(network: onnx.ModelProto) -> Dataset:
    return make_data(network, 400)


@pytest.fixture(scope="module")
def calibrated(network: onnx.ModelProto, noise: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_bundle(tmp_path_factory.mktemp("calibrated") / "net", network)
    calibrate(folder, noise, effort=QUICK, provider="cpu", silent=True)
    return folder


def test_another_score_is_calibrated_as_if_it_were_served(
    calibrated: Path, network: onnx.ModelProto, noise: Dataset, tmp_path: Path
) -> None:
    score: ScoreName = "combined"
    found = bundle.load(calibrated)
    work = cost.rescoring(data.folds(len(noise), found.calibrated().seed))
    with Stages(tmp_path / "x", {}, progress := Progress(work, "", silent=True)) as stages:
        made = rescored(found, noise, score, stages, provider="cpu")
    served = calibrate(
        make_bundle(tmp_path / "net", network),
        noise,
        CalibrationSettings(score=score),
        QUICK,
        provider="cpu",
        silent=True,
    )
    names = ("score", "threshold", "tests", "n", "fpr", "predicted_fpr", "realized_fpr", "histogram")
    for name in (*names, "row_bound", "data", "folds"):
        assert getattr(made, name) == getattr(served, name), name
    old = found.calibrated()
    assert (made.l2, made.linf) == (old.l2, old.linf)
    assert 0.7 < progress.count / work < 1.3


def test_every_score_has_a_headline_of_its_own(calibrated: Path, noise: Dataset, tmp_path: Path) -> None:
    def ascent(target: Target, images: Floats, labels: Labels, budget: Any, seed: int) -> Found:
        return pgd(target.model, images, labels, budget, norm="linf", clip=True, seed=seed)

    scores: tuple[ScoreName, ...] = ("radius", "combined", "radius")
    other: tuple[ScoreName, ...] = ("combined", "jacobian", "radius")
    settings = Settings(scores=scores, budgets={"linf": (0.2,)}, images=60, quick=True)
    tasks = [Task(attack(ascent, name="ascent-linf", norm="linf"), 0.2)]
    results = evaluate(
        calibrated, noise, tmp_path / "out", tasks, settings, provider="cpu", threads=1, silent=True
    )
    assert results.scores == ["jacobian", "radius", "combined"]
    assert results.served == "jacobian"
    assert set(results.rejected) == set(results.scores)
    assert [one.score for one in results.standing] == results.scores
    assert set(results.attacks[0].detection) == set(results.scores)
    turned = replace(settings, scores=other)
    again = evaluate(
        calibrated, noise, tmp_path / "out", tasks, turned, provider="cpu", threads=1, silent=True
    )
    assert again.attacks == results.attacks, "their order does not count"
    kept = sorted(path.name for path in (tmp_path / "out" / "scores").iterdir())
    assert kept == ["combined.json", "radius.json"]
    arrays = load_arrays(tmp_path / "out" / results.attacks[0].file)
    for score in results.scores:
        wrong = arrays["wrong"]
        assert (arrays[f"accepted_{score}"][wrong] == (arrays[f"ratio_{score}"][wrong] <= 1)).all()
    assert results.bundle["thresholds"].keys() == set(results.scores)
    assert {check.verdict for check in results.checks} <= {"passed", "undecided", "not run"}


def test_omega_of_random_perturbations_is_kept(
    calibrated: Path,
    noise: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "guard")
    settings = Settings(images=4)
    run = partial(evaluate, calibrated, noise, tmp_path / "out", [], settings, provider="cpu", threads=1)
    before = run(silent=True).radii
    assert sum(one.method == "omega-bound, random perturbations" for one in before) == 2
    fold = len(data.folds(len(noise), 0)["radii"])
    for norm in ("l2", "linf"):
        kept = load_arrays(tmp_path / "out" / f"omega-random-{norm}.npz")
        assert kept["remainder"].shape == (fold, len(EPS))
    monkeypatch.setattr("guard.evaluation.audit.random_remainders", lambda *_, **__: pytest.fail("again"))
    assert run(silent=True).radii == before
    (tmp_path / "out" / "omega-random-l2.npz").unlink()
    with pytest.raises(pytest.fail.Exception, match="again"):
        run(silent=True)
    assert f"at most {fold * RANDOM_PASSES:.2g} forward passes" in caplog.text
