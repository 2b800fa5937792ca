"""`guard report`: what an evaluation found, as one HTML page and as a section of a model's card."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.cli.options import Subparsers, add_command, check_output, emit
from guard.errors import DataError, UsageError

if TYPE_CHECKING:
    from guard.evaluation.report.reading import Evaluation
    from guard.norms import Norm


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "report",
        run,
        description="""\
Turn a folder of results that guard evaluate wrote into one HTML page that needs
no network: the verdict, plots, the papers' tables with ours, a gallery, and how
every number came about. What was not run is left out and named.""",
        example="""\
guard report results/
guard report results/ --against results-undefended/ --out report.html
guard report results/ --markdown models/mine/card.md
guard info --dataset cifar10 --json > facts.json
guard report results/ --stability facts.json""",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder that guard evaluate wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in RESULTS)")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="also as the section Attacks of a Markdown file, such as a bundle's card.md (sealed again)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RESULTS2",
        help="show another model's results beside, such as an undefended twin's",
    )
    parser.add_argument(
        "--stability",
        type=Path,
        nargs="+",
        default=[],
        metavar="FACTS",
        help="draw the data-stability curve of what guard info --dataset D --json wrote",
    )


def run(arguments: argparse.Namespace) -> int:
    from guard.evaluation.report import markdown
    from guard.evaluation.report.page import page
    from guard.evaluation.report.reading import read
    from guard.files import write_text

    for folder in filter(None, (arguments.results, arguments.against)):
        if folder.is_file():
            raise UsageError(f"{folder}: is a file; expected the folder that guard evaluate wrote.")
    evaluation = read(arguments.results)
    against = None if arguments.against is None else read(arguments.against)
    stability = dict(_facts(path) for path in arguments.stability)
    out = arguments.out or arguments.results / "report.html"
    check_output("--out", out, ".html", ".htm")
    if arguments.markdown is not None:
        check_output("--markdown", arguments.markdown, ".md", ".markdown", ".txt")
    write_text(out, page(evaluation, against, stability))
    lines = [f"wrote {out}"]
    if arguments.markdown is not None:
        _write_section(arguments.markdown, markdown.section(evaluation, against), evaluation)
        lines.append(f"wrote the section Attacks of {arguments.markdown}")
    results = evaluation.results
    if results.outstanding:
        lines.append(f"the run is not finished, outstanding: {', '.join(results.outstanding)}")
    record = {
        "report": str(out),
        "markdown": None if arguments.markdown is None else str(arguments.markdown),
        "served": results.served,
        "standing": [one.model_dump(mode="json") for one in results.standing],
    }
    emit(arguments, record, "\n".join(lines))
    return 0


def _facts(path: Path) -> "tuple[Norm, dict[str, Any]]":
    try:
        facts = json.loads(path.read_bytes())
        curve = facts["stability"]
        lengths = {len(curve["eps"]), len(curve["halfway"])}
        if facts["norm"] not in ("l2", "linf") or len(lengths) != 1 or not {"dataset", "n"} <= facts.keys():
            raise KeyError(facts["norm"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is not what guard info --dataset D --json writes. Run: guard info --dataset D --json > "
            "facts.json, and give --stability facts.json"
        ) from error
    norm: Norm = facts["norm"]
    return norm, facts


def _write_section(path: Path, section: str, evaluation: "Evaluation") -> None:
    """Puts the section into a Markdown file; the card of a bundle is sealed into it again."""
    from guard import bundle as bundles
    from guard.card import with_section
    from guard.files import atomic_folder, write_text

    if path.name != bundles.CARD or not (path.parent / bundles.MANIFEST).exists():
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except UnicodeDecodeError as error:
            raise DataError(
                f"--markdown {path}: is no text in UTF-8. Give a Markdown file, or a new one."
            ) from error
        write_text(path, with_section(before, section))
        return
    bundle = bundles.load(path.parent)
    results = evaluation.results
    calibration = bundle.manifest.files.get(bundles.CALIBRATION, "none")
    for what, here, there in (
        ("model", bundle.digest, results.bundle.get("digest")),
        ("calibration", calibration, results.settings.get("identity", {}).get("calibration")),
    ):
        if there not in (None, here):
            raise DataError(
                f"{path}: is the card of the {what} {here}, but {evaluation.folder} holds results of "
                f"{there}. Give the card of the evaluated bundle, or evaluate this one."
            )
    with atomic_folder(bundle.path, keep=True) as folder:
        card = folder / bundles.CARD
        write_text(card, with_section(card.read_text() if card.exists() else "", section))
        bundles.seal(folder, bundle.manifest)
