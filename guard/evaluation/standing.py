"""The headline: robust accuracy with rejection, under the union of everything that attacks found."""

from collections.abc import Mapping, Sequence

import numpy as np

from guard.attacks import Norm
from guard.bundle import ScoreName
from guard.decision import NORMS
from guard.evaluation.results import Finished, Standing, share
from guard.evaluation.target import Flags
from guard.stages import Arrays


def headline_budgets(
    finished: Sequence[Finished], asked: Mapping[Norm, Sequence[float]]
) -> dict[Norm, list[float]]:
    """The budgets that have a headline, by norm, in rising order: those at which some attack on the model was
    run, and, where one looked for the nearest image, those asked for and those of noise too.

    An attack within a smaller budget says nothing of a larger one, at which it never tried.
    """
    found: dict[Norm, list[float]] = {}
    for norm in NORMS:
        here = [one.result for one in finished if one.result.norm == norm]
        tried = {one.budget for one in here if one.knowledge != "nothing"}
        if None in tried:
            tried |= {one.budget for one in here} | set(asked.get(norm, ()))
        found[norm] = sorted(budget for budget in tried if budget is not None)
    return found


def standings(
    finished: Sequence[Finished],
    clean: Arrays,
    scores: Sequence[ScoreName],
    budgets: Mapping[Norm, Sequence[float]],
) -> list[Standing]:
    """Robust accuracy with rejection for every score, norm and budget, under the union of all attacks."""
    return [
        _standing(finished, clean, score, norm, budget)
        for score in scores
        for norm, values in budgets.items()
        for budget in values
    ]


def _standing(
    finished: Sequence[Finished], clean: Arrays, score: ScoreName, norm: Norm, budget: float
) -> Standing:
    taken = clean["right"] & clean[f"accepted_{score}"]
    by_attack: dict[str, Flags] = {}
    left = taken.copy()
    alone = np.asarray(clean["right"], np.bool_).copy()
    shortest = len(taken)
    for one in finished:
        result, wrong = one.result, one.within(norm, budget)
        fell = by_attack.setdefault(result.name, np.zeros(len(taken), np.bool_))
        fell[one.arrays["row"][wrong & one.arrays[f"accepted_{score}"]]] = True
        left &= ~fell
        alone[one.arrays["row"][wrong]] = False
        aimed = result.norm == norm and result.aware in (None, score)
        if aimed and (result.budget is None or result.budget <= budget):
            shortest = min(shortest, int(result.settings["images"]))
    counts = {name: int((fell & taken).sum()) for name, fell in by_attack.items()}
    ranked = dict(sorted(((n, c) for n, c in counts.items() if c), key=lambda item: (-item[1], item[0])))
    return Standing(
        score=score,
        norm=norm,
        budget=budget,
        standing=share(left),
        clean=share(taken),
        worst=next(iter(ranked), None),
        fallen=ranked,
        complete=share(left[:shortest]) if shortest < len(taken) else None,
        alone=share(alone),
    )
