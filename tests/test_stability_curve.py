"""The picture is sound XML that holds the curves where they belong."""

from xml.etree import ElementTree as ET

import pytest

from guard.stability_curve import picture

SVG = "{http://www.w3.org/2000/svg}"


def test_curves_stand_where_their_values_are() -> None:
    text = picture("a < b & c", "eps", [0, 1, 2], {"first": [0, 0.5, 1], "second": [1, 1, 1]})
    root = ET.fromstring(text)
    lines = [path.attrib["d"] for group in root.iter(f"{SVG}g") for path in group.findall(f"{SVG}path")]
    first, second = (line.removeprefix("M").split("L") for line in lines if "L" in line)
    low, middle, high = (tuple(map(float, point.split())) for point in first)
    assert middle == pytest.approx(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2), abs=0.11)
    assert low[1] > high[1]  # SVG counts downwards
    assert {point.split()[1] for point in second} == {f"{high[1]:.1f}"}
    assert "a < b & c" in [element.text for element in root.iter(f"{SVG}text")]


def test_a_curve_over_one_distance_is_drawn() -> None:
    ET.fromstring(picture("t", "eps", [0.0, 0.0], {"only": [1, 1]}))
