"""TreeKV: neighbours merge two by two, so that what is far away is kept ever more sparsely."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.policies.base import (
    HeadGroup,
    Policy,
    PolicyState,
    RunSpec,
    Tier,
    Tokens,
    Window,
)
from flexijax.policies.gathered import gathered, nothing_gathered


@dataclasses.dataclass(frozen=True)
class TreeKV(Policy):
    """Keeps `sinks` first tokens, the newest up to half of B, and c = B / 2 between them by a tree.

    Whenever one more than c stand in between, one of the two at the places i and i + 1 goes: the
    one of lower attention, averaged over the queries that saw it and summed over the G query heads;
    the older where they are equal. Then i moves on by one, from c - 1 back to 0. After many tokens
    half of the c places hold one of every two of the last c tokens, a quarter one of every four of
    those before, and so on. `attended=False` is the paper's ablation: the tree alone, of each two
    the older stays.

    Up to R go at once, every R steps, one after the other by the same rule; of a prompt, as if its
    tokens had come one by one, by the attention of its last `window` queries. Which places merge
    depends on how many have been evicted and on nothing else, so what stays is the best of each of
    c stretches: see `_places`. Device bytes: B + R tokens of every head, and 8 bytes a token.
    Source: https://arxiv.org/abs/2501.04987 by third-party notes (4 + 508 + 512 of 1,024 tokens).
    What differs: it reduces a prompt in blocks of a size that the notes do not give, and numbers
    the positions of what stays anew; keys here keep the rotation of their place in the text.
    Raises ValueError for a number of sinks or a window that cannot be.
    """

    sinks: int = 4
    window: int = 64
    attended: bool = True

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")

    @property
    def prompt_window(self) -> int:
        """See `Policy`."""
        return self.window

    @property
    def observes_decode(self) -> bool:
        """See `Policy`."""
        return True

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`. Raises ValueError for a budget without newest tokens."""
        if run.budget_tokens // 2 <= self.sinks:
            raise ValueError(
                f"budget_tokens={run.budget_tokens} must be more than twice sinks={self.sinks} of "
                "policy='treekv'"
            )
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def init_state(self, tokens: int) -> PolicyState:
        """Attention gathered, and queries that saw the token, float32[T] each: see `Policy`."""
        return nothing_gathered(tokens)

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """Adds what the window's queries gave, and how many there were: see `Policy`."""
        return gathered(state, window, tokens)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """1 for the best of each stretch of the tree, 0 for its others, else +inf: see `Policy`."""
        assert group.room is not None
        between, held = self._between(group.room, tokens), (tokens.position >= 0).sum()
        # Their place among those in between, in the order of the text.
        order = jnp.argsort(jnp.where(between, tokens.position, jnp.iinfo(jnp.int32).max))
        place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
        width = group.room - group.room // 2
        gone = tokens.length - held  # before this time
        into = _places(place, gone, jnp.maximum(held - group.room, 0), width)
        into = jnp.where(between, into, width)

        average = state.tokens["sum"] / jnp.maximum(state.tokens["queries"], 1.0)
        worth = average if self.attended else -place.astype(jnp.float32)
        worth = jnp.where(between, worth, -jnp.inf)
        best = jax.ops.segment_max(worth, into, num_segments=width + 1)
        newest = jnp.where(between & (worth == best[into]), place, -1)
        stays = newest == jax.ops.segment_max(newest, into, num_segments=width + 1)[into]
        return jnp.where(between, stays.astype(jnp.float32), jnp.inf)

    def _between(self, room: int, tokens: Tokens) -> jax.Array:
        """bool[T]: neither first tokens nor newest ones."""
        newest = tokens.length - (room // 2 - self.sinks)
        return (tokens.position >= self.sinks) & (tokens.position < newest)


def _places(place: jax.Array, gone: jax.Array, going: jax.Array, width: int) -> jax.Array:
    """Where each of width + going tokens in a row has its place once `going` have gone.

    place: int32[T], from the left, now; gone: int32[], how many have gone before. Several go to one
    place, of which one stays. While i runs once over the places, the row, with all that comes at
    its end, merges as 0 1 | 2 3 | 4 5 ...: whatever stands at 2 j or 2 j + 1 comes to place j.
    """
    # As all stood when i was last 0, what has merged since in its first place.
    done = gone % width
    place = jnp.where(place < done, 2 * place, place + done)
    rounds, rest = (done + going) // width, (done + going) % width
    # Those behind the first 2 c come while i runs for the second time, the third, ...
    began = jnp.maximum(place - width, 0) // width
    place = jnp.where(place < width, place, width + (place - width) % width)
    place = place >> jnp.clip(rounds - began, 0, 31)
    return jnp.where(place < 2 * rest, place // 2, place - rest)


def oracle(worth: list[float], *, width: int, first: int, going: int) -> list[int]:
    """Which of the tokens between sinks and newest stay, one leaving after the other.

    worth: of each, in the order of the text, `width + going` of them. first: i to begin with.
    """
    row = list(range(width))
    for came, i in zip(range(width, width + going), range(first, first + going), strict=True):
        row.append(came)
        left, right = row[i % width], row[i % width + 1]
        row.remove(left if worth[left] <= worth[right] else right)
    assert len(row) == min(width, len(worth)) == len(np.unique(row))
    return row
