"""`evaluate`: how close caches keep a model to full attention, on one and the same text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexijax.cache.memory import request_bytes
from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.engine.program import Program, Progress
from flexijax.engine.requests import check_cache, check_int
from flexijax.evaluation import Comparison, Evaluation, compare
from flexijax.models.language_model import LanguageModel
from flexijax.profiles.documents import Document, prompt_ids
from flexijax.profiles.records import Records
from flexijax.profiling.choose import with_profile

# Raise it with every change, here or anywhere below, that changes a number of a row by more than
# the rounding of float32: another choice of pages, kernel formula, count, or meaning of a field.
# Rows of another version are not taken from a records file, they are measured again.
VERSION = 1
NO_ANSWER = "full attention answers with nothing but a stop token"


def evaluate(
    lm: LanguageModel,
    documents: Sequence[Document | Sequence[int]],
    configs: Mapping[str, CacheConfig],
    *,
    max_tokens: int = 5600,
    steps: int = 64,
    records: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Feeds full attention's greedy answer to every config and compares next-token distributions.

    A prompt is read once for all configs. Compared are the tokens before full's first stop token,
    at most `steps`; every config is fed the same ones, and as many more as make whole chunks for
    all of them. A document that full attention answers with nothing but a stop token has no row.
    documents: each a `Document`, which is cut to a prompt of max_tokens, or a prompt's token ids.
    configs: by the name that their rows bear; of one page size, dtype and implementation. records:
    a file of finished rows; what it holds is not measured again, whatever the config was called. A
    row is found by everything that changes its numbers: weights, prompt, policy, head groups,
    sizes, jax's version and `VERSION`. progress: called with (stage, done, total).
    Raises ValueError naming the argument, or as `generate` does for what does not fit the model.
    """
    max_tokens = check_int("max_tokens", max_tokens, minimum=1)
    steps = check_int("steps", steps, minimum=1)
    _check_configs(lm, configs)
    if isinstance(documents, str | Document) or not isinstance(documents, Sequence):
        raise ValueError(f"documents={reprlib.repr(documents)} must be a list of documents")
    chunk = math.lcm(*(config.chunk_steps for config in configs.values()))
    room = max_tokens + _round_up(steps, chunk)
    if room > lm.max_context:
        raise ValueError(
            f"max_tokens={max_tokens} and steps={steps}, in chunks of {chunk} that are whole for "
            f"the rerank_interval of every config, are {room} tokens; {lm.name} can read at most "
            f"{lm.max_context}"
        )
    prompts = [_prompt(lm, document, at, max_tokens) for at, document in enumerate(documents)]
    share = (lm, prompts, room, _round_up(steps, chunk), progress)
    programs = {name: _program(config, *share) for name, config in configs.items()}
    first = next(iter(configs.values()))
    reference = dataclasses.replace(first.as_full(), rerank_interval=first.chunk_steps)
    run = _Run(lm, _program(reference, *share), programs, steps, chunk, progress)
    known, rows = Records(None if records is None else Path(records)), []
    for at, (document, prompt) in enumerate(zip(documents, prompts, strict=True)):
        task, index = ("prompt", at)
        if isinstance(document, Document):
            task, index = document.task, document.index
        shared = run.key_of_answer(prompt)
        keys = {name: [*shared, *key_of_program(programs[name])] for name in configs}
        missing = [name for name, key in keys.items() if known.get(*key) is None]
        if missing and known.get(*shared) != NO_ANSWER:
            values = None
            for name, values in run.measure(prompt, missing, f"{task}[{index}]"):
                known.add(*keys[name], value=values)
            if values is None:
                known.add(*shared, value=NO_ANSWER)
        found = {name: known.get(*key) for name, key in keys.items()}
        rows += [
            Comparison(config=name, task=task, index=index, **values)
            for name, values in found.items()
            if values is not None
        ]
    return Evaluation(tuple(rows))


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all documents of a call share. chunk: steps that are whole chunks of every program."""

    lm: LanguageModel
    full: Program
    programs: Mapping[str, Program]
    steps: int
    chunk: int
    progress: Progress | None

    @functools.cached_property
    def _key_of_reading(self) -> list[Any]:
        return [*key_of_model(self.lm), repr(self.full.prefill_spec())]

    def key_of_answer(self, prompt: Sequence[int]) -> list[Any]:
        """Everything that full attention's answer to a prompt depends on."""
        return [*self._key_of_reading, list(prompt), self.steps, self.chunk]

    def measure(
        self, prompt: Sequence[int], names: Sequence[str], label: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(config, what a `Comparison` says of it), one after the other; none without an answer."""
        lm, progress, full = self.lm, self.progress, self.full
        made = [full, *(self.programs[name] for name in names)]
        reading = read(lm, made, prompt, progress=progress, label=label)
        answer = Continuation(lm, full, reading, progress=progress).greedy(
            _round_up(self.steps, self.chunk)
        )
        stops = [at for at, token in enumerate(answer) if token in lm.end_ids]
        tokens = min([*stops, self.steps])
        if not tokens:
            return
        answer = answer[: _round_up(tokens, self.chunk)]
        expected = Continuation(lm, full, reading, progress=progress).feed(answer)
        # Logits after token i say what comes as token i + 1: full's own choice, or nothing holds.
        if not np.array_equal(expected.argmax(-1)[:-1], np.array(answer[1:])):
            raise RuntimeError("full attention, fed its own tokens, does not choose them again")
        for done, name in enumerate(names):
            if progress is not None:
                progress(f"comparing on {label}", done, len(names))
            fed = Continuation(lm, self.programs[name], reading, progress=progress)
            same, kl = compare(expected[:tokens], fed.feed(answer)[:tokens])
            values = {"context": len(prompt), "tokens": tokens, "steps": len(answer)}
            values |= {"kl": float(kl.mean()), "agreement": float(same.mean())}
            yield name, {**values, **_costs(fed, prompt=len(prompt), steps=len(answer))}
        if progress is not None:
            progress(f"comparing on {label}", len(names), len(names))


def key_of_model(lm: LanguageModel) -> list[Any]:
    """Everything of a model that its logits depend on, and where its answers end."""
    code = [VERSION, jax.__version__, jax.default_backend()]
    model = [lm.name, lm.fingerprint, str(lm.dtype), _digest(lm.params)]
    return [*code, *model, sorted(lm.end_ids)]


def key_of_program(program: Program) -> list[Any]:
    """Everything of a program that numbers depend on, the list of unstable heads among it."""
    return [
        repr(program.policy),
        repr(program.layout),
        program.implementation,
        program.transfer,
    ]


def _costs(fed: Continuation, *, prompt: int, steps: int) -> dict[str, Any]:
    """What was moved and dropped in `steps` steps, and bytes of a request as long as the prompt."""
    stats, kept = fed.stats, request_bytes(fed.program.layout, prompt)
    reranks = sum(head.reranks for head in stats.heads)
    rcos = [head.rco / head.choices for head in stats.heads if head.choices]
    return {
        "promoted_pages": stats.promoted_pages,
        "evicted_tokens": stats.evicted_tokens,
        "mean_interval": steps * len(stats.heads) / reranks if reranks else None,
        "rco": float(np.mean(rcos)) if rcos else None,
        "device_bytes": kept.device,
        "summary_bytes": kept.summaries,
        "host_bytes": kept.host,
    }


def _program(
    config: CacheConfig,
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    room: int,
    new_tokens: int,
    progress: Progress | None,
) -> Program:
    config, _ = with_profile(lm, config, prompts=prompts, progress=progress)
    return make_program(lm, config, max_tokens=room, max_new_tokens=new_tokens, shared_reading=True)


def _prompt(
    lm: LanguageModel, document: Document | Sequence[int], at: int, max_tokens: int
) -> list[int]:
    """The token ids of a document. Raises ValueError that names it."""
    if isinstance(document, Document):
        if lm.tokenizer is None:
            raise ValueError(f"documents[{at}] is text, but {lm.name} has no tokenizer: pass ids")
        return prompt_ids(document, lm.tokenizer, max_tokens=max_tokens)
    try:
        tokens = [operator.index(token) for token in document]
    except TypeError:
        raise ValueError(
            f"documents[{at}]={reprlib.repr(document)} must be a Document or a list of token ids"
        ) from None
    if not 0 < len(tokens) <= max_tokens:
        raise ValueError(
            f"documents[{at}] has {len(tokens)} tokens, it must have 1 to max_tokens={max_tokens}"
        )
    outside = next((token for token in tokens if not 0 <= token < lm.vocab_size), None)
    if outside is not None:
        raise ValueError(f"documents[{at}] holds token {outside}, not in 0..{lm.vocab_size - 1}")
    return tokens


def _check_configs(lm: LanguageModel, configs: Mapping[str, CacheConfig]) -> None:
    if not isinstance(configs, Mapping) or not configs:
        raise ValueError(f"configs={configs!r} must be a dict of name to CacheConfig, not empty")
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        if not isinstance(name, str) or not isinstance(config, CacheConfig):
            raise ValueError(f"configs[{name!r}]={config!r} must be a CacheConfig under a name")
        check_cache(lm, config)
        for field in ("page_size", "dtype", "implementation"):
            mine, other = getattr(config, field), getattr(first, field)
            if mine != other:
                raise ValueError(
                    f"configs[{name!r}] has {field}={mine!r}, configs[{first_name!r}] {other!r}: "
                    "configs that share the reading of a prompt share it"
                )


def _digest(params: Any) -> str:
    """Of a sample of every weight: tells models of one architecture apart, and reads little."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)]).tobytes())
    return found.hexdigest()


def _round_up(count: int, chunk: int) -> int:
    return -(-count // chunk) * chunk
