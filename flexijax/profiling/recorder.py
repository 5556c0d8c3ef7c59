"""Runs a model densely on one prompt and records, inside the program, which pages each head chose.

The model attends to everything, so what it says does not depend on the choice; only page ids and
shares of attention mass leave the device, never attention weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexijax import config
from flexijax.models.config import AttentionShape
from flexijax.models.decoder import DecoderLike, Params
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels.prefill import prefill_attention
from flexijax.policies.base import forced, make_score
from flexijax.policies.score import Score

MASS = "mass"
SCORES = (*config.SCORES, MASS)
_PREFILL_TOKENS = 512
_DECODE_STEPS = 16


class Recording(NamedTuple):
    """What was seen while one prompt was continued for T steps, in NumPy arrays.

    page_ids: int32[T, L, K, n], each head's top pages, best first, -1 where there were fewer; the
        first m of them are the choice at a budget of m pages.
    pages: int32[T], pages of the context at each step (N_t).
    mass: float32[T, L, K, budgets], share of the attention that the choice at each budget holds.
    tokens: int32[T + 1], the model's own greedy tokens.
    """

    page_ids: np.ndarray
    pages: np.ndarray
    mass: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class _Program:
    """What the compiled programs depend on beside the shapes of their arguments.

    score: None ranks pages by their true attention mass.
    """

    decoder: DecoderLike
    shape: AttentionShape
    page_size: int
    budgets: tuple[int, ...]
    score: Score | None
    stop_ids: frozenset[int]


class _Workspace(NamedTuple):
    """Everything kept of one prompt, a list of layers each: keys, values and what scores pages.

    k: [K, H, S] and v: [K, S, H], the forms that CPU matmuls read fastest; states and summaries:
    as the score has them, leaves [K, ...] and [P, K, ...].
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    states: tuple[Any, ...]
    summaries: tuple[Any, ...]


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
) -> Recording:
    """Continues a prompt greedily for `steps` steps and records the pages each head would choose.

    tokens: the prompt's ids. steps: a multiple of 16. budgets: pages a head may choose, at several
    sizes at once. capacity: tokens to make room for, at least prompt and steps; prompts of one
    capacity share one compilation. score: one of those that decoding chooses by, see `CacheConfig`,
    or "mass", the true attention mass of each page. As in decoding, the first and the newest page
    are always chosen, and stop tokens are never said. progress: called with (tokens done, of how
    many), prompt and steps. Raises ValueError when the sizes do not fit.
    """
    _check(lm, tokens, steps, page_size, budgets, capacity, score)
    block = max(_PREFILL_TOKENS, page_size)
    room = -(-capacity // block) * block
    stop_ids = lm.end_ids
    program = _Program(
        lm.decoder, lm.attention, page_size, budgets, _score(lm, score, page_size), stop_ids
    )
    k, v = _empty(lm, room)
    first = jnp.int32(0)
    for start in range(0, len(tokens), block):
        piece = tokens[start : start + block]
        padded = np.zeros((1, block), np.int32)
        padded[0, : len(piece)] = piece
        last = jnp.int32(len(piece) - 1)
        first, k, v = _prefill(program, lm.params, padded, jnp.int32(start), last, k, v)
        if progress is not None:
            first.block_until_ready()
            progress(start + len(piece), len(tokens) + steps)
    work = _summarized(program, k, v, jnp.int32(len(tokens)))
    seen = []
    token, length = first, jnp.int32(len(tokens))
    for done in range(_DECODE_STEPS, steps + 1, _DECODE_STEPS):
        work, token, length, out = _decode(program, lm.params, work, token, length)
        seen.append(jax.device_get(out))
        if progress is not None:
            progress(len(tokens) + done, len(tokens) + steps)
    ids, mass, said = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    lengths = len(tokens) + 1 + np.arange(steps)
    pages = (-(-lengths // page_size)).astype(np.int32)
    said = np.concatenate([np.asarray(first)[None], said])
    return Recording(page_ids=ids, pages=pages, mass=mass, tokens=said)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _prefill(program, params: Params, tokens, start, last, k, v):
    """One block of the prompt: tokens int32[1, block] -> (next token, k, v)."""
    shape = program.shape
    block = tokens.shape[1]

    def attend(layer, q, k_new, v_new, state):
        k, v = state
        k_all, v_all = _written(k[layer], v[layer], k_new, v_new, start)
        grouped = q[0].reshape(block, shape.num_kv_heads, shape.group_size, shape.head_dim)
        out = prefill_attention(grouped, k_all, v_all, start, scale=shape.scale).reshape(q.shape)
        return out, (_replace(k, layer, k_all), _replace(v, layer, v_all))

    positions = (start + jnp.arange(block, dtype=jnp.int32))[None]
    x, (k, v) = program.decoder.hidden(params, tokens, positions, attend, (k, v))
    return _greedy(program, params, x[:, last])[0], k, v


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _summarized(program, k, v, length) -> _Workspace:
    """The workspace with the score's state of the prompt and the summaries of its pages.

    That of the page not yet full means nothing: it is the newest, chosen by rule, and is summarised
    when it is full.
    """
    score, size = program.score, program.page_size
    if score is None:
        return _Workspace(k, v, ((),) * len(k), ((),) * len(k))

    def of_layer(keys):
        heads, head_dim, _ = keys.shape
        pages = jnp.transpose(keys.reshape(heads, head_dim, -1, size), (2, 0, 3, 1))
        state = score.fit(pages, length)
        return state, score.summarize(pages, state)

    states, summaries = zip(*map(of_layer, k), strict=True)
    return _Workspace(k, v, states, summaries)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(program, params: Params, work: _Workspace, token, length):
    """`_DECODE_STEPS` greedy steps: ... -> (work, token, length, (page ids, mass, tokens))."""

    def step(carry, _):
        work, token, length = carry
        attend = functools.partial(_attend_and_choose, program, length)
        x, (work, chosen, mass) = program.decoder.hidden(
            params, token[None, None], length[None, None], attend, (work, (), ())
        )
        token = _greedy(program, params, x[:, 0])[0]
        return (work, token, length + 1), (jnp.stack(chosen), jnp.stack(mass), token)

    (work, token, length), out = jax.lax.scan(step, (work, token, length), length=_DECODE_STEPS)
    return work, token, length, out


def _attend_and_choose(program, length, layer, q, k_new, v_new, state):
    """Dense attention of the token at position `length`, and the pages each head would choose."""
    work, chosen, mass = state
    shape, size = program.shape, program.page_size
    k_all, v_all = _written(work.k[layer], work.v[layer], k_new, v_new, length)
    newest = length // size
    summaries = _filled(program, k_all, work.states[layer], work.summaries[layer], length)

    q = q[0].reshape(shape.num_kv_heads, shape.group_size, shape.head_dim)
    logits = jnp.einsum("KGH,KHS->KGS", q, k_all, preferred_element_type=jnp.float32)
    seen = jnp.arange(k_all.shape[2]) <= length
    weights = jax.nn.softmax(jnp.where(seen[None, None], logits * shape.scale, -jnp.inf))
    out = jnp.einsum("KGS,KSH->KGH", weights, v_all.astype(jnp.float32)).astype(q.dtype)

    per_page = weights.reshape(*weights.shape[:2], -1, size).sum(axis=-1).mean(axis=1)  # [K, P]
    pages = jnp.arange(per_page.shape[1], dtype=jnp.int32)
    if program.score is None:
        scores = jnp.where((pages <= newest)[None], per_page, -jnp.inf)
    else:
        scores = program.score.scores(
            q[None],
            summaries,
            jax.tree.map(lambda leaf: leaf[None], work.states[layer]),
            pages[None],
            (length + 1)[None],
            page_size=size,
            scale=shape.scale,
            implementation=None,
        )[0]
    scores = forced(scores[None], (length + 1)[None], page_size=size)[0]
    values, ids = jax.lax.top_k(scores, program.budgets[-1])
    held = jnp.cumsum(jnp.take_along_axis(per_page, ids, axis=1), axis=1)
    ids = jnp.where(values == -jnp.inf, -1, ids)
    held = jnp.stack([held[:, budget - 1] for budget in program.budgets], axis=-1)
    work = _Workspace(
        _replace(work.k, layer, k_all),
        _replace(work.v, layer, v_all),
        work.states,
        _replace(work.summaries, layer, summaries),
    )
    out = out.reshape(1, 1, shape.num_heads, shape.head_dim)
    return out, (work, (*chosen, ids), (*mass, held))


def _filled(program, k, state, summaries, length):
    """A layer's summaries, with that of the page which the token at position `length` fills."""
    score, size = program.score, program.page_size
    if score is None:
        return summaries
    page = length // size
    keys = jax.lax.dynamic_slice_in_dim(k, page * size, size, axis=2).transpose(0, 2, 1)
    # Out of bounds, so dropped, until the page is full.
    at = jnp.where(length % size == size - 1, page, k.shape[2] // size)
    new = score.summarize(keys, state)
    return jax.tree.map(lambda pool, row: pool.at[at].set(row, mode="drop"), summaries, new)


def _greedy(program, params: Params, x: jax.Array) -> jax.Array:
    """x [B, D] -> int32[B], the best token that does not end the text."""
    logits = program.decoder.logits(params, x)
    if program.stop_ids:
        logits = logits.at[:, jnp.array(sorted(program.stop_ids))].set(-jnp.inf)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _written(k, v, k_new, v_new, start) -> tuple[jax.Array, jax.Array]:
    """Keys and values [1, T, K, H] of tokens from `start` on, written into a layer's workspace."""
    k_new = jnp.transpose(k_new[0], (1, 2, 0))
    v_new = jnp.transpose(v_new[0], (1, 0, 2))
    return (
        jax.lax.dynamic_update_slice_in_dim(k, k_new, start, axis=2),
        jax.lax.dynamic_update_slice_in_dim(v, v_new, start, axis=1),
    )


def _replace(leaves: tuple, at: int, leaf: Any) -> tuple:
    return (*leaves[:at], leaf, *leaves[at + 1 :])


def _score(lm: LanguageModel, name: str, page_size: int) -> Score | None:
    if name == MASS:
        return None
    made = config.CacheConfig(page_size=page_size, budget_tokens=2 * page_size, score=name)
    return make_score(made, jnp.dtype(lm.dtype).name)


def _empty(lm: LanguageModel, room: int):
    shape = lm.attention
    sizes = (
        (shape.num_kv_heads, shape.head_dim, room),
        (shape.num_kv_heads, room, shape.head_dim),
    )
    return tuple(
        tuple(jnp.zeros(size, lm.dtype) for _ in range(shape.num_layers)) for size in sizes
    )


def _check(lm, tokens, steps, page_size, budgets, capacity, score) -> None:
    if not tokens:
        raise ValueError("tokens=[] must hold at least one token")
    if steps <= 0 or steps % _DECODE_STEPS:
        raise ValueError(f"steps={steps} must be a positive multiple of {_DECODE_STEPS}")
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
    if score not in SCORES:
        raise ValueError(f"score={score!r} must be one of {', '.join(map(repr, SCORES))}")
