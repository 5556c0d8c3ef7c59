"""From the body of a request to what the engine is asked."""

from __future__ import annotations

import dataclasses

from flexijax.engine.sampling import Sampling
from flexijax.server.errors import ApiError, of_value
from flexijax.server.requests import ChatRequest, CompletionRequest, Sampled


@dataclasses.dataclass(frozen=True)
class Shown:
    """logprobs: whether each token's is. alternatives: how many likelier or less likely ones are,
    too. usage: whether a stream ends with it; usage_so_far: whether each piece has it, too."""

    logprobs: bool
    alternatives: int
    usage: bool
    usage_so_far: bool


def sampling_of(body: Sampled, shown: Shown, *, new_seed: int) -> Sampling:
    """new_seed: for a request that names none. Raises ApiError naming a field."""
    try:
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=None if body.top_k is None or body.top_k < 1 else body.top_k,
            top_p=None if body.top_p == 1 else body.top_p,
            min_p=body.min_p or None,
            stop=body.stop,
            stop_ids=tuple(body.stop_token_ids or ()),
            logprobs=shown.logprobs,
            alternatives=shown.alternatives,
            # SeedSequence takes numbers of any size, but none below 0.
            seed=new_seed if body.seed is None else body.seed % 2**64,
            ignore_eos=bool(body.ignore_eos),
        )
    except ValueError as error:
        raise of_value(error) from None
    return sampling


def new_tokens_of(body: Sampled) -> int | None:
    """The most that may be generated; None for all that there is room for. Raises ApiError."""
    if isinstance(body, ChatRequest):
        named, older = body.max_completion_tokens, body.max_tokens
        if None not in (named, older) and named != older:
            message = f"max_tokens={older} and max_completion_tokens={named} differ: leave one out"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        return older if named is None else named
    # As OpenAI's: a completion that does not say is a short one.
    return 16 if body.max_tokens is None else body.max_tokens


def shown_of(body: CompletionRequest | ChatRequest) -> Shown:
    """What of an answer is shown beside its text. Raises ApiError for what is not known."""
    if isinstance(body, ChatRequest):
        logprobs, alternatives = bool(body.logprobs), body.top_logprobs or 0
    else:
        logprobs, alternatives = body.logprobs is not None, body.logprobs or 0
        if body.echo and logprobs:
            message = "logprobs are of generated tokens: those of an echoed prompt are not kept"
            raise ApiError(400, message, param="logprobs", code="unsupported")
    options = body.stream_options
    usage = options is not None and bool(options.include_usage)
    so_far = usage and options is not None and bool(options.continuous_usage_stats)
    return Shown(logprobs, alternatives, usage, so_far)
