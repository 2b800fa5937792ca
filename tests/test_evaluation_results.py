import math
from pathlib import Path

import numpy as np
import pytest

from guard.errors import DataError
from guard.evaluation.results import (
    auroc,
    auroc_interval,
    detection,
    load,
    load_arrays,
    paired_interval,
    summary,
)


def test_summary_is_of_the_finite_values() -> None:
    values = np.array([3.0, np.inf, 1.0, 2.0, np.nan, 4.0, 5.0])
    found = summary(values)
    assert found is not None
    assert (found.n, found.mean, found.median) == (5, 3.0, 3.0)
    assert found.standard_error == pytest.approx(np.sqrt(2.5 / 5))
    assert (found.median_lower, found.median_upper) == (1.0, 5.0)
    assert summary(np.array([np.inf, 1.0])) is None


@pytest.mark.parametrize("n", [6, 7, 20, 21, 26, 100, 104, 999, 1000])
def test_the_interval_of_the_median_covers_it(n: int) -> None:
    found = summary(np.arange(1.0, n + 1))  # so that an order statistic is its rank
    assert found is not None
    low, high = int(found.median_lower), int(found.median_upper)
    assert low + high == n + 1
    # The median lies between them where at least `low` and at most `high` - 1 values lie below it.
    covered = sum(math.comb(n, below) for below in range(low, high)) / 2**n
    assert 0.95 <= covered < 0.99


@pytest.mark.parametrize(
    ("attacked", "clean", "expected"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0),
        ([1.0], [2.0, 3.0], 0.0),
        ([1.0, 2.0], [1.0, 2.0], 0.5),
        ([2.0], [1.0, 2.0, 3.0, 4.0], 1.5 / 4),
        ([np.inf, np.nan], [1.0, np.inf], 0.75),
    ],
)
def test_auroc_counts_pairs(attacked: list[float], clean: list[float], expected: float) -> None:
    assert auroc(np.array(attacked), np.array(clean)) == expected


@pytest.mark.parametrize(("apart", "attacked", "clean"), [(0.0, 40, 60), (1.5, 40, 60), (3.0, 200, 30)])
def test_the_interval_of_the_auroc_covers_it(apart: float, attacked: int, clean: int) -> None:
    generator, covered, runs = np.random.default_rng(0), 0, 400
    area = 0.5 * math.erfc(-apart / 2)  # of two normal scores of unit variance
    for _ in range(runs):
        found = auroc(generator.normal(apart, 1, attacked), generator.normal(0, 1, clean))
        lower, upper = auroc_interval(found, attacked, clean)
        covered += lower <= area <= upper
    assert 0.92 <= covered / runs <= 0.995


@pytest.mark.parametrize(("shift", "alike"), [(0.0, 0.9), (1.0, 0.9), (1.0, 0.0), (-1.0, -0.5)])
def test_the_interval_of_paired_scores_covers_it(shift: float, alike: float) -> None:
    generator, covered, runs = np.random.default_rng(0), 0, 400
    area = 0.5 * math.erfc(-shift / 2)
    for _ in range(runs):
        clean = generator.normal(0, 1, 80)
        rows = generator.permutation(80)[:60]  # those that an attack broke
        attacked = shift + alike * clean[rows] + math.sqrt(1 - alike**2) * generator.normal(0, 1, 60)
        lower, upper = paired_interval(attacked, clean, rows)
        covered += lower <= area <= upper
    assert 0.92 <= covered / runs <= 0.98


def test_the_interval_shown_is_the_wider_one() -> None:
    clean = np.linspace(0, 1, 40)
    rows = np.arange(40)
    for attacked in (clean + 0.1, clean[::-1] + 0.1):
        found = detection(np.zeros(40, np.bool_), attacked, clean, rows)
        apart = auroc_interval(found.auroc, 40, 40)
        paired = paired_interval(attacked, clean, rows)
        assert found.auroc_lower == min(apart[0], paired[0])
        assert found.auroc_upper == max(apart[1], paired[1])
    assert paired_interval(clean + 2, clean, rows) == (1.0, 1.0)
    assert detection(np.zeros(40, np.bool_), clean + 2, clean, rows).auroc_lower < 1


def test_an_auroc_at_an_end_has_an_interval_too() -> None:
    lower, upper = auroc_interval(1.0, 20, 30)
    assert 0.85 < lower < 0.95
    assert upper == 1.0
    assert auroc_interval(0.0, 20, 30) == pytest.approx((0.0, 1 - lower))
    # Of one each the variance is a (1 - a), and 1 - a = 1.96 sqrt(a (1 - a)) at a = 1 / (1 + 1.96^2).
    assert auroc_interval(1.0, 1, 1)[0] == pytest.approx(1 / (1 + 1.96**2))


def test_a_folder_without_results_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no results.json .*Make it with: guard evaluate"):
        load(tmp_path)
    (tmp_path / "results.json").write_text('{"command": 3}')
    with pytest.raises(DataError, match=r"results.json: command: Input should be a valid string"):
        load(tmp_path)


def test_broken_and_incomplete_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match=r"a.npz: is no .npz file"):
        load_arrays(path)
    np.savez(path, row=np.arange(3))
    with pytest.raises(DataError, match=r"holds no wrong\."):
        load_arrays(path, ("row", "wrong"))
    assert load_arrays(path, ("row",))["row"].tolist() == [0, 1, 2]
