"""The one shape of all attacks, ours or a library's, white-box or not, and the tasks they are run as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

from guard.attacks import Floats, Found, Labels
from guard.bundle import ScoreName
from guard.evaluation.target import Target
from guard.norms import Norm

Knowledge = Literal["gradients", "scores", "decisions", "another network", "nothing"]

QUERIES: tuple[Knowledge, ...] = ("scores", "decisions")
"""What attacks by queries know."""

BLACK_BOX: tuple[Knowledge, ...] = (*QUERIES, "another network")
"""What attacks know that see no gradient of the model's."""

WHOLE_AUTOATTACK = ("autoattack-l2", "autoattack-linf")
"""The attacks that follow gradients and search by queries too: Square is their last part."""

SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
DEFAULT: ScoreName = "jacobian"

BUDGETS: dict[Norm, tuple[float, ...]] = {"l2": (0.25, 0.5, 1.0), "linf": (2 / 255, 8 / 255)}
"""Those attacks are run at where nothing else is asked for."""

Run = Callable[[Target, Floats, Labels, "float | None", int], Found]
"""`run(target, images, labels, budget, seed)`: images (B, C, H, W) in [0, 1] of true classes (B,).

Attacked images stay in [0, 1] and, with a budget, within it. What is not broken keeps success False and
distance inf. Deterministic by seed, and an image's fate should not hang on its neighbours in the batch more
than the attack's own randomness does.
"""


SPARING = 1000
"""Passes per image from which an attack that knows the detector spares images that are broken already."""


@dataclass(frozen=True)
class Attack:
    """An attack by its name on the command line.

    `norm` is what budgets and distances are measured in, None where the attack has a measure of its own (its
    `unit`). `budgets` are those it is run at by default; None: it looks for the nearest adversarial image.
    `aware` is the score of the detector it knows and evades, None for attacks on the classifier alone, which
    succeed where the class is wrong; an aware attack succeeds where it is wrong and accepted. `passes` is
    its greatest cost per image in forward passes, a gradient counted as two more. `needs` is the package of
    the extra `attacks` that it takes. `source` is the paper and section its settings come from.
    """

    name: str
    title: str
    run: Run
    norm: Norm | None
    knowledge: Knowledge
    passes: int
    source: str
    budgets: tuple[float, ...] | None = None
    aware: ScoreName | None = None
    needs: str | None = None
    unit: str = "pixel values"

    @property
    def keywords(self) -> dict[str, bool | int | float | str]:
        """The plain settings that its function, and what it runs, are bound to; of sequences their length."""
        parts = (*self.run.args, self.run) if isinstance(self.run, partial) else ()
        bound: dict[str, Any] = {}
        for part in parts:
            bound |= part.keywords if isinstance(part, partial) else {}
        sized = {name: len(value) if isinstance(value, tuple) else value for name, value in bound.items()}
        return {name: value for name, value in sized.items() if isinstance(value, bool | int | float | str)}

    @property
    def installed(self) -> bool:
        """Whether what it needs can be imported."""
        return self.needs is None or find_spec(self.needs) is not None

    @property
    def wanting(self) -> str:
        """What to do where it is not installed."""
        return (
            f"needs {self.needs}, which is not installed. In guard's folder, run: pip install -e '.[attacks]'"
        )


@dataclass(frozen=True)
class Task:
    """One attack at one budget; `denial` counts rejected images instead of wrong ones."""

    attack: Attack
    budget: float | None
    denial: bool = False

    @property
    def name(self) -> str:
        """The attack's name and its budget: its own among all tasks."""
        return self.attack.name if self.budget is None else f"{self.attack.name}-{self.budget}"

    @property
    def skips(self) -> bool:
        """Whether images that a cheaper attack broke already, for the same score and budget, are spared."""
        dear = self.attack.knowledge in BLACK_BOX or self.attack.passes >= SPARING
        return self.attack.aware is not None and self.budget is not None and dear and not self.denial


def tasks_of(attacks: Sequence[Attack], denials: Sequence[Attack] = ()) -> list[Task]:
    """Every attack at each of its budgets, cheap ones first."""
    found = [
        Task(attack, budget, denial)
        for denial, some in ((False, attacks), (True, denials))
        for attack in some
        for budget in attack.budgets or (None,)
    ]
    return sorted(found, key=lambda task: (task.attack.passes, task.denial))


def bound(budget: float | None) -> float:
    """The budget of an attack that cannot go without; raises `ValueError` where there is none, or below 0."""
    if budget is None or not budget >= 0:
        raise ValueError(f"budget is {budget}; expected a number of at least 0")
    return budget


class Budgeted(Protocol):
    """An attack on the served decision within a budget, its score and norm bound later."""

    def __call__(
        self,
        target: Target,
        images: Floats,
        labels: Labels,
        eps: float,
        /,
        *,
        score: ScoreName,
        norm: Norm,
        seed: int,
    ) -> Found:
        """As `guard.evaluation.adaptive.joint`."""
        ...


def named(method: str, score: ScoreName, norm: Norm) -> str:
    """The attack's name on the command line: the default score goes without saying."""
    return f"{method}-{norm}" if score == DEFAULT else f"{method}-{score}-{norm}"


def _run_knowing(
    attack: Budgeted,
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    score: ScoreName,
    norm: Norm,
) -> Found:
    return attack(target, images, labels, bound(budget), score=score, norm=norm, seed=seed)


def knowing(
    method: str, title: str, attack: Budgeted, score: ScoreName, norm: Norm, *, passes: int, source: str
) -> Attack:
    """The attack bound to the score that it knows, with the norm's budgets."""
    return Attack(
        name=named(method, score, norm),
        title=f"{title}, knowing {score}",
        run=partial(_run_knowing, attack, score=score, norm=norm),
        norm=norm,
        knowledge="gradients",
        passes=passes,
        source=source,
        budgets=BUDGETS[norm],
        aware=score,
    )
