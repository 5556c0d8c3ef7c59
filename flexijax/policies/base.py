"""What a cache method is: head groups with their ladders, what is observed, how things are ranked.

Every published method is a ranking of tokens or pages plus a ladder of places: the best ranked stay
on the device, the rest goes to the host or is dropped. A policy says which heads are kept how, and
ranks; the mechanism in `flexijax.cache` takes the top, moves, counts, and knows no policy by name.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from flexijax.models.config import AttentionShape
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.codec import Codec
from flexijax.policies.page_score import PageScore
from flexijax.profiles.head_profile import HeadProfile

DEVICE = "device"
HOST = "host"
# The tiers, and how their head group is kept, of which pages can be coded.
CODED = ((DEVICE, "selected"), (DEVICE, "offloaded"), (HOST, "offloaded"))


@dataclasses.dataclass(frozen=True)
class Tier:
    """One rung of a ladder: room for so many pages or tokens of each head; None takes all.

    codec: what full pages are kept in; None: the cache's dtype.
    """

    room: int | None
    memory: Literal["device", "host"] = DEVICE
    codec: Codec | None = None


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that are kept alike. Static: programs are compiled for it.

    heads: ascending. ladder: where their pages or tokens are, best ranked first; what falls below
    the last rung is dropped for good, and counted. unit: what is ranked and moved. attends: pages
    that each step chooses among those on the device; None attends to all of them. score: how pages
    are scored, where they are chosen or moved. prompt_room: of a prompt only so many stay, and what
    is generated fills the rest of the room; None fills all of it. schedule: each head is reranked
    in an interval of its own; None reranks all after every chunk of decode steps. source: an
    earlier layer, and of each head here the head there whose chosen pages it attends to; it has no
    score then. places: not for policies: of a group that shards of a mesh hold different numbers
    of, see `cache/spread.py`.

    | ladder | unit | attends | kept as |
    |---|---|---|---|
    | all on the device | page | None | dense: attention over everything |
    | all on the device | page | n | selected: n pages chosen at every step, by a block table |
    | n on the device, all on the host | page | None | offloaded: reranked, new ones load |
    | n on the device | token | None | evicting: the lowest ranked are overwritten |

    Pages of selected and offloaded groups may have a codec, slots only that of their host pages.
    Raises ValueError for any other combination.
    """

    heads: tuple[int, ...]
    ladder: tuple[Tier, ...]
    unit: Literal["page", "token"] = "page"
    attends: int | None = None
    score: PageScore | None = None
    prompt_room: int | None = None
    schedule: Adaptive | None = None
    source: tuple[int, tuple[int, ...]] | None = None
    places: int = 0

    def __post_init__(self) -> None:
        if list(self.heads) != sorted(set(self.heads)) or min(self.heads, default=0) < 0:
            raise ValueError(f"heads={self.heads} of a group must ascend from 0, each named once")
        if not self.ladder:
            raise ValueError("ladder=() of a head group needs at least one tier")
        for name, value in (("attends", self.attends), ("prompt_room", self.prompt_room)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} of a head group must be at least 1")
        if self.room is not None and self.room < 1:
            raise ValueError(f"room={self.room} of a tier must be at least 1")
        kind = self.kind
        if self.source is not None and self.score is not None:
            raise ValueError("a head group whose pages another layer chooses has no score")
        if kind in ("selected", "offloaded") and self.score is None and self.source is None:
            raise ValueError("a head group whose pages are chosen needs a score")
        for name, kinds in (
            ("score", ("selected", "offloaded")),
            ("source", ("selected",)),
            ("schedule", ("offloaded",)),
            ("prompt_room", ("evicting",)),
        ):
            if getattr(self, name) is not None and kind not in kinds:
                raise ValueError(f"{name} means nothing for a head group that is kept {kind}")
        for tier in self.ladder:
            if tier.codec is not None and (tier.memory, kind) not in CODED:
                raise ValueError(
                    f"the {tier.memory}'s pages of a head group that is kept {kind} have no codec"
                )
        if self.ladder[0].codec not in (None, self.ladder[-1].codec):
            raise ValueError("slots of a head group may only have the codec of its host pages")
        if self.prompt_room is not None and self.prompt_room > (self.room or 0):
            raise ValueError(f"prompt_room={self.prompt_room} is more than room={self.room}")

    @property
    def room(self) -> int | None:
        """Units on the device, for each head; None: all that come."""
        return self.ladder[0].room

    @property
    def codec(self) -> Codec | None:
        """What pages of one of its tiers are kept in, if that is no dtype."""
        return next((tier.codec for tier in self.ladder if tier.codec is not None), None)

    @property
    def kind(self) -> Literal["dense", "selected", "offloaded", "evicting"]:
        """How the group is kept: see the table above."""
        limited = self.room is not None
        match ([tier.memory for tier in self.ladder], self.unit, limited, self.attends is None):
            case (["device"], "page", False, True):
                return "dense"
            case (["device"], "page", False, False):
                return "selected"
            case (["device", "host"], "page", True, True) if self.ladder[1].room is None:
                return "offloaded"
            case (["device"], "token", True, True):
                return "evicting"
        raise ValueError(
            f"{self} is no ladder that the cache has: pages all on the device (all attended, or "
            "`attends` of them chosen), pages with limited room on the device and all of them on "
            "the host, or tokens with limited room and the rest dropped (rank the tokens of a page "
            "alike to drop whole pages)"
        )


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """What a policy may know of a run when it states its groups.

    budget_tokens: that a head attends to beside the newest ones. max_tokens: of the longest
    request; max_new_tokens of them are generated. chunk_steps: decode steps between two reranks.
    adaptive: of `CacheConfig(rerank_interval="adaptive")`. profile: of the model's heads, None
    unless the policy asks for one.
    """

    shape: AttentionShape
    page_size: int
    budget_tokens: int
    max_tokens: int
    max_new_tokens: int
    chunk_steps: int
    adaptive: Adaptive | None
    profile: HeadProfile | None

    @property
    def budget_pages(self) -> int:
        """The budget in pages."""
        return self.budget_tokens // self.page_size

    @property
    def all_heads(self) -> tuple[int, ...]:
        """The KV heads of a layer."""
        return tuple(range(self.shape.num_kv_heads))


class Tokens(NamedTuple):
    """The tokens of one KV head that are on the device, in any order."""

    k: jax.Array  # [T, H], rotated
    v: jax.Array  # [T, H]
    position: jax.Array  # int32[T], in the text; -1 where there is no token
    length: jax.Array  # int32[], tokens of the text so far
    layer: jax.Array  # int32[]


class Window(NamedTuple):
    """The last W queries of one KV head over its T tokens."""

    q: jax.Array  # [G, W, H], unscaled
    position: jax.Array  # int32[W], in the text; -1 where there is no query
    logits: jax.Array  # float32[G, W, T], scaled; -inf where the query does not see the token
    lse: jax.Array  # float32[G, W], log of the sum of their exponentials


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState:
    """What a policy remembers of one KV head of one request; both may be without leaves."""

    tokens: Any = ()  # leaves [T, ...], which stay with their token wherever it moves
    head: Any = ()  # leaves of any shape


class Policy(abc.ABC):
    """A cache method: a frozen dataclass of pure functions, hashable, one file each.

    `groups` is all that must be given. What is here besides are the defaults: the first page is
    always attended, no query is observed, the newest tokens stay.
    """

    @property
    def name(self) -> str:
        """What messages and tables call the method: its file, or its class in a script."""
        file = type(self).__module__.rpartition(".")[2]
        return type(self).__name__ if file == "__main__" else file

    @property
    def needs_profile(self) -> bool:
        """Whether the method asks which heads of the model are stable."""
        return False

    @property
    def prompt_window(self) -> int | None:
        """How many of a prompt's last queries are observed at its end; None: every one of it."""
        return 0

    @property
    def observes_decode(self) -> bool:
        """Whether the queries of each chunk of decode steps are observed at its end."""
        return False

    @property
    def sink_pages(self) -> int:
        """How many first pages are attended whatever their score, as the newest one always is."""
        return 1

    @abc.abstractmethod
    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """How each KV head of a layer is kept; every head is in one group."""

    def init_state(self, tokens: int) -> PolicyState:
        """What is remembered of a head of which nothing was observed yet; tokens: T."""
        return PolicyState()

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """What is remembered of a head after its queries in `window`."""
        return state

    def across_heads(self, state: PolicyState, layer: jax.Array) -> PolicyState:
        """What is remembered of each head of a group, given what all of them saw of a prompt.

        Leaves [K, T, ...] and [K, ...]; called once, at the prompt's end, where all heads hold the
        same tokens in the same places. layer: int32[]. What comes back is as `init_state` says.
        """
        return state

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """What tokens are kept by: float32[T]; the `room` greatest stay, of equal ones any.

        Ranks of places without a token (position -1) are ignored.
        """
        return tokens.position.astype(jnp.float32)


def attention(window: Window) -> jax.Array:
    """The weights float32[G, W, T] of the window's softmax; 0 for queries that are not there."""
    is_query = (window.position >= 0)[None, :, None]
    # Where there is no query both are -inf, and their difference is no number.
    total = jnp.where(is_query, window.lse[..., None], 0.0)
    return jnp.exp(window.logits - total)


def check_groups(groups: tuple[HeadGroup, ...], *, num_kv_heads: int, layer: int) -> None:
    """Raises ValueError unless every KV head of the layer is in exactly one group."""
    named = sorted(head for group in groups for head in group.heads)
    if named != list(range(num_kv_heads)):
        raise ValueError(
            f"the head groups of layer {layer} name heads {named}; each of 0 .. {num_kv_heads - 1} "
            "must be in one group"
        )


def check_sources(layers: tuple[tuple[HeadGroup, ...], ...]) -> None:
    """Raises ValueError where a group's source is no earlier layer that chooses as many pages."""
    for layer, groups in enumerate(layers):
        for group in groups:
            if group.source is None:
                continue
            of, heads = group.source
            there = layers[of] if 0 <= of < layer else ()
            choosing = {head for one in there if one.score is not None for head in one.heads}
            attends = {one.attends for one in there if set(one.heads) & set(heads)}
            if not choosing.issuperset(heads) or attends != {group.attends}:
                raise ValueError(
                    f"source={group.source} of a head group of layer {layer} must name heads of an "
                    f"earlier layer that choose {group.attends} pages themselves"
                )
            if len(heads) != len(group.heads):
                raise ValueError(
                    f"source={group.source} of layer {layer} must name a head for each of "
                    f"{group.heads}"
                )
