"""A prompt through the model, chunk by chunk, and from there into the cache of any program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.attention import Workspace
from flexijax.cache.cache import Cache
from flexijax.engine.prefill import Program, new_workspace, prefill_chunk
from flexijax.engine.program import Compiler, run_commit
from flexijax.models.decoder import Params

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a prompt left behind: everything that a cache of the same shape needs of it.

    program: the one it was read by. length: its tokens. workspace: keys and values of all layers
    and heads. x: the last token's hidden state [1, D]; queries: its queries, per layer
    [1, K, G, H].
    """

    program: Program
    length: int
    workspace: Workspace
    x: jax.Array
    queries: tuple[jax.Array, ...]

    def commit(
        self,
        compiler: Compiler,
        cache: Cache | None,
        *,
        row: int,
        blocks: Sequence[int],
        release: bool = False,
    ) -> Cache:
        """The prompt in row `row` of a cache (donated; None: an empty one) of a program.

        blocks: one block id a page, at least ceil(length / page) of them. The program may differ
        from the reading's in policy, slots and rows, and in what follows from them.
        Raises ValueError where decoder, shape, pages, page size or dtype differ.
        """
        theirs, ours = compiler.program, self.program
        for name in ("shape", "page_size", "dtype", "pages"):
            mine, other = getattr(ours.layout, name), getattr(theirs.layout, name)
            if mine != other:
                raise ValueError(f"a prompt read with {name}={mine} cannot be used with {other}")
        if theirs.decoder != ours.decoder:
            raise ValueError("a prompt read by one decoder cannot be continued by another")
        table = np.zeros(theirs.layout.pages, np.int32)
        table[: len(blocks)] = blocks
        return run_commit(
            compiler,
            cache,
            self.workspace,
            jnp.int32(row),
            jnp.asarray(table),
            jnp.int32(self.length),
            self.queries,
            release=release,
        )


class Reader:
    """Reads prompts one after the other into one workspace, compiled once."""

    def __init__(self, params: Params, compiler: Compiler, progress: Progress | None) -> None:
        self._params, self._compiler, self._progress = params, compiler, progress
        self._workspace: Workspace | None = None

    def read(self, tokens: Sequence[int], label: str) -> Reading:
        """The prompt's reading, good until the next call, which takes its workspace.

        tokens: ids, at least one. label: what progress calls the prompt.
        """
        program = self._compiler.program
        chunk, length = program.chunk, len(tokens)
        padded = np.zeros(-(-length // chunk) * chunk, np.int32)
        padded[:length] = tokens
        x, queries, workspace = None, (), self._workspace
        if workspace is None or workspace.k[0].is_deleted():
            workspace = new_workspace(program.layout)
        for start in range(0, length, chunk):
            last = min(length - start, chunk) - 1
            workspace, x, queries = self._compiler.run(
                prefill_chunk,
                "prefill",
                (4,),
                self._params,
                jnp.asarray(padded[None, start : start + chunk]),
                jnp.int32(start),
                jnp.int32(last),
                workspace,
            )
            if self._progress is not None:
                x.block_until_ready()
                self._progress(f"reading {label}", start + last + 1, length)
        assert x is not None
        self._workspace = workspace
        return Reading(program, length, workspace, x, queries)
