"""The page of a run's curves: what is on it, for runs of every length, and that it needs nothing else."""

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from guard.training import curves

SVG = "{http://www.w3.org/2000/svg}"
XHTML = "{http://www.w3.org/1999/xhtml}"

LOSS = "loss nats per image"
STABILITY = "stability squared l2 distance of probabilities, summed over the batch"
RAMPS = ("stability:weight=0.8..8@0.2..0.8,eps=2/255..8/255@0.1..0.35", "tv-l2:eps=0.01")


def config(epochs: int = 10, regularizers: tuple[str, ...] = RAMPS) -> dict[str, Any]:
    settings = {"architecture": "compact-resnet", "regularizers": list(regularizers), "epochs": epochs}
    return {"settings": settings, "data": {"name": "cifar10"}}


def line(epoch: int, **more: float) -> dict[str, float]:
    metrics = {
        "epoch": epoch,
        "learning_rate": 0.1,
        "seconds": 60.0 * epoch,
        "loss": 3 / epoch,
        "data": 2 / epoch,
        "stability": 0.5 * epoch,
        "gradient_l2": 1.5,
        "train_accuracy": 0.5,
        "held_out_accuracy": 0.25,
    }
    return metrics | more


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


def figures(text: str) -> dict[str, ET.Element]:
    """Every panel by its title, with the unit."""
    found = {}
    for figure in parsed(text).iter(f"{XHTML}figure"):
        title = figure.find(f".//{XHTML}h2")
        assert title is not None
        found["".join(title.itertext())] = figure
    return found


def legend(figure: ET.Element) -> list[str]:
    return ["".join(entry.itertext()) for entry in figure.iter(f"{XHTML}li")]


def paths(figure: ET.Element) -> list[str]:
    """The lines of the curves, in the drawing's coordinates."""
    return [path.get("d", "") for group in figure.iter(f"{SVG}g") for path in group.iter(f"{SVG}path")]


def points(path: str) -> list[tuple[float, float]]:
    pairs = [corner.split() for corner in path.removeprefix("M").split("L")]
    return [(float(x), float(y)) for x, y in pairs]


class TestPage:
    def test_has_every_series_with_its_last_value(self) -> None:
        found = figures(curves.page("run", config(), [line(epoch) for epoch in range(1, 5)]))
        assert {title: legend(figure) for title, figure in found.items()} == {
            "loss nats per image": ["loss 0.75", "data term 0.5"],
            "accuracy %": ["training batches 50", "held-out images 25"],
            STABILITY: ["stability 2"],
            "gradient l2 loss per unit of l2 distance": ["gradient l2 1.5"],
            "learning rate at the end of the epoch": ["learning rate 0.1"],
            "stability: weight as scheduled": ["weight 3.2"],  # a third of the way from 0.8 to 8
            "stability: eps as scheduled": ["eps 0.03137"],
        }
        assert all(len(paths(figure)) == len(legend(figure)) for figure in found.values())

    def test_draws_to_scale(self) -> None:
        lines = [line(epoch, loss=loss) for epoch, loss in ((1, 1.0), (2, 3.0), (3, 2.0))]
        panel = figures(curves.page("run", config(4), lines))["loss nats per image"]
        (x1, y1), (x2, y2), (x3, y3) = points(paths(panel)[0])
        assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
        assert y1 > y3 > y2  # up is more
        assert y1 - y2 == pytest.approx(2 * (y1 - y3), abs=0.11)
        heights = {
            text.text: float(text.get("y", "nan"))
            for text in panel.iter(f"{SVG}text")
            if text.get("class") == "y"
        }
        assert heights["3"] - 4 == pytest.approx(y2, abs=0.11)
        epochs = [text.text for text in panel.iter(f"{SVG}text") if text.get("class") == "x"]
        assert epochs == ["0", "1", "2", "3", "4", "epochs"]

    def test_ramps_bend_where_they_should(self) -> None:
        panel = figures(curves.page("run", config(), [line(1)]))["stability: weight as scheduled"]
        corners = points(paths(panel)[0])
        left, right = corners[0][0], corners[-1][0]
        assert [(x - left) / (right - left) for x, _ in corners] == pytest.approx([0, 0.2, 0.8, 1], abs=1e-3)
        assert corners[0][1] == corners[1][1] > corners[2][1] == corners[3][1]

    def test_refers_to_nothing_outside(self) -> None:
        text = curves.page("run", config(), [line(1), line(2)])
        assert set(re.findall(r"https?://[^\"]+", text)) == {SVG.strip("{}"), XHTML.strip("{}")}
        assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|\bhref=|url\(|@import", text)

    def test_reloads_only_while_training(self) -> None:
        going = curves.page("run", config(2), [line(1)])
        finished = curves.page("run", config(2), [line(1), line(2)])
        assert '<meta http-equiv="refresh" content="10" />' in going
        assert "refresh" not in finished
        assert "1 of 2 epochs" in going
        assert "2 of 2 epochs · 2 min 0 s" in finished

    def test_states_the_test_split(self) -> None:
        lines = [line(1), {"test_accuracy": 0.9125, "test_images": 10000}]
        text = curves.page("run", config(1), lines)
        assert "test accuracy 91.25% of 10,000 images" in text
        assert "test accuracy" not in curves.page("run", config(1), lines[:1])

    def test_before_the_first_epoch(self) -> None:
        text = curves.page("run", config(), [])
        assert figures(text) == {}
        assert "The first epoch is under way" in text

    def test_one_epoch_is_dots(self) -> None:
        found = figures(curves.page("run", config(10, ("none",)), [line(1)]))
        for figure in found.values():
            assert paths(figure) == []
            assert len(list(figure.iter(f"{SVG}circle"))) == len(legend(figure))

    def test_long_numbers_fit_beside_the_axis(self) -> None:
        drawn = figures(curves.page("run", config(1), [line(1, loss=2.30371085, data=2.30370942)]))[LOSS]
        numbers = [text for text in drawn.iter(f"{SVG}text") if text.get("class") == "y"]
        assert max(len(text.text or "") for text in numbers) == 9
        assert all(float(text.attrib["x"]) >= 7 * len(text.text or "") for text in numbers)

    def test_what_is_not_finite_or_absent_is_a_gap(self) -> None:
        lines = [line(epoch) for epoch in range(1, 8)]
        lines[2]["loss"] = math.nan
        lines[5]["loss"] = math.inf
        del lines[0]["stability"], lines[6]["stability"]
        found = figures(curves.page("run", config(7), lines))
        loss = found["loss nats per image"]
        assert [len(points(path)) for path in paths(loss)] == [2, 2, 7]  # loss twice, then the data term
        assert len(list(loss.iter(f"{SVG}circle"))) == 1
        assert [len(points(path)) for path in paths(found[STABILITY])] == [5]
        assert legend(found[STABILITY]) == ["stability not finite"]
        assert not re.search(r"\b(nan|inf)\b", curves.page("run", config(7), lines))

    def test_nothing_but_nan(self) -> None:
        found = figures(curves.page("run", config(2), [line(1, loss=math.nan, data=math.nan)]))
        assert legend(found["loss nats per image"]) == ["loss not finite", "data term not finite"]
        assert paths(found["loss nats per image"]) == []

    @pytest.mark.parametrize("extreme", [1e308, -1e308, 5e-324, -0.0, 1e299, 1e-299, 3.4e38])
    def test_extremes_draw_too(self, extreme: float) -> None:
        lines = [line(1, stability=0.0), line(2, stability=extreme), line(3, stability=-extreme)]
        assert legend(figures(curves.page("run", config(), lines))[STABILITY])

    def test_without_held_out_images(self) -> None:
        lines = [line(1)]
        del lines[0]["held_out_accuracy"]
        assert legend(figures(curves.page("run", config(), lines))["accuracy %"]) == ["training batches 50"]

    def test_names_are_escaped(self) -> None:
        text = curves.page('a<b>&"c', config(), [line(1, **{"x<y": 1.0})])
        assert "<b>&" not in text
        assert "x<y" in figures(text)

    def test_a_thousand_epochs_stay_small(self) -> None:
        lines = [line(epoch, gradient_l2=epoch % 7) for epoch in range(1, 1001)]
        text = curves.page("run", config(1000), lines)
        assert len(text) < 60_000
        for figure in figures(text).values():
            for path in paths(figure):
                assert len(points(path)) <= 400

    def test_reads_what_a_run_writes(self, tmp_path: Path) -> None:
        written = json.dumps(line(1, loss=math.nan))
        assert "NaN" in written
        assert figures(curves.page("run", config(), [json.loads(written)]))
