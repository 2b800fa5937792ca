import re
import tomllib
from pathlib import Path

import guard

ROOT = Path(__file__).parent.parent


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == guard.__version__
    assert len(set(versions)) == len(versions)


def test_the_version_has_one_home() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "guard/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", guard.__version__)
