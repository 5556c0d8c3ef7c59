"""RazorAttention: retrieval heads keep everything, the others first tokens and the newest."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.policies.base import HeadGroup, Policy, PolicyState, RunSpec, Tier, Tokens


@dataclasses.dataclass(frozen=True)
class RazorAttention(Policy):
    """Keeps every token of the retrieval heads; of the others `sinks` first and the newest ones.

    Of those max(B, S / `share`) stay, with S the longest context of the run, rounded up to eight
    pages: rooms are static, and a shorter request keeps as many.

    retrieval: per layer, the KV heads that keep everything. The paper takes each that has a query
    head among the 14 % with the highest induction score or the 1 % with the highest echo score:
    `flexijax.profiling.retrieval.measure_retrieval(lm).kv_heads()`. None takes the unstable heads
    of the model's profile instead: the same split by another measure, an ablation and not the
    paper's.

    The paper also keeps one compensation token for the N that a head has dropped, of their mean key
    and mean value, with log N added to its logit. It is not here: attention over tokens that stand
    for several needs a weight for each place, which the cache does not have.
    Device bytes: S of the retrieval heads, sinks + max(B, S / share) + R of the others.
    Source: https://arxiv.org/abs/2407.15891 by third-party notes; shares of heads and sinks as in
    MindSpore's golden-stick; B stands for the paper's least number of newest tokens.
    Raises ValueError for a negative number of sinks or a share that is none.
    """

    retrieval: tuple[tuple[int, ...], ...] | None = None
    sinks: int = 4
    share: int = 5

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0")
        if self.share < 1:
            raise ValueError(f"share={self.share} must be at least 1")

    @property
    def needs_profile(self) -> bool:
        """Unless the heads are named: see `Policy`."""
        return self.retrieval is None

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """Retrieval heads, then the others: see `Policy`.

        Raises ValueError where the heads are neither named nor in a profile.
        """
        if self.retrieval is not None:
            retrieval = self.retrieval[layer]
        elif run.profile is not None:
            retrieval = run.profile.unstable_heads(layer)
        else:
            raise ValueError(
                "policy='razor_attention' needs RazorAttention(retrieval=...), or a head profile: "
                "see CacheConfig(profile=...)"
            )
        others = tuple(head for head in run.all_heads if head not in retrieval)
        found = []
        if retrieval:
            found.append(HeadGroup(retrieval, (Tier(None),)))
        if others:
            pages = -(-run.max_tokens // (8 * self.share * run.page_size))
            newest = max(run.budget_tokens, 8 * pages * run.page_size)
            found.append(HeadGroup(others, (Tier(self.sinks + newest),), unit="token"))
        return tuple(found)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """First tokens, then the newer the better: see `Policy`."""
        newest = tokens.position.astype(jnp.float32)
        return jnp.where(tokens.position < self.sinks, jnp.inf, newest)


def oracle(length: int, *, sinks: int, newest: int) -> np.ndarray:
    """bool[T]: which tokens of a text of `length` a head that is no retrieval head keeps."""
    position = np.arange(length)
    return (position < sinks) | (position >= length - newest)
