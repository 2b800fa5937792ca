"""Reports: every number of the results is on the page, which needs nothing else and lies about nothing."""

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from guard import bundle as bundles
from guard.attacks import Found
from guard.bundle import Share
from guard.cli import main
from guard.errors import DataError
from guard.evaluation import suite
from guard.evaluation.report import figures, findings, gallery, markdown, tables, words
from guard.evaluation.report.page import page
from guard.evaluation.report.reading import Evaluation, read
from guard.evaluation.results import (
    CLEAN_FILE,
    RESULTS,
    LeftOut,
    Standing,
    Subset,
    Summary,
    same,
    summary,
)
from guard.files import sha256
from guard.shares import share_of
from tests.results_folder import CHECKS, Images, planted, radii
from tests.serving import write_bundle

SVG = "{http://www.w3.org/2000/svg}"
XHTML = "{http://www.w3.org/1999/xhtml}"
EVIL = "<script>alert('x')</script>\"&|"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "planted"
    planted(path)
    return path


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    return read(folder)


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    """The folder once more, with other values in its `results.json`."""
    for file in folder.rglob("*.*"):
        target = to / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    record = json.loads((folder / RESULTS).read_text()) | changes
    (to / RESULTS).write_text(json.dumps(record))
    return to


def text_of(html: str) -> str:
    """All text of the page, with plain spaces; its being parsed shows that it is well-formed."""
    root = ET.fromstring(html.removeprefix("<!DOCTYPE html>"))
    return " ".join("".join(root.itertext()).replace("\u00a0", " ").split())


def leaves(value: Any) -> Iterator[Any]:
    """The shares, summaries and lone numbers of a record, however deep."""
    if isinstance(value, Share | Summary | str) or value is None:
        yield value
    elif isinstance(value, BaseModel):
        for inner in value.__dict__.values():
            yield from leaves(inner)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


class TestReading:
    def test_nearest_is_the_closed_form(self, evaluation: Evaluation) -> None:
        """Of a linear classifier: margin over slope, a little beyond; linf from attacks of its own."""
        right = evaluation.right
        clean = evaluation.clean
        exact = (clean["margin"] / clean["gradient_l2"])[right]
        found = evaluation.nearest("l2")
        assert (found[~right] == 0).all()
        assert (found[right] >= exact * (1 - 1e-4)).all()
        ours = next(one for one in evaluation.attacks if one.result.name == "fmn-l2")
        assert evaluation.nearest("l2")[ours.rows].max() <= ours.lengths("l2").max()

    def test_fallen_agrees_with_what_the_run_says_stands(self, evaluation: Evaluation) -> None:
        for one in evaluation.results.standing:
            beyond = evaluation.fallen(one.norm, one.score) > one.budget * (1 + 1e-6)
            assert int(beyond.sum()) == one.standing.count

    def test_rejected_and_wrong_images_have_fallen_before(self, evaluation: Evaluation) -> None:
        gone = ~(evaluation.right & evaluation.accepted("radius"))
        assert gone.any()
        assert (evaluation.fallen("l2", "radius")[gone] == 0).all()

    def test_an_attack_on_the_first_images_stands_for_those(self, evaluation: Evaluation) -> None:
        by = {one.result.name: one for one in evaluation.attacks}
        assert by["fmn-l2"].n_considered == 40
        assert by["boundary-l2"].n_considered == 20
        wrong = int((~evaluation.right[:20]).sum())
        assert by["boundary-l2"].errors_within([0.0, np.inf]) == [wrong / 20, 1.0]
        assert by["boundary-l2"].standing().value == 0

    def test_find_ignores_hyphens_and_rounding(self, evaluation: Evaluation) -> None:
        assert len(evaluation.find("PGD", norm="l2")) == 3
        assert len(evaluation.find("pgd", norm="linf", budget=0.031372549)) == 1
        assert [one.result.name for one in evaluation.find("jointpgd", budget=0.25)] == ["joint-pgd-l2"]
        assert same(None, None)
        assert not same(None, 0.5)

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda path: (path / RESULTS).unlink(), r"holds no results\.json .*guard evaluate --val"),
            (lambda path: (path / RESULTS).write_text("{}"), r"results\.json: .*required"),
            (lambda path: (path / RESULTS).write_text("no"), r"results\.json: .*JSON"),
            (lambda path: (path / CLEAN_FILE).unlink(), r"clean\.npz: is missing"),
            (lambda path: (path / "attacks/fmn-l2.npz").unlink(), r"fmn-l2\.npz: is missing"),
            (lambda path: (path / "attacks/fmn-l2.npz").write_bytes(b"PK"), r"is no \.npz file"),
            (lambda path: without(path / "attacks/cw-l2.npz", "l2", "passes"), r"holds no l2, passes\."),
            (lambda path: without(path / CLEAN_FILE, "accepted_radius"), r"holds no accepted_radius\."),
            (lambda path: beyond(path / "attacks/cw-l2.npz"), "its rows are not the"),
        ],
    )
    def test_what_is_missing_or_broken_is_named(
        self, folder: Path, tmp_path: Path, harm: Any, message: str
    ) -> None:
        path = copied(folder, tmp_path / "r")
        harm(path)
        with pytest.raises(DataError, match=message):
            read(path)

    def test_another_runs_images_are_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"holds 40 images, .* speaks of 41"):
            read(copied(folder, tmp_path / "r", images=41))


def without(path: Path, *names: str) -> None:
    with np.load(path) as file:
        kept = {name: file[name] for name in file if name not in names}
    np.savez(path, **kept)


def beyond(path: Path) -> None:
    with np.load(path) as file:
        kept = dict(file)
    kept["row"] = kept["row"] + 40
    np.savez(path, **kept)


class TestPage:
    def test_every_number_of_the_results_is_there(self, evaluation: Evaluation) -> None:
        text = text_of(page(evaluation))
        results = evaluation.results
        # Of an attack that evades a score, what that score detects says nothing.
        attacks = [
            one.model_copy(update={"detection": {k: v for k, v in one.detection.items() if k != one.aware}})
            for one in results.attacks
        ]
        results = results.model_copy(update={"attacks": attacks})
        for name in ("accuracy", "rejected", "jacobian", "attacks", "standing", "checks", "radii"):
            for leaf in leaves(getattr(results, name)):
                if isinstance(leaf, Share):
                    if name == "radii":
                        wanted = f"{leaf.count} of {leaf.n}, at most {100 * leaf.upper:.2f}%"
                    else:
                        ends = f"[{100 * leaf.lower:.1f}, {100 * leaf.upper:.1f}]"
                        wanted = f"{100 * leaf.value:.1f}% {ends} (n = {leaf.n})"
                elif isinstance(leaf, Summary):
                    wanted = (
                        f"{leaf.median:.3g} [{leaf.median_lower:.3g}, {leaf.median_upper:.3g}] (n = {leaf.n})"
                    )
                    assert f"{leaf.mean:.3g} ± {1.96 * leaf.standard_error:.3g}" in text
                else:
                    continue
                assert wanted in text, (name, leaf)
        for audit in results.radii:
            tightness = f"{audit.tightness:.3f} ± {1.96 * audit.tightness_error:.3f}"
            assert f"{audit.mean_radius:.3g}{audit.mean_distance:.3g}{tightness}" in text
        for check in results.checks:
            assert f"{check.expected}{check.found}" in text
        assert results.command in text
        assert results.hardware in text
        for name in {name for standing in results.standing for name in standing.fallen}:
            stands = [one for one in results.standing if one.score == results.served]
            cells = [findings.brought_down(one, name) for one in stands]
            full = [one.clean.count for one in stands]
            told = [
                str(n) if of == all_ else f"{n} of {of}" for (n, of), all_ in zip(cells, full, strict=True)
            ]
            assert name + "".join(told) in text

    def test_needs_no_network_and_no_script(self, evaluation: Evaluation) -> None:
        html = page(evaluation, evaluation)
        assert set(re.findall(r"https?://[^\"<\s]+", html)) == {SVG.strip("{}"), XHTML.strip("{}")}
        assert not re.search(r"<script|<link|<iframe|url\(|@import|\bon\w+=", html)
        assert set(re.findall(r"src=\"([^,\"]*)", html)) == {"data:image/png;base64"}
        assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)", html))

    def test_the_verdict_comes_first(self, evaluation: Evaluation) -> None:
        root = ET.fromstring(page(evaluation).removeprefix("<!DOCTYPE html>"))
        titles = [heading.text for heading in root.iter(f"{XHTML}h2")]
        assert titles[0] == "Verdict"
        assert titles.index("Detection of attacks, second") > titles.index("All attacks")

    def test_what_others_wrote_stays_text(self, folder: Path, tmp_path: Path) -> None:
        record = json.loads((folder / RESULTS).read_text())
        bundle = {"name": EVIL, "class_names": [EVIL] * 3, EVIL: EVIL}
        record["attacks"][0] |= {"title": EVIL, "source": EVIL, "unit": EVIL}
        record["attacks"][1]["name"] = EVIL
        record["standing"][0] |= {"worst": EVIL, "fallen": {EVIL: 1}}
        record["checks"][0] |= {"name": EVIL, "expected": EVIL, "found": EVIL, "numbers": {EVIL: 1.0}}
        record["radii"][0] |= {"method": EVIL, "kind": EVIL}
        plain = {"command": EVIL, "hardware": EVIL, "data": {"name": EVIL}, "settings": {EVIL: [EVIL]}}
        evil = read(copied(folder, tmp_path / "r", **(record | plain | {"bundle": bundle})))
        html = page(evil, evil)
        assert "<script" not in html
        assert text_of(html).count(EVIL) > 10
        card = markdown.section(evil)
        assert "<script" not in re.sub(r"^    .*$", "", card, flags=re.MULTILINE)  # code, which stays text

    def test_without_anything_run(self, folder: Path, tmp_path: Path) -> None:
        bare: dict[str, Any] = {"attacks": [], "standing": [], "checks": [], "radii": []}
        empty = read(copied(folder, tmp_path / "r", **bare))
        text = text_of(page(empty))
        assert "No check for gradient masking was run." in text
        assert "The run audited no radii." in text
        assert "Attacks not run: FGSM, I-FGSM," in text
        assert "No attack succeeded" in text
        markdown.section(empty)

    def test_no_estimate_is_called_certified(self, evaluation: Evaluation) -> None:
        text = text_of(page(evaluation)) + markdown.section(evaluation)
        ours = text.replace("% certified test error at l2 radii, by randomized smoothing", "")
        ours = ours.replace("word certified", "").replace("linf certified", "")
        ours = re.sub(r"probabilistic: certified[^.]*|sound: certified[^.]*", "", ours)
        assert "certified" not in ours

    def test_a_score_that_no_attack_knows_is_marked(self, evaluation: Evaluation) -> None:
        assert "No attack of the run knows radius: an attacker" in text_of(page(evaluation))

    def test_a_budget_at_which_no_attack_knows_the_score_is_marked(
        self, folder: Path, tmp_path: Path
    ) -> None:
        record = json.loads((folder / RESULTS).read_text())
        aware = [one for one in record["attacks"] if one["aware"] == "jacobian" and one["norm"] == "l2"]
        budgets = sorted({one["budget"] for one in aware if one["budget"] is not None})
        assert len(budgets) > 1
        assert "knows jacobian" not in text_of(page(read(copied(folder, tmp_path / "all", **record))))
        left = [one for one in record["attacks"] if one not in aware or one["budget"] == budgets[0]]
        fewer = read(copied(folder, tmp_path / "fewer", **(record | {"attacks": left})))
        warning = (
            f"No attack of the run knows jacobian at {', '.join(f'l2 {budget:g}' for budget in budgets[1:])}"
        )
        assert f"{warning}: an attacker who does" in text_of(page(fewer))
        assert any(warning in sentence for sentence in findings.headline(fewer))

    def test_attacks_and_controls_are_counted_apart(self, evaluation: Evaluation) -> None:
        attacks = evaluation.results.attacks
        before = len({one.name for one in attacks if one.knowledge != "nothing"})
        first = attacks[0].name
        turned = [
            one.model_copy(update={"knowledge": "nothing", "false_alarms": {}}) if one.name == first else one
            for one in attacks
        ]
        assert f"{before} attacks" in text_of(page(evaluation))
        assert f"{before - 1} attacks, " in text_of(page(changed(evaluation, attacks=turned)))


class TestWords:
    @pytest.mark.parametrize(
        ("budget", "norm", "text"),
        [(0.25, "l2", "l2 0.25"), (8 / 255, "linf", "linf 8/255"), (0.05, "linf", "linf 0.05")],
    )
    def test_budgets(self, budget: float, norm: str, text: str) -> None:
        assert words.at(budget, norm) == text

    def test_success_says_which_images_were_left_out(self, evaluation: Evaluation) -> None:
        first = evaluation.results.attacks[0]
        spared = first.model_copy(update={"settings": {"skipped": 25}})
        said = f"{words.share(first.success)}; 25 broken before left out"
        assert words.success(spared) == said
        assert words.success(first.model_copy(update={"settings": {"skipped": 0}})) == words.share(
            first.success
        )
        shown = changed(evaluation, attacks=[spared])
        assert said in text_of(page(shown))
        assert f"| {said} |" in markdown.section(shown)

    def test_an_error_is_the_rest(self) -> None:
        found = share_of(9, 10)
        assert words.error(found) == words.share(share_of(1, 10))

    def test_a_median_may_be_infinite(self) -> None:
        assert words.middle(np.array([1.0, 1.0, 1.0, np.inf, np.inf, np.inf, np.inf])) == "∞ [1, ∞] (n = 7)"
        assert words.middle(np.array([1.0, 2.0, np.inf])) == "2 (n = 3)", "no interval from so few"
        assert words.middle(np.array([])) == "–"
        assert words.middle(np.arange(1.0, 101.0)) == "50.5 [40, 61] (n = 100)"

    def test_durations(self) -> None:
        assert [words.duration(s) for s in (2.5, 75, 7260)] == ["2.5 s", "1 min 15 s", "2 h 1 min"]


class TestTables:
    def test_lipgen_6_picks_the_papers_attacks(self, evaluation: Evaluation) -> None:
        table = tables.lipgen_6([evaluation])
        rows = {row.name: row.cells for row in table.rows}
        assert rows["planted: attack"] == ("–", "fmn-l2", "boundary-l2", "cw-l2", "joint-pgd-l2 1")
        assert rows["ResNeXt-34 (2x32): detected"] == ("6%", "96%", "100%", "100%", "22%")
        found = next(one.result for one in evaluation.attacks if one.result.name == "cw-l2")
        assert rows["planted: detected"][3] == words.share(found.detection["jacobian"].rejected)

    def test_errors_are_of_attacks_at_that_budget(self, evaluation: Evaluation) -> None:
        kept = [one for one in evaluation.results.attacks if one.norm != "linf" or one.budget == 2 / 255]
        small = changed(evaluation, attacks=kept)
        cells = tables.scale_1([small]).rows[-1].cells
        assert cells[3] == tables.scale_1([evaluation]).rows[-1].cells[3] != "–"
        assert cells[4] == "–"
        assert tables.scale_4([small]).rows[-1].cells[2] == "–"
        budgets = [one for one in evaluation.results.attacks if one.budget is not None]
        assert tables.lipgen_2([changed(evaluation, attacks=budgets)]).rows[-1].cells[1] == "–"

    def test_a_perturbation_as_long_as_the_budget_is_within_it(
        self, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What is left of 2/255 when it is added to an image and taken away again, in float32.
        distances = np.full(len(evaluation.right), 2 / 255 + 2.9e-8)
        monkeypatch.setattr(Evaluation, "nearest", lambda self, norm: distances)
        assert tables.scale_1([evaluation]).rows[-1].cells[3].startswith("100.0%")

    def test_hamming_1_names_what_is_not_built(self, evaluation: Evaluation) -> None:
        ours = tables.hamming_1([evaluation]).rows[-1]
        assert ours.cells[1:6] == ("–",) * 5
        assert ours.cells[6] == "not built"

    def test_accuracy_under_an_attack_counts_all_its_images(self, folder: Path, tmp_path: Path) -> None:
        record = json.loads((folder / RESULTS).read_text())
        for one in record["attacks"]:
            one["name"] = one["name"].replace("joint-pgd", "other").replace("pgd", "autoattack")
        evaluation = read(copied(folder, tmp_path / "r", attacks=record["attacks"]))
        attack = evaluation.find("autoattack", norm="l2", budget=0.5)[0]
        left = evaluation.right.copy()
        left[attack.rows[attack.success]] = False
        expected = words.share(share_of(int(left.sum()), 40))
        assert tables.manifold_1([evaluation]).rows[-1].cells[0] == f"{expected}, autoattack-l2 0.5"

    def test_a_part_of_autoattack_is_not_the_whole(self, folder: Path, tmp_path: Path) -> None:
        record = json.loads((folder / RESULTS).read_text())
        for one in record["attacks"]:
            one["name"] = one["name"].replace("joint-pgd", "other").replace("pgd", "autoattack-apgd-ce")
        evaluation = read(copied(folder, tmp_path / "r", attacks=record["attacks"]))
        assert tables.manifold_1([evaluation]).rows[-1].cells[:2] == ("–", "–")
        assert tables.hamming_1([evaluation]).rows[-1].cells[1:3] == ("–", "–")

    def test_an_evasive_attack_that_was_spared_images_is_not_shown(
        self, folder: Path, tmp_path: Path
    ) -> None:
        record = json.loads((folder / RESULTS).read_text())
        evaluation = read(copied(folder, tmp_path / "whole", attacks=record["attacks"]))
        shown = tables.source_of(evaluation, "evasive CW")
        assert shown is not None
        assert shown.result.aware == "jacobian"
        for one in record["attacks"]:
            one["settings"]["skipped"] = 3
        spared = read(copied(folder, tmp_path / "spared", attacks=record["attacks"]))
        assert tables.source_of(spared, "evasive CW") is None

    def test_what_an_evasive_attack_did_not_get_past_is_shown(self, evaluation: Evaluation) -> None:
        shown = tables.source_of(evaluation, "evasive CW")
        assert shown is not None
        assert shown.result.success is not None
        cell = tables.lipgen_6([evaluation]).rows[-3].cells[-1]
        assert cell == f"{words.error(shown.result.success)} not evaded"

    def test_the_longer_carlini_wagner_is_shown(self, folder: Path, tmp_path: Path) -> None:
        record = json.loads((folder / RESULTS).read_text())
        record["attacks"][0]["name"] = "cw-quick-l2"
        found = tables.source_of(read(copied(folder, tmp_path / "r", attacks=record["attacks"])), "CW")
        assert found is not None
        assert found.result.name == "cw-l2"

    def test_of_a_budget_the_pgd_that_stops_first_is_shown(self, folder: Path, tmp_path: Path) -> None:
        record = json.loads((folder / RESULTS).read_text())
        some = [one for one in record["attacks"] if one["norm"] == "l2" and one["aware"] is None][:2]
        for one, name in zip(some, ("pgd-deep-l2", "pgd-l2"), strict=True):
            one |= {"name": name, "budget": 0.5}
        found = tables.source_of(read(copied(folder, tmp_path / "r", attacks=some)), "PGD")
        assert found is not None
        assert found.result.name == "pgd-l2"

    def test_lipgen_2_is_whole(self, evaluation: Evaluation) -> None:
        rows = [row for row in tables.lipgen_2([evaluation]).rows if not row.ours]
        assert len(rows) == 6
        assert not any("–" in row.cells for row in rows)

    def test_every_row_is_as_long_as_its_head(self, evaluation: Evaluation) -> None:
        found = tables.tables([evaluation, evaluation])
        assert [table.name for table in found if table.name.startswith("SCALE")] == [
            f"SCALE Table {number}" for number in range(1, 7)
        ]
        for table in found:
            assert all(len(row.cells) + 1 == len(table.columns) for row in table.rows), table.name
            assert sum(row.ours for row in table.rows) >= 2

    def test_the_strongest_radius_served_is_named(self, tmp_path: Path) -> None:
        result = planted(tmp_path / "r")
        result.clean["radius_linf"] = np.full(40, 0.02)
        strongest = radii()[3].model_copy(update={"kind": "conformal", "method": "scaled-first-order"})
        result.write(radii=[strongest, *radii()])
        result.clean["omega_linf"] = np.full(40, 0.001)
        result.write(radii=[strongest, *radii()])
        found = read(tmp_path / "r")
        bound, served = tables.scale_1([found]).rows[-2:]
        wrong = int((~found.right).sum())
        assert bound.cells[1:3] == (words.share(share_of(40, 40)),) * 2
        assert served.name == "planted: linf scaled-first-order (conformal) instead of the ω-bound"
        assert served.cells[1:3] == tuple(words.share(share_of(lost, 40)) for lost in (wrong, 40))

    def test_top_5_only_where_there_are_many_classes(self, evaluation: Evaluation, tmp_path: Path) -> None:
        for table in (tables.scale_1, tables.scale_2):
            assert not any("top 5" in row.name for row in table([evaluation]).rows)
        result = planted(tmp_path / "r", count=12, classes=1000)
        found = read(tmp_path / "r")
        rows = {row.name: row.cells for row in tables.scale_1([found]).rows}
        assert rows["ImageNet, undefended (top 5)"][0] == "6.94"
        clean = float(rows["planted: top 5"][0].partition("%")[0])
        assert clean <= float(rows["planted"][0].partition("%")[0])
        # Attacks on the most probable class say nothing of the five.
        assert rows["planted: top 5"][1:] == ("–",) * 4
        assert tables.scale_2([found]).rows[-1].cells[1:] == ("–",) * 3

        weight = result.measure(np.eye(48, dtype=np.float32).reshape(48, 3, 4, 4))["logits"].T

        def out(some: Images, labels: NDArray[np.int64], *, far: int) -> Found:
            """Away from the true class; the first `far` of the images far enough."""
            moved = some.copy()
            moved[:far] -= 9 * weight[labels[:far]].reshape(-1, 3, 4, 4)
            success = np.arange(len(some)) < far
            return Found(moved, success, np.where(success, 1.0, np.inf))

        result.attack("top5-pgd-linf", "", partial(out, far=2), "linf", 8 / 255)
        result.attack("top5-nearest-l2", "", partial(out, far=3), "l2")
        result.attacks, result.arrays = result.attacks[-2:], result.arrays[-2:]
        for arrays in result.arrays:
            arrays["l2"], arrays["linf"] = (np.where(arrays["success"], size, np.inf) for size in (0.7, 0.03))
        result.write()
        found = read(tmp_path / "r")
        right = int(found.right.sum())
        cells = tables.scale_1([found]).rows[-1].cells
        assert cells[3:] == ("–", words.share(share_of(3, right)))
        assert tables.scale_2([found]).rows[-1].cells[3] == words.mean(summary(np.full(3, 0.7)))

    def test_radii_at_the_budgets(self, tmp_path: Path) -> None:
        result = planted(tmp_path / "r")
        result.clean["omega_l2"] = np.full(40, 0.6)
        result.write()
        cells = tables.scale_6([read(tmp_path / "r")]).rows[-1].cells
        wrong = int((~read(tmp_path / "r").right).sum())
        assert cells[0] == words.share(share_of(wrong, 40))
        assert cells[2] == words.share(share_of(40, 40))


class TestFigures:
    def titles(self, evaluation: Evaluation) -> list[str]:
        return [figure.title for figure in figures.figures(evaluation, None, {})]

    def test_all_that_can_be_drawn(self, evaluation: Evaluation) -> None:
        assert self.titles(evaluation) == [
            "Error against l2 distance: attacks with gradients",
            "Error against l2 distance: attacks without gradients",
            "Robust accuracy in l2",
            "Error against linf distance: attacks with gradients",
            "Robust accuracy in linf",
            "What a first success costs",
            *(f"Jacobian norm: {name}" for name in ("clean", "fmn-l2", "boundary-l2", "cw-l2")),
            "Jacobian norm: joint-pgd-l2 1",
            "Radius against l2 distance",
        ]
        for figure in figures.figures(evaluation, evaluation, {}):
            ET.fromstring(figure.svg)

    def test_radii_are_drawn_against_the_distances_of_their_audit(self, tmp_path: Path) -> None:
        folder = planted(tmp_path / "r")
        folder.clean["radius_linf"] = np.full(40, 0.01)
        folder.write()
        distance = np.where(np.arange(40) < 3, 0.005, 0.5)
        np.savez(tmp_path / "r/radii-linf.npz", distance=distance)
        evaluation = read(tmp_path / "r")
        accepted = evaluation.accepted("jacobian")
        nearest = np.where(evaluation.right, evaluation.nearest("linf"), np.inf)
        inside = int((accepted & (np.minimum(nearest, distance) < 0.01)).sum())
        assert inside >= 3
        found = figures.figures(evaluation, None, {})
        drawn = next(one for one in found if one.title == "Radius against linf distance")
        assert drawn.caption == f"n = {accepted.sum()} accepted images, {inside} attacked inside."
        np.savez(tmp_path / "r/radii-linf.npz", distance=distance[:7])
        with pytest.raises(DataError, match=r"radii-linf\.npz: holds 7 images, .* speaks of 40"):
            read(tmp_path / "r")

    def test_errors_end_where_nothing_looked_for_the_nearest_image(self, evaluation: Evaluation) -> None:
        drawn = {one.title: one.svg for one in figures.figures(evaluation, None, {})}
        assert ">0.05<" in drawn["Error against linf distance: attacks with gradients"]
        assert ">0.1<" not in drawn["Error against linf distance: attacks with gradients"]

    def test_missing_attacks_leave_their_curves_out(self, folder: Path, tmp_path: Path) -> None:
        record = json.loads((folder / RESULTS).read_text())
        kept = [one for one in record["attacks"] if one["name"] == "cw-l2"]
        found = self.titles(read(copied(folder, tmp_path / "r", attacks=kept)))
        assert not [title for title in found if "linf" in title or "PGD" in title or "Boundary" in title]

    def test_data_stability_is_drawn_where_it_is_given(self, evaluation: Evaluation) -> None:
        facts = {
            "norm": "l2",
            "dataset": "planted",
            "n": 7,
            "stability": {"eps": [0.0, 1.0, 2.0], "halfway": [0.0, 0.5, 1.0]},
        }
        first = figures.figures(evaluation, None, {"l2": facts})[0]
        assert ("pale", "data stability of planted (n = 7)") in first.legend

    def test_the_gallery_shows_what_was_added(self, evaluation: Evaluation) -> None:
        exhibit = gallery.exhibits(evaluation)[0]
        assert exhibit.attack.result.aware == "jacobian"  # the hardest attacker first
        twin = exhibit.twins[0]
        row = int(exhibit.attack.rows[exhibit.attack.success][0])
        shown = decoded(twin.difference)
        place = int(np.flatnonzero(exhibit.attack.rows == row)[0])
        added = exhibit.attack.arrays["image"][place] - evaluation.clean["image"][row]
        assert np.abs(shown - np.clip(0.5 + exhibit.gain * added, 0, 1)).max() <= 0.003
        assert np.abs(decoded(twin.original) - evaluation.clean["image"][row]).max() <= 0.003
        assert twin.accepted[0] == "jacobian"

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_images_of_any_channels_are_shown(self, channels: int) -> None:
        assert gallery.data_uri(np.full((channels, 2, 2), 0.5, np.float32)).startswith("data:image/png")


def decoded(uri: str) -> Any:
    """The image (C, H, W) in [0, 1] of a data URI."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image).transpose(2, 0, 1) / 255


class TestFindings:
    def test_masking(self, evaluation: Evaluation) -> None:
        assert "Signs of gradient masking: unbounded attack succeeds." in findings.masking(evaluation)
        for checks, expected in (
            ([CHECKS[0]], "No sign of gradient masking in 1 check."),
            (
                [CHECKS[0], CHECKS[2]],
                "No sign of gradient masking in 1 check; 1 not run, for want of attacks to compare.",
            ),
        ):
            assert findings.masking(changed(evaluation, checks=checks)) == expected

    def test_a_price_needs_an_attack_that_looked_for_the_nearest_image(self, evaluation: Evaluation) -> None:
        right = evaluation.right
        only = f"to another class {words.middle(evaluation.nearest('l2')[right])}."
        assert findings.price(evaluation) == [f"l2, median smallest distance found {only}"]
        knowing = evaluation.results.attacks[0].model_copy(update={"aware": "jacobian"})
        both = findings.price(changed(evaluation, attacks=[*evaluation.results.attacks, knowing]))
        assert "to another class that jacobian accepts" in both[0]
        near, accepted = evaluation.nearest("l2"), evaluation.fallen("l2", "jacobian")
        kept = right & evaluation.accepted("jacobian") & np.isfinite(near) & (near > 0)
        ratio = accepted[kept] / near[kept]
        assert f"of the same images {words.middle(ratio)} times as far." in both[0]

    def test_every_command_behind_the_numbers_is_there(self, evaluation: Evaluation) -> None:
        first, *others = evaluation.results.attacks
        earlier = first.model_copy(update={"settings": {"command": "guard evaluate --attacks fmn-l2"}})
        both = changed(evaluation, attacks=[earlier, *others])
        assert findings.commands(both) == ["guard evaluate --attacks fmn-l2", evaluation.results.command]
        assert "guard evaluate --attacks fmn-l2" in text_of(page(both))
        assert "\n    guard evaluate --attacks fmn-l2\n" in markdown.section(both)

    def test_a_run_that_was_stopped_says_so_first(self, evaluation: Evaluation) -> None:
        assert findings.headline(changed(evaluation, outstanding=["fab-l2", "audit of the radii"]))[0] == (
            "The run is not finished: outstanding are fab-l2, audit of the radii. Attacks that are missing "
            "would leave less standing. The command that began them goes on from here."
        )
        bare = changed(evaluation, checks=[], radii=[])
        assert not any("not finished" in sentence for sentence in findings.headline(bare))

    def test_images_on_which_all_attacks_ran_stand_beside_the_headline(self, evaluation: Evaluation) -> None:
        some = Subset(
            images=20,
            attacks=["autoattack-l2", "cw-restarts-l2"],
            standing=share_of(3, 20),
            clean=share_of(17, 20),
            alone=share_of(2, 20),
            added=share_of(1, 4),
        )
        first = evaluation.results.standing[0].model_copy(update={"subsets": [some]})
        dear = changed(evaluation, standing=[first])
        said = words.share(first.standing)
        meaning, stands, added, *_ = findings.headline(dear)
        assert meaning.startswith("Robust accuracy with rejection is the share of images ")
        assert stands == f"Robust accuracy with rejection in l2. At 0.25: {said}."
        brought = "autoattack-l2, cw-restarts-l2 brought down, of those that others left, 1 of 4 at 0.25."
        assert added == f"On the first 20 images {brought}"
        none = some.model_copy(update={"added": None})
        assert findings.added([first.model_copy(update={"subsets": [none]})]) == []
        text, section = text_of(page(dear)), markdown.section(dear)
        assert "first 20autoattack-l2, cw-restarts-l21 of 415.0% [3.2, 37.9] (n = 20)" in text
        assert f"| jacobian, l2 0.25 | {said} |" in section
        assert "| first 20 | autoattack-l2, cw-restarts-l2 | 1 of 4 | 15.0% [3.2, 37.9] (n = 20) |" in section
        figure = next(one for one in figures.figures(dear, None, {}) if one.title == "Robust accuracy in l2")
        assert "ran on the first images only" in figure.caption

    def test_attacks_on_the_first_images_only_are_named_and_give_no_median(
        self, evaluation: Evaluation
    ) -> None:
        results = evaluation.results
        few = [one.model_copy(update={"settings": one.settings | {"images": 20}}) for one in results.attacks]
        dear = changed(evaluation, attacks=few)
        assert results.sought("l2")
        assert not dear.results.sought("l2")
        assert dear.results.sought("l2", on_all=False)
        assert findings.price(evaluation)
        assert findings.price(dear) == []
        assert findings.unknowing(dear.results, "jacobian") == findings.unknowing(results, "jacobian")
        said = [one for one in findings.gaps([dear]) if "Run on fewer images: on the first 20 " in one]
        assert len(said) == 1
        assert f"{findings.name(dear)}: {said[0]}" in findings.gaps([dear, evaluation])
        first = results.standing[0]
        meant = first.model_copy(update={"meant": dict.fromkeys(first.fallen, 10)})
        name = max(first.fallen, key=lambda one: first.fallen[one])
        text = text_of(page(changed(evaluation, standing=[meant])))
        assert f"{name}{first.fallen[name]} of 10" in text

    def test_models_attacked_on_other_images_are_named(self, evaluation: Evaluation) -> None:
        clean = dict(evaluation.clean)
        moved = dataclasses.replace(evaluation, clean=clean | {"index": clean["index"] + 1})
        elsewhere = changed(evaluation, data=evaluation.results.data | {"digest": "of others"})
        for other in (moved, elsewhere):
            (said,) = [one for one in findings.gaps([evaluation, other]) if "on other images than" in one]
            assert said in text_of(page(evaluation, other))
        assert not [one for one in findings.gaps([evaluation, evaluation]) if "on other images than" in one]

    def test_families_not_run(self, evaluation: Evaluation) -> None:
        missing = findings.not_run(evaluation)
        assert not {"PGD", "CW", "Boundary", "DDN or FMN", "joint PGD"} & set(missing)
        assert {"AutoAttack", "Square", "joint APGD", "over HTTP", "denial"} <= set(missing)

    def test_every_attack_that_was_run_is_of_a_family(self, evaluation: Evaluation) -> None:
        """AutoAttack's parts alone: they are not the whole."""
        first = evaluation.results.attacks[0]
        for one in (*suite.known(), *suite.over_rejection()):
            run = changed(evaluation, attacks=[first.model_copy(update={"name": one.name})])
            missing = set(findings.not_run(run))
            part = one.name.startswith("autoattack-apgd")
            found = 0 if part or "top5" in one.name else 1
            if one.name in ("autoattack-l2", "autoattack-linf"):
                assert not {"APGD", "FAB", "Square", "AutoAttack"} & missing
                found = 4
            assert len(missing) == len(findings.FAMILIES) - 1 - found  # top 5 is for models of many classes

    def test_checks_that_were_not_run_are_told_apart(self, evaluation: Evaluation) -> None:
        skipped = [CHECKS[2].model_copy(update={"name": f"queries, {norm}"}) for norm in ("l2", "linf")]
        said = findings.masking(changed(evaluation, checks=[CHECKS[0], *skipped]))
        assert said == "No sign of gradient masking in 1 check; 2 not run, for want of attacks to compare."
        undecided = CHECKS[0].model_copy(update={"name": "more steps", "verdict": "undecided"})
        said = findings.masking(changed(evaluation, checks=[CHECKS[0], undecided]))
        least = "1 undecided, as the attacks that tell break nothing there"
        assert said == f"No sign of gradient masking in 1 check; {least}."


def changed(evaluation: Evaluation, **update: Any) -> Evaluation:
    results = evaluation.results.model_copy(update=update)
    return Evaluation(evaluation.folder, results, evaluation.clean, evaluation.attacks)


class TestLeftOut:
    def test_attacks_that_could_not_be_run_are_named_with_the_reason(self, evaluation: Evaluation) -> None:
        assert "Asked for and left out" not in text_of(page(evaluation))
        refused = changed(evaluation, left_out=[LeftOut(name="square-l2", reason="Images are small & few.")])
        said = "Asked for and left out: square-l2 (Images are small & few.)"
        assert said in text_of(page(refused))
        assert said.replace("&", "&amp;") in markdown.section(refused)


class TestControls:
    def test_right_images_that_a_score_rejects_are_shown(self, evaluation: Evaluation) -> None:
        control = next(one for one in evaluation.results.attacks if one.knowledge == "nothing")
        assert "false alarms" not in text_of(page(evaluation)).lower()
        alarms = {"jacobian": share_of(3, 30)}
        shown = changed(evaluation, attacks=[control.model_copy(update={"false_alarms": alarms})])
        said = words.share(share_of(3, 30))
        assert f"{words.attack(control)}{said}–" in text_of(page(shown)), "and – for the other score"
        assert f"| {words.attack(control)} | {said} | – |" in markdown.section(shown)


class TestMarkdown:
    def test_tables_are_whole(self, evaluation: Evaluation) -> None:
        lines = markdown.section(evaluation, evaluation).splitlines()
        assert lines[0] == "## Attacks"
        assert f"    {evaluation.results.command}" in lines
        for before, line in pairwise(lines):
            if before.startswith("|") and line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", before)) == len(re.findall(r"(?<!\\)\|", line))

    def test_rows_say_what_the_results_say(self, evaluation: Evaluation) -> None:
        text = markdown.section(evaluation)
        first = evaluation.results.standing[0]
        assert isinstance(first, Standing)
        assert (
            f"| jacobian, l2 0.25 | {words.share(first.standing)} | {words.share(first.clean)} "
            f"| {findings.worst(first)} |"
        ) in text
        assert (
            "| l2 omega-bound (estimate), served | 0.236 | 0.407 | 0.579 ± 0.020 "
            "| 60 | 1 of 60, at most 8.94% (95%) |" in text
        )
        assert "| unbounded attack succeeds | failed | 100% at an unbounded budget | 97% (n = 60) |" in text
        # what stands under attackers who know comes before detection of those who do not
        assert text.index("Right and accepted under every attack") < text.index("Detection of attacks")


class TestCommand:
    def test_writes_page_and_section(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, card = tmp_path / "out.html", tmp_path / "new.md"
        words_ = ["report", str(folder), "--out", str(out), "--markdown", str(card), "--against", str(folder)]
        assert main([*words_, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["report"] == str(out)
        assert [one["budget"] for one in said["standing"]][:2] == [0.25, 0.5]
        text_of(out.read_text())
        first = card.read_text()
        card.write_text(f"# Model\n\n{first}")
        assert main(words_) == 0
        assert card.read_text() == f"# Model\n\n{first}"

    def test_the_page_lies_beside_the_results(self, folder: Path, tmp_path: Path) -> None:
        path = copied(folder, tmp_path / "r")
        assert main(["report", str(path)]) == 0
        assert (path / "report.html").exists()

    def test_a_bundle_stays_whole(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bundle = write_bundle(tmp_path / "bundle")
        card = bundle / bundles.CARD
        path = copied(folder, tmp_path / "r")
        assert main(["report", str(path), "--markdown", str(card)]) == 1
        assert "is the card of the model sha256:" in capsys.readouterr().err
        assert not card.exists()
        of = {"name": "colours", "digest": bundles.load(bundle).digest}
        path = copied(folder, tmp_path / "c", bundle=of, settings={"identity": {"calibration": "other"}})
        assert main(["report", str(path), "--markdown", str(card)]) == 1
        assert "holds results of other. Give the card of the evaluated bundle" in capsys.readouterr().err
        path = copied(folder, tmp_path / "s", bundle=of)
        assert main(["report", str(path), "--markdown", str(card)]) == 0
        assert card.read_text().startswith("## Attacks\n")
        assert bundles.load(bundle).manifest.files[bundles.CARD] == sha256(card)

    def test_stability_is_what_info_writes(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures = tmp_path / "data.npz"
        generator = np.random.default_rng(0)
        some = generator.integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
        np.savez(pictures, x_train=some, y_train=np.arange(20) % 2, x_test=some, y_test=np.arange(20) % 2)
        assert main(["info", "--dataset", str(pictures), "--json"]) == 0
        facts = tmp_path / "facts.json"
        facts.write_text(capsys.readouterr().out)
        out = tmp_path / "out.html"
        assert main(["report", str(folder), "--out", str(out), "--stability", str(facts)]) == 0
        assert "data stability of data (n = 20)" in out.read_text()
        facts.write_text("[]")
        assert main(["report", str(folder), "--out", str(out), "--stability", str(facts)]) == 1
        assert "is not what guard info --dataset D --json writes" in capsys.readouterr().err

    def test_a_run_that_is_not_finished_is_reported_as_such(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = copied(folder, tmp_path / "r", outstanding=["fab-l2"])
        assert main(["report", str(path)]) == 0
        assert "not finished, outstanding: fab-l2" in capsys.readouterr().out

    def test_errors_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["report", str(tmp_path)]) == 1
        assert "Make it with: guard evaluate" in capsys.readouterr().err

    def test_wrong_files_are_named(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["report", str(folder / RESULTS)]) == 2
        assert "is a file; expected the folder that guard evaluate wrote" in capsys.readouterr().err
        card, out = tmp_path / "card.md", str(tmp_path / "out.html")
        card.write_bytes(b"\xff\xfe")
        assert main(["report", str(folder), "--out", out, "--markdown", str(card)]) == 1
        assert "is no text in UTF-8" in capsys.readouterr().err
        assert card.read_bytes() == b"\xff\xfe"
