"""From what is asked to token ids, in threads of its own: the event loop waits for none of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from flexijax.models.chat_template import ChatPrompt
from flexijax.models.language_model import LanguageModel
from flexijax.models.tokenizer import Tokenizer
from flexijax.server.errors import ApiError
from flexijax.server.requests import DetokenizeRequest, TokenizeRequest, TokenizeResponse
from flexijax.server.token_text import TokenText

_T = TypeVar("_T")
_THREADS = 2


class Words:
    """A model's tokenizer and chat template. max_context: tokens, of the longest request."""

    def __init__(self, lm: LanguageModel, max_context: int) -> None:
        self.of_tokens = TokenText(lm.tokenizer)
        self._lm, self._max_context = lm, max_context
        self._pool = ThreadPoolExecutor(_THREADS, "flexijax-words")

    def start(self, function: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
        """function(*args) in one of the threads."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """Ends the threads; what waits for one is not done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """special: whether the tokenizer adds what it puts around every text, such as BOS."""
        tokenizer = self._tokenizer("prompt")
        try:
            return tokenizer.encode(text if special else ChatPrompt(text))
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from None

    def chat(self, messages: Sequence[dict[str, Any]]) -> ChatPrompt:
        """The prompt of a conversation."""
        tokenizer = self._tokenizer("messages")
        try:
            return ChatPrompt(tokenizer.chat(messages))
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    def ids(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """Of a prompt as it was given. Raises ApiError for what is too long or no token."""
        if isinstance(prompt, str):
            ids = self.encode(prompt, special=special)
        else:
            ids = prompt
            outside = next((one for one in ids if one >= self._lm.vocab_size), None)
            if outside is not None:
                message = f"prompt holds token {outside}, not in 0..{self._lm.vocab_size - 1}"
                raise ApiError(400, message, param="prompt", code="invalid_value")
        if not ids:
            raise ApiError(400, "prompt is empty: it needs at least one token", param="prompt")
        if len(ids) >= self._max_context:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, and this model's maximum context length is "
                f"{self._max_context} tokens, of which at least one is generated",
                code="context_length_exceeded",
            )
        return ids

    def text(self, ids: list[int]) -> str:
        """Of token ids, special ones left out; "" for a model without a tokenizer."""
        tokenizer = self._lm.tokenizer
        return "" if tokenizer is None else tokenizer.decode(ids)

    def tokenize(self, body: TokenizeRequest) -> TokenizeResponse:
        """The answer of `/tokenize`."""
        prompt = None
        if body.messages is not None:
            prompt = self.chat([message.plain() for message in body.messages])
            ids = self.encode(prompt)
        else:
            ids = self.encode(body.prompt or "", special=body.add_special_tokens is not False)
        return TokenizeResponse(
            count=len(ids),
            max_model_len=self._max_context,
            tokens=ids,
            token_strs=[self.of_tokens.text(one) for one in ids]
            if body.return_token_strs
            else None,
            prompt=None if prompt is None else str(prompt),
        )

    def detokenize(self, body: DetokenizeRequest) -> str:
        """The answer of `/detokenize`."""
        tokenizer = self._tokenizer("tokens")
        outside = next((one for one in body.tokens if one >= self._lm.vocab_size), None)
        if outside is not None:
            message = f"tokens holds {outside}, not in 0..{self._lm.vocab_size - 1}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return tokenizer.decode(body.tokens)

    def _tokenizer(self, param: str) -> Tokenizer:
        if self._lm.tokenizer is None:
            message = f"{self._lm.name} has no tokenizer: send token ids as the prompt"
            raise ApiError(400, message, param=param, code="no_tokenizer")
        return self._lm.tokenizer
