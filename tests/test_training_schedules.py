"""Schedules at exact points: shares of training, whatever its length."""

import pytest

from guard.errors import UsageError
from guard.training import schedules

FROM_ZERO = {"three-slopes"}
JUST_BEFORE = 1 - 2**-53


def at(name: str, *shares: float, warmup: float = 0.0) -> list[float]:
    return [schedules.share(name, progress, warmup) for progress in shares]


class TestWarmUp:
    @pytest.mark.parametrize("name", sorted(set(schedules.SCHEDULES) - FROM_ZERO))
    def test_rises_to_the_peak(self, name: str) -> None:
        assert at(name, 0.0, 0.1, 0.2, warmup=0.2) == pytest.approx([0, 0.5, 1])
        assert at(name, 0.0) == [1]

    def test_a_schedule_from_0_has_none_but_its_own(self) -> None:
        for name in ("three-slopes", "0:0,0.5:1,1:0"):
            assert at(name, 0.0, 0.1, 0.5, 1.0, warmup=0.2) == at(name, 0.0, 0.1, 0.5, 1.0)

    @pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
    def test_shares_stay_shares(self, name: str) -> None:
        assert all(0 <= schedules.share(name, step / 500, 0.1) <= 1 for step in range(501))


class TestNamed:
    def test_one_cycle_and_cosine(self) -> None:
        assert at("one-cycle", 0.6, 1.0, warmup=0.2) == pytest.approx([0.5, 0])
        assert at("cosine", 0.0, 1 / 3, 0.5, 1.0) == pytest.approx([1, 0.75, 0.5, 0])
        assert at("constant", 0.0, 0.5, 1.0) == [1, 1, 1]

    # Epochs of 200, but for tenths: epochs of 300.
    def test_step_is_the_wide_residual_networks(self) -> None:
        found = at("step", 59.999 / 200, 60 / 200, 120 / 200, 160 / 200, 1.0)
        assert found == pytest.approx([1, 1 / 5, 1 / 25, 1 / 125, 1 / 125])

    def test_fifths_are_those_of_lip_on_cifar10(self) -> None:
        epochs = (59.999, 60, 119.999, 120, 179.999, 180, 200)
        found = at("fifths", *(epoch / 200 for epoch in epochs))
        assert found == pytest.approx([1, 1 / 5, 1 / 5, 1 / 25, 1 / 25, 1 / 125, 1 / 125])

    def test_tenths_are_those_of_lip_on_cifar100(self) -> None:
        found = at("tenths", *(epoch / 300 for epoch in (149.999, 150, 224.999, 225, 300)))
        assert found == pytest.approx([1, 1 / 10, 1 / 10, 1 / 100, 1 / 100])

    def test_three_slopes_are_those_of_hamming(self) -> None:
        epochs = (0, 20, 40, 60, 80, 90, 100)
        rates = [0.1 * share for share in at("three-slopes", *(epoch / 100 for epoch in epochs))]
        assert rates == pytest.approx([0, 0.05, 0.1, 0.0525, 0.005, 0.0025, 0])
        assert at("three-slopes", 0.4, 1.0) == [1, 0]


class TestKnots:
    def test_are_joined_by_straight_lines(self) -> None:
        name = "0:0,0.4:1,0.8:0.05,1:0"
        shares = [step / 40 for step in range(41)]
        assert at(name, *shares) == at("three-slopes", *shares)

    def test_may_jump(self) -> None:
        assert at("0:1,0.5:1,0.5:0.1,1:0.1", 0.0, 0.5 * JUST_BEFORE, 0.5, 1.0) == [1, 1, 0.1, 0.1]

    def test_are_constant_outside(self) -> None:
        assert [schedules.piecewise([(0.2, 3.0), (0.4, 5.0)], share) for share in (0, 0.2, 0.3, 0.4, 1)] == [
            3,
            3,
            pytest.approx(4),
            5,
            5,
        ]

    @pytest.mark.parametrize(
        "text",
        [
            "0:1",
            "0:1,0.5:0",
            "0.1:1,1:0",
            "0:1,0.6:1,0.5:1,1:0",
            "0:1,1:-1",
            "0:1,1:nan",
            "0:1,nan:1,1:0",
            "0:1,1:inf",
            "0:1,1",
            "0:a,1:0",
            "0:1,1:0,",
            ":",
            "0:1:2,1:0",
        ],
    )
    def test_that_mean_nothing_are_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match=r"--schedule is .*: expected knots share:value, shares rising"):
            schedules.named(text)

    def test_an_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(
            UsageError, match="--schedule is linear: expected one of one-cycle, cosine"
        ) as error:
            schedules.named("linear")
        assert all(name in str(error.value) for name in schedules.SCHEDULES)


class TestRamps:
    def test_go_straight_and_stay(self) -> None:
        ramp = schedules.Ramp(0.8, 8.0, 0.2, 0.8)
        values = [ramp.at(progress) for progress in (0, 0.2, 0.5, 0.8, 1)]
        assert values == pytest.approx([0.8, 0.8, 4.4, 8, 8])

    def test_may_fall_and_may_jump(self) -> None:
        assert schedules.Ramp(1.0, 0.0, 0.0, 1.0).at(0.25) == 0.75
        jump = schedules.Ramp(1.0, 2.0, 0.5, 0.5)
        assert [jump.at(0.5 * JUST_BEFORE), jump.at(0.5)] == [1, 2]
