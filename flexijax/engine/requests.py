"""What a caller asks of `generate`, checked and tokenized before anything is traced."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import SupportsIndex, cast

from flexijax.config import CacheConfig
from flexijax.engine.engine import MAX_STOP_IDS, Request
from flexijax.engine.sampling import Sampling, request_seed
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform


def make_requests(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None,
    seed: int,
) -> list[Request]:
    """One request a prompt; arguments as of `generate`. Raises ValueError that names the prompt."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    seed = whole_number("seed", seed, least=0)
    try:
        given = list(prompts)
    except TypeError:
        raise ValueError(f"prompts={prompts!r} must be a list of texts or of token ids") from None
    requests = []
    for index, wish in enumerate(_samplings(sampling, len(given))):
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
                sampling=wish,
                seed=request_seed(wish, seed=seed, index=index),
                stop_ids=_stop_ids(lm, wish),
            )
        )
    return requests


def check_cache(lm: LanguageModel, cache: CacheConfig) -> None:
    """Raises ValueError for what is no model, or a cache that does not fit it or the device."""
    if not isinstance(lm, LanguageModel):
        raise ValueError(f"lm={reprlib.repr(lm)} must be a LanguageModel, of flexijax.load")
    if not isinstance(cache, CacheConfig):
        raise ValueError(f"cache={cache!r} must be None or a flexijax.CacheConfig")
    for name, wanted in (("implementation", "triton"), ("transfer", "zero_copy")):
        if getattr(cache, name) == wanted and not platform.is_gpu():
            raise ValueError(f"{name}={wanted!r} runs on NVIDIA GPUs only: leave it at None here")
    # A decode chunk runs all its steps, so an endless interval would be an endless first token.
    if (cache.tail_pages - 1) * cache.page_size >= lm.max_context:
        raise ValueError(
            f"rerank_interval={cache.rerank_interval} is longer than the {lm.max_context} tokens "
            f"that {lm.name} can read: the usual one is 16"
        )


def whole_number(name: str, value: object, *, least: int) -> int:
    """The value as an int, NumPy's included. Raises ValueError naming it where it is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    number = operator.index(cast(SupportsIndex, value))
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    return number


def _samplings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * count
    try:
        each = [wish for wish in sampling if isinstance(wish, Sampling)]
        others = len(each) != len(sampling)
    except TypeError:
        each, others = [], True
    if others:
        raise ValueError(f"sampling={reprlib.repr(sampling)} must be a Sampling, or a list of them")
    if len(each) != count:
        raise ValueError(f"sampling has {len(each)} entries for {count} prompts")
    return each


def _stop_ids(lm: LanguageModel, wish: Sampling) -> tuple[int, ...]:
    if wish.stop and lm.tokenizer is None:
        raise ValueError(f"stop={wish.stop!r} needs a tokenizer, and {lm.name} has none")
    outside = next((i for i in wish.stop_ids if i >= lm.vocab_size), None)
    if outside is not None:
        raise ValueError(f"stop_ids holds token {outside}, not in 0..{lm.vocab_size - 1}")
    own = () if wish.ignore_eos else lm.end_ids
    stops = tuple(sorted({*own, *wish.stop_ids}))
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
