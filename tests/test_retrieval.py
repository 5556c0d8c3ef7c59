"""Heads that were made to retrieve are found, and those that look elsewhere are not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models.config import AttentionShape
from flexijax.models.decoder import DecoderLike
from flexijax.models.language_model import LanguageModel
from flexijax.policies.razor_attention import RazorAttention
from flexijax.profiling.retrieval import RetrievalScores, measure_retrieval
from tests.tiny_models import tiny_model
from tests.tiny_runs import dense_qkv

VOCAB, WIDTH = 40, 64


@dataclasses.dataclass(frozen=True)
class PlantedDecoder(DecoderLike):
    """Four query heads of two KV heads, all of which ask for their own token, more or less.

    x: the token, and the one before it. The first KV head's keys say which token stands there, the
    second's which stood before it: whoever asks there finds what followed.
    """

    def embed(self, params, tokens):
        before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        return jnp.stack([tokens, before], axis=-1).astype(jnp.float32)

    def layers(self, params):
        return [params["roles"][0], params["roles"][1]]

    def layer(self, weights, layer, x, positions, attention_fn, state, *, only=None):
        token, before = (jnp.eye(VOCAB, WIDTH)[x[..., at].astype(jnp.int32)] for at in range(2))
        queries = weights[:, None] * token[:, :, None]
        keys = jnp.stack([token, before], axis=2)
        out, state = attention_fn(layer, queries, keys, jnp.zeros_like(keys), state)
        return x + 0 * out.sum(), state

    def norm(self, params, x):
        return x

    def logits(self, params, x):
        return x


def planted():
    """Heads that ask for nothing attend evenly."""
    roles = jnp.asarray([[30.0, 0.0, 30.0, 0.0], [0.0, 0.0, 0.0, 30.0]])
    return LanguageModel(
        name="planted",
        decoder=PlantedDecoder(),
        params={"roles": roles},
        attention=AttentionShape(2, 4, 2, WIDTH, 1.0),
        vocab_size=VOCAB,
        max_context=256,
        dtype=jnp.dtype("float32"),
        tokenizer=None,
        fingerprint="planted",
    )


def test_heads_that_were_planted_are_found():
    scores = measure_retrieval(planted(), length=24, repeats=3)
    # An echo head attends to itself as well, and where a token came more than once to all of them.
    assert scores.echo[0, 0] > 0.2 and scores.induction[0, 2] > 0.5 and scores.induction[1, 3] > 0.5
    others = np.ones((2, 4), bool)
    others[0, [0, 2]] = others[1, 3] = False
    assert scores.echo[others].max() < 0.1 and scores.induction[others].max() < 0.1
    assert scores.kv_heads(induction=0.25, echo=0.0) == ((1,), (1,))
    assert scores.kv_heads(induction=0.25, echo=0.1) == ((0, 1), (1,))


def test_shares_equal_a_loop():
    lm, length, repeats = tiny_model(), 20, 3
    scores = measure_retrieval(lm, length=length, repeats=repeats, seed=4)
    once = np.random.default_rng(4).integers(0, lm.vocab_size, length)
    texts = dense_qkv(lm, length * repeats)(np.tile(once, repeats))
    assert scores.echo.shape == scores.induction.shape == (2, 6)
    for layer, (q, k, _) in enumerate(texts):
        for head in range(6):
            echo = induction = 0.0
            for at in range(length, length * repeats):
                keys = k[: at + 1, head // 3].astype(np.float64)
                weights = np.exp(lm.attention.scale * keys @ q[at, head].astype(np.float64))
                weights /= weights.sum()
                echo += sum(weights[at - length :: -length])
                induction += sum(weights[at - length + 1 :: -length])
            found = scores.echo[layer, head], scores.induction[layer, head]
            queries = length * (repeats - 1)
            np.testing.assert_allclose(found, (echo / queries, induction / queries), rtol=1e-4)


def test_shares_of_heads_are_those_of_the_whole_model():
    echo = np.zeros((3, 4), np.float32)
    induction = np.arange(12, dtype=np.float32).reshape(3, 4)
    echo[0, 1] = 1.0
    scores = RetrievalScores(echo, induction, num_kv_heads=2)
    assert scores.kv_heads(induction=0.25, echo=0.01) == ((0,), (), (0, 1))
    assert scores.kv_heads() == ((0,), (), (1,))
    RazorAttention(retrieval=scores.kv_heads())


@pytest.mark.parametrize(("length", "repeats"), [(1, 4), (8, 1), (100, 6)])
def test_a_text_that_cannot_be(length, repeats):
    with pytest.raises(ValueError, match=f"length={length} and repeats={repeats} must be at least"):
        measure_retrieval(tiny_model(), length=length, repeats=repeats)
