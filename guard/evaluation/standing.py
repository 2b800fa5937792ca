"""The headline: robust accuracy with rejection, under the union of everything that attacks found."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from guard.bundle import ScoreName
from guard.evaluation.results import Finished, Standing, Subset
from guard.evaluation.target import Flags
from guard.norms import NORMS, Norm
from guard.shares import share
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
    right = np.asarray(clean["right"], np.bool_)
    taken = right & clean[f"accepted_{score}"]
    fell: dict[str, Flags] = {}
    wrong: dict[str, Flags] = {}
    images: dict[str, int] = {}
    fewer: set[str] = set()
    for one in finished:
        result, within = one.result, one.within(norm, budget)
        for flags, by in ((within & one.arrays[f"accepted_{score}"], fell), (within, wrong)):
            by.setdefault(result.name, np.zeros(len(right), np.bool_))[one.arrays["row"][flags]] = True
        images[result.name] = int(result.settings["images"])
        aimed = result.norm == norm and result.aware in (None, score)
        if aimed and images[result.name] < len(right) and (result.budget is None or result.budget <= budget):
            fewer.add(result.name)
    subsets = []
    for count in sorted({images[name] for name in fewer}, reverse=True):
        here = sorted(name for name in fewer if images[name] == count)
        more = [name for name in images if images[name] >= count and name not in here]
        before = _left(taken, fell, more)[:count]
        after = _left(taken, fell, [*more, *here])[:count]
        subsets.append(
            Subset(
                images=count,
                attacks=here,
                standing=share(after),
                clean=share(taken[:count]),
                alone=share(_left(right, wrong, [*more, *here])[:count]),
                added=share(~after[before]) if before.any() else None,
            )
        )
    fallen = {name: int((flags & taken).sum()) for name, flags in fell.items()}
    meant = {name: int(taken[: images[name]].sum()) for name in fell}
    ranked = sorted(
        (name for name in fallen if fallen[name]),
        key=lambda name: (-fallen[name] / meant[name], -fallen[name], name),
    )
    return Standing(
        score=score,
        norm=norm,
        budget=budget,
        standing=share(_left(taken, fell, fell)),
        clean=share(taken),
        worst=next(iter(ranked), None),
        fallen={name: fallen[name] for name in ranked},
        meant=meant,
        alone=share(_left(right, wrong, wrong)),
        subsets=subsets,
    )


def _left(taken: Flags, broken: Mapping[str, Flags], names: Iterable[str]) -> Flags:
    """Which of the images taken none of the named attacks broke."""
    left = taken.copy()
    for name in names:
        left &= ~broken[name]
    return left
