"""Page scores that are only compared with those of the package, and the names of all.

A `Candidate` keeps bfloat16 numbers of every page and needs no state; its three functions say which
numbers, and what a query makes of them. Pages then compete by the attention mass that this gives.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.score_fitted import LowRank, Product, SketchMax
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.queries import HeadQueries, grouped
from flexijax.policies.minmax import MinMax
from flexijax.policies.page_score import PageScore, PageShape, PageTable, update_by_summaries
from flexijax.policies.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class Candidate:
    """kept: (page, H) -> shape of what is kept of a page. of_page: keys [..., page, H] -> that.

    logits: q [B, K, G, H], scaled, and what is kept [B, P, K, ...] -> [B, K, G, P]. name: stands
    for the three in records of results, since how a function is written differs from run to run.
    """

    name: str
    kept: Callable[[int, int], tuple[int, ...]] = dataclasses.field(repr=False)
    of_page: Callable[[jax.Array], jax.Array] = dataclasses.field(repr=False)
    logits: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(repr=False)

    @property
    def fit_tokens(self) -> int | None:
        """Nothing is fitted: see `PageScore`."""
        return 0

    def empty(self, blocks: int, heads: int, page: PageShape) -> jax.Array:
        """See `PageScore.empty`."""
        shape = (blocks, heads, *self.kept(page.page_size, page.head_dim))
        return jnp.zeros(shape, jnp.bfloat16, device=platform.sharding())

    def empty_state(self, rows: int, heads: int, page: PageShape) -> tuple[()]:
        """See `PageScore.empty_state`."""
        return ()

    def fit(self, k_pages: jax.Array, length: jax.Array) -> tuple[()]:
        """See `PageScore.fit`."""
        return ()

    def summarize(self, k_pages: jax.Array, state: Any) -> jax.Array:
        """See `PageScore.summarize`."""
        return self.of_page(k_pages.astype(jnp.float32)).astype(jnp.bfloat16)

    update = update_by_summaries

    def scores(
        self,
        q: jax.Array | HeadQueries,
        summaries: jax.Array,
        state: Any,
        table: PageTable,
        *,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """See `PageScore.scores`."""
        rows = jnp.take(summaries, table.blocks, axis=0, mode="clip").astype(jnp.float32)
        logits = self.logits(grouped(q).astype(jnp.float32) * scale, rows)
        end = jnp.arange(1, table.blocks.shape[1] + 1)[None] * table.page_size
        known = (end <= table.summarized[:, None])[:, None, None]
        return jnp.where(known, logits, -jnp.inf)


def _product(q: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.einsum("BKGH,BPKH->BKGP", q, rows)


def _mean(keys: jax.Array) -> jax.Array:
    return keys.mean(-2)


def _mean_and_radius(keys: jax.Array) -> jax.Array:
    """The mean, and behind it the root of the mean squared distance from it: [..., H + 1]."""
    mean = keys.mean(-2)
    radius = jnp.sqrt(((keys - mean[..., None, :]) ** 2).sum(-1).mean(-1))
    return jnp.concatenate([mean, radius[..., None]], axis=-1)


def _radius_logits(q: jax.Array, rows: jax.Array) -> jax.Array:
    """In a random direction a page of 16 reaches about 1.8 deviations: 1.8 |q| radius / sqrt(H)."""
    width = q.shape[-1]
    length = jnp.linalg.norm(q, axis=-1)[..., None]  # [B, K, G, 1]
    radius = rows[..., width].transpose(0, 2, 1)[:, :, None]
    return _product(q, rows[..., :width]) + 1.8 * width**-0.5 * length * radius


def _mean_and_variance(keys: jax.Array) -> jax.Array:
    return jnp.stack([keys.mean(-2), keys.var(-2)], axis=-2)


def _cumulant_logits(q: jax.Array, rows: jax.Array) -> jax.Array:
    """Log of the mean exponential of a Gaussian: q.mean + q^2.variance / 2."""
    return _product(q, rows[..., 0, :]) + 0.5 * _product(q * q, rows[..., 1, :])


def _bounds_and_mean(keys: jax.Array) -> jax.Array:
    return jnp.stack([keys.min(-2), keys.max(-2), keys.mean(-2)], axis=-2)


def _half_bound_logits(q: jax.Array, rows: jax.Array) -> jax.Array:
    low, high, mean = (rows[..., i, :] for i in range(3))
    bound = _product(jnp.minimum(q, 0), low) + _product(jnp.maximum(q, 0), high)
    return 0.5 * (bound + _product(q, mean))


def _exact_logits(q: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jnp.einsum("BKGH,BPKSH->BKGPS", q, rows), axis=-1)


def _row(page: int, width: int) -> tuple[int, ...]:
    return (width,)


def _row_and_one(page: int, width: int) -> tuple[int, ...]:
    return (width + 1,)


def _two_rows(page: int, width: int) -> tuple[int, ...]:
    return (2, width)


def _three_rows(page: int, width: int) -> tuple[int, ...]:
    return (3, width)


def _everything(page: int, width: int) -> tuple[int, ...]:
    return (page, width)


def _everything_of(keys: jax.Array) -> jax.Array:
    return keys


# Every score by the name that a bench takes; "exact" is the oracle that keeps all keys.
CANDIDATES: dict[str, PageScore] = {
    "minmax": MinMax(),
    "minmax32": MinMax("float32"),
    "minmax16": MinMax("bfloat16"),
    "minmax8": MinMax("int8"),
    "sketch1": Sketch(1),
    "sketch2": Sketch(2),
    "sketch4": Sketch(4),
    **{f"sketch2first{n}": Sketch(2, n) for n in (16, 64, 256)},
    "sketch2whole": Sketch(2, None),
    "sketch2max": SketchMax(2),
    "mean": Candidate("mean", _row, _mean, _product),
    "radius": Candidate("radius", _row_and_one, _mean_and_radius, _radius_logits),
    "cumulant": Candidate("cumulant", _two_rows, _mean_and_variance, _cumulant_logits),
    "halfbound": Candidate("halfbound", _three_rows, _bounds_and_mean, _half_bound_logits),
    "lowrank2": LowRank(32, 2),
    "lowrank4": LowRank(32, 4),
    "product": Product(2),
    "exact": Candidate("exact", _everything, _everything_of, _exact_logits),
}
