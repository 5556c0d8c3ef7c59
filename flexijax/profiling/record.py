"""Continues a prompt under full attention and records which pages each head would have chosen."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.engine.program import Program
from flexijax.models.language_model import LanguageModel
from flexijax.policies.page_score import PageShape
from flexijax.policies.page_scores import SCORES
from flexijax.profiling.recording import Choices, Recording
from flexijax.profiling.settings import MASS, RANKINGS

_CHUNK_STEPS = 16


class RecordedChoices(NamedTuple):
    """What was observed while one prompt was continued for T steps, in NumPy arrays.

    page_ids: int32[T, L, K, n], each head's top pages, best first, -1 where there were fewer; the
        first m of them are the choice at a budget of m pages.
    pages: int32[T], pages of the context at each step (N_t).
    mass: float32[T, L, K, budgets], share of the attention that the choice at each budget holds.
    stale_mass: float32[T, L, K, budgets], of the same attention what the choice of 16 steps before
        holds, with the pages begun since, as after a rerank; NaN at the first 16 steps.
    tokens: int32[T + 1], the model's own greedy tokens.
    """

    page_ids: np.ndarray
    pages: np.ndarray
    mass: np.ndarray
    stale_mass: np.ndarray
    tokens: np.ndarray


def record(
    lm: LanguageModel,
    tokens: list[int],
    *,
    steps: int,
    page_size: int,
    budgets: tuple[int, ...],
    capacity: int,
    score: str = "minmax",
    progress: Callable[[int, int], None] | None = None,
) -> RecordedChoices:
    """Continues a prompt greedily for `steps` steps and records the pages each head would choose.

    tokens: the prompt's ids. steps: a multiple of 16. budgets: pages a head may choose, at several
    sizes at once. capacity: tokens to make room for, at least prompt and steps; prompts of one
    capacity share one compilation. score: one of those that decoding chooses by, see
    `policies.page_scores`, or "mass", the true attention mass of each page. As in decoding, the
    first and the newest page are always chosen; stop tokens are never generated. progress: called
    with (tokens done, of how many), prompt and steps. Raises ValueError when the sizes do not fit.
    """
    _check(lm, tokens, steps, page_size, budgets, capacity, score)
    program = _program(lm, page_size, budgets, capacity, score)
    total = len(tokens) + steps

    def report(stage: str, done: int, of: int) -> None:
        if progress is not None and stage.startswith("reading"):
            progress(done, total)

    prompt = read(lm, [program], tokens, progress=report)
    run, found, generated = Continuation(lm, program, prompt), [], []
    for done in range(_CHUNK_STEPS, steps + 1, _CHUNK_STEPS):
        generated += run.greedy(_CHUNK_STEPS)
        layers: list[Choices] = jax.device_get(
            [layer.groups[0].state.head[0] for layer in run.cache.banks[0].layers]
        )
        # [1, K, R, ...] of each layer -> [R, L, K, ...]
        found.append(
            jax.tree.map(lambda *of: np.stack([x[0].swapaxes(0, 1) for x in of], axis=1), *layers)
        )
        if progress is not None:
            progress(len(tokens) + done, total)
    chosen: Choices = jax.tree.map(lambda *chunks: np.concatenate(chunks), *found)
    lengths = len(tokens) + 1 + np.arange(steps)
    return RecordedChoices(
        page_ids=np.asarray(chosen.pages),
        pages=(-(-lengths // page_size)).astype(np.int32),
        mass=np.asarray(chosen.mass),
        stale_mass=np.asarray(chosen.stale_mass),
        tokens=np.array([*generated, run.next_token], np.int32),
    )


def _program(
    lm: LanguageModel, page_size: int, budgets: tuple[int, ...], capacity: int, score: str
) -> Program:
    policy = Recording(
        budgets,
        PageShape(page_size, lm.attention.head_dim, jnp.dtype(lm.dtype).name),
        None if score == MASS else SCORES[score],
        lm.attention.scale,
        _CHUNK_STEPS,
    )
    cache = CacheConfig(
        policy=policy,
        page_size=page_size,
        budget_tokens=budgets[-1] * page_size,
        rerank_interval=_CHUNK_STEPS,
    )
    made = make_program(lm, cache, max_tokens=capacity, shared_reading=True)
    return Program(made.decoder, made.layout, policy, suppress_ids=tuple(sorted(lm.end_ids)))


def _check(lm, tokens, steps, page_size, budgets, capacity, score) -> None:
    if not tokens:
        raise ValueError("tokens=[] must hold at least one token")
    if steps <= 0 or steps % _CHUNK_STEPS:
        raise ValueError(f"steps={steps} must be a positive multiple of {_CHUNK_STEPS}")
    if not budgets or list(budgets) != sorted(set(budgets)) or budgets[0] < 2:
        raise ValueError(f"budgets={budgets} must be ascending numbers of pages of at least 2")
    if budgets[-1] * page_size >= capacity:
        raise ValueError(
            f"budgets={budgets} pages of {page_size} tokens leave nothing to choose "
            f"in capacity={capacity} tokens"
        )
    if len(tokens) + steps > capacity:
        raise ValueError(
            f"capacity={capacity} must be at least {len(tokens) + steps}, "
            f"a prompt of {len(tokens)} tokens and {steps} steps"
        )
    if capacity > lm.max_context:
        raise ValueError(f"capacity={capacity} must be at most {lm.max_context}, all of the model")
    if score not in RANKINGS:
        raise ValueError(f"score={score!r} must be one of {', '.join(map(repr, RANKINGS))}")
