"""Attention that tokens gathered, and how many queries saw them: for ranks by the mean."""

from __future__ import annotations

import jax.numpy as jnp

from flexijax.policies.base import PolicyState, Tokens, Window, attention


def nothing_gathered(tokens: int) -> PolicyState:
    """Before any query: "sum" and "queries" of each token, float32[T]."""
    nothing = jnp.zeros(tokens, jnp.float32)
    return PolicyState(tokens={"sum": nothing, "queries": nothing})


def gathered(state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
    """With what the window's queries gave, over the G query heads, and how many there were."""
    is_query = window.position >= 0
    saw = (window.position[:, None] >= tokens.position) & is_query[:, None]
    return PolicyState(
        tokens={
            "sum": state.tokens["sum"] + attention(window).sum(axis=(0, 1)),
            "queries": state.tokens["queries"] + saw.sum(0).astype(jnp.float32),
        }
    )
