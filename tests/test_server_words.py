"""The text of single tokens: joined, it is the text of all of them."""

import pytest

from flexijax.models.tokenizer import Tokenizer
from tests import server_kit  # noqa: F401  skips where the serve extra is missing
from tests.tokenizer_files import KINDS, TEXTS, backend_of

pytestmark = pytest.mark.any_jax


# In these the text of a token depends on what follows it.
NOT_LOCAL = {"word_piece", "with_suffix", "replacing_at_the_end"}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - NOT_LOCAL))
def test_texts_of_tokens_join(kind):
    from flexijax.server.token_text import TokenText

    words = Tokenizer(
        backend=backend_of(kind),
        bos_token="<s>",
        eos_token="</s>",
        stop_ids=frozenset(),
        chat_template=None,
    )
    of_tokens = TokenText(words)
    for text in TEXTS:
        ids = [one for one in words.encode(text) if of_tokens.shown(one)]
        joined = b"".join(map(of_tokens.data, ids)).decode("utf-8", "replace")
        # Decoders may take a space off the beginning.
        assert joined in (words.decode(ids), " " + words.decode(ids))


def test_a_model_without_a_tokenizer_has_no_texts():
    from flexijax.server.token_text import TokenText

    of_tokens = TokenText(None)
    assert (of_tokens.text(3), of_tokens.data(3), of_tokens.shown(3)) == ("", b"", "")
