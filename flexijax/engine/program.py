"""What a run's programs are compiled for, and a runner that times what compiling takes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from flexijax.cache.cache import group_programs, kind
from flexijax.cache.layout import CacheLayout, GroupProgram
from flexijax.cache.memory import trim_heap
from flexijax.cache.prefill_kv import PrefillSpec, room
from flexijax.cache.refit import RefitRule, refit_rule
from flexijax.engine import jit_cache
from flexijax.engine.interrupts import deferred_interrupt
from flexijax.engine.jit_cache import jitted, running
from flexijax.engine.sampling import METHODS
from flexijax.models.decoder import DecoderLike
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.tiling import largest_divisor
from flexijax.policies.base import HeadGroup, Policy, RunSpec

# Decode steps between two looks at what was sampled, of what serves requests.
BOUNDARY_STEPS = 4

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class _Steps(Policy):
    """All that decode steps ask a policy for; how it ranks is no business of theirs."""

    observes: bool
    sinks: int

    @property
    def observes_decode(self) -> bool:
        return self.observes

    @property
    def sink_pages(self) -> int:
        return self.sinks

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about a run; hashable. implementation, transfer: see `CacheConfig`.

    suppress_ids: tokens that are never generated. sampling: what decode steps can do, see
    `sampling.METHODS`. alternatives: how many likeliest tokens they find. boundary_steps: at most
    so many decode steps run at a time; None: whole chunks. mesh: over whose devices it runs;
    decoder and layout are those of each device then, and whole is the layout of the model. None: on
    one device.
    """

    decoder: DecoderLike
    layout: CacheLayout
    policy: Policy
    implementation: str | None = None
    transfer: str | None = None
    suppress_ids: tuple[int, ...] = ()
    sampling: str = METHODS[0]
    alternatives: int = 0
    boundary_steps: int | None = None
    mesh: Mesh | None = None
    whole: CacheLayout | None = None

    @property
    def steps(self) -> int:
        """Decode steps between two looks at what was sampled, a divisor of R."""
        if self.boundary_steps is None or self.observes_chunks:
            return self.chunk_steps
        return largest_divisor(self.chunk_steps, self.boundary_steps)

    @property
    def model_layout(self) -> CacheLayout:
        """The layout of all heads of the model, whoever has them."""
        return self.layout if self.whole is None else self.whole

    def of_rows(self, rows: int) -> Program:
        """What decode steps of so many of its rows are compiled for."""
        return dataclasses.replace(self, layout=self.layout.of_rows(rows))

    @property
    def decoding(self) -> Program:
        """What decode steps are compiled for, the same for policies whose heads are kept alike."""
        layout = self.layout
        # Asked for before every few steps: what is as it should be is left as it is.
        if any(group.prompt_room is not None for *_, group in layout.all_groups()):
            layout = dataclasses.replace(layout, groups=_without_prompt_rooms(layout.groups))
        policy = _Steps(self.policy.observes_decode, self.policy.sink_pages)
        return dataclasses.replace(self, layout=layout, policy=policy, whole=None)

    @functools.cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Of how many rows there are decode programs, ascending; the last is of all.

        Two, four and so on where rows are apart: a step's cost follows those that run. Not one,
        whose products add up in another order than those of two to eight: what a request gets would
        depend on how many run beside it.
        """
        sizes = self.layout.sizes
        few = (of for of in (2, 4) if of < sizes.batch and of % sizes.bank_rows == 0)
        return (*few, sizes.batch)

    @functools.cached_property
    def code_tokens(self) -> int:
        """Tokens at a prompt's beginning on which what is kept of its pages may depend."""
        scores = {group.score for *_, group in self.layout.all_groups() if group.score is not None}
        return max([0, *(score.fit_tokens or 0 for score in scores)])

    @functools.cached_property
    def observes_chunks(self) -> bool:
        """Whether a group asks for every query of a chunk, so that a program runs all of it."""
        return any(kind(of.group).num_queries(of) > 1 for groups in self.groups for of in groups)

    @property
    def chunk_steps(self) -> int:
        """Decode steps of a request after which heads are reranked and tokens evicted (R)."""
        return self.layout.sizes.chunk_steps

    @functools.cached_property
    def groups(self) -> tuple[tuple[GroupProgram, ...], ...]:
        """Per layer, what the programs over its head groups of one bank are compiled for."""
        rows = self.layout.of_rows(self.layout.sizes.bank_rows)
        return tuple(
            group_programs(
                rows,
                self.policy,
                layer,
                implementation=self.implementation,
                transfer=self.transfer,
            )
            for layer in range(len(self.layout.groups))
        )

    @functools.cached_property
    def chunk_ends(self) -> tuple[int, ...]:
        """The layers of which a group has something to do at the end of a chunk."""
        return tuple(
            layer
            for layer, groups in enumerate(self.groups)
            if any(kind(of.group).has_chunk_end(of) for of in groups)
        )

    @functools.cached_property
    def refit_rule(self) -> RefitRule | None:
        """See `cache.refit.refit_rule`."""
        return refit_rule(self.layout)

    def prefill_spec(self) -> PrefillSpec:
        """What reading a prompt for this program alone is compiled for."""
        return prefill_spec((self,))


@functools.lru_cache(maxsize=64)
def _without_prompt_rooms(
    groups: tuple[tuple[HeadGroup, ...], ...],
) -> tuple[tuple[HeadGroup, ...], ...]:
    return tuple(
        tuple(dataclasses.replace(group, prompt_room=None) for group in of_layer)
        for of_layer in groups
    )


def prefill_spec(programs: tuple[Program, ...]) -> PrefillSpec:
    """What reading a prompt for all the programs is compiled for; they are of one model and size.

    Raises ValueError where they differ in what a prompt is read with.
    """
    found = {(p.decoder, p.layout.sizes.shape, p.layout.sizes.max_tokens) for p in programs}
    found_with = {(p.layout.sizes.dtype, p.implementation) for p in programs}
    if len(found) != 1 or len(found_with) != 1:
        raise ValueError(
            "one reading of a prompt serves programs of one model, length, dtype and "
            f"implementation only, not {sorted(map(str, found | found_with))}"
        )
    sizes = programs[0].layout.sizes
    policies = [program.policy for program in programs]
    chunk, tail, tails, steps = platform.prefill_sizes()
    tokens = room(sizes.max_tokens, chunk=chunk, tail=tail, tails=tails)
    step = -(-tokens // (steps * chunk)) * chunk
    return PrefillSpec(
        shape=sizes.shape,
        tokens=tokens,
        chunk=chunk,
        tail=tail,
        tails=tails,
        key_lengths=(*range(step, tokens, step), tokens),
        dtype=sizes.dtype,
        window=max([1, *(policy.prompt_window or 0 for policy in policies)]),
        observers=tuple(dict.fromkeys(p for p in policies if p.prompt_window is None)),
        implementation=programs[0].implementation,
    )


class Runner:
    """Runs jitted functions and counts what compiling them took.

    seconds: spent tracing and compiling. programs: how many were compiled. Executables are shared
    by all instances, so a second call with the same shapes compiles nothing. mesh: see `jitted`.
    """

    def __init__(self, progress: Progress | None, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        self.seconds = 0.0
        self.programs = 0
        self.progress = progress
        self._call: tuple[str, Any] = ("", ())
        self._began: float | None = None
        self._ended = 0.0

    def run(
        self,
        stage: str,
        function: Callable[..., Any],
        static: Any,
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> Any:
        """function(static, *args), compiled if need be. stage: for progress."""
        return self._watched(stage, jitted(function, static, donate, self.mesh), args)

    def compile(
        self,
        stage: str,
        function: Callable[..., Any],
        static: Any,
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Compiled:
        """Compiles what `run` would, which then need not; args: of shapes, where not there yet."""
        program = jitted(function, static, donate, self.mesh)
        return self._watched(stage, lambda *args: program.lower(*args).compile(), args)

    def lower(
        self,
        function: Callable[..., Any],
        static: Any,
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Lowered:
        """Traces what `run` would; when `compile` of it has been called, `run` need not."""
        return self._watched("", jitted(function, static, donate, self.mesh).lower, args)

    def begin_compiling(self) -> None:
        """Called while a function is traced, which is before it is compiled."""
        if self._began is not None:
            return
        stage, args = self._call
        # What still runs would be timed as compiling otherwise.
        jax.block_until_ready([leaf for leaf in jax.tree.leaves(args) if _is_there(leaf)])
        self._began = self._ended = time.perf_counter()
        if stage and self.progress is not None:
            self.progress(f"compiling {stage}", 0, 1)

    def end_compiling(self) -> None:
        """Called whenever the compiler is done with something."""
        self._ended = time.perf_counter()

    def _watched(self, stage: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._call, self._began = (stage, args), None
        token = running.set(self)
        try:
            with deferred_interrupt():
                made = call(*args)
        finally:
            running.reset(token)
            self._call = ("", ())
        if self._began is not None:
            self.seconds += self._ended - self._began
            self.programs += 1
            trim_heap()
            jit_cache.make_room()
            if stage and self.progress is not None:
                self.progress(f"compiling {stage}", 1, 1)
        return made


def _is_there(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_deleted()
