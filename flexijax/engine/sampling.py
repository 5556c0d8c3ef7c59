"""What a request asks of sampling, and drawing one token a row from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# What sampling takes, from the least to the most: programs are compiled for one of these, since a
# choice inside of a program is a wait of the host at every step on a GPU.
METHODS = ("greedy", "weighted", "filtered")
# The most that a request may ask for, and what the programs find where one does.
MAX_ALTERNATIVES = 20
# Bits of float32 infinity: the greatest distance below the best logit.
_INFINITY = 0x7F800000
# Tokens in a block of the two-level running sum; one level over a vocabulary is slow everywhere.
_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request's tokens are sampled and when it ends.

    Raises ValueError, naming the field and its value, when a value could not work.
    """

    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep the k most likely tokens, and those as likely as the k-th; None keeps all."""
    top_p: float | None = None
    """Of those, keep the most likely ones that hold this share, and those as likely as the last of
    them; None keeps all."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the most likely one; None drops none."""
    stop: tuple[str, ...] = ()
    """The text ends before any of these strings."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the request beside the model's own."""
    logprobs: bool = False
    """Also return the log-probability of every token under the model itself, before temperature
    and the filters."""
    alternatives: int = 0
    """Also return so many of the most likely tokens in place of each one, with their
    log-probabilities, at most 20."""
    seed: int | None = None
    """Of what is sampled, None is 0; prompts that share one `Sampling` each sample their own."""
    ignore_eos: bool = False
    """Go on past the model's own stop tokens."""

    def __post_init__(self) -> None:
        _require(
            self,
            "temperature",
            _is_real(self.temperature) and self.temperature >= 0,
            "a finite number, 0 or more",
        )
        _require(
            self,
            "top_k",
            self.top_k is None or _is_count(self.top_k, 1),
            "None or an integer of at least 1",
        )
        _require(
            self,
            "top_p",
            self.top_p is None or (_is_real(self.top_p) and 0 < self.top_p <= 1),
            "None or a number above 0 and up to 1",
        )
        _require(
            self,
            "min_p",
            self.min_p is None or (_is_real(self.min_p) and 0 <= self.min_p <= 1),
            "None or a number from 0 to 1",
        )
        _require(
            self,
            "stop",
            _is_sequence(self.stop) and all(isinstance(s, str) and s for s in self.stop),
            "a tuple of non-empty strings",
        )
        _require(
            self,
            "stop_ids",
            _is_sequence(self.stop_ids) and all(_is_count(i, 0) for i in self.stop_ids),
            "a tuple of token ids",
        )
        _require(
            self,
            "alternatives",
            _is_count(self.alternatives, 0) and self.alternatives <= MAX_ALTERNATIVES,
            f"an integer from 0 to {MAX_ALTERNATIVES}",
        )
        _require(
            self,
            "seed",
            self.seed is None or _is_count(self.seed, 0),
            "None or an integer of at least 0",
        )
        for name in ("logprobs", "ignore_eos"):
            _require(self, name, isinstance(getattr(self, name), bool), "True or False")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """What `sample` needs of each row's request; a filter that is off holds its neutral value."""

    temperature: Array  # float32[B], 0 is greedy
    top_k: Array  # int32[B], 0 is off
    top_p: Array  # float32[B], 1 is off
    min_p: Array  # float32[B], 0 is off

    @staticmethod
    def of(requests: Sequence[Sampling]) -> "SamplingRows":
        """The rows of a batch, in order."""
        f32, greatest = jnp.float32, float(np.finfo(np.float32).max)
        tiny = float(np.finfo(np.float32).tiny)
        return SamplingRows(
            jnp.asarray([min(r.temperature, greatest) for r in requests], jnp.float32),
            jnp.asarray([min(r.top_k or 0, 2**31 - 1) for r in requests], jnp.int32),
            # Not below what float32 holds: a share of 0 would keep nothing.
            jnp.asarray([max(1.0 if r.top_p is None else r.top_p, tiny) for r in requests], f32),
            jnp.asarray([r.min_p or 0.0 for r in requests], jnp.float32),
        )


def method_of(sampling: Sampling) -> str:
    """The least of `METHODS` that serves the request; a greater one gives it the same tokens."""
    if sampling.temperature == 0:
        return "greedy"
    return "weighted" if sampling.top_k is None and sampling.top_p is None else "filtered"


def request_seed(sampling: Sampling, *, place: int) -> int:
    """The 32-bit seed of one request. place: among prompts that share one `Sampling`."""
    entropy = [sampling.seed or 0, place]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def step_keys(seeds: Array, steps: Array) -> Array:
    """The random key of each row at its own step, whatever else is in the batch.

    seeds: uint32[B], of `request_seed`. steps: int32[B], tokens the request has generated before.
    Returns key[B].
    """
    return jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(seeds, steps)


def sample(logits: Array, rows: SamplingRows, keys: Array, *, method: str) -> tuple[Array, Array]:
    """One token a row; a row's draw depends on its own logits, parameters and key only.

    logits: float32[B, V]. keys: key[B]. method: the greatest of `method_of` of the rows.
    Returns the tokens int32[B] and their log-probabilities float32[B] under softmax(logits).
    Greedy rows take the first of the greatest logits.
    """
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if method != "greedy":
        drawn = _draw(logits, rows, keys, filtered=method == "filtered")
        token = jnp.where(rows.temperature > 0, drawn, token)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
    """The likeliest tokens of each row, int32[B, n], and their log-probabilities float32[B, n].

    logits: float32[B, V]; count: n. Of equals the first; where V is less than n, the rest has a
    log-probability of minus infinity.
    """
    lacking = max(0, count - logits.shape[-1])
    logits = jnp.pad(logits, ((0, 0), (0, lacking)), constant_values=-jnp.inf)
    best, tokens = lax.top_k(logits, count)
    return tokens.astype(jnp.int32), best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _draw(logits: Array, rows: SamplingRows, keys: Array, *, filtered: bool) -> Array:
    """A token of each row by inverting its cumulative distribution: one uniform number a row."""
    weights = sampling_weights(logits, rows, filtered=filtered)  # [B, V]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys)  # [B]
    batch, vocab = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK)))
    blocks = padded.reshape(batch, -1, _BLOCK)
    ends = jnp.cumsum(blocks.sum(-1), axis=-1)  # [B, blocks]
    target = uniform * ends[:, -1]
    block = jnp.argmax(ends > target[:, None], axis=-1)  # first block that reaches past it
    start = jnp.where(block > 0, jnp.take_along_axis(ends, block[:, None] - 1, 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, _BLOCK]
    reached = (jnp.cumsum(inside, axis=-1) > (target - start)[:, None]) & (inside > 0)
    # Rounding may leave the target a hair past the block's own sum: then its last token it is.
    last = _BLOCK - 1 - jnp.argmax(jnp.flip(inside, -1) > 0, axis=-1)
    offset = jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), last)
    return (block * _BLOCK + offset).astype(jnp.int32)


def sampling_weights(logits: Array, rows: SamplingRows, *, filtered: bool) -> Array:
    """float32[B, V]: what each token weighs in the draw, 0 where a filter drops it.

    filtered: whether any row has a `top_k` or a `top_p`.

    Every filter keeps the tokens within some distance of the best logit, so all of them together
    are one threshold a row. It is found by bisection over the bits of the distance, which are
    ordered like the distance itself: exact, and an order of magnitude cheaper than sorting.
    """
    tiny = float(np.finfo(np.float32).tiny)
    below = logits.max(axis=-1, keepdims=True) - logits  # [B, V], 0 or more
    distance = below / jnp.maximum(rows.temperature, tiny)[:, None]
    bits = lax.bitcast_convert_type(distance, jnp.int32)
    weights = jnp.exp(-distance)
    kept = distance <= -jnp.log(rows.min_p)[:, None]
    if filtered:
        kept &= bits <= _threshold(bits, weights, rows)[:, None]
    return jnp.where(kept, weights, 0.0)


def _threshold(bits: Array, weights: Array, rows: SamplingRows) -> Array:
    """int32[B]: the greatest distance, as bits, that `top_k` and then `top_p` keep."""
    off = jnp.full(rows.top_k.shape, _INFINITY, jnp.int32)
    found = _smallest_threshold(lambda at: (bits <= at[:, None]).sum(-1), rows.top_k, off)
    nearest = jnp.where(rows.top_k > 0, found, off)
    left = jnp.where(bits <= nearest[:, None], weights, 0.0)
    share = rows.top_p * left.sum(-1)
    found = _smallest_threshold(
        lambda at: jnp.where(bits <= at[:, None], left, 0.0).sum(-1), share, off
    )
    return jnp.where(rows.top_p < 1, jnp.minimum(found, nearest), nearest)


def _smallest_threshold(measure, target: Array, greatest: Array) -> Array:
    """int32[B]: the smallest t in 0..greatest with measure(t) >= target, measure rising in t.

    Where no t reaches the target, `greatest`.
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # measure(low) misses the target, measure(high) reaches it
        middle = low + (high - low) // 2
        reached = measure(middle) >= target
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    return lax.fori_loop(0, 31, halve, (jnp.full_like(greatest, -1), greatest))[1]


def _require(owner: Sampling, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(owner, name)!r} must be {wanted}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, minimum: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def _is_sequence(value: object) -> bool:
    # A bare string is a sequence of characters, which is never what was meant.
    return isinstance(value, tuple | list)
