"""Behaviour: what clients of OpenAI's API send and get, with the openai client, on a port of this machine."""

import json

import httpx
import openai
import pytest
import torch

from onecard.config import SamplingConfig, ServeConfig
from onecard.data.chat.mask import prompt_ids
from onecard.hf.load import load_model, load_tokenizer
from onecard.infer.decoding import Answer
from onecard.infer.protocol import ChatRequest, parse
from onecard.infer.sampling import Sampler
from onecard.infer.server import Served, make_server
from onecard.infer.tools import format_of
from tests.infer.test_server import BASE, Running, said
from tests.infer.test_tools import CHAT, HERMES, LLAMA, OTHER

ASKED = "How many mugs does Ann have?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kinds": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "kinds"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
BARE = {"type": "function", "function": {"name": "count", "parameters": NONE}}
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"$ref": "#/$defs/Colour"},
                "times": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["colour", "times"],
            "additionalProperties": False,
            "$defs": {"Colour": {"enum": ["red", "blue"]}},
        },
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def model():
    return load_model(BASE, compute_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def running(model, tokenizer):
    models = {"base": Served(None, tokenizer)}
    for name, head in (("calls", HERMES), ("calls-llama", LLAMA), ("calls-text", OTHER)):
        calling = load_tokenizer(BASE)
        calling.chat_template = head + CHAT
        models[name] = Served(None, calling, None, format_of(calling))
    made = Running(make_server(model, models, ServeConfig(port=0)))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=600)


def ask(client, question=ASKED, model="base", **fields):
    fields = {"temperature": 0, "max_tokens": 16, **fields}
    return client.chat.completions.create(model=model, messages=said(question), **fields)


def alone(model, tokenizer, sampling, num_tokens=16):
    answer, text = Answer(model, tokenizer, prompt_ids(said(ASKED), tokenizer), num_tokens, sampling), ""
    while answer.finish_reason is None:
        text += answer.advance()
    return text


def test_each_sampling_setting_is_that_of_generate(client, model, tokenizer):
    cases = [
        ({"temperature": 1, "seed": 3}, {"top_k": 2}),
        ({"temperature": 1, "seed": 3}, {"min_p": 0.3}),
        ({"temperature": 1.5, "seed": 3, "top_p": 0.5}, {}),
        ({"frequency_penalty": 2.0, "presence_penalty": -1.0}, {}),
        ({}, {"repetition_penalty": 2.0}),
    ]
    texts = set()
    for fields, more in cases:
        expected = alone(model, tokenizer, SamplingConfig(**fields, **more))
        assert ask(client, **fields, extra_body=more).choices[0].message.content == expected
        texts.add(expected)
    first = prompt_ids(said(ASKED), tokenizer)
    with torch.no_grad():
        token = int(model(torch.tensor([first])).logits[0, -1].argmax())
    biased = ask(client, logit_bias={str(token): -100}).choices[0].message.content
    assert (
        biased
        == alone(model, tokenizer, SamplingConfig(logit_bias={token: -100}))
        != alone(model, tokenizer, SamplingConfig())
    )
    assert len(texts) > 2


def test_several_choices_have_seeds_of_their_own(client, model, tokenizer):
    expected = [alone(model, tokenizer, SamplingConfig(temperature=1.2, seed=7 + i)) for i in range(3)]
    whole = ask(client, n=3, seed=7, temperature=1.2)
    assert [choice.message.content for choice in whole.choices] == expected and len(set(expected)) > 1
    texts = ["", "", ""]
    for chunk in ask(client, n=3, seed=7, temperature=1.2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == expected and chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_whole_and_streamed(client):
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0]
    found = whole.logprobs.content
    assert "".join(each.token for each in found) == whole.message.content
    for each in found:  # greedy: the drawn token is the likeliest one
        assert each.token == each.top_logprobs[0].token and each.logprob == each.top_logprobs[0].logprob <= 0
        assert bytes(each.bytes).decode() == each.token and len(each.top_logprobs) == 2
    chunks = list(ask(client, logprobs=True, top_logprobs=2, stream=True))
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in found]
    assert ask(client).choices[0].logprobs is None
    text = client.completions.create(model="base", prompt="two mugs", temperature=0, max_tokens=4, logprobs=1).choices[
        0
    ]
    assert "".join(text.logprobs.tokens) == text.text and text.logprobs.text_offset[0] == 0
    assert [max(top, key=top.get) for top in text.logprobs.top_logprobs] == text.logprobs.tokens


def test_answers_match_their_schema(client):
    """From a model that knows nothing of JSON. The slow test and benchmarks/serve.py ask for many more."""
    for seed in range(4):
        choice = ask(client, temperature=1, seed=seed, max_tokens=120, response_format=FORMAT).choices[0]
        check_person(choice)
    chunks = ask(client, temperature=1, seed=0, max_tokens=120, response_format=FORMAT, stream=True)
    check_person(ask(client, temperature=1, seed=0, max_tokens=120, response_format=FORMAT).choices[0])
    assert (
        json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)).keys()
        == SCHEMA["properties"].keys()
    )
    short = {"type": "object", "additionalProperties": {"type": "boolean"}}
    free = ask(client, response_format={"type": "json_object"}, max_tokens=3).choices[0]
    assert free.message.content.startswith("{") and free.finish_reason == "length"
    text = client.completions.create(
        model="base", prompt="Say yes:", max_tokens=60, temperature=1, seed=1,
        extra_body={"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}},
    ).choices[0]  # fmt: skip
    assert json.loads(text.text) in ("yes", "no") and text.finish_reason == "stop" and short


def check_person(choice):
    assert choice.finish_reason == "stop"
    found = json.loads(choice.message.content)
    assert list(found) == ["name", "age", "kinds"] and isinstance(found["name"], str) and len(found["name"]) <= 8
    assert type(found["age"]) is int and 0 <= found["age"] <= 120
    assert set(found["kinds"]) <= {"red", "blue"} and len(found["kinds"]) <= 2


@pytest.mark.parametrize(
    "schema, named",
    [({"type": "objekt"}, "objekt"), ({"not": {}}, "not"), ({"type": "array", "uniqueItems": True}, "uniqueItems")],
)
def test_a_schema_that_answers_are_not_held_to_is_refused(client, schema, named):
    with pytest.raises(openai.BadRequestError, match=named) as error:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert error.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        ask(client, response_format={"type": "json_schema"})


def test_calls_of_tools_come_as_calls(client, tokenizer, monkeypatch):
    """The model is made to write a call; whole, streamed, and with a tool of another name, which stays text."""
    text = 'So: <tool_call>{"name": "count", "arguments": {"n": 2}}</tool_call>'
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr(Sampler, "pick", lambda self, tokens, logits: next(self.left))
    begin = Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda self, *a: (begin(self, *a), setattr(self, "left", iter(ids)))[0])
    how = {"model": "calls", "max_tokens": 200}
    choice = ask(client, tools=[TOOL], **how).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "So: "
    (call,) = choice.message.tool_calls
    assert call.function.name == "count" and json.loads(call.function.arguments) == {"n": 2}
    chunks = [chunk.choices[0] for chunk in ask(client, tools=[TOOL], stream=True, **how)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "So: "
    (streamed,) = [called for chunk in chunks for called in chunk.delta.tool_calls or []]
    assert streamed.function.model_dump() == call.function.model_dump() and chunks[-1].finish_reason == "tool_calls"
    other = {"type": "function", "function": {"name": "other"}}
    for fields in ({"tools": [other]}, {"tools": [TOOL], "tool_choice": "none"}, {}):
        choice = ask(client, **fields, **how).choices[0]
        assert choice.message.content == text and choice.finish_reason == "stop" and not choice.message.tool_calls


@pytest.mark.parametrize(
    "name, stream", [("calls", False), ("calls", True), ("calls-llama", False), ("calls-text", True)]
)
def test_a_forced_call_is_made_and_its_result_is_answered(client, name, stream):
    """The untrained model is held to the call, in each format of templates. Then the talk goes on with the result."""
    named = {"type": "function", "function": {"name": "paint"}}
    for choice, names in (("required", {"count", "paint"}), (named, {"paint"})):
        for seed in range(2):
            how = {"model": name, "tools": [BARE, PAINT], "tool_choice": choice, "max_tokens": 200}
            how |= {"temperature": 1, "seed": seed}
            if stream:
                chunks = [chunk.choices[0] for chunk in ask(client, stream=True, **how)]
                (call,) = [each for chunk in chunks for each in chunk.delta.tool_calls or []]
                content, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
            else:
                found = ask(client, **how).choices[0]
                (call,), content, reason = found.message.tool_calls, found.message.content, found.finish_reason
            assert not content and reason == "tool_calls" and call.function.name in names
            arguments = json.loads(call.function.arguments)
            if call.function.name == "paint":
                assert arguments.keys() == {"colour", "times"} and arguments["colour"] in ("red", "blue")
                assert type(arguments["times"]) is int and 1 <= arguments["times"] <= 9
            assert isinstance(arguments, dict)
    called = {"id": call.id, "type": "function", "function": call.function.model_dump()}
    talk = [*said(ASKED), {"role": "assistant", "content": None, "tool_calls": [called]}]
    talk.append({"role": "tool", "tool_call_id": call.id, "content": "painted twice"})
    how = {"model": name, "tools": [BARE, PAINT], "temperature": 0, "max_tokens": 9}
    answered = client.chat.completions.create(messages=talk, **how)
    assert answered.choices[0].message.content and answered.usage.prompt_tokens > 20
    other = [*talk[:-1], {**talk[-1], "content": "painted seven times over"}]
    assert client.chat.completions.create(messages=other, **how).usage.prompt_tokens > answered.usage.prompt_tokens


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "count"}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"format": "zip", "properties": {
            "a": {"type": "string", "format": "zip"}}}}}]}, "tools"),
    ],
)  # fmt: skip
def test_a_forced_call_that_cannot_be_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **{"model": "calls", "tools": [TOOL], "tool_choice": "required", **fields})
    assert error.value.param == param


def test_tools_are_in_the_prompt_and_a_template_without_them_is_refused(client, running):
    service = running.server.config.app.state.service
    called = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"n": 2}'}}
    talk = [*said(ASKED), {"role": "assistant", "content": None, "tool_calls": [called]}]
    body = {"model": "calls", "messages": [*talk, {"role": "tool", "content": "two", "tool_call_id": "c1"}]}
    ids, _ = service.prompt(parse(ChatRequest, json.dumps({**body, "tools": [TOOL]}).encode()))
    assert '"name": "count"' in service.models["calls"].tokenizer.decode(ids) and "two" in service.models[
        "calls"
    ].tokenizer.decode(ids)
    for fields in ({"tools": [TOOL]}, {"messages": body["messages"]}):
        with pytest.raises(openai.BadRequestError, match="has no tools") as error:
            client.chat.completions.create(**{"model": "base", "messages": said("a"), **fields})
        assert error.value.param == "tools"
    for wrong in ({"name": "count", "arguments": "{"}, {"name": "count", "arguments": "[]"}):
        with pytest.raises(openai.BadRequestError, match="arguments of a call"):
            client.chat.completions.create(
                model="calls",
                messages=[*said("a"), {"role": "assistant", "tool_calls": [{**called, "function": wrong}]}],
            )


def test_responses(client):
    expected = ask(client).choices[0].message.content
    how = {"model": "base", "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(input=ASKED, **how)
    assert whole.output_text == expected and whole.usage.output_tokens > 0
    assert whole.status == ("incomplete" if whole.usage.output_tokens == 16 else "completed")
    parts = [{"role": "user", "content": [{"type": "input_text", "text": ASKED}]}]
    assert client.responses.create(input=parts, **how).output_text == expected
    events = list(client.responses.create(input=ASKED, stream=True, **how))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].response.output_text == expected and events[-1].response.usage == whole.usage
    told = client.responses.create(input=ASKED, instructions="Be brief.", **how)
    assert told.usage.input_tokens > whole.usage.input_tokens
    again = [*parts, *[item.model_dump() for item in whole.output], *said("And Bob?")]
    assert client.responses.create(input=again, **how).usage.input_tokens > whole.usage.input_tokens
    person = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}
    assert (
        json.loads(client.responses.create(input=ASKED, model="base", text=person).output_text).keys()
        == SCHEMA["properties"].keys()
    )
    for fields in ({"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]}, {"store": True}, {"n": 2}):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(input=ASKED, **how, extra_body=fields)
        assert error.value.param == next(iter(fields)) and error.value.code == "unsupported_parameter"


def test_metrics_count_and_embeddings_are_refused_by_name(client, running):
    def read():
        text = httpx.get(f"{running.url}/metrics").text
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}

    before = read()
    usage = ask(client, "Count these mugs for me").usage
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not served"):
        client.embeddings.create(model="base", input="a")
    after = read()

    def more(name):
        return after.get(name, 0) - before.get(name, 0)

    assert more("onecard_prompt_tokens_total") == usage.prompt_tokens
    assert more("onecard_answer_tokens_total") == usage.completion_tokens
    assert more('onecard_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert more('onecard_requests_total{path="/v1/embeddings",status="404"}') == 1
    assert more("onecard_answer_seconds_count") == more("onecard_first_token_seconds_count") == 1
    assert usage.prompt_tokens_details.cached_tokens == more("onecard_cached_tokens_total")
    repeated = ask(client, "Count these mugs for me").usage
    assert repeated.prompt_tokens_details.cached_tokens == repeated.prompt_tokens - 1
