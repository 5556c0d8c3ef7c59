"""Text to token ids and back, chat templates, and text that streams out token by token."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` backend plus what a model's files say about using it.

    bos_token and eos_token are texts or None; add_bos: `encode` puts the BOS id first; stop_ids:
    ids that end a generation; chat_template: the model's Jinja template, or None.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    add_bos: bool
    stop_ids: frozenset[int]
    chat_template: str | None

    def __post_init__(self) -> None:
        if self.add_bos and self.backend.token_to_id(self.bos_token or "") is None:
            raise ValueError(f"bos_token={self.bos_token!r}: not in the vocabulary, needed first")

    def encode(self, text: str) -> list[int]:
        """Token ids of text, after BOS if the model wants it and the text does not begin with it.

        Special tokens spelled out in text, as a chat template does, become their ids.
        """
        if not isinstance(text, str):
            raise ValueError(f"text={text!r}: must be a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # What the command line makes of bytes that are not UTF-8.
            raise ValueError(f"text is not Unicode: {error.reason} at {error.start}") from error
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.add_bos and self.bos_token and not text.startswith(self.bos_token):
            bos = self.backend.token_to_id(self.bos_token)
            assert bos is not None
            return [bos, *ids]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out, broken UTF-8 as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A fresh incremental decoder for one generation."""
        return TextStream(self)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        messages: dicts with "role" and "content". ValueError without a template, and for
        messages that the template refuses.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: pass plain text instead")
        if not messages:
            raise ValueError("messages=[]: a chat needs at least one message")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "add_bos_token": self.add_bos,
            "chat_template": self.chat_template,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        stop = {"eos_token_id": sorted(self.stop_ids)}
        (directory / "generation_config.json").write_text(json.dumps(stop))


class TextStream:
    """Turns ids into text as they come, holding back a character until all its bytes are there.

    The pieces of every `push` and the final `flush` join to `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = ""  # what has gone out of the text of _ids

    def push(self, token_id: int) -> str:
        """Takes the next id, returns the text that became certain, often empty."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        # An unfinished character decodes to exactly one U+FFFD, always the last.
        unfinished = text.endswith("\ufffd")
        certain = text[:-1] if unfinished else text
        piece = certain[len(self._sent) :]
        self._sent = certain
        if not unfinished and len(self._ids) > 32:
            # Keeps each push short; a few ids stay so that the text's start is treated as before
            # (SentencePiece decoders strip the first space).
            kept = self._tokenizer.decode(self._ids[-4:])
            if "\ufffd" not in kept and text.endswith(kept):
                self._ids, self._sent = self._ids[-4:], kept
        return piece

    def flush(self) -> str:
        """The rest: U+FFFD if the last character never became whole, else nothing."""
        piece = self._tokenizer.decode(self._ids)[len(self._sent) :]
        self._ids, self._sent = [], ""
        return piece


def from_directory(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, or None where it has no tokenizer.json.

    ValueError for files that are there but cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
    config = read_json(directory / "tokenizer_config.json")
    bos, eos = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
    bos_id = backend.token_to_id(bos) if bos else None
    first = backend.encode("a").ids[:1]
    add_bos = bos_id is not None and (
        bool(config["add_bos_token"]) if "add_bos_token" in config else first == [bos_id]
    )
    stop = _ids(read_json(directory / "generation_config.json").get("eos_token_id"))
    stop |= _ids(read_json(directory / "config.json").get("eos_token_id"))
    if eos and (eos_id := backend.token_to_id(eos)) is not None:
        stop |= {eos_id}
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.exists():
        template = jinja_file.read_text(encoding="utf-8")
    return Tokenizer(
        backend=backend,
        bos_token=bos,
        eos_token=eos,
        add_bos=add_bos,
        stop_ids=frozenset(stop),
        chat_template=template,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file; ValueError for broken JSON."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(i) for i in value} if isinstance(value, list) else {int(value)}


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which chat templates do not expect.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
