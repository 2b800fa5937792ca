"""All attacks there are, and which of them a request means: by name, or by group."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from guard.bundle import ScoreName
from guard.errors import UsageError
from guard.evaluation import (
    adaptive,
    controls,
    denial,
    gradient,
    libraries,
    over_http,
    top_five,
    transfer,
    unseen,
)
from guard.evaluation.attack import QUERIES, WHOLE_AUTOATTACK, Attack
from guard.evaluation.target import Classifier
from guard.norms import Norm

MODULES = (gradient, adaptive, libraries, unseen, controls, over_http, top_five)
"""Modules of attacks, each with `ATTACKS`."""

DEFAULT = (
    "noise",
    "fgsm",
    "pgd",
    "pgd-deep",
    "apgd-ce",
    "apgd-margin",
    "fmn",
    "fmn-targeted",
    "high-confidence",
    "joint-pgd",
    "joint-restarts",
    "transfer",
    "transfer-accepted",
    "denial",
)
"""The default suite, in both norms: all that the headline needs, strong for its cost, without packages."""

Group = Literal[
    "default",
    "gradient",
    "minimum-norm",
    "decision",
    "adaptive",
    "unseen",
    "controls",
    "autoattack",
    "top5",
    "all",
]

GROUPS: dict[Group, str] = {
    "default": "noise, FGSM, PGD, APGD, FMN, high confidence, joint PGD, denial; with --twin transfer",
    "gradient": "the strongest image within a budget, by gradients",
    "minimum-norm": "the nearest wrong image, by gradients",
    "decision": "black box: by queries of labels or scores",
    "adaptive": "attacks that know the detector, or an undefended twin",
    "unseen": "changes that are no small norm: flow, colours, compression",
    "controls": "noise and corruptions that know nothing of the model",
    "autoattack": "AutoAttack's standard suite",
    "top5": "for many classes: out of the five most probable ones",
    "all": "everything that is installed",
}

QUICK = ("pgd-l2", "pgd-linf", "pgd-deep-l2", "joint-pgd-l2", "cw-quick-l2")
QUICK_BUDGETS: dict[Norm, tuple[float, ...]] = {"l2": (0.5,), "linf": (2 / 255,)}


def known(twin: Classifier | None = None) -> tuple[Attack, ...]:
    """Every attack on accuracy, cheap ones first; those of transfer only with a `twin` to make them on."""
    found = [attack for module in MODULES for attack in module.ATTACKS]
    if twin is not None:
        found += transfer.attacks(twin)
    return tuple(sorted(found, key=lambda attack: attack.passes))


def over_rejection() -> tuple[Attack, ...]:
    """The attacks that make clean images rejected: success is a rejection."""
    return denial.ATTACKS


def belongs(attack: Attack, group: Group) -> bool:
    """Whether the attack is one of the group's."""
    queries = attack.knowledge in QUERIES
    adaptive = attack.aware is not None or attack.knowledge == "another network"
    top5 = attack.name.startswith("top5-")
    plain = attack.knowledge == "gradients" and attack.norm is not None and not adaptive and not top5
    match group:
        case "default":
            return common_name(attack).rpartition("-")[0] in DEFAULT
        case "gradient":
            return plain and attack.budgets is not None and attack.name not in WHOLE_AUTOATTACK
        case "minimum-norm":
            return plain and attack.budgets is None
        case "decision":
            return queries
        case "adaptive":
            return adaptive
        case "unseen":
            return attack.norm is None and attack.knowledge != "nothing"
        case "controls":
            return attack.knowledge == "nothing"
        case "autoattack":
            return attack.name in WHOLE_AUTOATTACK
        case "top5":
            return top5
        case "all":
            return True


def common_name(attack: Attack) -> str:
    """The attack's name without the score it knows: `joint-pgd-l2` of `joint-pgd-radius-l2`."""
    return attack.name if attack.aware is None else attack.name.replace(f"-{attack.aware}", "")


def choose(
    words: Sequence[str],
    scores: Sequence[ScoreName],
    attacks: Sequence[Attack],
) -> list[Attack]:
    """The attacks that names and groups mean, in the order of `attacks`; of groups, also those whose package
    is not installed.

    An attack that knows the detector is taken for the `scores` at hand alone; its name may leave the score
    out. Raises `UsageError` for a name that nothing has, naming those near it, for an attack asked for by
    name whose package is not installed, and where no attack is.
    """
    usable = [attack for attack in attacks if attack.aware is None or attack.aware in scores]
    taken: set[str] = set()
    for word in words:
        members = [attack for attack in usable if word in (attack.name, common_name(attack))]
        if word in GROUPS:
            members = [attack for attack in usable if belongs(attack, word)]
        elif not members:
            raise UsageError(_unknown(word, attacks, scores))
        elif not members[0].installed:
            raise UsageError(f"the attack {word} {members[0].wanting}")
        taken |= {attack.name for attack in members}
    chosen = [attack for attack in usable if attack.name in taken]
    if not any(attack.installed for attack in chosen):
        reasons = [f"{attack.name} {attack.wanting}" for attack in chosen]
        raise UsageError(
            f"no attack of {', '.join(words)} can be run: {'; '.join(reasons) or 'none is one'}."
        )
    return chosen


def quick(scores: Sequence[ScoreName], attacks: Sequence[Attack]) -> list[Attack]:
    """The suite of `--quick`: PGD-20, deep PGD, joint PGD and a shortened Carlini-Wagner."""
    usable = [attack for attack in attacks if attack.aware is None or attack.aware in scores]
    return [attack for attack in usable if common_name(attack) in QUICK]


def with_budgets(attack: Attack, budgets: Mapping[Norm, tuple[float, ...]]) -> Attack:
    """The attack at other budgets than its own, where it has budgets in a norm that is named."""
    if attack.budgets is None or attack.norm is None or attack.norm not in budgets:
        return attack
    return replace(attack, budgets=budgets[attack.norm])


def _unknown(word: str, attacks: Sequence[Attack], scores: Sequence[ScoreName]) -> str:
    if "/" in word or word in (".", ".."):
        return f"{word!r} is no attack. A bundle stands before: guard evaluate {word} --attacks ..."
    other = {attack.aware for attack in attacks if word in (attack.name, common_name(attack))}
    if other:
        return (
            f"the attack {word} knows the score {other.pop()}: add it to --scores (now {', '.join(scores)})."
        )
    if word.startswith("transfer"):
        return f"the attack {word} is made on another network: name that with --twin BUNDLE."
    names = sorted({name for attack in attacks for name in (attack.name, common_name(attack))} | set(GROUPS))
    near = difflib.get_close_matches(word, names, n=4, cutoff=0.4)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return f"{word!r} is no attack.{hint} All of them: guard evaluate --attacks list"
