"""The floors of the design, read from the imports: a file may only look down."""

import ast
import statistics
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# An sdist cannot hold links: there each linked folder is a copy, under a name of its own.
IN_A_CHECKOUT = pytest.mark.skipif(
    not (REPOSITORY / "flexijax" / "models").is_symlink(), reason="this is no checkout"
)
pytestmark = [IN_A_CHECKOUT, pytest.mark.any_jax]

# From the ground up: a folder, or a file that stands beside the folders, imports only from what is
# listed above it here. Inside a folder files may import each other, but not in a circle.
FLOORS = (
    "profiles",
    "pallas_kernels",
    "models",
    "flexijax/policies",
    "flexijax/cache",
    "flexijax/config.py",
    "flexijax/results.py",
    "flexijax/engine",
    "flexijax/profiling",
    "flexijax/generate.py",
    "flexijax/compare.py",
    "flexijax/evaluation.py",
    "flexijax/evaluate.py",
    "flexijax/aot",
    "flexijax/server",
    "flexijax/cli",
    "flexijax/demo.py",
    "flexijax/__main__.py",
    "flexijax/__init__.py",
)
FOLDERS = ("flexijax", "models", "pallas_kernels", "profiles")


def floor_of(file: str) -> str | None:
    """The entry of `FLOORS` that a file belongs to; None where nobody has named one.

    "models/config.py" -> "models"; "flexijax/config.py" -> "flexijax/config.py"
    """
    return next((name for name in FLOORS if file == name or file.startswith(f"{name}/")), None)


def edges(file: str, source: str, root: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, file of ours or None) of each import of this package."""
    for line, module, name in imported(ast.parse(source)):
        if module.split(".")[0] == "flexijax":
            yield (
                line,
                module,
                (name and file_of(f"{module}.{name}", root)) or file_of(module, root),
            )


def library_files(root: Path) -> list[str]:
    """Every Python file of the package once, by its real path."""
    return sorted(
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
        if path.resolve() == path  # rglob may or may not walk the links inside flexijax/
    )


def file_of(module: str, root: Path) -> str | None:
    """The file behind an import name, or None where there is none.

    "flexijax.models.config" -> "models/config.py"; "flexijax.models" -> "models/__init__.py"
    """
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in FOLDERS:
        parts = parts[1:]
    path = root.joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return str(file.relative_to(root))
    return None


def imported(tree: ast.AST) -> list[tuple[int, str, str | None]]:
    """(line, module, name) of every import in a file, those inside functions included."""
    found: list[tuple[int, str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, module, alias.name) for alias in node.names]
    return found


def faults(file: str, source: str, root: Path) -> list[str]:
    """What a file of the package imports and must not."""
    wrong = []
    for line, module, _ in imported(ast.parse(source)):
        top = module.split(".")[0]
        if not top or top in FOLDERS[1:] or top in ("tests", "bench", "examples"):
            wrong.append(f"{file}:{line} imports {module or '.'}: write flexijax.<folder>.<file>")
    mine = floor_of(file)
    for line, module, target in edges(file, source, root):
        if target is None:
            wrong.append(f"{file}:{line} imports {module}, which is no file of ours")
            continue
        theirs = floor_of(target)
        if theirs is None or mine is None or FLOORS.index(theirs) > FLOORS.index(mine):
            wrong.append(f"{file}:{line} imports {target}, which stands above it")
        elif theirs == mine and target == file:
            wrong.append(f"{file}:{line} imports itself")
    return wrong


def test_every_floor_is_there_and_named_once(repository):
    assert len(set(FLOORS)) == len(FLOORS)
    assert [name for name in FLOORS if not (repository / name).exists()] == []


def test_every_file_has_a_floor(repository):
    unlisted = [file for file in library_files(repository) if floor_of(file) is None]
    assert not unlisted, f"name the floor of {unlisted} in FLOORS"


def test_files_import_only_from_below(repository):
    wrong = [
        fault
        for file in library_files(repository)
        for fault in faults(file, (repository / file).read_text(encoding="utf-8"), repository)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_imports_in_a_circle(repository):
    """Not between folders, and not between the files of one: `graphlib` names the circle."""
    between, within = {}, {}
    for file in library_files(repository):
        if file.endswith("/__init__.py"):
            continue  # says what a folder shows, and is imported with each of its files
        source = (repository / file).read_text(encoding="utf-8")
        targets = [target for *_, target in edges(file, source, repository) if target is not None]
        mine = floor_of(file)
        between.setdefault(mine, set()).update({floor_of(target) for target in targets} - {mine})
        within[file] = {target for target in targets if not target.endswith("/__init__.py")}
    TopologicalSorter(between).prepare()
    TopologicalSorter(within).prepare()


def test_files_are_short(repository):
    """One idea a file: at most 300 lines, half of them below 120."""
    lines = {
        file: len((repository / file).read_text(encoding="utf-8").splitlines())
        for file in library_files(repository)
    }
    long = {file: count for file, count in lines.items() if count > 300}
    assert not long
    assert statistics.median(lines.values()) < 120


def test_scripts_do_not_import_a_second_copy(repository):
    """`import models` from the root gives classes that are not those of flexijax.models."""
    wrong = [
        f"{path.relative_to(repository)}:{line} imports {module}"
        for folder in ("tests", "bench", "examples")
        for path in (repository / folder).rglob("*.py")
        for line, module, _ in imported(ast.parse(path.read_text(encoding="utf-8")))
        if module.split(".")[0] in FOLDERS[1:]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import models.config",
        "from pallas_kernels import dispatch",
        "from . import config",
        "from flexijax import CacheConfig",
        "import flexijax",
        "def f():\n    from flexijax.cache.blocks import BlockAllocator",
        "from flexijax.engine import sampling",
        "from flexijax.nowhere import thing",
        "from tests.conftest import REPOSITORY",
    ],
)
def test_a_planted_fault_is_found(source, repository):
    assert faults("profiles/head_profile.py", source, repository)


def test_looking_down_is_allowed(repository):
    source = "from flexijax.profiles.lookup import find\nimport jax\nfrom pathlib import Path"
    assert not faults("flexijax/cache/blocks.py", source, repository)
