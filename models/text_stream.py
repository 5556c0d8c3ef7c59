"""Text that streams out token by token and joins to what decoding all tokens at once gives."""

from __future__ import annotations

import codecs
import re
from typing import Any, Protocol

import tokenizers

from flexijax.models.backend import failing_as, part

_BYTE = re.compile(r"<0x.{2}>", re.DOTALL)
_WHOLE_TOKENS = ("Metaspace", "WordPiece", "BPEDecoder")
_SEQUENCE = ("Replace", "ByteFallback", "Fuse", "Strip")


class TextStream(Protocol):
    """Pieces of every `push` and the final `flush` join to `decode` of all ids."""

    def push(self, token_id: int) -> str:
        """Takes the next id, returns the text that became certain, often empty."""
        ...

    def flush(self) -> str:
        """The rest, once no token follows."""
        ...


def text_stream(backend: tokenizers.Tokenizer, hidden: frozenset[int]) -> TextStream:
    """The stream that fits a tokenizer's decoder; hidden: ids that show nothing."""
    decoder = part(backend.decoder)
    kind = decoder.get("type")
    if kind == "ByteLevel":
        return _Bytes(backend, hidden)
    if kind is None or kind in _WHOLE_TOKENS:
        return _Tokens(backend, hidden, byte_fallback=False)
    if kind == "Sequence" and _is_local(decoder["decoders"]):
        kinds = [step["type"] for step in decoder["decoders"]]
        return _Tokens(backend, hidden, byte_fallback="ByteFallback" in kinds)
    return _AtOnce(backend, hidden)


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether the text of a token depends on its neighbours only through runs of byte tokens.

    So it is of SentencePiece's decoders: replacements within a token, bytes, joined, one space
    taken off the beginning.
    """
    kinds = [step["type"] for step in steps]
    order = [_SEQUENCE.index(kind) if kind in _SEQUENCE else -1 for kind in kinds]
    if -1 in order or order != sorted(order):
        return False
    strips = [step for step in steps if step["type"] == "Strip"]
    return not strips or (
        len(strips) == 1 and "Fuse" in kinds and strips[0]["start"] <= 1 and strips[0]["stop"] == 0
    )


class _Visible:
    """What the streams share: ids that show nothing are never seen by a decoder."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int]) -> None:
        self._backend, self._hidden = backend, hidden

    def _token(self, token_id: int) -> str | None:
        return None if token_id in self._hidden else self._backend.id_to_token(int(token_id))

    def _decode(self, ids: list[int]) -> str:
        with failing_as("tokenizer"):
            return self._backend.decode(ids, skip_special_tokens=False) if ids else ""


class _Bytes(_Visible):
    """Byte-level BPE: characters stand for bytes, which are UTF-8 across tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int]) -> None:
        super().__init__(backend, hidden)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return ""
        data = [BYTE_OF.get(character) for character in token]
        # Added tokens are no byte-level text: they stand for themselves, as in the library.
        whole = token.encode() if None in data else bytes(b for b in data if b is not None)
        return self._utf8.decode(whole)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Tokens(_Visible):
    """Decoders that turn token after token to text, and a run of byte tokens as one.

    A run with a byte too many is U+FFFD from its first byte on, so that none of it is certain
    before its end. Each piece is decoded after the piece before it, since decoders treat the
    beginning of a text in a way of its own.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, hidden: frozenset[int], *, byte_fallback: bool
    ) -> None:
        super().__init__(backend, hidden)
        self._byte_fallback = byte_fallback
        self._before: list[int] = []  # decodes to text that has gone out, not empty if it can be
        self._shown = ""  # what it decodes to
        self._run: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return ""
        self._run.append(int(token_id))
        if self._byte_fallback and _BYTE.fullmatch(token):
            return ""
        return self.flush()

    def flush(self) -> str:
        run, self._run = self._run, []
        piece = self._decode(self._before + run)[len(self._shown) :] if run else ""
        self._before = run if piece else self._before + run
        self._shown = self._decode(self._before)
        return piece


class _AtOnce(_Visible):
    """Any other decoder: nothing is certain before the end."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int]) -> None:
        super().__init__(backend, hidden)
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        if self._token(token_id) is not None:
            self._ids.append(int(token_id))
        return ""

    def flush(self) -> str:
        ids, self._ids = self._ids, []
        return self._decode(ids)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself if it can be printed, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
