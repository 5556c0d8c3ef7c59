"""LaCache: a ladder, on which each layer keeps other tokens than the next; nothing is weighed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.policies.base import HeadGroup, Policy, PolicyState, RunSpec, Tier, Tokens, Window


@dataclasses.dataclass(frozen=True)
class LaCache(Policy):
    """Keeps the `first` x B tokens of the beginning, and thins out the others rung by rung.

    A rung is `rung` tokens that follow each other among those that are held; of the one at the
    cursor layer l keeps the token l mod `rung`, and the cursor moves behind it. Less than `margin`
    tokens before the end of the B that are held it goes back to the first x B. A prompt of S tokens
    is thinned at once: once through, and where that is not enough a second time with rungs of

        1 + t (rung - 1),    t = ceil(left to go / (M (rung - 1))),   M = B - first x B - margin

    Source: https://arxiv.org/abs/2507.14204, read with GATECH-EIC/LaCache: 128 first of 256, span
    16 and overlap 0, which is `rung=2` for models of 17 to 32 layers, 1 + ceil((L - 16) / 16). The
    margin there is L; here the default is at most half of what is behind the first x B. A rung's
    tokens go one by one from the left, R at most every R steps, where that code lets go of whole
    rungs; with rungs of 2 it is the same. Its overlap and its slack of a few tokens above B are
    not here, and keys keep the rotation of their place in the text.
    Device bytes: B + R tokens of every head. Raises ValueError for a share, rung or margin that
    cannot be.
    """

    first: float = 0.5
    rung: int = 2
    margin: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.first < 1:
            raise ValueError(f"first={self.first} must be at least 0 and less than 1")
        if self.rung < 2:
            raise ValueError(f"rung={self.rung} must be at least 2")
        if self.margin is not None and self.margin < self.rung:
            raise ValueError(f"margin={self.margin} must be at least rung={self.rung}")

    @property
    def prompt_window(self) -> int:
        """One query, of which nothing is wanted but that the prompt ends with it: see `Policy`."""
        return 1

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`. Raises ValueError for a budget without room for the ladder."""
        budget = run.budget_tokens
        first, rungs = self._ladder(budget)
        margin = budget - first - rungs
        if rungs < 1 or margin < max(run.shape.num_layers, self.rung):
            raise ValueError(
                f"budget_tokens={budget} leaves {budget - first} tokens behind the first ones of "
                f"policy='lacache': a rung and a margin of at least {run.shape.num_layers} layers"
                f" and rung={self.rung} do not fit"
            )
        return (HeadGroup(run.all_heads, (Tier(budget),), unit="token"),)

    def _ladder(self, room: int) -> tuple[int, int]:
        """Tokens that always stay, and rungs until the cursor goes back to them."""
        first = int(self.first * room)
        margin = (room - first) // 2 if self.margin is None else self.margin
        return first, room - first - margin

    def init_state(self, tokens: int) -> PolicyState:
        """The prompt's length, int32[]: see `Policy`."""
        return PolicyState(head=jnp.int32(0))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """Notes where the prompt ends: see `Policy`."""
        return PolicyState(head=tokens.length)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """1 for what stays; of a prompt -inf for the rest, else 0: see `Policy`."""
        assert group.room is not None
        room, prompt = group.room, state.head
        is_there = tokens.position >= 0
        order = jnp.argsort(jnp.where(is_there, tokens.position, jnp.iinfo(jnp.int32).max))
        place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
        at_once, cursor, kept = self._thinned(place, prompt, tokens.layer, room)
        held = is_there.sum()
        gone = tokens.length - held - (prompt - kept)  # since the prompt
        going = jnp.where(tokens.length == prompt, 0, held - room)
        going = jnp.maximum(going, 0)
        stays = self._one_by_one(len(place), cursor, gone, going, tokens.layer, room)[place]
        later = stays.astype(jnp.float32)
        return jnp.where(tokens.length == prompt, jnp.where(at_once, 1.0, -jnp.inf), later)

    def _thinned(
        self, place: jax.Array, length: jax.Array, layer: jax.Array, room: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a prompt: what stays bool[T], rungs behind the cursor, and how many tokens stay."""
        first, most = self._ladder(room)
        drops = self.rung - 1
        going = jnp.maximum(length - room, 0)
        rungs = jnp.minimum(_ceil(going, drops), most)
        stays, place = _rungs_of(place - first, self.rung, rungs, layer % self.rung)
        left = jnp.maximum(going - most * drops, 0)
        times = jnp.maximum(_ceil(left, most * drops), 1)
        again = _ceil(left, times * drops)
        size = 1 + times * drops
        still, _ = _rungs_of(place, size, again, layer % size)
        # Of the last rung there may be less than all.
        behind = length - rungs * drops - first - size * again
        kept = jnp.where(left > 0, first + again + jnp.maximum(behind, 0), length - rungs * drops)
        return stays & still, jnp.where(left > 0, again, rungs), kept

    def _one_by_one(
        self,
        places: int,
        cursor: jax.Array,
        gone: jax.Array,
        going: jax.Array,
        layer: jax.Array,
        room: int,
    ) -> jax.Array:
        """bool[T], which of the tokens in a row stay when `going` more go after `gone`."""
        first, most = self._ladder(room)
        drops, keeps = self.rung - 1, layer % self.rung

        def let_go(at: jax.Array, stays: jax.Array) -> jax.Array:
            step = (cursor * drops + gone + at) % (most * drops)
            # The one that stays has those of the rung that stood before it taken away.
            behind = (step % drops >= keeps).astype(jnp.int32)
            target = first + step // drops + behind
            return stays & (jnp.cumsum(stays) != target + 1)

        return lax.fori_loop(0, going, let_go, jnp.ones(places, bool))


def _ceil(count: jax.Array, of: jax.Array | int) -> jax.Array:
    return -(-count // of)


def _rungs_of(
    place: jax.Array, size: jax.Array | int, rungs: jax.Array, keeps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which of the tokens at int32[T] stay when rungs from 0 on keep one each, and their places."""
    on = (place >= 0) & (place < size * rungs)
    after = jnp.where(place < 0, place, place - (size - 1) * rungs)
    return ~on | (place % size == keeps), jnp.where(on, place // size, after)


def oracle(
    row: list[int], cursor: int, *, layer: int, room: int, first: int, margin: int, rung: int
) -> tuple[list[int], int]:
    """What is left of the tokens in a row when there are more than `room`, and the cursor then.

    As the authors write it: lists of indices, of whole rungs.
    """
    going, drops = len(row) - room, rung - 1
    if going <= 0:
        return row, cursor
    to_end = room - cursor - margin
    rungs = min(-(-going // drops), to_end)
    on = [cursor + layer % rung + rung * at for at in range(rungs)]
    found = [*range(cursor), *on, *range(cursor + rung * rungs, len(row))]
    row = [row[at] for at in found]
    left = going - to_end * drops
    if left <= 0:
        return row, cursor + rungs
    times = -(-left // ((room - first - margin) * drops))
    size = rung + (times - 1) * drops
    rungs = -(-left // (size - 1))
    on = [first + layer % size + size * at for at in range(rungs)]
    found = [*range(first), *on, *range(first + size * rungs, len(row))]
    return [row[at] for at in found], first + rungs
