"""Text to token ids and back, and what a model's folder says about both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from flexijax.models import chat_template, end_of_text
from flexijax.models.backend import added_ends, failing_as, read_backend
from flexijax.models.files import read_json, read_text, short
from flexijax.models.special_tokens import add_special_tokens
from flexijax.models.text_stream import TextStream, text_stream

_JINJA = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
# Letters of a text from which on other threads may run while it is encoded.
_LONG = 1 << 14


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` backend plus what a model's files say about using it.

    The backend's post-processor puts BOS first or EOS last. bos_token and eos_token are texts or
    None; stop_ids: ids that end a generation; chat_template: the model's Jinja template, or None.
    special_tokens: all the named ones that a template sees, bos_token and eos_token if left out.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    stop_ids: frozenset[int]
    chat_template: str | None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.chat_template, str | None):
            raise ValueError(f"chat_template={short(self.chat_template)}: must be a text")
        if not self.special_tokens:
            named = {"bos_token": self.bos_token, "eos_token": self.eos_token}
            texts = {name: text for name, text in named.items() if text is not None}
            object.__setattr__(self, "special_tokens", MappingProxyType(texts))

    @property
    def add_bos(self) -> bool:
        """Whether `encode` puts the BOS id before the ids of a text."""
        bos = None if self.bos_token is None else self.backend.token_to_id(self.bos_token)
        return bos is not None and self._ends[0] == [bos]

    def encode(self, text: str) -> list[int]:
        """Token ids of text, after BOS if the model wants it and the text does not begin with it.

        Special tokens spelled out in text become their ids. The prompt that `chat` made gets no
        BOS: its template writes it where the model wants one.
        """
        if not isinstance(text, str):
            raise ValueError(f"text={short(text)}: must be a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # What the command line makes of bytes that are not UTF-8.
            raise ValueError(f"text is not Unicode: {error.reason} at {error.start}") from error
        add = not isinstance(text, chat_template.ChatPrompt)
        with failing_as("text cannot be encoded"):
            ids = self._encoded(text, add)
        if add and self.add_bos and ids[:2] == 2 * self._ends[0]:
            return ids[1:]  # the text spells it too
        return ids

    def _encoded(self, text: str, add: bool) -> list[int]:
        # One text keeps the interpreter to itself, seconds of megabytes; a batch does not. A batch
        # has `tokenizers` warn in a process that is forked later, so short texts go alone.
        if len(text) < _LONG:
            return self.backend.encode(text, add_special_tokens=add).ids
        [found] = self.backend.encode_batch_fast([text], add_special_tokens=add)
        return found.ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out, broken UTF-8 as U+FFFD."""
        with failing_as("ids cannot be decoded"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A fresh incremental decoder for one generation; its pieces join to `decode`."""
        return text_stream(self.backend, self._hidden)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        messages: dicts with "role" and "content". `encode` knows it again, and gives the ids that
        the template spells. ValueError without a template, and for messages that the template
        refuses; `models/chat_template.py` bounds its time and memory.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: pass plain text instead")
        return chat_template.render(self.chat_template, messages, self.special_tokens)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = dict(self.special_tokens) | {"chat_template": self.chat_template}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        end_of_text.save_stop_ids(directory, self.stop_ids)

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        return added_ends(self.backend)

    @functools.cached_property
    def _hidden(self) -> frozenset[int]:
        # Asked, since the library also shows special tokens whose text its normalizer changes;
        # twice, since decoders may take a space off the beginning.
        added = self.backend.get_added_tokens_decoder()
        special = [index for index, token in added.items() if token.special]
        return frozenset(index for index in special if self.decode([index, index]) == "")


def from_directory(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, or None where it has no tokenizer.json.

    ids and texts are those of transformers' PreTrainedTokenizerFast. ValueError, which names file
    or key, for what cannot be read and for settings that are not followed here.
    """
    path = directory / "tokenizer.json"
    if not path.is_symlink() and not path.exists():
        return None
    backend, pad_token = read_backend(path)
    config_path = directory / "tokenizer_config.json"
    config = {"pad_token": pad_token} | read_json(config_path)
    with _named(config_path):
        _check_settings(backend, config)
        special_tokens = add_special_tokens(backend, directory, config)
    with failing_as(f"{path}: encoding fails"):
        first, last = added_ends(backend)
    bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    _warn_of_ends(config, "add_bos_token", bool(first))
    _warn_of_ends(config, "add_eos_token", bool(last))
    stop = end_of_text.stop_ids(directory)
    if not stop and eos is not None and (eos_id := backend.token_to_id(eos)) is not None:
        stop = frozenset({eos_id})  # else nothing would ever end a generation
    return Tokenizer(
        backend=backend,
        bos_token=bos,
        eos_token=eos,
        stop_ids=stop,
        chat_template=_chat_template(directory, config),
        special_tokens=MappingProxyType(special_tokens),
    )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before a problem with one of its keys."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise error if str(path.parent) in text else ValueError(f"{path}: {text}") from error


def _check_settings(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Follows what changes ids or texts in transformers, or refuses it by its key."""
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    key = "clean_up_tokenization_spaces"
    if config.get(key) and not isinstance(backend.model, tokenizers.models.BPE):
        kind = type(backend.model).__name__
        raise ValueError(f"{key}={short(config[key])}: not done here to the text of a {kind} model")
    key = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if config.get(key):
        raise ValueError(f"{key}={short(config[key])}: not done here")
    key = "fast_tokenizer_files"
    if config.get(key) not in (None, [], ["tokenizer.json"]):
        raise ValueError(f"{key}={short(config[key])}: only tokenizer.json is read")


def _warn_of_ends(config: dict[str, Any], key: str, added: bool) -> None:
    # transformers 4 went by the key, 5 goes by tokenizer.json alone.
    wanted = config.get(key)
    if wanted is not None and bool(wanted) != added:
        does = "adds" if added else "does not add"
        warnings.warn(
            f"tokenizer_config.json says {key}={short(wanted)}, but tokenizer.json {does} it; "
            "tokenizer.json is followed, as transformers 5 does",
            stacklevel=4,
        )


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The default template: from its own file if there is one, else from tokenizer_config.json."""
    file, folder = directory / _JINJA, directory / _MORE_TEMPLATES
    if file.exists() or file.is_symlink():
        return read_text(file)
    if any(folder.glob("*.jinja")):  # named ones replace those of the config
        default = folder / "default.jinja"
        return read_text(default) if default.exists() else None
    name = f"{directory / 'tokenizer_config.json'}: chat_template"
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _by_name(template, name)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{name}={short(template)}: must be a text")
    return template


def _by_name(templates: list[Any], name: str) -> dict[str, Any]:
    found = {}
    for at, entry in enumerate(templates):
        if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
            raise ValueError(f"{name}[{at}]={short(entry)}: must have a name and a template")
        if not isinstance(entry["name"], str):
            raise ValueError(f"{name}[{at}].name={short(entry['name'])}: must be a text")
        found[entry["name"]] = entry["template"]
    return found
