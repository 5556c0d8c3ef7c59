"""The official client against a running server: every answer is what the engine says alone."""

import asyncio

import pytest

from flexijax.engine.sampling import Sampling
from tests.server_kit import CONTEXT, EVERYTHING, engine_of, httpx, openai, served_model, serving

pytestmark = pytest.mark.usefixtures("short_chunks")

PROMPTS = ["the quick brown fox", "hello world 123", "日本 lower", "it's the lazy dog jumps over"]


@pytest.fixture(scope="module")
def lm():
    return served_model()


@pytest.fixture(scope="module")
def served(lm):
    with serving(lm, engine_of(lm, EVERYTHING)) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    with served.client() as made:
        yield made


@pytest.fixture(scope="module")
def alone(lm):
    """What an engine of its own answers, asked for one thing at a time."""
    engine = engine_of(lm, EVERYTHING)

    def answer(prompt, new=24, **sampling):
        return engine.submit(prompt, max_new_tokens=new, sampling=Sampling(**sampling)).result()

    return answer


def test_a_completion_is_the_engines(client, alone):
    for prompt in PROMPTS:
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)
        expected = alone(prompt)
        [choice] = made.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert made.usage.prompt_tokens == expected.metrics.prompt_tokens
        assert made.usage.completion_tokens == len(expected.token_ids) > 0
        assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
        assert made.id.startswith("cmpl-") and made.object == "text_completion"


def test_a_stream_joins_to_the_whole(client, alone):
    with client.completions.create(
        model="alias",
        prompt=PROMPTS[0],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    expected = alone(PROMPTS[0], new=40)
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == expected.text
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert len(parts) > 5, "a stream that comes at once is none"
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert {part.id for part in chunks} == {last.id} and last.model == "alias"


def test_each_piece_may_say_how_many_tokens_there_are(client):
    """vLLM's: of its own choice; without it a piece says nothing of usage."""
    usage = {"include_usage": True, "continuous_usage_stats": True}
    ask = dict(model="tiny", max_tokens=9, stream=True, extra_body={"ignore_eos": True})
    for create, more in (
        (client.completions.create, {"prompt": PROMPTS[:2], "n": 2}),
        (client.chat.completions.create, {"messages": CHAT, "n": 2}),
    ):
        *parts, last = create(**ask, **more, stream_options=usage)
        counts: dict[int, list] = {}
        for part in parts:
            if part.usage is not None:
                counts.setdefault(part.choices[0].index, []).append(part.usage)
        for of in counts.values():
            made = [one.completion_tokens for one in of]
            assert made == sorted(made) and made[0] < made[-1] == 9
            assert {one.total_tokens - one.completion_tokens for one in of} == {of[0].prompt_tokens}
        prompts = [of[0].prompt_tokens for of in list(counts.values())[:: ask.get("n", 2)]]
        assert sum(prompts) == last.usage.prompt_tokens
        assert last.usage.completion_tokens == 9 * len(counts)
        *parts, last = create(**ask, **more, stream_options={"include_usage": True})
        assert all(part.usage is None for part in parts) and last.usage is not None


def test_ids_are_a_prompt_too(client, lm, alone):
    ids = lm.tokenizer.encode(PROMPTS[1])
    made = client.completions.create(
        model="tiny",
        prompt=ids,
        max_tokens=9,
        temperature=0,
        echo=True,
        extra_body={"return_token_ids": True},
    )
    expected = alone(PROMPTS[1], new=9)
    assert made.choices[0].text == PROMPTS[1] + expected.text
    assert made.choices[0].token_ids == list(expected.token_ids)


def test_several_prompts_and_choices_keep_their_places(client, alone):
    made = client.completions.create(
        model="tiny", prompt=PROMPTS, n=2, max_tokens=12, temperature=0.8, seed=3
    )
    assert [choice.index for choice in made.choices] == list(range(8))
    again = client.completions.create(
        model="tiny", prompt=PROMPTS[2], n=2, max_tokens=12, temperature=0.8, seed=3
    )
    texts = [choice.text for choice in made.choices]
    assert [choice.text for choice in again.choices] == texts[4:6]
    assert texts[4] != texts[5], "two choices draw for themselves"
    assert texts[0] == alone(PROMPTS[0], new=12, temperature=0.8, seed=3).text


def test_a_request_without_a_seed_draws_anew(client):
    ask = dict(model="tiny", prompt=PROMPTS[0], max_tokens=16)
    texts = {client.completions.create(**ask).choices[0].text for _ in range(3)}
    assert len(texts) == 3
    negative = [client.completions.create(**ask, seed=-5).choices[0].text for _ in range(2)]
    assert negative[0] == negative[1]


def test_filters_are_the_engines(client, alone):
    made = client.completions.create(
        model="tiny",
        prompt=PROMPTS[3],
        max_tokens=16,
        temperature=1.3,
        top_p=0.9,
        seed=11,
        extra_body={"top_k": 7, "min_p": 0.01, "ignore_eos": True},
    )
    ask = dict(temperature=1.3, top_p=0.9, top_k=7, min_p=0.01, seed=11, ignore_eos=True)
    assert made.choices[0].text == alone(PROMPTS[3], new=16, **ask).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text(client, alone, stream):
    whole = alone(PROMPTS[0], new=40).text
    stop = whole[17:20]
    at = whole.find(stop)
    made = client.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=[stop], stream=stream
    )
    parts = list(made) if stream else [made]
    assert "".join(part.choices[0].text for part in parts) == whole[:at]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_stop_token_ends_it(client, alone):
    expected = alone(PROMPTS[0], new=20)
    token = expected.token_ids[10]
    first = expected.token_ids.index(token)
    made = client.completions.create(
        model="tiny",
        prompt=PROMPTS[0],
        max_tokens=20,
        temperature=0,
        extra_body={"stop_token_ids": [token], "return_token_ids": True},
    )
    assert made.choices[0].token_ids == list(expected.token_ids[:first])
    assert made.choices[0].finish_reason == "stop"


def test_log_probabilities_are_of_the_tokens(client, lm, alone):
    expected = alone(PROMPTS[0], new=24, logprobs=True)
    ask = dict(model="tiny", prompt=PROMPTS[0], max_tokens=24, temperature=0, logprobs=0)
    whole = client.completions.create(**ask, echo=False).choices[0].logprobs
    assert whole.token_logprobs == pytest.approx(expected.logprobs)
    texts = [lm.tokenizer.decode([token]) for token in expected.token_ids]
    assert whole.tokens == texts
    assert whole.text_offset == [len("".join(texts[:at])) for at in range(24)]
    with client.completions.create(**ask, stream=True) as stream:
        parts = [chunk.choices[0].logprobs for chunk in stream]
    joined = [token for part in parts if part for token in part.tokens]
    offsets = [offset for part in parts if part for offset in part.text_offset]
    assert (joined, offsets) == (whole.tokens, whole.text_offset)


def test_alternatives_are_the_likeliest(client, lm, alone):
    expected = alone(PROMPTS[0], new=10, temperature=1.5, seed=4, alternatives=3)
    ask = dict(model="tiny", temperature=1.5, seed=4, max_tokens=10)
    made = client.completions.create(**ask, prompt=PROMPTS[0], logprobs=3).choices[0].logprobs
    text = lm.tokenizer.decode
    assert expected.alternatives is not None
    for at, likely in enumerate(expected.alternatives):
        wanted = {text([one]): logprob for one, logprob in reversed(likely)}
        wanted.setdefault(made.tokens[at], made.token_logprobs[at])
        assert made.top_logprobs[at] == pytest.approx(wanted)
    chat = client.chat.completions.create(
        **ask, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=2
    )
    for one in chat.choices[0].logprobs.content:
        first, second = one.top_logprobs
        assert first.logprob >= second.logprob and first.logprob >= one.logprob


CHAT = [
    {"role": "developer", "content": "be brief"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "w"}],
    },
]


def test_a_chat_goes_through_the_template(client, lm, alone):
    prompt = lm.tokenizer.chat(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello w"}]
    )
    expected = alone(prompt, new=20, logprobs=True)
    ask = dict(model="tiny", messages=CHAT, temperature=0, logprobs=True)
    made = client.chat.completions.create(**ask, max_completion_tokens=20)
    [choice] = made.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    content = choice.logprobs.content
    assert [one.logprob for one in content] == pytest.approx(expected.logprobs)
    data = bytes(byte for one in content for byte in one.bytes)
    assert data.decode("utf-8", "replace") == expected.text
    with client.chat.completions.create(
        **ask, max_tokens=20, stream=True, stream_options={"include_usage": True}
    ) as stream:
        first, *parts, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
    assert parts[-1].choices[0].finish_reason == expected.finish_reason
    assert last.usage.total_tokens == made.usage.total_tokens


def test_a_chat_that_names_no_end_may_fill_the_context(client):
    made = client.chat.completions.create(
        model="tiny", messages=CHAT, extra_body={"ignore_eos": True}
    )
    assert made.usage.total_tokens == CONTEXT and made.choices[0].finish_reason == "length"


def test_many_at_once_never_mix(served, alone):
    """More than there are rows, streaming and not, from one event loop."""
    expected = {(at, new): alone(PROMPTS[at], new=new) for at in range(4) for new in (7, 18, 30)}

    async def ask(client, at, new, stream):
        made = await client.completions.create(
            model="tiny",
            prompt=PROMPTS[at],
            max_tokens=new,
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": True},
        )
        choices = [part.choices[0] async for part in made] if stream else made.choices
        ids = [one for choice in choices for one in choice.token_ids]
        return "".join(choice.text for choice in choices), ids

    async def everybody():
        async with served.async_client() as client:
            cases = [(at, new, stream) for at, new in expected for stream in (False, True)]
            return cases, await asyncio.gather(*(ask(client, *case) for case in cases))

    cases, answers = asyncio.run(everybody())
    for (at, new, _), (text, ids) in zip(cases, answers, strict=True):
        assert (text, ids) == (expected[at, new].text, list(expected[at, new].token_ids))
    served.quiet()


def test_cached_tokens_are_told(served, client):
    """Whole chunks of a prompt that was read before, but for requests of another salt."""
    ask = dict(
        model="tiny", prompt="jumps over the lazy dog " * 16, max_tokens=4, temperature=0, n=2
    )
    before, told = served.metrics()["prefix_cache_hits_total"], []
    for salt in ("one", "one", "other"):
        made = client.completions.create(**ask, extra_body={"cache_salt": salt})
        told.append(made.usage.prompt_tokens_details.cached_tokens)
        assert len({choice.text for choice in made.choices}) == 1
    assert told[0] == told[2] == 0
    assert 0 < told[1] < made.usage.prompt_tokens
    assert served.metrics()["prefix_cache_hits_total"] - before >= told[1]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("tiny").max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_words_and_ids(served, lm):
    text = "héllo wörld"
    ids = lm.tokenizer.encode(text)
    made = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert (made["tokens"], made["count"]) == (ids, len(ids))
    assert made["max_model_len"] == CONTEXT and len(made["token_strs"]) == len(ids)
    assert served.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    chat = served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["prompt"] == "<s>user: hi\nassistant:"
    assert chat["tokens"] == lm.tokenizer.encode(
        lm.tokenizer.chat([{"role": "user", "content": "hi"}])
    )
    info = httpx.get(f"{served.url}/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and info["chat_template"] == lm.tokenizer.chat_template


def test_metrics_count_what_came(served, client):
    before = served.metrics()
    client.completions.create(
        model="tiny",
        prompt=PROMPTS[0],
        max_tokens=33,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    served.quiet()
    after = served.metrics()

    def gained(name):
        return after[name] - before[name]

    assert gained("generation_tokens_total") == gained("request_generation_tokens_sum") == 33
    assert gained("time_to_first_token_seconds_count") == gained("request_success_total") == 1
    assert gained("inter_token_latency_seconds_count") == 32
    assert gained("offloaded_bytes_total") > 0 and gained("decode_seconds_total") > 0
    assert after["device_kv_bytes"] > 0 and after["host_kv_bytes"] > 0
    assert after["device_kv_used_bytes"] == after["host_kv_used_bytes"] == 0
    assert 0 <= after["page_overlap"] <= 1
