"""A language model whose stable and unstable heads are known, and documents for it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import tokenizers

from flexijax.models.config import AttentionShape
from flexijax.models.decoder import DecoderLike
from flexijax.models.language_model import LanguageModel
from flexijax.models.tokenizer import Tokenizer
from flexijax.profiles.documents import Document

WORDS = [f"w{at}" for at in range(60)]


@dataclasses.dataclass(frozen=True)
class PlantedDecoder(DecoderLike):
    """One fixed query for stable heads and another at every position for the unstable ones.

    params: keys float32[positions, K, H]; queries float32[positions, L, K, H], used as they are.
    """

    num_layers: int

    def embed(self, params, tokens):
        """Nothing of a token."""
        return jnp.zeros((*tokens.shape, 1))

    def layers(self, params):
        """Keys, the same in all of them, and queries of each."""
        return [(params["keys"], params["queries"][:, at]) for at in range(self.num_layers)]

    def layer(self, weights, layer, x, positions, attention_fn, state, *, only=None):
        """Calls the attention function with the planted arrays; what it returns changes nothing."""
        keys, queries = weights
        k = keys[positions]
        _, state = attention_fn(layer, queries[positions], k, k, state)
        return x if only is None else x[:, :1], state

    def norm(self, params, x):
        """Nothing."""
        return x

    def logits(self, params, x):
        """The same score for every token."""
        return jnp.zeros((*x.shape[:-1], len(WORDS)))


def words_tokenizer():
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(
        backend=backend,
        bos_token=None,
        eos_token=None,
        stop_ids=frozenset({5}),
        chat_template="w1 {{ messages[0].content }} w2",
    )


def planted_model():
    """(model, its unstable heads): queries repeat, but for the unstable heads'."""
    layers, heads, width, positions = 3, 4, 8, 700
    unstable = ((0, 2), (1, 0), (2, 1))
    rng = np.random.default_rng(0)
    fixed = np.broadcast_to(rng.normal(size=(1, layers, heads, width)), (positions,) + (3, 4, 8))
    queries = fixed.copy()
    for layer, head in unstable:
        queries[:, layer, head] = rng.normal(size=(positions, width))
    params = {
        "keys": jnp.asarray(rng.normal(size=(positions, heads, width)), jnp.float32),
        "queries": jnp.asarray(queries, jnp.float32),
    }
    lm = LanguageModel(
        name="planted",
        decoder=PlantedDecoder(layers),
        params=params,
        attention=AttentionShape(layers, heads, heads, width, width**-0.5),
        vocab_size=len(WORDS),
        max_context=positions,
        dtype=jnp.dtype("float32"),
        tokenizer=words_tokenizer(),
        fingerprint="planted",
    )
    return lm, unstable


def text_document(task, seed):
    numbers = np.random.default_rng(seed).integers(6, 60, size=400)
    text = " ".join(WORDS[number] for number in numbers)
    return Document(task=task, index=seed, text=text, instruction="w8 w9")
