"""A model ready to run: the decoder's functions, its weights, its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from flexijax.models.config import AttentionShape, ModelConfig
from flexijax.models.decoder import Decoder, DecoderLike, Params
from flexijax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Everything `generate` needs of a model.

    decoder: the pure functions `hidden` and `logits`, hashable; params: their pytree of weights,
    one subtree per layer, in dtype. attention: what the cache needs to know. max_context in tokens.
    tokenizer is None for a model that only speaks token ids; stop_ids then says which of them end a
    generation. fingerprint names the configuration that head profiles belong to; two models of one
    architecture share it.
    """

    name: str
    decoder: DecoderLike
    params: Params
    attention: AttentionShape
    vocab_size: int
    max_context: int
    dtype: Any
    tokenizer: Tokenizer | None
    fingerprint: str
    stop_ids: frozenset[int] = frozenset()

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a generation, which the tokenizer knows where there is one."""
        return self.stop_ids if self.tokenizer is None else self.tokenizer.stop_ids


def fingerprint(config: ModelConfig) -> str:
    """16 hex digits over the constants that shape attention and weights.

    The family's name and the context length are left out: the same model read from another file
    format, or run with a shorter context, has the same heads.
    """
    fields = dataclasses.asdict(config)
    del fields["family"], fields["max_context"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def from_config(
    config: ModelConfig,
    params: Params,
    *,
    name: str,
    dtype: Any,
    tokenizer: Tokenizer | None,
    stop_ids: frozenset[int] = frozenset(),
) -> LanguageModel:
    """Joins a config, its params in dtype and a tokenizer (or None) into a `LanguageModel`.

    stop_ids: the ids that end a generation, for a model without a tokenizer.
    """
    return LanguageModel(
        name=name,
        decoder=Decoder(config),
        params=params,
        attention=config.attention_shape,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        dtype=dtype,
        tokenizer=tokenizer,
        fingerprint=fingerprint(config),
        stop_ids=stop_ids if tokenizer is None else frozenset(),
    )
