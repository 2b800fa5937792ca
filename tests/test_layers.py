"""A module imports only from lower layers, and serving loads neither torch nor scipy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "guard"

# Lowest first. A sub-package stands as one entry; its modules may import one another, without cycles.
LAYERS = (
    ("", "errors", "interrupts", "norms", "plots", "progress"),
    (
        "batching",
        "certificate",
        "files",
        "graph",
        "images",
        "logs",
        "metrics",
        "neighbours",
        "openapi",
        "stability_curve",
    ),
    ("archives", "bundle", "free_batch", "http", "operators", "samples", "settings", "stages", "statistics"),
    ("autodiff", "bounds", "data", "shares"),
    ("card", "guarded"),
    ("adapt", "attacks", "runtime"),
    ("decision", "wrap"),
    ("calibration", "offline", "tables", "training", "worker"),
    ("export", "routes"),
    ("evaluation", "service"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Packages that only these entries of the table, or single modules, may import, wherever the import stands.
HEAVY = {
    "torch": {"training", "export", "cli.train", "evaluation.torch_models", "evaluation.libraries"},
    "torchvision": {"training", "export"},
    "scipy": {"evaluation", "calibration"},
    "bentoml": {"service", "routes", "worker"},
    "foolbox": {"evaluation.libraries"},
    "eagerpy": {"evaluation.libraries"},
    "pyautoattack": {"evaluation.libraries"},
    "art": {"evaluation.wasserstein"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`training.loop` for guard/training/loop.py, and `` for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def entry_of(module: str) -> str:
    return module.partition(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the package's name."""
    found = {name for name in imports_of(path) if name.partition(".")[0] == "guard"}
    inner = {name.removeprefix("guard").lstrip(".") for name in found}
    names = {name_of(module) for module in MODULES}
    return {name if name in names else name.rpartition(".")[0] for name in inner}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_come_from_lower_layers(path: Path) -> None:
    module = name_of(path)
    entry = entry_of(module)
    assert entry in LEVEL, f"guard.{module} has no place in the table of layers: give it one"
    for imported in own_imports_of(path):
        if entry_of(imported) != entry:
            assert LEVEL[entry_of(imported)] < LEVEL[entry], f"guard.{module} imports guard.{imported}"


def test_the_table_names_only_what_exists() -> None:
    assert set(LEVEL) == {entry_of(name_of(path)) for path in MODULES}


def test_no_cycles_within_a_package() -> None:
    graph = {name_of(path): own_imports_of(path) - {name_of(path), ""} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imports_of(path)}
    for package, allowed in HEAVY.items():
        if package in packages:
            module = name_of(path)
            assert {module, entry_of(module)} & allowed, f"guard.{module} imports {package}"


def loaded_by(code: str) -> set[str]:
    """Top-level packages in a fresh interpreter's memory after running the code."""
    listing = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_serving_loads_neither_torch_nor_scipy() -> None:
    loaded = loaded_by("import guard.service, guard.worker, guard.decision")
    assert {"guard", "onnxruntime", "bentoml"} <= loaded
    assert not loaded & {"torch", "torchvision", "scipy"}


def test_commands_without_training_load_no_torch() -> None:
    names = ("calibrate", "certify", "graph", "info", "report", "serve", "wrap")
    loaded = loaded_by("".join(f"import guard.cli.{name}\n" for name in names))
    assert not loaded & {"torch", "torchvision"}


def test_help_loads_next_to_nothing() -> None:
    loaded = loaded_by("from guard.cli import main\nmain(['--help'])")
    assert not loaded & {"numpy", "onnx", "onnxruntime", "pydantic", "bentoml", "torch", "scipy"}
