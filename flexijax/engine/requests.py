"""What a caller asks of `generate`, checked and tokenized before anything is traced."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import SupportsIndex, cast

from flexijax.config import CacheConfig
from flexijax.engine.batch import MAX_STOP_IDS
from flexijax.engine.sampling import Sampling, request_seed
from flexijax.engine.sequence import Request
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform


def make_requests(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None,
) -> list[Request]:
    """One request a prompt; arguments as of `generate`. Raises ValueError that names the prompt."""
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, minimum=1)
    try:
        given = list(prompts)
    except TypeError:
        raise ValueError(f"prompts={prompts!r} must be a list of texts or of token ids") from None
    shared = not isinstance(sampling, Sequence)
    requests = []
    for index, params in enumerate(_samplings(sampling, len(given))):
        tokens = _tokens(lm, given[index], index)
        if len(tokens) + max_new_tokens > lm.max_context:
            raise ValueError(
                f"prompts[{index}] has {len(tokens)} tokens, and max_new_tokens={max_new_tokens} "
                f"more would pass the {lm.max_context} that {lm.name} can read: shorten either"
            )
        requests.append(
            Request(
                index=index,
                tokens=tokens,
                max_new_tokens=max_new_tokens,
                sampling=params,
                seed=request_seed(params, place=index if shared or params.seed is None else 0),
                stop_ids=_stop_ids(lm, params),
            )
        )
    return requests


def check_cache(lm: LanguageModel, cache: CacheConfig) -> None:
    """Raises ValueError for what is no model, or a cache that does not fit it or the device."""
    if not isinstance(lm, LanguageModel):
        raise ValueError(f"lm={reprlib.repr(lm)} must be a LanguageModel, of flexijax.load")
    if not isinstance(cache, CacheConfig):
        raise ValueError(f"cache={cache!r} must be None or a flexijax.CacheConfig")
    platform.check_runs_here(implementation=cache.implementation, transfer=cache.transfer)
    for memory in cache.codecs if platform.is_gpu() else ():
        name = f"{memory}_codec"
        raise ValueError(
            f"{name}={getattr(cache, name)!r} has no kernels for a GPU yet: leave it at None here"
        )
    if cache.page_size > lm.max_context:
        raise ValueError(
            f"page_size={cache.page_size} is longer than the {lm.max_context} tokens that "
            f"{lm.name} can read: the usual one is 16"
        )
    # A decode chunk runs all its steps, so an endless interval would be an endless first token.
    if cache.chunk_steps >= lm.max_context:
        raise ValueError(
            f"rerank_interval={cache.rerank_interval} is longer than the {lm.max_context} tokens "
            f"that {lm.name} can read: the usual one is 16"
        )


def check_int(name: str, value: object, *, minimum: int) -> int:
    """The value as an int, NumPy's included. Raises ValueError naming it where it is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}")
    number = operator.index(cast(SupportsIndex, value))
    if number < minimum:
        raise ValueError(f"{name}={number} must be at least {minimum}")
    return number


def check_callable(name: str, value: object) -> None:
    """Raises ValueError naming what is neither None nor to be called."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}={value!r} must be None or a function")


def _samplings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * count
    try:
        each = [one for one in sampling if isinstance(one, Sampling)]
        others = len(each) != len(sampling)
    except TypeError:
        each, others = [], True
    if others:
        raise ValueError(f"sampling={reprlib.repr(sampling)} must be a Sampling, or a list of them")
    if len(each) != count:
        raise ValueError(f"sampling has {len(each)} entries for {count} prompts")
    return each


def _stop_ids(lm: LanguageModel, params: Sampling) -> tuple[int, ...]:
    if params.stop and lm.tokenizer is None:
        raise ValueError(f"stop={params.stop!r} needs a tokenizer, and {lm.name} has none")
    outside = next((i for i in params.stop_ids if i >= lm.vocab_size), None)
    if outside is not None:
        raise ValueError(f"stop_ids holds token {outside}, not in 0..{lm.vocab_size - 1}")
    own = () if params.ignore_eos else lm.end_ids
    stops = tuple(sorted({*own, *params.stop_ids}))
    if len(stops) > MAX_STOP_IDS:
        raise ValueError(f"stop_ids has {len(stops)} tokens, at most {MAX_STOP_IDS} can stop")
    return stops


def _tokens(lm: LanguageModel, prompt: str | Sequence[int], index: int) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise ValueError(f"prompts[{index}] is text, but {lm.name} has no tokenizer: pass ids")
        try:
            tokens = tuple(lm.tokenizer.encode(prompt)) if prompt else ()
        except ValueError as error:
            raise ValueError(f"prompts[{index}]: {error}") from error
    else:
        try:
            tokens = tuple(operator.index(token) for token in prompt)
        except TypeError:
            raise ValueError(
                f"prompts[{index}]={reprlib.repr(prompt)} must be a text or a list of token ids"
            ) from None
    if not tokens:
        raise ValueError(f"prompts[{index}] is empty: a prompt needs at least one token")
    outside = next((t for t in tokens if not 0 <= t < lm.vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompts[{index}] holds token {outside}, not in 0..{lm.vocab_size - 1}")
    return tokens
