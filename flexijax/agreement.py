"""How often a cache would choose the next token of a given text, fed that text token by token.

Two greedy texts part for good at their first difference, however close the models are; feeding both
the same text compares every one of their choices.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from flexijax.compiled import run_forced
from flexijax.config import CacheConfig
from flexijax.engine import Engine, Progress, Request
from flexijax.generate import make_program
from flexijax.models.language_model import LanguageModel
from flexijax.profiles.head_profile import HeadProfile
from flexijax.sampling import Sampling


def agreeing_tokens(
    lm: LanguageModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    cache: CacheConfig,
    profile: HeadProfile | None = None,
    progress: Progress | None = None,
) -> int:
    """How many of `tokens` are the greedy choice after the prompt and the tokens before them.

    prompt, tokens: token ids; the tokens are usually another mode's answer to the prompt.
    Raises ValueError as `generate` does for a cache that does not fit the model or the memory.
    """
    interval = cache.chunk_steps
    steps = -(-len(tokens) // interval) * interval
    program = make_program(lm, cache, profile=profile, max_tokens=len(prompt) + steps, rows=1)
    engine = Engine(lm, program, progress=progress)
    request = Request(
        index=0,
        tokens=tuple(prompt),
        max_new_tokens=steps,
        sampling=Sampling(),
        seed=0,
        stop_ids=(),
    )
    chosen = engine.admit(request, "the prompt again").tokens
    fed = np.resize(np.asarray(tokens, np.int32), steps)
    for start in range(0, steps, interval):
        piece = jnp.asarray(fed[start : start + interval, None])
        engine.cache, logits = run_forced(
            engine.compiler, lm.params, engine.cache, piece, jnp.ones(1, bool)
        )
        chosen += np.asarray(logits[:, 0]).argmax(axis=-1).tolist()
    return sum(a == b for a, b in zip(chosen, tokens, strict=False))
