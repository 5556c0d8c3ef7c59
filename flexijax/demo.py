"""`make demo`: a real model answers a question about a real document, by two policies in turn."""

import importlib
import pydoc
import shlex
import sys
import tempfile
from pathlib import Path

from flexijax.cli.main import main as cli

# Documentation that every Python carries with it; at three to four characters a token this is
# about 7,000 tokens and leaves room for the answer in the model's 8,192.
MODULES = ("argparse", "json", "textwrap", "pathlib")
CHARACTERS = 30_000
QUESTION = "In one short paragraph, explain what the argparse module described above is for."


def document(*, modules: tuple[str, ...] = MODULES, characters: int = CHARACTERS) -> str:
    """The standard library's own documentation as plain text, cut at the last whole line."""
    pages = (pydoc.render_doc(importlib.import_module(name)) for name in modules)
    text = pydoc.plain("\n\n".join(pages))
    return text[: text.rfind("\n", 0, characters)]


def main() -> int:
    """Runs `flexijax generate` on the document; returns its exit code."""
    text = document()
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text(f"{text}\n\n{QUESTION}", encoding="utf-8")
        command = [
            *("generate", "--model", "smollm2", "--prompt-file", str(prompt), "--chat"),
            *("--max-new-tokens", "96", "--stop", "\n\n", "--policy", "flexi", "--compare-full"),
        ]
        print(f"Documentation of Python's own modules ({len(text):,} characters). {QUESTION}")
        shown = shlex.join(command).replace("\n", "\\n")
        print(f"$ flexijax {shown}\n", flush=True)
        return cli(command)


if __name__ == "__main__":
    sys.exit(main())
