import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import MANIFEST, Share
from guard.cli import main
from guard.cli.evaluate import summary
from guard.evaluation import suite
from guard.evaluation.results import Check, Detection, RadiusAudit, Results, Standing, Subset, load
from guard.evaluation.suite import common_name
from tests.serving import write_bundle
from tests.test_evaluation_run import colours

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("cli_evaluate") / "colours")


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = colours(40)
    assert dataset.labels is not None
    names = np.array(dataset.class_names)
    np.savez(tmp_path / "colours.npz", x_test=dataset.images, y_test=dataset.labels, class_names=names)


def run(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def test_a_run_from_start_to_end(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    words = (folder, "--val", "colours.npz", "--provider", "cpu", "--threads", "1", "--out", "out")
    assert run(*words, "--attacks", "pgd-l2", "pgd-linf", "--budgets", "l2=1.5,1", "linf=51/255") == 0
    out, err = capsys.readouterr()
    assert "is not the data that" in err
    assert "attacks to run: 2, each at its budgets; at most" in err
    lines = out.splitlines()
    assert lines[0] == "colours on 40 images of colours"
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "wrote out; next: guard report out"
    results = load("out")
    assert [(one.norm, one.budget) for one in results.standing] == [
        ("l2", 1.0),
        ("l2", 1.5),
        ("linf", 0.2),
    ]
    attacks = "--attacks pgd-l2 pgd-linf --budgets l2=1.0,1.5 linf=51/255"
    assert (
        results.command
        == f"guard evaluate {folder} --val colours.npz {attacks} --provider cpu --threads 1 --out out"
    )
    assert results.attacks[0].settings["command"] == results.command
    assert results.provenance["arguments"]["val"] == "colours.npz"
    assert run(*words, "--attacks", "pgd-l2", "--json") == 0
    assert Results.model_validate(json.loads(capsys.readouterr().out)).images == 40
    joining = ("--attacks", "fgsm-l2", "--budgets", "l2=1", "--join", "out", "--out", "other")
    assert run(*words[:-2], *joining) == 0
    made, joined = load("out").attacks, load("other")
    assert joined.attacks[0].name == "fgsm-l2"
    assert joined.attacks[1:] == made
    assert joined.command.endswith("--budgets l2=1.0 --join out --provider cpu --threads 1 --out other")
    assert joined.provenance["arguments"]["join"] == ["out"]


def test_quick(folder: Path, capsys: Captured) -> None:
    assert run(folder, "--val", "colours.npz", "--quick", "--threads", "1", "--out", "out") == 0
    results = load("out")
    assert results.settings["quick"]
    assert results.settings["images"] == 100
    names = {one.name for one in results.attacks}
    assert {"pgd-l2", "pgd-linf", "pgd-deep-l2", "joint-pgd-l2"} <= names
    assert {one.norm for one in results.standing} == {"l2", "linf"}
    assert len(results.checks) == 18
    out = capsys.readouterr().out
    assert "signs of masked gradients: 0 found" in out
    assert "No attack of the run knows jacobian at linf 2/255: an attacker who does will" in out


def test_help_has_every_group_as_the_list_has_it(capsys: Captured) -> None:
    assert run("--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    for group, what in suite.GROUPS.items():
        assert f"{group} {what}" in told


def test_list_names_every_attack_in_80_columns(capsys: Captured) -> None:
    assert run("--attacks", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = {line.split()[1] for line in lines if line.startswith("  ")}
    assert listed == {one.name for one in (*suite.known(), *suite.over_rejection())}
    assert run("--attacks", "list", "--json") == 0
    entries = json.loads(capsys.readouterr().out)["attacks"]
    assert {entry["name"] for entry in entries} == listed
    assert all(entry["passes"] >= 1 and entry["groups"] for entry in entries)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out"], "--val is missing"),
        (["--val", "colours.npz"], "--out is missing"),
        (["--val", "colours.npz", "--out", "o", "--quick", "--attacks", "all"], "--quick has a suite of its"),
        (["--val", "colours.npz", "--out", "o", "--attacks", "pdg-l2"], "'pdg-l2' is no attack. Near it: "),
        (["--val", "colours.npz", "--out", "o", "--budgets", "l1=3"], "argument --budgets: 'l1' is no norm"),
        (["--val", "colours.npz", "--out", "o", "--budgets", "l2=0"], "argument --budgets: expected budgets"),
        (["--val", "colours.npz", "--out", "o", "--budgets", "l2=1e400"], "argument --budgets: expected bud"),
        (
            ["--val", "colours.npz", "--out", "o", "--budgets", "linf=2/0"],
            "argument --budgets: expected budg",
        ),
        (
            ["--val", "colours.npz", "--out", "o", "--images", "5,0"],
            "argument --images: expected up to three",
        ),
        (["--val", "colours.npz", "--out", "o", "--seed", "-1"], "argument --seed: expected a whole number"),
        (["--val", "colours.npz", "--out", "o", "--scores", "beauty"], "argument --scores: invalid choice"),
    ],
)
def test_wrong_usage(folder: Path, words: list[str], message: str, capsys: Captured) -> None:
    assert run(folder, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"guard: error: {message}")
    assert not Path("o").exists()


def test_a_twin_of_other_classes_or_images_is_refused(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    names = manifest["class_names"]
    cases: tuple[tuple[dict[str, object], str], ...] = (
        ({"class_names": names[1:]}, f"has {len(names) - 1} classes"),
        ({"class_names": names[::-1]}, "has the classes of"),
        ({"input": manifest["input"] | {"height": 9}}, "takes images of 3 x 9 x"),
    )
    assert run(folder, "--val", "colours.npz", "--out", "o", "--twin", folder) == 2
    assert f"--twin {folder}: is the model of {folder} itself" in capsys.readouterr().err
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    for change, message in cases:
        (twin / MANIFEST).write_text(json.dumps(manifest | change))
        assert run(folder, "--val", "colours.npz", "--out", "o", "--twin", twin) == 2
        assert f"guard: error: --twin {twin}: {message}" in capsys.readouterr().err
    assert not Path("o").exists()


def test_budgets_of_one_norm_add_up(folder: Path, capsys: Captured) -> None:
    budgets = ("--budgets", "l2=0.2,0.2", "l2=1.5")
    assert run(folder, "--val", "colours.npz", "--attacks", "fgsm-l2", *budgets, "--out", "out") == 0
    results = load("out")
    assert [one.budget for one in results.attacks] == [0.2, 1.5]
    assert "--budgets l2=0.2 l2=1.5 --out" in results.command
    assert "  jacobian l2 0.2 " in capsys.readouterr().out


def test_budgets_of_one_norm_leave_those_of_the_other(folder: Path) -> None:
    words = ("--attacks", "fgsm-l2", "fgsm-linf", "--budgets", "l2=0.2", "--out", "out")
    assert run(folder, "--val", "colours.npz", *words) == 0
    results = load("out")
    assert [one.budget for one in results.attacks] == [0.2, 2 / 255, 8 / 255]
    stand = [(one.norm, one.budget) for one in results.standing]
    assert stand == [("l2", 0.2), ("linf", 2 / 255), ("linf", 8 / 255)]


def test_interruption_says_how_to_go_on(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("guard.evaluation.masking.probe", interrupted)
    words = (folder, "--val", "colours.npz", "--attacks", "pgd-l2", "--out", "out")
    assert run(*words) == 130
    expected = (
        "guard: error: interrupted: what is finished lies in out; the same command goes on from there. "
        "Outstanding: signs of masked gradients, audit of the radii"
    )
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected
    assert len(load("out").attacks) == 3


def share(count: int, n: int) -> Share:
    return Share(count=count, n=n, value=count / n, lower=0.001, upper=0.999)


def test_the_summary_says_the_verdict_first_in_80_columns(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--val", "colours.npz", "--attacks", "pgd-l2", "--out", "out") == 0
    results = load("out")
    standing = Standing(
        score="margin-gradient",
        norm="linf",
        budget=8 / 255,
        standing=share(123, 1000),
        clean=share(870, 1000),
        worst="nearest-accepted-margin-gradient-linf",
        fallen={"nearest-accepted-margin-gradient-linf": 700},
        meant={"nearest-accepted-margin-gradient-linf": 870},
        subsets=[
            Subset(
                images=200,
                attacks=["boundary-linf", "hopskipjump-linf", "square-linf"],
                standing=share(20, 200),
                clean=share(170, 200),
                alone=share(10, 200),
                added=share(3, 23),
            )
        ],
    )
    failed = Check(
        name="random search finds nothing that PGD does not, linf",
        verdict="failed",
        expected="",
        found="one step breaks 100 of 100 images, 20 break 90 of 100 images",
    )
    radius = RadiusAudit(
        norm="linf",
        kind="conformal",
        method="scaled-first-order-and-more",
        served=True,
        violations=share(12, 1000),
        mean_radius=0.1,
        mean_distance=0.2,
        tightness=0.5,
    )
    attack = results.attacks[0].model_copy(
        update={
            "name": "pgd-restarts-margin-linf",
            "norm": "linf",
            "budget": 8 / 255,
            "detection": {"jacobian": Detection(rejected=share(120, 1000), auroc=0.9)},
        }
    )
    filled = results.model_copy(
        update={
            "standing": [standing],
            "checks": [failed],
            "radii": [radius],
            "attacks": [attack],
            "over_rejection": [attack],
        }
    )
    alarms = {"jacobian": share(120, 1000)}
    control = attack.model_copy(update={"name": "corruption-gaussian-noise", "false_alarms": alarms})
    filled = filled.model_copy(update={"attacks": [attack, control]})
    lines = summary(filled, tmp_path / "r").splitlines()
    assert max(len(line) for line in lines if "wrote" not in line) <= 80
    assert "  margin-gradient linf 8/255   12.3% [0.1%, 99.9%], clean 87.0%" in lines
    assert "    most fall to nearest-accepted-margin-gradient-linf: 700 of 870" in lines
    (first,) = (line for line in lines if line.startswith("    first 200: "))
    assert first.startswith("    first 200: 10.0% [0.1%, 99.9%]; 3 of the 23 left fell to boundary-linf, ")
    assert "signs of masked gradients: 1 found, 0 absent, 0 undecided, 0 not looked for" in lines
    assert any("conformal" in line and "1.2% of 1000 (<= 99.9%), 0.50" in line for line in lines)
    assert "  right without attack:" in lines[1]
    assert lines[1].endswith("(95% intervals in brackets)")
    assert ["pgd-restarts-margin-linf", "8/255", "12.0%", "[0.1%,", "99.9%]", "of", "1000", "0.900"] in [
        line.split() for line in lines
    ]
    assert any(
        line.startswith("  pgd-restarts-margin-linf 8/255: ") and line.endswith(f" of {attack.n}")
        for line in lines
    )
    assert any(
        line.split() == ["corruption-gaussian-noise", "8/255", "12.0%", "[0.1%,", "99.9%]", "of", "1000"]
        for line in lines
    )
    texts = (
        "robust accuracy with rejection",
        "rejected by jacobian of what attacks",
        "rejected by jacobian of what noise",
        "signs of masked",
    )
    assert [next(at for at, line in enumerate(lines) if line.startswith(text)) for text in texts] == sorted(
        next(at for at, line in enumerate(lines) if line.startswith(text)) for text in texts
    )


def test_the_default_suite_covers_what_the_headline_needs() -> None:
    names = {common_name(one) for one in suite.known() if suite.belongs(one, "default")}
    assert {
        "pgd-l2",
        "pgd-linf",
        "pgd-deep-l2",
        "pgd-deep-linf",
        "fmn-l2",
        "fmn-linf",
        "joint-pgd-l2",
    } <= names
