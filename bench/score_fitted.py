"""Page scores with a code learnt from the prompt's keys, for comparison: low rank and products."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import dispatch, platform, sketches
from flexijax.pallas_kernels.queries import HeadQueries, grouped
from flexijax.pallas_kernels.sketches import SketchCode
from flexijax.policies.page_score import PageShape, PageTable, update_by_summaries
from flexijax.policies.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class SketchMax(Sketch):
    """`Sketch`, but of the query heads the one that gives a page most, in absolute terms."""

    def scores(
        self,
        q: jax.Array | HeadQueries,
        summaries: Any,
        state: Any,
        table: PageTable,
        *,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """See `PageScore.scores`: the greatest log of the page's summed exponentials."""
        return dispatch.sketch_scores(
            sketches.prepare(grouped(q), state, bits=self.bits, scale=scale),
            summaries,
            table.blocks,
            table.summarized,
            page_size=table.page_size,
            implementation=implementation,
        ).max(axis=2, keepdims=True)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A sketch of the `rank` greatest principal components of a head's keys, `bits` bits each.

    What is left out of a key is taken for its mean, which changes the choice of no page.
    Its state is large: a basis of H times rank numbers for each head of a request.
    """

    rank: int
    bits: int

    @property
    def fit_tokens(self) -> int | None:
        """The whole prompt: see `PageScore`."""
        return None

    def empty(self, blocks: int, heads: int, page: PageShape) -> jax.Array:
        """See `PageScore.empty`."""
        shape = (blocks, heads, self.bits, sketches.words(self.rank), page.page_size)
        return jnp.zeros(shape, jnp.uint32, device=platform.sharding())

    def empty_state(self, rows: int, heads: int, page: PageShape) -> Any:
        """See `PageScore.empty_state`."""
        device = platform.sharding()
        code = SketchCode(
            *(jnp.zeros((rows, heads, self.rank), jnp.float32, device=device) for _ in range(2))
        )
        return jnp.zeros((rows, heads, page.head_dim, self.rank), jnp.float32, device=device), code

    def fit(self, k_pages: jax.Array, length: jax.Array) -> Any:
        """See `PageScore.fit`."""
        keys, valid = _tokens(k_pages, length)
        count = jnp.maximum(length, 1).astype(jnp.float32)
        apart = jnp.where(valid, keys - (keys.sum(1, keepdims=True) / count), 0.0)
        _, vectors = jnp.linalg.eigh(jnp.einsum("KSH,KSI->KHI", apart, apart) / count)
        basis = vectors[..., -self.rank :]
        return basis, sketches.fit(_projected(k_pages, basis), length, bits=self.bits)

    def summarize(self, k_pages: jax.Array, state: Any) -> jax.Array:
        """See `PageScore.summarize`."""
        basis, code = state
        return sketches.encode(_projected(k_pages, basis), code, bits=self.bits)

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
        basis, code = state
        projected = jnp.einsum("BKGH,BKHR->BKGR", grouped(q).astype(jnp.float32), basis)
        query = sketches.prepare(projected, code, bits=self.bits, scale=scale)
        return dispatch.sketch_scores(
            query,
            summaries,
            table.blocks,
            table.summarized,
            page_size=table.page_size,
            implementation=implementation,
        )


@dataclasses.dataclass(frozen=True)
class Product:
    """Product quantization (PQCache, https://arxiv.org/abs/2407.12820): 4 bits for `part` channels.

    Every group of `part` neighbouring channels has 16 centroids, found by k-means on the prompt's
    keys. The codes are kept two in a byte; the centroids are the state.
    """

    part: int
    rounds: int = 8

    @property
    def fit_tokens(self) -> int | None:
        """The whole prompt: see `PageScore`."""
        return None

    def empty(self, blocks: int, heads: int, page: PageShape) -> jax.Array:
        """See `PageScore.empty`."""
        shape = (blocks, heads, page.page_size, page.head_dim // self.part // 2)
        return jnp.zeros(shape, jnp.uint8, device=platform.sharding())

    def empty_state(self, rows: int, heads: int, page: PageShape) -> jax.Array:
        """See `PageScore.empty_state`: centroids [rows, heads, H / part, 16, part]."""
        shape = (rows, heads, page.head_dim // self.part, 16, self.part)
        return jnp.zeros(shape, jnp.float32, device=platform.sharding())

    def fit(self, k_pages: jax.Array, length: jax.Array) -> jax.Array:
        """See `PageScore.fit`."""
        keys, valid = _tokens(k_pages, length)
        heads, tokens, width = keys.shape
        keys = keys.reshape(heads, tokens, width // self.part, self.part).swapaxes(1, 2)
        keep = valid[:, None]  # [1, 1, S, 1]
        # Begun with keys spread evenly over the prompt.
        start = (jnp.arange(16) * jnp.maximum(length, 1)) // 16
        centroids = jnp.take(keys, start, axis=2)

        def improve(_: int, centroids: jax.Array) -> jax.Array:
            mine = jnp.where(keep, jax.nn.one_hot(_nearest(keys, centroids), 16), 0.0)
            total = jnp.einsum("KNSC,KNSP->KNCP", mine, jnp.where(keep, keys, 0.0))
            count = mine.sum(2)[..., None]
            return jnp.where(count > 0, total / jnp.maximum(count, 1.0), centroids)

        return jax.lax.fori_loop(0, self.rounds, improve, centroids)

    def summarize(self, k_pages: jax.Array, state: jax.Array) -> jax.Array:
        """See `PageScore.summarize`."""
        *lead, page, width = k_pages.shape
        parts = k_pages.astype(jnp.float32).reshape(*lead, page, width // self.part, self.part)
        centroids = jnp.broadcast_to(state, (*lead, *state.shape[-3:]))
        code = _nearest(parts.swapaxes(-2, -3), centroids).swapaxes(-1, -2).astype(jnp.uint8)
        return code[..., 0::2] | (code[..., 1::2] << jnp.uint8(4))

    update = update_by_summaries

    def scores(
        self,
        q: jax.Array | HeadQueries,
        summaries: jax.Array,
        state: jax.Array,
        table: PageTable,
        *,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """See `PageScore.scores`."""
        batch, heads, group, width = q.shape
        parts = (grouped(q).astype(jnp.float32) * scale).reshape(batch, heads, group, -1, self.part)
        products = jnp.einsum("BKGNP,BKNCP->BKGNC", parts, state)
        rows = jnp.take(summaries, table.blocks, axis=0, mode="clip")  # [B, P, K, page, N / 2]
        halves = [rows & jnp.uint8(15), rows >> jnp.uint8(4)]
        code = jnp.stack(halves, axis=-1).reshape(*rows.shape[:4], width // self.part)
        # Which of 16 as a product with a table: slow, and exact enough for a comparison.
        mine = jax.nn.one_hot(code, 16)
        logits = jnp.einsum("BPKSNC,BKGNC->BKGPS", mine, products)
        end = jnp.arange(1, table.blocks.shape[1] + 1)[None] * table.page_size
        logits = jax.nn.logsumexp(logits, axis=-1)
        return jnp.where((end <= table.summarized[:, None])[:, None, None], logits, -jnp.inf)


def _tokens(k_pages: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pages [P, K, page, H] as tokens float32[K, S, H], zeros behind the prompt; bool[1, S, 1]."""
    pages, heads, page, width = k_pages.shape
    keys = k_pages.astype(jnp.float32).swapaxes(0, 1).reshape(heads, pages * page, width)
    valid = (jnp.arange(pages * page) < length)[None, :, None]
    return jnp.where(valid, keys, 0.0), valid


def _projected(k_pages: jax.Array, basis: jax.Array) -> jax.Array:
    """Pages [..., K, page, H] by [..., K, H, R], leading axes matched from the right."""
    return jnp.matmul(k_pages.astype(jnp.float32), basis)


def _nearest(parts: jax.Array, centroids: jax.Array) -> jax.Array:
    """Of parts [..., N, S, P] the nearest of centroids [..., N, C, P]: int32[..., N, S]."""
    products = jnp.einsum("...SP,...CP->...SC", parts, centroids)
    lengths = (centroids * centroids).sum(-1)[..., None, :]
    return (lengths - 2 * products).argmin(-1)
