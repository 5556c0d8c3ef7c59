"""What may be asked: the bodies of requests, as OpenAI's API and vLLM's additions name them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flexijax.engine.batch import MAX_STOP_IDS
from flexijax.engine.sampling import MAX_ALTERNATIVES
from flexijax.server.fields import Body, Content, Prompts, Stops, only

MAX_CHOICES = 128
_INT64 = 2**63
_PENALTY = "penalties are not supported: the engine samples from the model's own probabilities"
_TOOLS = "tools are not supported: the engine does not constrain what is generated"
_FORMAT = 'only {"type": "text"} is supported: the engine does not constrain what is generated'
_ONE_OF_N = "is not supported: ask for n choices and choose among them"

Count: TypeAlias = Annotated[int, Field(ge=1)]
Id: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Body):
    """include_usage: whether one more chunk says how many tokens there were."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With include_usage, each chunk of a choice says how many that choice has so far."""


class Sampled(Body):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """-1 and 0 keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Stops = ()
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOP_IDS)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    """Noted nowhere: for clients that always send it."""

    frequency_penalty: Annotated[Any, only(_PENALTY, 0)] = None
    presence_penalty: Annotated[Any, only(_PENALTY, 0)] = None
    repetition_penalty: Annotated[Any, only(_PENALTY, 1)] = None
    logit_bias: Annotated[Any, only("is not supported: the engine adds nothing to logits", {})] = (
        None
    )
    min_tokens: Annotated[Any, only("is not supported: see ignore_eos", 0)] = None
    skip_special_tokens: Annotated[
        Any, only("is not supported: special tokens are never shown", True)
    ] = None
    include_stop_str_in_output: Annotated[
        Any, only("is not supported: texts end before it", False)
    ] = None
    response_format: Annotated[Any, only(_FORMAT, {"type": "text"})] = None

    @model_validator(mode="after")
    def _goes_together(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value", "stream_options needs stream: true")
        return self


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """How many alternatives beside each token's own."""
    add_special_tokens: bool = True
    best_of: Annotated[Any, only(f"best_of {_ONE_OF_N}", 1)] = None
    suffix: Annotated[Any, only("is not supported: the model only goes on from a prompt")] = None


class Message(Body):
    """One of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[Any, only(_TOOLS, [])] = None
    refusal: Annotated[Any, only("is not supported")] = None

    def plain(self) -> dict[str, Any]:
        """What a chat template is given; most know no developer."""
        role = "system" if self.role == "developer" else self.role
        given = {"role": role, "content": self.content, "name": self.name}
        given["reasoning_content"] = self.reasoning_content
        return {name: value for name, value in given.items() if value is not None}


Messages: TypeAlias = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Count | None = None
    """Comes before max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    tools: Annotated[Any, only(_TOOLS, [])] = None
    tool_choice: Annotated[Any, only(_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(_TOOLS, True, False)] = None
    functions: Annotated[Any, only(_TOOLS, [])] = None
    function_call: Annotated[Any, only(_TOOLS, "none", "auto")] = None
    modalities: Annotated[Any, only("only text is generated", ["text"])] = None
    echo: Annotated[Any, only("is for /v1/completions", False)] = None
    add_generation_prompt: Annotated[Any, only("an answer always follows", True)] = None
    continue_final_message: Annotated[
        Any, only("is not supported: an answer always begins anew", False)
    ] = None

    @model_validator(mode="after")
    def _alternatives_are_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value", "top_logprobs needs logprobs: true")
        return self


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or the messages of a chat."""

    model: str | None = None
    prompt: Annotated[str, Field()] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: Annotated[Any, only("an answer always follows", True)] = None

    @model_validator(mode="after")
    def _has_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("value", "needs either prompt or messages")
        return self


class TokenizeResponse(Body):
    """count: of tokens. max_model_len: the most that a request may come to. prompt: of a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    prompt: str | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Id]


class DetokenizeResponse(Body):
    """The text, special tokens left out."""

    prompt: str


class TokenizerInfo(Body):
    """`GET /tokenizer_info`."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    stop_token_ids: list[int]
    chat_template: str | None
