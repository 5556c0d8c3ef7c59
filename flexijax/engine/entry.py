"""A request of an engine from its submission to its end."""

from __future__ import annotations

import dataclasses

from flexijax.cache.prefix import block_hashes
from flexijax.engine.boundary import Limits, RequestState
from flexijax.engine.measured import Times
from flexijax.engine.prefiller import PrefillResult
from flexijax.engine.scheduler import why_refused
from flexijax.engine.sequence import Request, Sequence
from flexijax.engine.stream import Stream
from flexijax.engine.text import RunningText
from flexijax.models.language_model import LanguageModel


@dataclasses.dataclass
class Entry:
    """A request that has not been let go of.

    label: of its prompt, for progress. prompt: where that has been read already. shown: of its
    tokens, how many its text has. salt: only requests of one salt share what they begin with.
    """

    request: Request
    stream: Stream
    state: RequestState
    text: RunningText
    times: Times
    label: str
    prompt: PrefillResult | None = None
    sequence: Sequence | None = None
    shown: int = 0
    salt: str = ""
    _hashes: list[bytes] | None = None

    def hashes(self, page_size: int) -> list[bytes]:
        """Of the prompt's full pages, see `block_hashes`; worked out once."""
        if self._hashes is None:
            tokens = self.request.tokens
            self._hashes = list(block_hashes(tokens, page_size=page_size, salt=self.salt))
        return self._hashes


def new_entry(
    lm: LanguageModel,
    limits: Limits,
    request: Request,
    stream: Stream,
    *,
    key: int,
    label: str,
    now: float,
    prompt: PrefillResult | None = None,
) -> Entry:
    """A request that is submitted at `now`, of the engine's clock; its key is new.

    Raises ValueError, with the arithmetic, where it can never fit.
    """
    state = RequestState(
        key=key,
        arrival=key,
        prompt_tokens=len(request.tokens),
        max_new_tokens=request.max_new_tokens,
    )
    if (message := why_refused(state, limits)) is not None:
        raise ValueError(message)
    text = RunningText(lm.tokenizer, request.sampling.stop)
    return Entry(request, stream, state, text, Times(now), label, prompt)
