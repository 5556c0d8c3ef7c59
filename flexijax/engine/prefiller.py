"""A prompt through the model, one layer after the other, and from there into caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import jax
import numpy as np

from flexijax.cache.cache import Cache
from flexijax.cache.prefill_kv import (
    Piece,
    PrefillKV,
    PrefillSpec,
    empty_prefill_kv,
    nothing_observed,
    pieces,
)
from flexijax.engine.execute import Place, as_index, run_admit, run_commit
from flexijax.engine.prefill import (
    PrefillProgram,
    embed_prompt,
    prefill_chunk,
    prefill_last_layer,
)
from flexijax.engine.program import Program, Runner
from flexijax.models.decoder import DecoderLike, Params
from flexijax.pallas_kernels import platform


class Reading:
    """A prompt on its way through the model; ends when each layer has been read and taken.

        while (layer := reading.advance()) is None or ...

    layer: that is being read. kv: of it, good when `advance` says that it is complete, until the
    next call. x: the last token's hidden state [1, D] once all layers have been read.
    """

    def __init__(self, prefiller: Prefiller, tokens: Sequence[int], label: str, start: int) -> None:
        self._of, self._label = prefiller, label
        self.length, self.start = len(tokens), start
        spec = prefiller.spec
        self._pieces = list(pieces(spec, self.length, start))
        self._weights = prefiller.decoder.layers(prefiller.params)
        padded = np.zeros(spec.tokens, np.int32)
        padded[: self.length] = tokens
        self.layer, self._at = 0, 0
        self.kv = prefiller.take_kv()
        self.x: jax.Array | None = None
        # Placed as a program's results are: what differs in that is compiled twice.
        args = (prefiller.params, platform.put(padded))
        self._stream = prefiller.runner.run("prefill", embed_prompt, prefiller.decoder, args)

    @property
    def wants_prefix(self) -> bool:
        """Whether the first `start` tokens of `kv` are to be filled in before `advance`."""
        return bool(self.start) and self._at == 0 and not self.done

    @property
    def done(self) -> bool:
        """Whether all layers have been read."""
        return self.layer == len(self._weights)

    def advance(self) -> int | None:
        """Runs the next chunk through the current layer; the layer's number if that completes it.

        Its keys and values are in `kv` then, and are overwritten by the next call.
        """
        of, piece = self._of, self._pieces[self._at]
        if self._at == 0 and self.layer and of.spec.observers:
            self.kv = dataclasses.replace(self.kv, observed=nothing_observed(of.spec))
        is_last = self.layer == len(self._weights) - 1
        program = PrefillProgram(of.decoder, of.spec, piece.size, piece.keys)
        at = (as_index(piece.start), as_index(min(self.length - piece.start, piece.size) - 1))
        args = (self._weights[self.layer], as_index(self.layer), self._stream, *at, self.kv)
        function, donate = (prefill_last_layer, (5,)) if is_last else (prefill_chunk, (2, 5))
        made, self.kv = of.runner.run("prefill", function, program, args, donate=donate)
        if is_last:
            self.x = made
        else:
            self._stream = made
        self._tell(made, piece)
        self._at += 1
        if self._at < len(self._pieces):
            return None
        self._at, complete = 0, self.layer
        self.layer += 1
        if self.done:
            self._stream.delete()
            of.give_back(self.kv)
        return complete

    def close(self) -> None:
        """Ends a reading that nobody waits for; its room serves the next prompt."""
        if not self.done:
            self._of.give_back(self.kv)
            self.layer = len(self._weights)

    def _tell(self, made: jax.Array, piece: Piece) -> None:
        """Progress in tokens of the prompt, as if all layers were read at once."""
        progress = self._of.runner.progress
        if progress is None:
            return
        made.block_until_ready()
        through = min(piece.start + piece.size, self.length)
        done = (self.layer * self.length + through) // len(self._weights)
        progress(f"reading {self._label}", done, self.length)


class Prefiller:
    """Reads prompts one after the other through the same arrays and programs."""

    def __init__(
        self, decoder: DecoderLike, params: Params, spec: PrefillSpec, runner: Runner
    ) -> None:
        self.decoder, self.params, self.spec, self.runner = decoder, params, spec, runner
        self._kv: PrefillKV | None = None

    def begin(self, tokens: Sequence[int], label: str, start: int = 0) -> Reading:
        """A prompt of token ids, at least one. label: what progress calls it.

        start: of the first token to read, a multiple of the chunk; the caller fills in those before
        it, see `Reading.wants_prefix`.
        """
        return Reading(self, tokens, label, start)

    def read(self, tokens: Sequence[int], label: str) -> PrefillResult:
        """All layers of a prompt at once, to be committed to several caches."""
        reading, kept = self.begin(tokens, label), []
        while not reading.done:
            if reading.advance() is None:
                continue
            kept.append(reading.kv)
            if not reading.done:
                reading.kv = empty_prefill_kv(self.spec)
        self._kv = None
        assert reading.x is not None
        return PrefillResult(self.decoder, self.spec, reading.length, tuple(kept), reading.x)

    def reset(self) -> None:
        """Lets go of all arrays, after a program failed that had been given them."""
        self._kv = None

    def take_kv(self) -> PrefillKV:
        """Room for one layer: what the last prompt left, or new."""
        kv, self._kv = self._kv, None
        # What was observed of the last prompt is not forgotten by writing over its keys.
        if kv is None or self.spec.observers:
            kv = None
            kv = empty_prefill_kv(self.spec)
        return kv

    def give_back(self, kv: PrefillKV) -> None:
        """Keeps the arrays of a prompt that has been read for the next one."""
        self._kv = kv


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    """What a prompt left behind: everything that caches need of it.

    decoder, spec: that it was read by. length: its tokens. kv: of each layer. x: the last token's
    hidden state [1, D].
    """

    decoder: DecoderLike
    spec: PrefillSpec
    length: int
    kv: tuple[PrefillKV, ...]
    x: jax.Array

    def commit(
        self,
        runner: Runner,
        program: Program,
        cache: Cache,
        *,
        row: int,
        blocks: Collection[int],
    ) -> Cache:
        """The prompt in row `row` of a cache of `program`, which is donated.

        blocks: one block id a page, at least ceil(length / page) of them. Raises ValueError where
        the program is of another model, length or dtype, or its policy observes what was not
        observed here.
        """
        self._check(program)
        place = Place.of(program, row, blocks, self.length)
        for layer, kv in enumerate(self.kv):
            cache = run_commit(runner, program, self.spec, cache, layer, kv, place)
        return run_admit(cache, place)

    def _check(self, program: Program) -> None:
        theirs, ours = program.prefill_spec(), self.spec
        for name in ("shape", "tokens", "dtype"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            if mine != other:
                raise ValueError(f"a prompt read with {name}={mine} cannot be used with {other}")
        if program.decoder != self.decoder:
            raise ValueError("a prompt read by one decoder cannot be continued by another")
        if theirs.window > ours.window or not set(theirs.observers) <= set(ours.observers):
            raise ValueError(
                f"policy {program.policy} observes queries that were not kept: name its program "
                "when the prompt is read"
            )
