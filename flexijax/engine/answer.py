"""What the caller of a request gets: its tokens one by one, and all of it at its end."""

from __future__ import annotations

from flexijax.engine.entry import Entry
from flexijax.engine.measured import Answering, metrics, no_metrics
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.sequence import Sequence
from flexijax.engine.stream import Token
from flexijax.results import Generation


def token_of(sequence: Sequence, at: int) -> Token:
    """The token at a place of those that were generated."""
    asked = bool(sequence.request.sampling.alternatives)
    alternatives = sequence.alternatives[at] if asked else ()
    return Token(sequence.tokens[at], sequence.logprobs[at], alternatives)


def generation(runner: ModelRunner, entry: Entry, answering: Answering, reason: str) -> Generation:
    """All of a request that ends for such a reason, and still has its row where it had one."""
    sequence, request = entry.sequence, entry.request
    if sequence is None or not sequence.tokens:
        tokens, logprobs, alternatives = [], [], []
        measured = no_metrics(request, entry.times, compile_s=runner.runner.seconds)
    else:
        ended = sequence.tokens[-1] in request.stop_ids
        tokens = sequence.tokens[:-1] if ended else sequence.tokens
        logprobs = sequence.logprobs[: len(tokens)]
        alternatives = sequence.alternatives[: len(tokens)]
        measured = metrics(
            runner,
            sequence,
            entry.times,
            new_tokens=len(tokens),
            cache=answering.cache,
            profile=answering.profile,
            origin=answering.origin,
        )
    return Generation(
        text=entry.text.text,
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs) if request.sampling.logprobs else None,
        alternatives=tuple(alternatives) if request.sampling.alternatives else None,
        finish_reason=reason,
        metrics=measured,
        profile=answering.profile,
    )
