"""Diagrams: values lie where they should, ticks are round, and every drawing is well-formed XML."""

import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard import plots

SVG = "{http://www.w3.org/2000/svg}"
FRAME = plots.Frame(plots.linear(0, 1, "across"), plots.shares("up"))


def numbers(path: str | None) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path or "")]


class TestAxes:
    def test_of_whole_numbers(self) -> None:
        for count, expected in ((1, [0, 1]), (3, [0, 1, 2, 3]), (26, [0, 5, 10, 15, 20, 25])):
            assert [value for value, _ in plots.counted(count).ticks] == expected
        assert all(len(plots.counted(count).ticks) <= 7 for count in range(1, 3000))

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0.013, 0.4, ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]),
            (1, 1e6, ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
            (3, 3, ["2", "5"]),
        ],
    )
    def test_logarithmic(self, low: float, high: float, expected: list[str]) -> None:
        axis = plots.logarithmic(low, high)
        assert [text for _, text in axis.ticks] == expected
        assert axis.low <= low
        assert axis.high >= high
        assert axis.at(axis.low) == 0
        assert axis.at(axis.high) == pytest.approx(1)
        assert axis.at(0) == 0  # no logarithm: at the end
        assert axis.at(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)

    @given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))
    def test_logarithmic_of_anything(self, one: float, other: float) -> None:
        axis = plots.logarithmic(min(one, other), max(one, other))
        assert axis.low < axis.high
        assert len(axis.ticks) <= 10

    def test_scale_is_only_for_the_eye(self) -> None:
        axis = plots.linear(0.0, 0.5, scale=100)
        assert axis.ticks[-1] == (0.6, "60") or axis.ticks[-1] == (0.5, "50")
        assert axis.at(axis.high) == 1


class TestMarks:
    def test_stairs_hold_a_value_until_the_next(self) -> None:
        assert plots.stairs([(0, 1), (1, 0.5), (3, 0)]) == [(0, 1), (1, 1), (1, 0.5), (3, 0.5), (3, 0)]
        assert plots.stairs([]) == []

    def test_bars_are_as_high_as_their_values(self) -> None:
        drawn = ET.fromstring(plots.bars(FRAME, [0, 0.5, 1], [0.25, 1], "c0"))
        path = drawn.find("path")
        assert path is not None
        left, ground, low, middle, high, right, back = numbers(path.get("d"))
        assert (left, middle, right) == (FRAME.left, (left + right) / 2, FRAME.width - FRAME.right)
        assert ground == back == FRAME.bottom
        assert ground - low == pytest.approx((ground - high) / 4, abs=0.1)

    def test_band_goes_there_and_back(self) -> None:
        drawn = ET.fromstring(plots.band(FRAME, [(0, 0), (1, 0)], [(0, 1), (1, 1)], "c1"))
        path = drawn.find("path")
        assert path is not None
        assert numbers(path.get("d"))[1::2] == [FRAME.top, FRAME.top, FRAME.bottom, FRAME.bottom]

    def test_a_rule_says_what_it_is_on_the_side_that_has_room(self) -> None:
        for value, anchor in ((0.1, "start"), (0.9, "end")):
            drawn = ET.fromstring(f"<g>{plots.rule(FRAME, value, 'a < b')}</g>")
            text = drawn.find("text")
            assert text is not None
            assert text.text == "a < b"
            assert anchor in text.get("style", "")

    def test_dots_and_whiskers(self) -> None:
        assert len(ET.fromstring(plots.dots(FRAME, [(0, 0), (1, 1)], "c0")).findall("circle")) == 2
        assert len(ET.fromstring(plots.whiskers(FRAME, [(0, 0, 1)], "c0")).findall("path")) == 1


def test_texts_are_escaped() -> None:
    frame = plots.Frame(plots.linear(0, 1, "<x>"), plots.shares("<y>"))
    for text in (frame.svg([], '"<b>"'), plots.standalone(frame, [], "<t>", [("c0", "<n>")])):
        found = "".join(ET.fromstring(text).itertext())
        assert "<x>" in found
        assert "<y>" in found


class TestThinning:
    def test_keeps_peaks_ends_and_order(self) -> None:
        values = [(float(epoch), 0.0) for epoch in range(5000)]
        values[1234] = (1234.0, 9.0)
        values[777] = (777.0, -9.0)
        kept = plots.thinned(values)
        assert len(kept) <= 400
        assert kept[0][0] == 0
        assert kept[-1] == values[-1]
        assert values[1234] in kept
        assert values[777] in kept
        epochs = [epoch for epoch, _ in kept]
        assert epochs == sorted(set(epochs))

    def test_keeps_a_gap(self) -> None:
        values = [(float(epoch), 1.0 if epoch != 2500 else math.nan) for epoch in range(5000)]
        assert sum(math.isnan(value) for _, value in plots.thinned(values)) == 1

    def test_leaves_short_ones_alone(self) -> None:
        values = [(float(epoch), 0.0) for epoch in range(400)]
        assert plots.thinned(values) == values


class TestTicks:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0.0, 1.0, ["0.0", "0.5", "1.0"]),
            (0.3, 2.31, ["0", "1", "2", "3"]),
            (30.0, 62.0, ["30", "40", "50", "60", "70"]),
            (2400.0, 24000.0, ["0", "10000", "20000", "30000"]),
            (1.5e-4, 3e-4, ["1.5e-04", "2.0e-04", "2.5e-04", "3.0e-04"]),
            (100000.0, 101000.0, ["100000", "100500", "101000"]),
            (5.0, 5.0, ["4.5", "5.0", "5.5"]),
            (0.0, 0.0, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
            (-1.0, 1.0, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        ],
    )
    def test_are_round(self, low: float, high: float, expected: list[str]) -> None:
        assert plots.labels(plots.ticks(low, high)) == expected

    @given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
    def test_span_whatever_they_are_given(self, one: float, other: float) -> None:
        low, high = min(one, other), max(one, other)
        found = plots.ticks(low, high)
        slack = 1e-6 * (found[1] - found[0])
        assert found[0] <= low + slack
        assert found[-1] >= high - slack
        assert 3 <= len(found) <= 7

    @pytest.mark.parametrize("low", [-3.7, 0.0, 1e-9, 0.12, 5e6])
    @pytest.mark.parametrize("width", [1e-6, 0.02, 0.5, 3.3, 7.0, 99.0, 1e9])
    def test_span_the_values_few_and_all_different(self, low: float, width: float) -> None:
        found = plots.ticks(low, low + width)
        assert 3 <= len(found) <= 7
        assert found[0] <= low + 1e-9 * max(1, abs(low))
        assert found[-1] >= low + width * (1 - 1e-6) - 1e-9 * abs(low)
        assert len(set(plots.labels(found))) == len(found)
