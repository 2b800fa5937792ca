"""Signs that gradients are masked, so that attacks by gradients look weaker than the attacker is.

Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5. `probe` runs a few attacks for them;
`checks` judges these, and the attacks of an evaluation against one another. `probe_detector` and
`detector_checks` do the same of attacks on the served decision, which follow the detector's gradients too.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from guard import attacks
from guard.attacks import Differentiable, Floats, Labels, column, misclassified, random_directions
from guard.bundle import ScoreName
from guard.evaluation import adaptive
from guard.evaluation.attack import QUERIES, WHOLE_AUTOATTACK, Knowledge, named
from guard.evaluation.results import Check, CheckVerdict, Finished, Flags
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.stages import Arrays

STEPS = (1, 5, 20, 80)
UNBOUNDED_STEPS = 80
DRAWS = 100


class BlackBox(NamedTuple):
    """A kind of attack that sees no gradient of the model's: what it knows, and what of a command adds it."""

    knows: tuple[Knowledge, ...]
    adds: str


BLACK_BOXES = {
    "search by queries": BlackBox(QUERIES, "the group decision"),
    "transfer": BlackBox(("another network",), "--twin"),
}

TOLERANCE = 0.01
"""Share of images that an attack may win over another by luck: one image, or one in a hundred."""

PASSES = 3 * (sum(STEPS) + len(STEPS)) * 2 + 3 * 2 * (UNBOUNDED_STEPS + 1) + 2 * DRAWS
"""Cost of `probe` per image in forward passes, at most, for two norms."""

DETECTOR_PASSES = adaptive.joint_passes(adaptive.JOINT, 20, 20)
"""The same of `probe_detector`."""


def probe(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    budgets: Mapping[Norm, float],
    *,
    seed: int = 0,
) -> Arrays:
    """What the checks need that the attacks of an evaluation do not tell, per image (B,).

    `NORM-STEPS`: success of PGD on the logit margin, from the image alone, with so many steps, at the norm's
    budget, in steps of 2.5 budgets over their number: were the first as long as the budget, every count would
    hold the one step. `NORM-random`: whether one of `DRAWS` random perturbations of that length is wrong,
    looked at where the longest PGD failed. `unbounded`: success of PGD in the linf ball of radius 1, which
    holds every image. Attacked images stay in [0, 1].
    """
    found: Arrays = {}
    for norm, eps in budgets.items():
        for steps in STEPS:
            found[f"{norm}-{steps}"] = attacks.pgd(
                model,
                images,
                labels,
                eps,
                norm=norm,
                steps=steps,
                restarts=1,
                rate=2.5 / steps,
                clip=True,
                seed=seed,
            ).success
        rows = np.flatnonzero(~found[f"{norm}-{STEPS[-1]}"])
        found[f"{norm}-random"] = np.zeros(len(images), np.bool_)
        found[f"{norm}-random"][rows] = _random(model, images[rows], labels[rows], norm, eps, seed)
    found["unbounded"] = attacks.pgd(
        model,
        images,
        labels,
        1.0,
        norm="linf",
        steps=UNBOUNDED_STEPS,
        restarts=2,
        loss="cross-entropy",
        clip=True,
        seed=seed,
    ).success
    return found


def probe_detector(
    target: Target, images: Floats, labels: Labels, score: ScoreName, *, seed: int = 0
) -> Arrays:
    """`unbounded` (B,): whether joint PGD in the linf ball of radius 1 makes the image wrong and accepted."""
    found = adaptive.joint(target, images, labels, 1.0, score=score, norm="linf", seed=seed)
    return {"unbounded": found.success}


def _random(
    model: Differentiable, images: Floats, labels: Labels, norm: Norm, eps: float, seed: int
) -> Flags:
    generator = np.random.default_rng([seed, 7])
    wrong = np.zeros(len(images), np.bool_)
    for _ in range(DRAWS):
        rows = np.flatnonzero(~wrong)
        if not len(rows):
            break
        noise = random_directions(images.shape, norm, generator)[rows]
        points = np.clip(images[rows] + column(np.full(len(rows), eps)) * noise, 0.0, 1.0)
        wrong[rows] = misclassified(points, model.logits(points), labels[rows])
    return wrong


def checks(finished: Sequence[Finished], probed: Arrays, budgets: Mapping[Norm, float]) -> list[Check]:
    """Every check with its verdict; `budgets` are those that `probed` was made at."""
    found = [
        _unbounded(
            probed,
            "an unbounded attack always succeeds",
            "PGD in the whole of [0, 1] makes every image wrong",
        )
    ]
    for norm, eps in budgets.items():
        found += [
            _more_steps(probed, norm, eps),
            _one_step(probed, norm, eps),
            _random_search(probed, norm, eps),
            *(_black_box(finished, kind, norm, eps) for kind in BLACK_BOXES),
        ]
    return found


def detector_checks(
    finished: Sequence[Finished], probed: Arrays, budgets: Mapping[Norm, float], score: ScoreName
) -> list[Check]:
    """Every check of attacks that know the detector of this score; `probed` is of `probe_detector`."""
    found = [
        _unbounded(
            probed,
            "an unbounded attack is always accepted",
            f"joint PGD in the whole of [0, 1] makes every image wrong and accepted by {score}",
        )
    ]
    for norm, eps in budgets.items():
        found.append(_more_starts(finished, norm, eps, score))
        found += [_black_box_accepted(finished, kind, norm, eps, score) for kind in BLACK_BOXES]
    return found


def _unbounded(probed: Arrays, name: str, expected: str) -> Check:
    success = probed["unbounded"]
    return Check(
        name=name,
        verdict="passed" if success.all() else "failed",
        expected=expected,
        found=f"{int(success.sum())} of {len(success)} images",
        numbers={"success": int(success.sum()), "n": len(success)},
    )


def _more_steps(probed: Arrays, norm: Norm, eps: float) -> Check:
    counts = {steps: int(probed[f"{norm}-{steps}"].sum()) for steps in STEPS}
    n = len(probed[f"{norm}-1"])
    values = list(counts.values())
    falls = max(before - after for before, after in pairwise(values))
    return Check(
        name=f"more steps are stronger, {norm}",
        verdict=_verdict(_few(falls, n), fell=max(values)),
        expected=f"PGD at {eps:.4g} breaks no fewer images with more steps",
        found=", ".join(f"{count} with {steps}" for steps, count in counts.items()) + f", of {n}",
        numbers={"n": n, "budget": eps} | {f"steps {steps}": count for steps, count in counts.items()},
    )


def _one_step(probed: Arrays, norm: Norm, eps: float) -> Check:
    once, often = probed[f"{norm}-1"], probed[f"{norm}-{STEPS[2]}"]
    alone = int((once & ~often).sum())
    return Check(
        name=f"many steps beat one, {norm}",
        verdict=_verdict(_few(alone, len(once)), fell=int((once | often).sum())),
        expected=f"one step of {eps:.4g} breaks no image that {STEPS[2]} steps do not",
        found=f"{alone} of {len(once)} images; one step breaks {int(once.sum())}, {STEPS[2]} break "
        f"{int(often.sum())}",
        numbers={
            "one step alone": alone,
            "one step": int(once.sum()),
            "many steps": int(often.sum()),
            "n": len(once),
            "budget": eps,
        },
    )


def _random_search(probed: Arrays, norm: Norm, eps: float) -> Check:
    alone, n = int(probed[f"{norm}-random"].sum()), len(probed[f"{norm}-random"])
    left = n - int(probed[f"{norm}-{STEPS[-1]}"].sum())
    return Check(
        name=f"random search finds nothing that PGD does not, {norm}",
        verdict=_verdict(_few(alone, n), fell=n - left + alone),
        expected=f"none of {DRAWS} random perturbations of {eps:.4g} breaks an image that PGD does not",
        found=f"{alone} of the {left} images that PGD left standing",
        numbers={"random alone": alone, "left by PGD": left, "n": n, "draws": DRAWS, "budget": eps},
    )


def _black_box(finished: Sequence[Finished], kind: str, norm: Norm, eps: float) -> Check:
    """Of the images that attacks both by gradients and of this kind of black box were run on, those that
    only the black box broke.

    Only attacks made for this norm and budget count, or for the nearest image in this norm: others are no
    measure of what their kind can do here. Those that know the detector, and may stop at images broken
    before, are left out.
    """
    plain = [
        one
        for one in finished
        if one.result.aware is None and one.result.norm == norm and one.result.budget in (None, eps)
    ]
    white = [one for one in plain if _by_gradients(one)]
    black = [one for one in plain if one.result.knowledge in BLACK_BOXES[kind].knows]
    rows = np.intersect1d(_rows(white), _rows(black))
    expected = f"{kind} breaks no image within {eps:.4g} that gradients do not"
    name = f"gradients beat {kind}, {norm}"
    if not len(rows):
        return Check(
            name=name,
            verdict="not run",
            expected=expected,
            found="no attacks of both kinds at this budget, or to the nearest image, on the same images; "
            f"{BLACK_BOXES[kind].adds} adds it",
        )
    by_gradients = np.isin(rows, _broken(white, norm, eps))
    by_black_box = np.isin(rows, _broken(black, norm, eps))
    alone = int((by_black_box & ~by_gradients).sum())
    return Check(
        name=name,
        verdict=_verdict(_few(alone, len(rows)), fell=int(by_black_box.sum())),
        expected=expected,
        found=f"{alone} of {len(rows)} images; {kind} breaks {int(by_black_box.sum())}, gradients "
        f"{int(by_gradients.sum())}",
        numbers={
            f"{kind} alone": alone,
            kind: int(by_black_box.sum()),
            "gradients": int(by_gradients.sum()),
            "n": len(rows),
            "budget": eps,
        },
    )


def _more_starts(finished: Sequence[Finished], norm: Norm, eps: float, score: ScoreName) -> Check:
    """Of the images that other starts were run on, those that they bring past the detector and no other
    attack does.

    Attacks that follow the detector's gradient have found what there is where these are few.
    """
    attack = named("joint-restarts", score, norm)
    expected = f"other starts bring no image within {eps:.4g} past {score} that other attacks do not"
    name = f"more starts find no more past the detector, {norm}"
    one = next((one for one in finished if (one.result.name, one.result.budget) == (attack, eps)), None)
    if one is None:
        return Check(name=name, verdict="not run", expected=expected, found=f"{attack} adds it")
    others = [other for other in finished if other is not one]
    past, before = _broken([one], norm, eps, score), _broken(others, norm, eps, score)
    alone, n = len(np.setdiff1d(past, before)), len(_rows([one]))
    return Check(
        name=name,
        verdict=_verdict(_few(alone, n), fell=len(np.union1d(past, before))),
        expected=expected,
        found=f"{alone} of {n} images; other attacks bring {len(before)} past it",
        numbers={"more starts alone": alone, "other attacks": len(before), "n": n, "budget": eps},
    )


def _black_box_accepted(
    finished: Sequence[Finished], kind: str, norm: Norm, eps: float, score: ScoreName
) -> Check:
    """Of the images that this kind of black box was run on, those that it makes wrong and accepted and no
    attack by gradients does. One that does so with none says nothing: it would find none whatever gradients
    are like.
    """
    box = BLACK_BOXES[kind]
    black = [
        one
        for one in finished
        if one.result.aware == score
        and one.result.knowledge in box.knows
        and one.result.norm == norm
        and one.result.budget in (None, eps)
    ]
    white = [one for one in finished if _by_gradients(one)]
    expected = f"{kind} brings no image within {eps:.4g} past {score} that gradients do not"
    name = f"gradients beat {kind} past the detector, {norm}"
    if not black:
        found = f"no such attack at this budget; {box.adds} adds it"
        return Check(name=name, verdict="not run", expected=expected, found=found)
    n = len(_rows(black))
    past = _broken(black, norm, eps, score)
    alone = len(np.setdiff1d(past, _broken(white, norm, eps, score)))
    return Check(
        name=name,
        verdict=_verdict(_few(alone, n), fell=len(past)),
        expected=expected,
        found=f"{alone} of {n} images; {kind} brings {len(past)} past it",
        numbers={f"{kind} alone": alone, kind: len(past), "n": n, "budget": eps},
    )


def _by_gradients(one: Finished) -> bool:
    """Whether the attack has nothing but gradients: what AutoAttack's last part finds is found by queries."""
    return one.result.knowledge == "gradients" and one.result.name not in WHOLE_AUTOATTACK


def _rows(finished: Sequence[Finished]) -> Labels:
    return np.unique(np.concatenate([one.arrays["row"] for one in finished] or [np.zeros(0, np.int64)]))


def _broken(finished: Sequence[Finished], norm: Norm, eps: float, score: ScoreName | None = None) -> Labels:
    """Rows made wrong within the budget, with a score also accepted by it."""
    none = [np.zeros(0, np.int64)]
    return np.unique(
        np.concatenate(
            none
            + [
                one.arrays["row"][one.within(norm, eps) & (score is None or one.arrays[f"accepted_{score}"])]
                for one in finished
            ]
        )
    )


def _few(count: int, n: int) -> bool:
    return count <= max(1, int(TOLERANCE * n))


def _verdict(good: bool, *, fell: int) -> CheckVerdict:
    """An attack that breaks nothing at all, at too small a budget or for want of strength, says nothing of
    others: `fell` is how many images the one that would tell breaks.
    """
    return ("passed" if good else "failed") if fell else "undecided"
