"""Regularizers as they are written on the command line."""

import pytest

from guard.errors import UsageError
from guard.training.grammar import REGULARIZERS, check_precision, parse, parse_all
from guard.training.schedules import Ramp


class TestParse:
    def test_every_regularizer_says_what_it_needs(self) -> None:
        for name in set(REGULARIZERS) - {"none"}:
            with pytest.raises(UsageError, match=f"{name} needs .* as in {name}:"):
                parse(name)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "tulp:eps=1",
                "'tulp': expected one of none, tv-l2, tv-l1, lipschitz, tulip",
            ),
            ("tulip:eps=1,lambda=1", "no hyperparameter 'lambda': it takes eps, weight, h"),
            ("none:eps=1", "it takes none"),
            ("tulip:eps=1", "needs weight, as in tulip:eps=1,weight=0.1"),
            ("tulip:eps=1,weight=x", "weight is 'x', not a number of 0 or more"),
            ("tulip:eps=-1,weight=1", "eps is '-1'"),
            ("tulip:eps=nan,weight=1", "eps is 'nan'"),
            ("tulip:eps=inf,weight=1", "eps is 'inf'"),
            ("tulip:eps=1,eps=2,weight=1", "gives eps twice"),
            ("tulip:eps=1,weight=1,h=0", "h is '0', not a number above 0"),
            ("tv-l2:eps=1,h=0.001", "h is the difference step of form=penalty: give both or neither"),
            ("tv-l1:eps=1,form=step,h=0.001", "h is the difference step of form=penalty"),
            ("tv-l2:eps=1,form=other", "form is 'other', not step or penalty"),
            ("", "unknown regularizer ''"),
        ],
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            parse(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("stability:weight=1..2@0.5..0.5", "a ramp is written FROM..TO@START..STOP"),
            ("stability:weight=1..2@0.5", "a ramp is written"),
            ("stability:weight=1..2@0..2", "a ramp is written"),
            ("stability:weight=1..x@0..1", "weight is '1..x@0..1', not a number|weight is 'x'"),
            ("stability:weight=-1..2@0..1", "weight is '-1'"),
            ("stability:weight=1/0", "weight is '1/0', not a number"),
            ("adversarial-linf:eps=0.1,steps=1.5", "steps is '1.5', not a whole number above 0"),
            ("adversarial-linf:eps=0.1,steps=0", "steps is '0'"),
            ("dense-manifold:weight=1,scale=0", "scale is '0', not a number above 0"),
        ],
    )
    def test_refuses_ramps_and_numbers(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            parse(text)

    def test_numbers_fractions_and_ramps(self) -> None:
        chosen = parse("stability:weight=0.8..8@0.2..0.8,eps=2/255..8/255@0.1..0.35")
        assert chosen.settings["weight"] == Ramp(0.8, 8, 0.2, 0.8)
        assert chosen.at(0)["weight"] == chosen.at(0.2)["weight"] == 0.8
        assert chosen.at(0.5)["weight"] == pytest.approx(4.4)
        assert chosen.at(0.8)["weight"] == chosen.at(1)["weight"] == 8
        assert chosen.at(0.225)["eps"] == pytest.approx(5 / 255)
        assert parse("stability:weight=1..2").at(0.25)["weight"] == 1.25  # over all of training
        assert parse("adversarial-linf:eps=8/255,steps=10").at(0.3) == {"eps": 8 / 255, "steps": 10}

    def test_replays(self) -> None:
        assert parse("free-linf:eps=0.1").replays == 4
        assert parse("free-linf:eps=0.1,replays=8").replays == 8
        assert parse("tv-l2:eps=0.1").replays == 1


class TestTogether:
    @pytest.mark.parametrize(
        "texts",
        [
            ["tv-l2:eps=1", "tulip:eps=1,weight=1"],
            ["tv-l1:eps=1", "gaussian:sigma=1"],
            ["adversarial-linf:eps=1", "lipschitz:weight=1", "free-linf:eps=1"],
        ],
    )
    def test_two_that_replace_the_images_are_refused(self, texts: list[str]) -> None:
        with pytest.raises(UsageError, match=f"{texts[0]} and {texts[-1]} each train on other points"):
            parse_all(texts)

    def test_penalties_combine(self) -> None:
        texts = ["tv-l2:eps=1,form=penalty", "tulip:eps=1,weight=1", "stability:weight=1", "hamming:weight=1"]
        assert [chosen.name for chosen in parse_all(texts)] == ["tv-l2", "tulip", "stability", "hamming"]


def test_the_same_one_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="stability:weight=1 is given twice: give it once, with twice"):
        parse_all(["stability:weight=1", "none", "stability:weight=1"])
    assert len(parse_all(["stability:weight=1,eps=0.1", "stability:weight=1,eps=0.2"])) == 2


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("gradient-penalty-l2:weight=1,h=0.01", True),
        ("gradient-penalty-l1:weight=1,h=0.1..0.01@0..1", True),
        ("tv-l2:eps=0.1,form=penalty,h=0.001", True),
        ("gradient-penalty-l2:weight=1,h=0.05", False),
        ("gradient-penalty-l2:weight=1", False),
        ("tulip:eps=0.1,weight=1,h=0.001", False),  # differenced in full precision
    ],
)
def test_steps_that_bf16_rounds_away_are_refused(text: str, fine: bool) -> None:
    chosen = [parse(text)]
    check_precision(chosen, "float32")
    if fine:
        with pytest.raises(UsageError, match=r"rounding. Give --precision float32, leave h out"):
            check_precision(chosen, "bf16")
    else:
        check_precision(chosen, "bf16")
