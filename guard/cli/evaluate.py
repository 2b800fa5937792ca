"""`guard evaluate`: attacks on a bundle, and what they leave standing."""

import argparse
import shlex
import textwrap
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.cli.options import (
    WIDTH,
    Subparsers,
    add_bundle,
    add_command,
    add_provider,
    add_threads,
    arguments_of,
    chosen_bundle,
    emit,
    held_out,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guard.bundle import Bundle, InputShape, ScoreName, Share
    from guard.evaluation.attack import Attack, Task
    from guard.evaluation.results import Results, Standing
    from guard.evaluation.run import Settings
    from guard.norms import Norm

_SCORES: "tuple[ScoreName, ...]" = ("jacobian", "combined", "radius", "margin-gradient", "jacobian-full")
_IMAGES = "1000,500,200"
_QUICK_IMAGES = 100


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        description="""\
Attack a calibrated bundle and its detector, and report what is left standing:
robust accuracy with rejection, the share of images that are accepted and
right when clean, and for which no attack found an accepted image of another
class within the budget. Whatever any attack of the run found counts.

Images come from the calibration's report fold where D is the data it was
calibrated on. Detection rates of attacks that do not know the detector are
reported second: they say little of attackers who do. Checks for masked
gradients and an audit of the radii follow. Read RESULTS with guard report.

A run that was stopped goes on when the same command is given again; attacks
added later leave finished ones as they are, and --join takes in what other
processes or machines finished. Groups of attacks (guard evaluate --attacks
list shows every attack and its cost):
  default       noise, FGSM, PGD, APGD, FMN, high confidence, joint PGD, denial;
                with --twin transfer
  gradient      the strongest image within a budget, by gradients
  minimum-norm  the nearest wrong image, by gradients
  decision      black box: by queries of labels or scores
  adaptive      attacks that know the detector, or an undefended twin
  unseen        changes that are no small norm: flow, colours, compression
  controls      noise and corruptions that know nothing of the model
  autoattack    AutoAttack's standard suite
  top5          for many classes: out of the five most probable ones
  all           everything that is installed""",
        example="""\
guard evaluate --val cifar10 --quick --out results/quick
guard evaluate models/mine --val photos/ --out results/mine
guard evaluate models/mine --val photos/ --attacks pgd-linf adaptive \\
  --scores all --budgets linf=2/255,8/255 --out results/linf
guard evaluate --attacks list""",
    )
    add_bundle(parser)
    parser.add_argument(
        "--val",
        metavar="D",
        help="held-out labelled images: a known data set's name, an .npz file, or a folder (required, "
        "but for --attacks list)",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="A",
        help="names or groups (default: default); list: show them (but those of --twin)",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=_budgets,
        default=[],
        metavar="NORM=E[,E...]",
        help="l2=0.25,0.5 linf=2/255, in pixel values of [0, 1] (default: l2=0.25,0.5,1 linf=2/255,8/255)",
    )
    parser.add_argument(
        "--images",
        type=_images,
        metavar="N[,N[,N]]",
        help="how many for most attacks, for those of 5,000 passes and more, and by queries "
        f"(default: {_IMAGES})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"PGD, deep PGD, joint PGD and Carlini-Wagner on {_QUICK_IMAGES} images, in a few minutes",
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        choices=(*_SCORES, "all"),
        default=[],
        metavar="S",
        help="detectors to judge and to attack besides the served one, at the same false positive rate: "
        f"{', '.join(_SCORES)}, or all",
    )
    parser.add_argument(
        "--twin",
        type=Path,
        metavar="BUNDLE",
        help="an undefended bundle, whose attacks are tried on this one",
    )
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULTS",
        help="results folders with the same settings, whose finished attacks are taken in",
    )
    parser.add_argument(
        "--seed", type=_whole, default=0, metavar="N", help="of images and attacks (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="RESULTS",
        help="results folder; goes on in one that is there (required, but for --attacks list)",
    )
    add_provider(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    from guard import bundle
    from guard.errors import UsageError
    from guard.evaluation import suite
    from guard.evaluation.run import evaluate
    from guard.files import check_writable

    if arguments.attacks == ["list"]:
        attacks = [*suite.known(), *suite.over_rejection()]
        emit(arguments, {"attacks": [_described(attack) for attack in attacks]}, _listing(attacks))
        return 0
    for option in ("val", "out"):
        if getattr(arguments, option) is None:
            raise UsageError(f"--{option} is missing (see guard evaluate --help).")
    check_writable(arguments.out, f"--out {arguments.out}")
    if arguments.quick and arguments.attacks:
        raise UsageError("--quick has a suite of its own: leave out --attacks, or --quick.")
    folder = chosen_bundle(arguments)
    found = bundle.load(folder)
    twin = None if arguments.twin is None else bundle.load(arguments.twin)
    if twin is not None:
        _check_twin(twin, found)
    dataset = held_out(arguments, found.manifest)
    settings = _settings(arguments)
    try:
        results = evaluate(
            folder,
            dataset,
            arguments.out,
            _tasks(arguments, found, twin, settings),
            settings,
            provider=arguments.provider,
            threads=arguments.threads,
            twin=None if twin is None else twin.digest,
            joined=arguments.join,
            command=_command(arguments),
            arguments=arguments_of(arguments),
        )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted: what is finished lies in {arguments.out}; the same command goes on from there"
            + _outstanding(arguments.out)
        ) from error
    emit(arguments, results.model_dump(mode="json"), summary(results, arguments.out))
    return 0


def _outstanding(out: Path) -> str:
    from guard.errors import DataError
    from guard.evaluation.results import load

    try:
        names = load(out).outstanding
    except DataError:  # nothing is finished
        return ""
    return f". Outstanding: {', '.join(names)}" if names else ""


def _settings(arguments: argparse.Namespace) -> "Settings":
    from guard.evaluation import suite
    from guard.evaluation.attack import BUDGETS
    from guard.evaluation.run import Settings

    default = suite.QUICK_BUDGETS if arguments.quick else BUDGETS
    given: dict[Norm, tuple[float, ...]] = {}
    for norm, values in arguments.budgets:
        given[norm] = tuple(sorted({*given.get(norm, ()), *values}))
    counts = [int(text) for text in _IMAGES.split(",")]
    if arguments.quick:
        counts = [_QUICK_IMAGES] * 3
    if arguments.images:
        first, *others = arguments.images
        counts = [first, *(min(first, count) for count in counts[1:])]
        counts[1 : 1 + len(others)] = others
    return Settings(
        scores=_scores(arguments),
        budgets={**default, **given},
        images=counts[0],
        dear_images=counts[1],
        query_images=counts[2],
        seed=arguments.seed,
        quick=arguments.quick,
    )


def _scores(arguments: argparse.Namespace) -> "tuple[ScoreName, ...]":
    return _SCORES if "all" in arguments.scores else tuple(arguments.scores)


def _check_twin(twin: "Bundle", found: "Bundle") -> None:
    """Raises where attacks made on the twin would mean nothing to the bundle: other images, other classes."""
    from guard.errors import UsageError

    ours, theirs = found.manifest, twin.manifest
    if theirs.input != ours.input:
        what = f"takes images of {_shape(theirs.input)}, {found.path} of {_shape(ours.input)}"
    elif len(theirs.class_names) != len(ours.class_names):
        what = f"has {len(theirs.class_names)} classes, {found.path} {len(ours.class_names)}"
    elif theirs.class_names != ours.class_names and set(theirs.class_names) == set(ours.class_names):
        what = f"has the classes of {found.path} in another order"
    elif twin.digest == found.digest:
        what = f"is the model of {found.path} itself"
    else:
        return
    raise UsageError(f"--twin {twin.path}: {what}. A twin is the same network, trained without a defence.")


def _shape(size: "InputShape") -> str:
    return f"{size.channels} x {size.height} x {size.width}"


def _tasks(
    arguments: argparse.Namespace, found: "Bundle", twin: "Bundle | None", settings: "Settings"
) -> "list[Task]":
    """What is to run; attacks that know a score are taken for the served one and those asked for."""
    from guard.evaluation import suite
    from guard.evaluation.attack import tasks_of
    from guard.runtime import Detector

    scores = (found.calibrated().score, *settings.scores)
    other = None
    if twin is not None:
        other = Detector(twin.model, provider=arguments.provider, threads=arguments.threads)
    everything = suite.known(other)
    denials = list(suite.over_rejection())
    if arguments.quick:
        chosen = suite.quick(scores, everything)
        denials = []
    else:
        words = arguments.attacks or ["default"]
        both = suite.choose(words, scores, (*everything, *denials))
        chosen = [attack for attack in both if attack in everything]
        denials = [attack for attack in both if attack in denials]
    budgets = settings.budgets if arguments.quick or arguments.budgets else {}
    return tasks_of(
        [suite.with_budgets(attack, budgets) for attack in chosen],
        [suite.with_budgets(attack, budgets) for attack in denials],
    )


def _command(arguments: argparse.Namespace) -> str:
    """The command line that gives this evaluation again."""
    words = ["guard", "evaluate"]
    if arguments.bundle:
        words.append(str(arguments.bundle))
    words += ["--val", str(arguments.val)]
    for name in ("attacks", "scores"):
        if getattr(arguments, name):
            words += [f"--{name}", *getattr(arguments, name)]
    if arguments.budgets:
        words += ["--budgets"]
        words += [
            f"{norm}={','.join(_number(value, norm) for value in values)}"
            for norm, values in arguments.budgets
        ]
    if arguments.images:
        words += ["--images", ",".join(map(str, arguments.images))]
    words += ["--quick"] * arguments.quick
    if arguments.twin:
        words += ["--twin", str(arguments.twin)]
    if arguments.join:
        words += ["--join", *map(str, arguments.join)]
    if arguments.seed:
        words += ["--seed", str(arguments.seed)]
    if arguments.provider != "auto":
        words += ["--provider", arguments.provider]
    if arguments.threads:
        words += ["--threads", str(arguments.threads)]
    return shlex.join([*words, "--out", str(arguments.out)])


def summary(results: "Results", out: Path) -> str:
    """The result in at most 80 columns: the verdict first."""
    from guard.evaluation.report import findings, words

    lines = [
        f"{results.bundle['name']} on {results.images} images of {results.data['name']}",
        f"  right without attack: {_share(results.accuracy)} (95% intervals in brackets)",
    ]
    lines += [
        f"  clean images rejected by {score}: {_share(rejected)}"
        + (" (served)" if score == results.served else "")
        for score, rejected in results.rejected.items()
    ]
    lines += [
        "",
        "robust accuracy with rejection (right and accepted under every attack run);",
        "clean: without attack; alone: right under every attack, nothing rejected",
    ]
    lines += [line for standing in results.standing for line in _standing_lines(standing)]
    for score in results.scores:
        lines += textwrap.wrap(findings.unknowing(results, score), WIDTH - 1)
    if results.outstanding:
        lines += textwrap.wrap(f"outstanding from other runs: {', '.join(results.outstanding)}", WIDTH - 1)
    plain = [one for one in results.attacks if one.aware is None and one.detection and one.norm]
    if plain:
        lines += [
            "",
            f"rejected by {results.served} of what attacks that do not know it get wrong (AUROC);",
            "most stop at the first wrong image; pgd-deep goes on and is rejected less:",
        ]
        for one in plain:
            found = one.detection[results.served]
            rejected = f"{_share(found.rejected)} of {found.rejected.n}"
            lines.append(f"  {words.attack(one):31s} {rejected:33s} {found.auroc:.3f}")
    controls = [one for one in results.attacks if results.served in one.false_alarms]
    if controls:
        lines += ["", f"rejected by {results.served} of what noise and corruptions leave right:"]
        for one in controls:
            alarms = one.false_alarms[results.served]
            lines.append(f"  {words.attack(one):31s} {_share(alarms)} of {alarms.n}")
    if results.over_rejection:
        lines += ["", "clean images that an attack makes rejected:"]
        lines += [
            _cut(f"  {words.attack(one)}: {_share(one.success)} of {one.success.n}")
            for one in results.over_rejection
            if one.success is not None
        ]
    if results.left_out:
        lines += ["", "left out:"]
        lines += [_cut(f"  {one.name}: {one.reason}") for one in results.left_out]
    if results.checks:
        failed = [check for check in results.checks if check.verdict == "failed"]
        count: Counter[str] = Counter(check.verdict for check in results.checks)
        told = {"failed": "found", "passed": "absent", "undecided": "undecided", "not run": "not looked for"}
        counts = ", ".join(f"{count[verdict]} {word}" for verdict, word in told.items())
        lines += ["", f"signs of masked gradients: {counts}"]
        lines += [_cut(f"  {check.name}: {check.found}") for check in failed]
    if results.radii:
        lines += ["", "radii that some attack broke (and their share of the nearest attack's distance):"]
        lines += [
            f"  {one.norm:4s} {one.kind} {one.method}{_alpha(one.alpha)}"[:42].ljust(42)
            + f" {one.violations.value:5.1%} of {one.violations.n} (<= {one.violations.upper:.1%}), "
            f"{one.tightness:.2f}"
            for one in results.radii
            if one.served
        ]
    return "\n".join([*lines, "", f"wrote {out}; next: guard report {out}"])


def _alpha(alpha: float | None) -> str:
    return "" if alpha is None else f", {alpha:.0%}"


def _standing_lines(standing: "Standing") -> list[str]:
    from guard.evaluation.report import findings, words

    name = f"{standing.score} {words.at(standing.budget, standing.norm)}"
    alone = f", alone {standing.alone.value:.1%}" if standing.alone else ""
    lines = [f"  {name:28s} {_share(standing.standing)}, clean {standing.clean.value:.1%}{alone}"]
    if standing.worst is not None:
        fallen, meant = findings.brought_down(standing, standing.worst)
        lines.append(_cut(f"    most fall to {standing.worst}: {fallen} of {meant}"))
    for some in standing.subsets:
        left = f"{some.added.count} of the {some.added.n} left" if some.added else "none was left that"
        added = f"{left} fell to {', '.join(some.attacks)}"
        lines.append(_cut(f"    first {some.images}: {_share(some.standing)}; {added}"))
    return lines


def _share(share: "Share") -> str:
    return f"{share.value:.1%} [{share.lower:.1%}, {share.upper:.1%}]"


def _number(budget: float, norm: "Norm") -> str:
    """The budget with all its digits, small ones of linf in 255ths where they are whole ones."""
    steps = round(budget * 255)
    return f"{steps}/255" if norm == "linf" and budget <= 0.2 and steps / 255 == budget else f"{budget!r}"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _described(attack: "Attack") -> dict[str, Any]:
    from guard.evaluation import suite

    groups = [group for group in suite.GROUPS if suite.belongs(attack, group)]
    names = ("name", "title", "norm", "budgets", "knowledge", "aware", "passes", "needs", "unit", "source")
    return {name: getattr(attack, name) for name in names} | {
        "groups": groups,
        "installed": attack.installed,
    }


def _listing(attacks: "Sequence[Attack]") -> str:
    from guard.evaluation import suite

    lines = ["passes per image at most (a gradient: three); * its package is not installed"]
    left = list(attacks)
    for group, words in suite.GROUPS.items():
        members = [attack for attack in left if group != "default" and suite.belongs(attack, group)]
        if not members:
            continue
        left = [attack for attack in left if attack not in members]
        lines += ["", f"{group}: {words}" if group != "all" else "others:"]
        for attack in members:
            mark = " " if attack.installed else "*"
            lines.append(_cut(f"{attack.passes:8d}{mark} {attack.name:36s} {attack.title}"))
    return "\n".join(lines)


def _budgets(text: str) -> "tuple[Norm, tuple[float, ...]]":
    norm, _, values = text.partition("=")
    try:
        numbers = tuple(sorted({float(Fraction(value)) for value in values.split(",")}))
    except (ValueError, ZeroDivisionError, OverflowError):
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"expected budgets above 0, such as l2=0.25,0.5, not {text!r}")
    if norm == "l2":
        return "l2", numbers
    if norm == "linf":
        return "linf", numbers
    raise argparse.ArgumentTypeError(f"{norm!r} is no norm: expected l2 or linf, as in linf=2/255")


def _images(text: str) -> list[int]:
    words = text.split(",")
    if not 1 <= len(words) <= 3 or not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(
            f"expected up to three numbers above 0, such as 1000,500,200, not {text!r}"
        )
    return [int(word) for word in words]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)
