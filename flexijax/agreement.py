"""How often a cache would choose the next token of a given text, fed that text token by token."""

from collections.abc import Sequence

import numpy as np

from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.engine.program import Progress
from flexijax.models.language_model import LanguageModel


def agreeing_tokens(
    lm: LanguageModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    cache: CacheConfig,
    progress: Progress | None = None,
) -> int:
    """How many of `tokens` are the greedy choice after the prompt and the tokens before them.

    prompt, tokens: token ids; the tokens are usually another policy's answer to the prompt.
    Raises ValueError as `generate` does for a cache that does not fit the model or the memory.
    """
    interval = cache.chunk_steps
    steps = -(-len(tokens) // interval) * interval
    program = make_program(lm, cache, max_tokens=len(prompt) + steps, max_new_tokens=steps)
    again = read(lm, [program], prompt, progress=progress, label="the prompt again")
    fed = Continuation(lm, program, again, progress=progress)
    logits = fed.feed(np.resize(np.asarray(tokens, np.int32), steps).tolist())
    chosen = [fed.first_logits.argmax(), *logits.argmax(axis=-1)]
    return sum(int(a) == b for a, b in zip(chosen, tokens, strict=False))
