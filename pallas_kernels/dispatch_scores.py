"""The public operations that choose pages: check the arguments, then choose who computes."""

import jax

from flexijax.pallas_kernels import checks_scores as checks
from flexijax.pallas_kernels.implementations import choose, choose_without_triton, module_of
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.sketches import SketchCode, SketchQuery
from flexijax.pallas_kernels.summaries import Summaries


def page_scores(
    q: jax.Array,
    summaries: Summaries,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Upper bound of q.k over every page: max over G of sum over H of max(q*max, q*min).

    Quest, https://arxiv.org/abs/2406.10774, equation 2.

    Args:
      q: float[B, K, G, H], unscaled.
      summaries: float[blocks, K, 2, H], minimum then maximum, or `QuantizedSummaries` of it.
      block_table: int32[B, P], the block of each page; not read beyond a request's length.
      lengths: int32[B], tokens of each request.
      page_size: tokens a page.
    Returns:
      float32[B, K, P]; -inf at and beyond page ceil(length / page_size).
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_page_scores(q, summaries, block_table, lengths, page_size)
    module = module_of("page_scores", choose(implementation))
    return module.page_scores(q, summaries, block_table, lengths, page_size=page_size)


def sketch_query(
    q: jax.Array | HeadQueries,
    code: SketchCode,
    *,
    bits: int,
    scale: float,
    implementation: str | None = None,
) -> SketchQuery:
    """Queries made ready for `sketch_scores`: rotated, and rounded to 6 bits; see `sketches`.

    Args:
      q: float[B, K, G, H], unscaled, or where they lie among other rows, which are not read. code:
        of the keys, leaves float32[B, K, H].
      bits: of each key element. scale: factor of the logits, usually H ** -0.5.
      implementation: "triton" has no kernel of its own here and takes the Pallas one.
    Returns:
      A `SketchQuery`; its weights are packed where a kernel made them.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_sketch_query(q, code, bits, scale)
    module = module_of("sketch_query", choose_without_triton(implementation))
    return module.sketch_query(q, code, bits=bits, scale=scale)


def sketch_scores(
    query: SketchQuery,
    codes: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Log of the sum of exp(offset + unit * sum over H of weight * code) over a page's tokens.

    Args:
      query: `SketchQuery`, as `sketch_query` makes it.
      codes: uint32[blocks, K, bits, W, page], bit planes packed as `sketches` says.
      block_table: int32[B, P], the block of each page; read for full pages only.
      lengths: int32[B], tokens of each request.
      page_size: tokens a page.
    Returns:
      float32[B, K, G, P]; -inf for a page that is not full.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_sketch_scores(query, codes, block_table, lengths, page_size)
    module = module_of("sketch_scores", choose(implementation))
    return module.sketch_scores(query, codes, block_table, lengths, page_size=page_size)


def select_pages(
    scores: jax.Array,
    lengths: jax.Array,
    scored: jax.Array,
    *,
    count: int,
    page_size: int,
    newer: int = 0,
    sinks: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """The pages that each head attends: what is always attended, then those of greatest rank.

    Always attended are the first `sinks` pages, and the tail: the newest page, and from the page of
    token `scored` on all others, since they have no score yet. Of equal ranks the lower page goes
    first.

    Args:
      scores: float32[B, K, G, P], -inf for a page that is never attended unless by the rule. With
        G = 1 a page's rank is its score. Else they are logs of the attention mass that each query
        head gives to a page, and the rank is the mean over heads of the page's share of it.
      lengths: int32[B], tokens of each request, 0 for a free row, which attends nothing. scored:
        int32[B], tokens of those pages that have scores.
      count: pages of each head; page_size: tokens. newer: so many pages of the tail, those behind
        its first one, are attended beside the count.
      implementation: "triton" has no kernel of its own here and takes the Pallas one.
    Returns:
      int32[B, K, min(count + newer, P)], in any order, -1 where fewer are attended.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_select_pages(scores, lengths, scored, count, newer, sinks, page_size)
    pages = scores.shape[-1]
    count = min(count, pages)
    module = module_of("page_selection", choose_without_triton(implementation))
    return module.select_pages(
        scores,
        lengths,
        scored,
        count=count,
        newer=min(newer, pages - count),
        page_size=page_size,
        sinks=sinks,
    )
