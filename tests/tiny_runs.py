"""What the law tests run: a tiny model, small budgets, requests, and the dense model's answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import flexijax
from flexijax.engine.sequence import Request
from flexijax.models.dense import dense_attend

PAGE, STEPS = 4, 8
# A layer with a head of each kind, and one with stable heads only.
PROFILE = flexijax.HeadProfile(
    model="tiny-llama",
    num_layers=2,
    num_kv_heads=2,
    unstable=((0, 1),),
    page_size=PAGE,
    budget_pages=4,
    source="by hand",
)
SMALL = flexijax.CacheConfig(
    page_size=PAGE, budget_tokens=4 * PAGE, rerank_interval=STEPS, profile=PROFILE
)
# Its chunks take STEPS steps as well.
ADAPTIVE = dataclasses.replace(SMALL, rerank_interval="adaptive")


def prompt_of(length, seed=0):
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def request_of(length, *, max_new_tokens, index=0):
    """A greedy request of a random prompt, which its index seeds."""
    return Request(
        index=index,
        tokens=tuple(prompt_of(length, seed=index)),
        max_new_tokens=max_new_tokens,
        sampling=flexijax.Sampling(),
        seed=0,
        stop_ids=(),
    )


def dense_greedy(lm, prompt, count):
    """(greedy tokens, logits float32[count, V] before each), every step read anew."""
    attention_fn = dense_attend(lm.attention)

    @jax.jit
    def logits_of(text):
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        x, _ = lm.decoder.hidden(lm.params, text, positions, attention_fn, None)
        return lm.decoder.logits(lm.params, x)[0]

    text = np.zeros((1, len(prompt) + count), np.int32)
    text[0, : len(prompt)] = prompt
    for length in range(len(prompt), text.shape[1]):
        text[0, length] = int(logits_of(text)[length - 1].argmax())
    logits = np.asarray(logits_of(text))[len(prompt) - 1 : -1]
    return text[0, len(prompt) :].tolist(), logits


def dense_qkv(lm, room):
    """A function of a text: per layer queries [T, N, H], keys and values [T, K, H], densely.

    room: the longest text, so that all of them share one compilation.
    """
    attention_fn = dense_attend(lm.attention)

    def recording(layer, q, k, v, state):
        out, _ = attention_fn(layer, q, k, v, None)
        return out, (*state, (q[0], k[0], v[0]))

    @jax.jit
    def run(text):
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        return lm.decoder.hidden(lm.params, text, positions, recording, ())[1]

    def qkv(tokens):
        text = np.zeros((1, room), np.int32)
        text[0, : len(tokens)] = tokens
        return jax.device_get(run(text))

    return qkv
