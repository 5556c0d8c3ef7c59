"""Real text for profiles and benches: files of documents in, prompts of a wanted length out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# The first of these that a JSON line has as a string is its text; "input" is what L-Eval calls it.
TEXT_FIELDS = ("input", "text", "content", "document", "context", "article", "prompt")
# Tokens of text without which a prompt is of no document.
_FEWEST = 16
_INSTRUCTION_FIELDS = ("instructions", "instruction", "question")


class Tokenizer(Protocol):
    """What is needed of a tokenizer: text to ids, ids to text, and the model's chat form."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat(self, messages: list[dict[str, str]]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and what is asked about it.

    task: name of the file it came from, without the ending; index: its place there.
    text: the document; instruction: the first thing asked about it, "" when nothing is.
    """

    task: str
    index: int
    text: str
    instruction: str


def read_documents(
    path: str | Path, *, limit: int | None = None, field: str | None = None
) -> list[Document]:
    """The documents of a file: one of each JSON line, or one of a whole text file.

    A text that an earlier line already had is left out. limit: the most documents to read; None
    reads all. field: of the JSON lines that holds the text; None takes the first of
    `TEXT_FIELDS`. Raises ValueError naming the file, and the line, when there is no text or it is
    not UTF-8, OSError when the file cannot be read.
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"limit={limit} must be positive, or None for every document")
    path = Path(path)
    try:
        if path.suffix == ".jsonl":
            return _from_json_lines(path, limit, field)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return [Document(task=path.stem, index=0, text=text, instruction="")]


def prompt_ids(document: Document, tokenizer: Tokenizer, *, max_tokens: int) -> list[int]:
    """Token ids of the document's prompt, its text cut at the end until the prompt fits.

    The instruction follows the document and is never cut. The whole is put in the model's chat
    form. Raises ValueError when the text has fewer than 16 tokens, or not so many of it fit.
    """

    def prompt(text: str) -> list[int]:
        content = f"{text}\n\n{document.instruction}".strip()
        return tokenizer.encode(tokenizer.chat([{"role": "user", "content": content}]))

    where, body = f"{document.task}[{document.index}]", tokenizer.encode(document.text)
    if len(body) < _FEWEST:
        raise ValueError(
            f"the text of {where} has {len(body)} tokens, a document must have at least {_FEWEST}"
        )
    kept = min(len(body), max_tokens - len(prompt("")))
    while kept >= _FEWEST:
        ids = prompt(tokenizer.decode(body[:kept]))
        if len(ids) <= max_tokens:
            return ids
        # Tokens at the seams may split anew: give back exactly what is too much.
        kept -= len(ids) - max_tokens
    raise ValueError(
        f"max_tokens={max_tokens} leaves no room for text of {where} beside its instruction; it "
        f"must be at least {len(prompt('')) + _FEWEST}"
    )


def _from_json_lines(path: Path, limit: int | None, field: str | None) -> list[Document]:
    documents: list[Document] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if limit is not None and len(documents) >= limit:
                break
            if line.strip():
                document = _from_json_line(path, number, line, field)
                if all(document.text != earlier.text for earlier in documents):
                    documents.append(document)
    if not documents:
        raise ValueError(f"{path} holds no documents")
    return documents


def _from_json_line(path: Path, number: int, line: str, field: str | None) -> Document:
    where = f"{path}, line {number + 1}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object with a text field")
    wanted = (field,) if field is not None else TEXT_FIELDS
    text = next((row[name] for name in wanted if isinstance(row.get(name), str)), "")
    if not text.strip():
        raise ValueError(
            f"{where} has no text in {' or '.join(wanted)}; its fields are {', '.join(row)}"
        )
    asked = next((row[name] for name in _INSTRUCTION_FIELDS if row.get(name)), "")
    if isinstance(asked, list):
        asked = asked[0]
    return Document(task=path.stem, index=number, text=text, instruction=str(asked))
