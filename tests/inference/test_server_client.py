"""The official client: what it sends is understood, what it gets it can read, and its rules for retries hold."""

import math

import openai
import pytest
from tests.inference.serving import running

from trivium.data.chat import Chat

HI = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server():
    with running(key="sesame") as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="sesame", max_retries=0) as one:
        yield one


def test_chat_and_stream(client):
    whole = client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, max_tokens=9, logprobs=True, top_logprobs=2
    )
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert len(choice.logprobs.content[0].top_logprobs) == 2 and whole.usage.completion_tokens <= 9
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HI,
            temperature=0,
            max_completion_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )


def test_stream_helpers(server, client):
    """They want answers that end by themselves."""
    question = [{"role": "user", "content": "how many?"}]
    prompt = Chat(server.tokenizer).prompt_ids(question)
    server.backend.script[tuple(prompt)] = [*server.tokenizer.encode("the 112 cat"), server.tokenizer.eot_id]
    with client.chat.completions.stream(model="tiny", messages=question) as stream:
        assert stream.get_final_completion().choices[0].message.content == "the 112 cat"
    with client.responses.stream(model="tiny", input="how many?") as stream:
        assert stream.get_final_response().output_text == "the 112 cat"


def test_completions(client):
    whole = client.completions.create(
        model="tiny", prompt=["the cat", "a"], n=2, temperature=0, max_tokens=5, logprobs=2
    )
    assert [c.index for c in whole.choices] == [0, 1, 2, 3] and whole.choices[0].text == whole.choices[1].text
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.token_logprobs) <= 5
    chunks = list(client.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=5, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text


def test_responses_with_a_previous_one(client):
    one = client.responses.create(model="tiny", input="hello", temperature=0, max_output_tokens=6)
    assert one.status in ("completed", "incomplete") and one.output_text == one.output[0].content[0].text
    two = client.responses.create(
        model="tiny", input=HI, previous_response_id=one.id, temperature=0, max_output_tokens=6
    )
    assert two.usage.input_tokens > one.usage.total_tokens and two.previous_response_id == one.id
    events = list(
        client.responses.create(
            model="tiny", input=HI, previous_response_id=one.id, temperature=0, max_output_tokens=6, stream=True
        )
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events][:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert events[-1].type in ("response.completed", "response.incomplete")
    told = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert told == events[-1].response.output_text == two.output_text
    assert client.responses.retrieve(one.id).output_text == one.output_text
    client.responses.delete(one.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(one.id)


def test_embeddings_have_length_one(client):
    found = client.embeddings.create(model="tiny", input=["a", "b"])
    assert [len(d.embedding) for d in found.data] == [32, 32]
    assert math.hypot(*found.data[1].embedding) == pytest.approx(1, abs=1e-5)
    assert client.embeddings.create(model="tiny", input="a", encoding_format="float").data[
        0
    ].embedding == pytest.approx(found.data[0].embedding)


def test_models(client):
    assert [m.id for m in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "messages.0.role"),
        ({"extra_body": {"tempature": 1}}, openai.BadRequestError, "tempature"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens"),
        ({"logit_bias": {"a": 1}}, openai.BadRequestError, "logit_bias"),
        ({"reasoning_effort": "low"}, openai.BadRequestError, "reasoning_effort"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "messages.0.content.0.type",
        ),
    ],
)
def test_errors(client, change, kind, param):
    with pytest.raises(kind) as told:
        client.chat.completions.create(**{"model": "tiny", "messages": HI, **change})
    assert told.value.param == param and told.value.type == "invalid_request_error" and told.value.body["message"]


def test_wrong_key(server):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="other", max_retries=0).models.list()


def test_an_error_in_a_stream_is_raised(server, client):
    ids = [40, 41]
    server.backend.script[tuple(ids)] = [20, 21, "boom"]
    with pytest.raises(openai.APIError, match="planted"):
        list(client.completions.create(model="tiny", prompt=ids, max_tokens=9, stream=True))


def test_overload_is_429_and_retried():
    """One place, taken by a slow stream: an error with Retry-After; with retries, an answer once it ends."""
    with running(max_requests=1) as server:
        server.backend.seconds_per_step = 0.02
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0)
        no_end = {str(i): -100 for i in server.tokenizer.stop_ids}
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True, logit_bias=no_end)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as told:
            client.completions.create(model="tiny", prompt="b", max_tokens=2)
        assert told.value.response.headers["retry-after"] == "1"
        patient = client.with_options(max_retries=9)
        assert patient.completions.create(model="tiny", prompt="b", max_tokens=2).usage.completion_tokens <= 2
