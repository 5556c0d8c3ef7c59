"""The text of single tokens, as lists of log-probabilities show them."""

from __future__ import annotations

import functools
import re

from flexijax.models.backend import failing_as, part
from flexijax.models.text_stream import BYTE_OF
from flexijax.models.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Of every token of a tokenizer, None for a model that has none: then all texts are empty.

    The bytes of tokens that are shown join to the UTF-8 of their text, except that some tokenizers
    leave out a space at the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        kind = None if tokenizer is None else part(tokenizer.backend.decoder).get("type")
        self._byte_level = kind == "ByteLevel"
        self.data = functools.lru_cache(maxsize=1 << 16)(self._data)

    def text(self, token_id: int) -> str:
        """Broken UTF-8 as U+FFFD: a character may go over several tokens."""
        return self.data(token_id).decode("utf-8", "replace")

    def shown(self, token_id: int) -> str:
        """The same, "" for tokens that are never shown."""
        tokenizer = self._tokenizer
        # Twice, since decoders may take a space off the beginning.
        hidden = tokenizer is None or tokenizer.decode([token_id, token_id]) == ""
        return "" if hidden else self.text(token_id)

    def _data(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b""
        backend = self._tokenizer.backend
        token = backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            data = [BYTE_OF.get(character) for character in token]
            # Added tokens stand for themselves.
            return token.encode() if None in data else bytes(b for b in data if b is not None)
        with failing_as("tokenizer"):
            one, two = (backend.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        found = _BYTE.fullmatch(token)
        if found and one != token:
            return bytes([int(found[1], 16)])
        return two[len(one) :].encode()
