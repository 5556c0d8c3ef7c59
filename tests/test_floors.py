"""The floors of the design, read from the imports: a file may only look down."""

import ast
from itertools import chain
from pathlib import Path

import pytest

# A file imports only from lower floors, or from files listed above it on its own floor.
FLOORS = {
    "0 plain data": """
        flexijax/intervals.py
        flexijax/config.py
        models/__init__.py
        models/config.py
        profiles/head_profile.py
        profiles/lookup.py
        profiles/records.py
        profiles/__init__.py
    """,
    "1 kernels": """
        pallas_kernels/platform.py
        pallas_kernels/reference.py
        pallas_kernels/partials.py
        pallas_kernels/summaries.py
        pallas_kernels/sketches.py
        pallas_kernels/xla.py
        pallas_kernels/sketch_scores_xla.py
        pallas_kernels/page_scores.py
        pallas_kernels/sketch_scores.py
        pallas_kernels/sparse_decode.py
        pallas_kernels/page_moves.py
        pallas_kernels/page_scores_triton.py
        pallas_kernels/sketch_scores_triton.py
        pallas_kernels/sparse_decode_triton.py
        pallas_kernels/prefill_cudnn.py
        pallas_kernels/prefill.py
        pallas_kernels/dispatch.py
        pallas_kernels/targets.py
        pallas_kernels/disassembly.py
        pallas_kernels/aot.py
        pallas_kernels/__init__.py
    """,
    "2 cache": """
        flexijax/blocks.py
        flexijax/score.py
        flexijax/score_minmax.py
        flexijax/score_sketch.py
        flexijax/cache.py
        flexijax/policy.py
        flexijax/schedule.py
        flexijax/tiers.py
        flexijax/attention.py
    """,
    "3 models": """
        models/layers.py
        models/decoder.py
        models/presets.py
        models/weights.py
        models/gguf_header.py
        models/gguf_header.py
        models/gguf.py
        models/tokenizer.py
        models/gguf_tokenizer.py
        models/huggingface.py
        models/language_model.py
        models/checkpoint.py
        models/dense.py
        models/load.py
    """,
    "4 running": """
        profiles/staleness.py
        profiles/documents.py
        profiles/stability.py
        profiles/recorder.py
        profiles/measure.py
        profiles/choose.py
        flexijax/sampling.py
        flexijax/results.py
        flexijax/text.py
        flexijax/memory.py
        flexijax/prefill.py
        flexijax/decode.py
        flexijax/compiled.py
        flexijax/reading.py
        flexijax/engine.py
        flexijax/continuation.py
        flexijax/requests.py
        flexijax/generate.py
        flexijax/agreement.py
        flexijax/footprint.py
        flexijax/compile_report.py
        profiles/plots.py
        profiles/report.py
        flexijax/sweep.py
    """,
    "5 face": """
        flexijax/terminal.py
        flexijax/cli_generate.py
        flexijax/cli_profile.py
        flexijax/cli_compile_text.py
        flexijax/cli_compile_report.py
        flexijax/cli.py
        flexijax/demo.py
        flexijax/server.py
        flexijax/__main__.py
        flexijax/__init__.py
    """,
}
FOLDERS = ("flexijax", "models", "pallas_kernels", "profiles")
RANK = {name: rank for rank, name in enumerate(chain(*map(str.split, FLOORS.values())))}


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
    for line, module, name in imported(ast.parse(source)):
        top = module.split(".")[0]
        if not top or top in FOLDERS[1:] or top in ("tests", "bench", "examples"):
            wrong.append(f"{file}:{line} imports {module or '.'}: write flexijax.<folder>.<file>")
            continue
        if top != "flexijax":
            continue
        target = (name and file_of(f"{module}.{name}", root)) or file_of(module, root)
        if target is None:
            wrong.append(f"{file}:{line} imports {module}, which is no file of ours")
        elif RANK.get(target, -1) >= RANK[file]:
            wrong.append(f"{file}:{line} imports {target}, which stands on its floor or above")
    return wrong


def test_every_file_has_a_floor(repository):
    unlisted = [file for file in library_files(repository) if file not in RANK]
    assert not unlisted, f"name the floor of {unlisted} in FLOORS"


def test_files_import_only_from_below(repository):
    wrong = [
        fault
        for file in library_files(repository)
        if file in RANK
        for fault in faults(file, (repository / file).read_text(encoding="utf-8"), repository)
    ]
    assert not wrong, "\n".join(wrong)


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
        "def f():\n    from flexijax.profiles.lookup import find",
        "from flexijax.profiles import find",
        "from flexijax.nowhere import thing",
        "from tests.conftest import REPOSITORY",
    ],
)
def test_a_planted_fault_is_found(source, repository):
    assert faults("profiles/head_profile.py", source, repository)


def test_looking_down_is_allowed(repository):
    source = "from flexijax.config import CacheConfig\nimport jax\nfrom pathlib import Path"
    assert not faults("profiles/head_profile.py", source, repository)
