"""The tokenizers library as the rest uses it: bounded files in, ValueError where it fails."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from flexijax.models.files import MAX_TOKENIZER_BYTES, read_bytes, short


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turns every error of the library in this block into a ValueError that begins with `what`.

    The library raises bare Exception, and pyo3's PanicException, a BaseException, where its Rust
    code panics.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # somebody pressed Ctrl-C
        text = str(error)
        if isinstance(error, ValueError) and text.startswith(what):
            raise  # our own, which says it already
        text = text if len(text) <= 300 else f"{text[:300]}..."
        raise ValueError(f"{what}: {text}") from error


def read_backend(path: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """A tokenizer.json, its truncation and padding switched off, and the text that it pads with.

    Training runs save both with the file; transformers ignores them as well, but for the name of
    the padding token. ValueError for a file that cannot be read and for one whose ids are drawn at
    random.
    """
    data = read_bytes(path, MAX_TOKENIZER_BYTES)
    with failing_as(f"{path}: not a readable tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(data)
        pad_token = (backend.padding or {}).get("pad_token")
        backend.no_truncation()
        backend.no_padding()
        dropout = getattr(backend.model, "dropout", None)
    if dropout:
        raise ValueError(f"{path}: model.dropout={short(dropout)}: ids would be random; remove it")
    return backend, pad_token


def set_ends(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Makes encoding put the BOS id first and the EOS id last, each if it is not None."""
    ends = [("bos", bos_id), ("eos", eos_id)]
    pieces = ["bos"] * (bos_id is not None) + ["$A"] + ["eos"] * (eos_id is not None)
    # By names of our own: the text of a token may hold the colon that has a meaning here.
    special_tokens: Any = [
        {"id": name, "ids": [i], "tokens": [backend.id_to_token(i)]}
        for name, i in ends
        if i is not None
    ]
    template: Any = processors.TemplateProcessing(single=pieces, special_tokens=special_tokens)
    backend.post_processor = template


def added_ends(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that encoding puts before and after those of a text."""
    if backend.post_processor is None:
        return [], []
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    count = len(whole) - len(bare)
    for at in range(count + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    raise ValueError("post_processor: changes the ids of the text itself")


def part(component: Any) -> dict[str, Any]:
    """What a decoder, normalizer or pre-tokenizer is, as in tokenizer.json; {} for none."""
    return {} if component is None else json.loads(component.__getstate__())
