"""One prompt, read once, then continued by any number of caches on one and the same tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexijax import cache as kv
from flexijax.attention import Workspace
from flexijax.compiled import Compiler, run_commit, run_decode, run_forced
from flexijax.engine import free_rows
from flexijax.models.language_model import LanguageModel
from flexijax.prefill import Program, new_workspace, prefill_chunk


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt after its prefill: what every cache of one size can be filled from."""

    workspace: Workspace
    queries: tuple[jax.Array, ...]  # per layer [1, K, G, H], of the last token
    length: int
    following: int  # the greedy choice after the prompt


def read(lm: LanguageModel, program: Program, prompt: Sequence[int]) -> Reading:
    """Reads token ids; any program of the same sizes and model will do."""
    compiler, workspace = Compiler(program, None), new_workspace(program.layout)
    padded = np.zeros(-(-len(prompt) // program.chunk) * program.chunk, np.int32)
    padded[: len(prompt)] = prompt
    x, queries = None, ()
    for start in range(0, len(prompt), program.chunk):
        last = min(len(prompt) - start, program.chunk) - 1
        piece = jnp.asarray(padded[None, start : start + program.chunk])
        where = (jnp.int32(start), jnp.int32(last))
        workspace, x, queries = compiler.run(
            prefill_chunk, "prefill", (4,), lm.params, piece, *where, workspace
        )
    assert x is not None, "a prompt has tokens"
    logits = lm.decoder.logits(lm.params, x)
    return Reading(workspace, queries, len(prompt), int(logits[0].argmax()))


def filled(program: Program, reading: Reading) -> kv.Cache:
    """A cache of one row that holds the prompt."""
    cache = kv.init(program.layout, program.policy.score)
    blocks = jnp.arange(program.layout.pages, dtype=jnp.int32)
    where = (jnp.int32(0), blocks, jnp.int32(reading.length))
    return run_commit(Compiler(program, None), cache, reading.workspace, *where, reading.queries)


def greedy(lm: LanguageModel, program: Program, reading: Reading, *, steps: int) -> list[int]:
    """The program's own `steps` most likely tokens after the prompt, stop tokens included."""
    compiler, cache = Compiler(program, None), filled(program, reading)
    tokens = [reading.following]
    rows = dataclasses.replace(
        free_rows(1),
        tokens=jnp.asarray(tokens, jnp.int32),
        active=jnp.ones(1, bool),
        remaining=jnp.full(1, steps + program.rerank_interval, jnp.int32),
    )
    while len(tokens) < steps:
        cache, rows, drawn = run_decode(compiler, lm.params, cache, rows)
        tokens += np.asarray(drawn.tokens)[:, 0].tolist()
    return tokens[:steps]


def feed(
    lm: LanguageModel, program: Program, reading: Reading, tokens: Sequence[int]
) -> np.ndarray:
    """Logits after each of the given tokens, float32[T, V]; T a multiple of the rerank interval."""
    compiler, cache = Compiler(program, None), filled(program, reading)
    parts = []
    for start in range(0, len(tokens), program.rerank_interval):
        piece = jnp.asarray(tokens[start : start + program.rerank_interval], jnp.int32)[:, None]
        cache, logits = run_forced(compiler, lm.params, cache, piece, jnp.ones(1, bool))
        parts.append(np.asarray(logits)[:, 0])
    return np.concatenate(parts)
