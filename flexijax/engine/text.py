"""The text of a running request: stop strings cut it, and what may become one is held back."""

from __future__ import annotations

from collections.abc import Sequence

from flexijax.models.tokenizer import Tokenizer


class RunningText:
    """Turns token ids into text piece by piece.

    text: what is certain so far. stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the piece of text that became certain."""
        if self._stream is None or self.stopped:
            return ""
        return self._certain(self._stream.push(token_id), final=False)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if self._stream is None or self.stopped:
            return ""
        return self._certain(self._stream.flush(), final=True)

    def _certain(self, new: str, *, final: bool) -> str:
        held = self._held + new
        found = min((at for s in self._stop if (at := held.find(s)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            piece, self._held = held[:found], ""
        else:
            keep = 0 if final else max((_overlap(held, s) for s in self._stop), default=0)
            piece, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`.

    "and so", "so on" -> 2
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
