"""What scoring the unstable heads' pages costs in a decode step: `python -m bench.score_time`.

All layers of the model one after the other, as in a step, each with the heads that the shipped
profile calls unstable; random keys, since what they are changes no time. The scores take turns, and
of each the median is shown; no time is shown before a score has passed its check.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import results
from bench.score_candidates import CANDIDATES
from bench.timing import interleaved, median, table
from flexijax.models.config import AttentionShape
from flexijax.pallas_kernels.page_scores import reference
from flexijax.pallas_kernels.page_selection.xla import page_ranks
from flexijax.policies.page_score import PageScore, PageShape, PageTable
from flexijax.profiles import lookup

PAGE = 16
SCORES = ("minmax32", "minmax16", "minmax8", "sketch1", "sketch2", "sketch4")
COLUMNS = ("score", "ms", "best_ms", "to_first", "page_bytes", "compile_s")


def step(score: PageScore, heads: Sequence[int], shape: AttentionShape, *, batch: int, tokens: int):
    """(compiled function, its arguments): scores of all layers, each waiting for the one before."""
    pages = -(-tokens // PAGE)
    rng = np.random.default_rng(0)
    blocks = jnp.asarray(rng.permutation(batch * pages).reshape(batch, pages), jnp.int32)
    table = PageTable.of_full_pages(blocks, jnp.full(batch, tokens, jnp.int32), PAGE)
    layers = []
    for count in heads:
        size = (batch * pages, count, PAGE, shape.head_dim)
        keys = jnp.asarray(rng.normal(size=size), jnp.float32)
        state = score.fit(keys, jnp.int32(batch * pages * PAGE))
        rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), state)
        q = rng.normal(size=(batch, count, shape.group_size, shape.head_dim))
        layers.append((jnp.asarray(q, jnp.float32), score.summarize(keys, state), rows))

    def run(layers, table):
        found, before = [], jnp.zeros((), jnp.float32)
        for q, summaries, state in layers:
            scores = score.scores(
                # Not a number that the compiler could leave out.
                q + before * 1e-30,
                summaries,
                state,
                table,
                scale=shape.scale,
                implementation=None,
            )
            before = scores[0, 0, 0]
            found.append(scores)
        return found

    arguments = (layers, table)
    return jax.jit(run).lower(*arguments).compile(), arguments


def check(score: PageScore, shape: AttentionShape) -> None:
    """Raises RuntimeError unless the score is near what its kind of score says in float64."""
    pages = 8
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(pages, 1, 1, shape.head_dim))
    keys = (centre + rng.normal(size=(pages, 1, PAGE, shape.head_dim))).astype(np.float32)
    q = rng.normal(size=(1, 1, shape.group_size, shape.head_dim)).astype(np.float32)
    state = score.fit(jnp.asarray(keys), jnp.int32(pages * PAGE))
    found = score.scores(
        jnp.asarray(q),
        score.summarize(jnp.asarray(keys), state),
        jax.tree.map(lambda leaf: leaf[None], state),
        PageTable.of_full_pages(
            jnp.arange(pages, dtype=jnp.int32)[None], jnp.full(1, pages * PAGE, jnp.int32), PAGE
        ),
        scale=shape.scale,
        implementation=None,
    )
    ends = reference.summarize(keys, np.full((pages, 1), PAGE))
    place = np.arange(pages)[None]
    bounds = reference.page_scores(q, ends, place, [pages * PAGE], page_size=PAGE)
    logits = np.exp(shape.scale * np.einsum("kgh,pksh->kgps", q[0], keys)).sum(-1)
    mass = np.log((logits / logits.sum(-1, keepdims=True)).mean(1))
    near = max(
        np.corrcoef(page_ranks(found)[0, 0], truth)[0, 1] for truth in (bounds[0, 0], mass[0])
    )
    if not near > 0.9:
        raise RuntimeError(f"{score} scores pages wrongly: correlation {near:.2f}")


def measure(
    scores: Sequence[str], *, batch: int, tokens: int, rounds: int, model: str
) -> list[dict[str, Any]]:
    """One row a score."""
    found = lookup.load(model)
    heads = [len(found.unstable_heads(layer)) for layer in range(found.num_layers)]
    heads = [count for count in heads if count]
    shape = AttentionShape(found.num_layers, 9, found.num_kv_heads, 64, 64**-0.5)
    page = PageShape(PAGE, shape.head_dim, "float32")
    runs: dict[str, tuple[Callable[..., Any], Any]] = {}
    rows = []
    for name in scores:
        score = CANDIDATES[name]
        check(score, shape)
        started = time.process_time()
        runs[name] = step(score, heads, shape, batch=batch, tokens=tokens)
        leaves = jax.tree.leaves(jax.eval_shape(lambda s=score: s.empty(1, 1, page)))
        bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        compiled = time.process_time() - started
        rows.append({"score": name, "page_bytes": bytes_, "compile_s": compiled})
        jax.block_until_ready(runs[name][0](*runs[name][1]))
    times: dict[str, list[float]] = {name: [] for name in scores}
    for _, name in interleaved(scores, rounds=rounds):
        run, arguments = runs[name]
        started = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times[name].append(1e3 * (time.perf_counter() - started))
    for row in rows:
        mine = times[row["score"]]
        row |= {"ms": median(mine), "best_ms": min(mine)}
        row["to_first"] = row["ms"] / median(times[scores[0]])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.score_time", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=7900, help="of every request")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--scores", nargs="+", default=SCORES, choices=sorted(CANDIDATES))
    args = parser.parse_args(argv)
    rows = measure(
        args.scores, batch=args.batch, tokens=args.tokens, rounds=args.rounds, model="smollm2-135m"
    )
    results.write(args.json, "score_time", args, rows=rows)
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
