"""lm-evaluation-harness over a cache: continuations go through decode steps, as generated ones do.

A likelihood from one dense reading of context and continuation would be the same for every cache.
Here a context is read once, and each of its continuations is fed to the cache token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

import flexijax
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.models.chat_template import ChatPrompt


class FlexijaxLM(TemplateLM):
    """A model with a cache. max_length: tokens of a context and what follows it.

    Longer contexts lose their beginning, as in the harness's own models.
    """

    def __init__(
        self, lm: flexijax.LanguageModel, cache: flexijax.CacheConfig, *, max_length: int
    ) -> None:
        super().__init__()
        if lm.tokenizer is None:
            raise ValueError(f"{lm.name} has no tokenizer")
        self._lm, self._cache, self._words = lm, cache, lm.tokenizer
        self._max_length = min(max_length, lm.max_context)
        self._program = make_program(
            lm, cache, max_tokens=self._max_length, batch=1, shared_reading=True
        )
        # Continuations are fed in whole chunks, so the last one needs room to its end.
        self._room = self._max_length - self._program.chunk_steps

    @property
    def eot_token_id(self) -> int:
        """What stands for an empty context, where the model has no BOS."""
        named = self._words.bos_token or self._words.eos_token
        found = None if named is None else self._words.backend.token_to_id(named)
        return min(self._words.stop_ids, default=0) if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of prompts."""
        return self._lm.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; without BOS only where that is asked for."""
        return self._words.encode(ChatPrompt(string) if add_special_tokens is False else string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; the assistant's answer always follows."""
        return self._words.chat(chat_history)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy answer) of each; contexts are read once."""
        fitted = [self._fitted(context, after) for _, context, after in requests]
        order = sorted(range(len(fitted)), key=lambda at: fitted[at][0])
        answers: dict[int, tuple[float, bool]] = {}
        for context, alike in itertools.groupby(order, key=lambda at: fitted[at][0]):
            prompt = read(self._lm, [self._program], context)
            for at in alike:
                continued = Continuation(self._lm, self._program, prompt)
                answers[at] = self._score(continued, fitted[at][1])
        return [answers[at] for at in range(len(requests))]

    def _score(self, continued: Continuation, tokens: list[int]) -> tuple[float, bool]:
        logits, steps = [continued.first_logits], self._program.chunk_steps
        if len(tokens) > 1:
            # What comes after them is fed too, and changes nothing before it.
            whole = -(-(len(tokens) - 1) // steps) * steps
            fed = continued.feed(np.resize(np.asarray(tokens, np.int32), whole).tolist())
            logits += list(fed[: len(tokens) - 1])
        rows = np.asarray(logits, np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        chosen = rows[np.arange(len(tokens)), tokens] - np.log(np.exp(rows).sum(-1))
        return float(chosen.sum()), bool((rows.argmax(-1) == tokens).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in pieces that fit: each begins anew after one token of the last."""
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            before, pieces = self.prefix_token_id, []
            for start in range(0, len(tokens), self._room - 1):
                piece = tokens[start : start + self._room - 1]
                pieces.append((("", ""), [before], piece))
                before = piece[-1]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy texts, up to the first of the strings that end them."""
        texts = []
        for text, options in (request.args for request in requests):
            until = options.get("until") or []
            new = int(options.get("max_gen_toks", 128))
            stop = tuple(one for one in ([until] if isinstance(until, str) else until) if one)
            prompt = self._words.encode(text)[-(self._max_length - new) :]
            [made] = flexijax.generate(
                self._lm,
                [prompt],
                max_new_tokens=new,
                cache=self._cache,
                sampling=flexijax.Sampling(stop=stop),
            )
            texts.append(made.text)
        return texts

    def _fitted(self, context: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        if len(after) >= self._room:
            raise ValueError(f"a continuation of {len(after)} tokens is longer than {self._room}")
        return context[-(self._room - len(after)) :], after
