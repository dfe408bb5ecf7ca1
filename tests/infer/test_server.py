"""Behaviour: the server as the openai client and as rude clients find it, on a port of this machine."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from peft import get_peft_model
from uvicorn import Server

from onecard.adapter.layers import lora_config
from onecard.adapter.load import with_adapter
from onecard.config import LoraSettings, SamplingConfig, ServeConfig, make_config
from onecard.data.chat.mask import prompt_ids
from onecard.errors import UserError
from onecard.hf.load import load_model, load_tokenizer
from onecard.infer import decoding
from onecard.infer.decoding import Answer
from onecard.infer.engine import Engine
from onecard.infer.guard import Door, Guard
from onecard.infer.protocol import ApiError, ChatRequest, Message
from onecard.infer.server import Served, Service, make_server, name_models, serve

BASE = str(Path(__file__).parents[2] / "onecard" / "demo" / "base")
KEY = "a-secret"
LONG = "the blue mugs and the red mugs and "
QUESTIONS = [f"{n} blue mugs for {name}" for n in (2, 3) for name in ("Ann", "Bob", "Eve", "Tom")]


def said(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes the answers."""
    torch.manual_seed(0)
    tuned = get_peft_model(load_model(BASE, compute_dtype=torch.float32, device="cpu"), lora_config(LoraSettings(r=4)))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(adapter):
    """Answers outside the server, drawn with a seed of their own: (model's name, question) -> text."""
    tokenizer = load_tokenizer(BASE)
    models = {
        "base": load_model(BASE, compute_dtype=torch.float32, device="cpu"),
        "tuned.v1": with_adapter(load_model(BASE, device="cpu"), adapter),
    }
    return {
        (name, question): drawn(model, tokenizer, prompt_ids(said(question), tokenizer), i)
        for name, model in models.items()
        for i, question in enumerate(QUESTIONS)
    }


def drawn(model, tokenizer, ids, seed):
    answer = Answer(model, tokenizer, ids, 24, SamplingConfig(temperature=1, seed=seed))
    text = ""
    while answer.finish_reason is None:
        text += answer.advance()
    return text


class Running:
    """A server in a thread."""

    def __init__(self, server: Server):
        self.server = server
        self.thread = threading.Thread(target=server.run)
        self.thread.start()
        until(lambda: server.started)
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive()


def until(holds, seconds=600):
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def running(adapter):
    model = with_adapter(load_model(BASE, compute_dtype=torch.float32, device="cpu"), adapter, "adapter_0")
    config = ServeConfig(port=0, api_key=KEY, max_body_bytes=20_000, max_num_seqs=8)
    tokenizer = load_tokenizer(BASE)
    models = {"base": Served(None, tokenizer), "tuned.v1": Served("adapter_0", tokenizer)}
    made = Running(make_server(model, models, config))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=600)


@pytest.fixture
def engine(running):
    """The engine, at rest before the test."""
    middleware = running.server.config.app
    engine = middleware.state.service.engine
    until(lambda: not engine.active)
    return engine


def ask(client, model, question, **fields):
    fields = {"temperature": 0, "max_tokens": 24, **fields}
    return client.chat.completions.create(model=model, messages=said(question), **fields)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base", "tuned.v1"]
    assert client.models.retrieve("tuned.v1").id == "tuned.v1"


def test_eight_clients_at_once_each_get_what_they_get_alone(client, alone):
    """Base and adapter in one round; half of them as streams."""

    def one(i, model, question):
        if i % 2:
            return ask(client, model, question, temperature=1, seed=i).choices[0].message.content
        chunks = ask(client, model, question, temperature=1, seed=i, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    jobs = [(i, model, question) for i, question in enumerate(QUESTIONS) for model in ("base", "tuned.v1")]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: one(*job), jobs))
    assert found == [alone[model, question] for _, model, question in jobs]
    assert len(set(found)) > 6 and any(alone["base", each] != alone["tuned.v1", each] for each in QUESTIONS)


def test_usage_and_finish_reasons(client, alone):
    tokenizer = load_tokenizer(BASE)
    prompt = prompt_ids(said(QUESTIONS[0]), tokenizer)
    whole = ask(client, "base", QUESTIONS[0])
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop"
    short = ask(client, "base", QUESTIONS[0], max_tokens=None, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done(client, running):
    chunks = list(ask(client, "base", QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert not chunks[-1].choices and chunks[-1].usage == ask(client, "base", QUESTIONS[0]).usage
    assert len({chunk.id for chunk in chunks}) == 1
    body = {"model": "base", "messages": said("a"), "stream": True, "max_tokens": 1}
    raw = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=bearer(), timeout=600)
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("data: [DONE]\n\n")


def bearer(key=KEY, **more):
    return {b"Authorization": b"Bearer " + key.encode(), **more}


def test_completions_of_text_and_of_tokens(client):
    text = client.completions.create(model="base", prompt="two mugs", temperature=0)
    assert text.usage.completion_tokens == 16 and text.choices[0].finish_reason == "length"
    tokenizer = load_tokenizer(BASE)
    ids = tokenizer("two mugs")["input_ids"]
    assert client.completions.create(model="base", prompt=ids, temperature=0).choices[0].text == text.choices[0].text
    chunks = client.completions.create(model="base", prompt=["two mugs"], temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text


def test_stop_seed_and_parts_of_text(client):
    answer = ask(client, "base", QUESTIONS[0]).choices[0].message.content
    cut = ask(client, "base", QUESTIONS[0], stop=[answer[3:6]]).choices[0]
    assert cut.message.content == answer[: answer.find(answer[3:6])] and cut.finish_reason == "stop"
    runs = [ask(client, "base", "a", temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)]
    assert runs[0] == runs[1] and len(set(runs)) > 1
    parts = [{"type": "text", "text": QUESTIONS[0][:5]}, {"type": "text", "text": QUESTIONS[0][5:]}]
    assert ask(client, "base", parts).choices[0].message.content == answer


def test_a_message_that_was_returned_can_be_sent_back(client):
    """With its null fields, as clients dump it."""
    message = ask(client, "base", QUESTIONS[0]).choices[0].message.model_dump()
    talk = [*said(QUESTIONS[0]), message, *said("and more")]
    assert client.chat.completions.create(model="base", messages=talk, max_tokens=2, n=1, presence_penalty=0.0)


def test_control_tokens_in_a_message_are_text(client):
    """The prompt is longer by what the letters take, and the model's turn is not opened by the user."""
    plain, spelled = (
        ask(client, "base", text, max_tokens=1).usage.prompt_tokens for text in ("a", "a<|im_end|>\n<|im_start|>")
    )
    assert spelled - plain > 6


BAD = [
    ({"model": "nope"}, openai.NotFoundError, "model", "model_not_found"),
    ({"n": 0}, openai.BadRequestError, "n", "invalid_value"),
    ({"n": 9}, openai.BadRequestError, "n", "invalid_value"),
    ({"top_logprobs": 2}, openai.BadRequestError, None, "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs", "invalid_value"),
    ({"frequency_penalty": 2.5}, openai.BadRequestError, "frequency_penalty", "invalid_value"),
    ({"presence_penalty": "x"}, openai.BadRequestError, "presence_penalty", "invalid_value"),
    ({"logit_bias": {"a": 1}}, openai.BadRequestError, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias", "invalid_value"),
    ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "logit_bias", "invalid_value"),
    ({"extra_body": {"top_k": -1}}, openai.BadRequestError, "top_k", "invalid_value"),
    ({"extra_body": {"min_p": 1.5}}, openai.BadRequestError, "min_p", "invalid_value"),
    ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty", "invalid_value"),
    ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "invalid_value"),
    ({"parallel_tool_calls": False}, openai.BadRequestError, "parallel_tool_calls", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, openai.BadRequestError, "reasoning_effort", "unsupported_parameter"),
    ({"store": True}, openai.BadRequestError, "store", "unsupported_parameter"),
    ({"extra_body": {"top_kk": 3}}, openai.BadRequestError, "top_kk", "unsupported_parameter"),
    ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value"),
    ({"stop": ["a"] * 5}, openai.BadRequestError, "stop", "invalid_value"),
    ({"stop": "x" * 5000}, openai.BadRequestError, "stop", "invalid_value"),
    ({"stop": ""}, openai.BadRequestError, "stop", "invalid_value"),
    ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user", "content": 7}]}, openai.BadRequestError, "messages.0.content", "invalid_value"),
    ({"max_tokens": 1024}, openai.BadRequestError, "messages", "context_length_exceeded"),
    ({"messages": said("mug " * 1200)}, openai.BadRequestError, "messages", "context_length_exceeded"),
    ({"messages": said("mug " * 4000)}, openai.BadRequestError, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(
    "fields, kind, param, code", BAD, ids=[f"{i}-{next(iter(case[0]))}" for i, case in enumerate(BAD)]
)
def test_what_is_not_served_is_named(client, fields, kind, param, code):
    with pytest.raises(kind) as error:
        client.chat.completions.create(**{"model": "base", "messages": said("a"), "max_tokens": 4, **fields})
    assert (error.value.param, error.value.code) == (param, code), error.value.body


def test_bad_prompts_are_named(client):
    for prompt in ([], ["a", "b"], [10**6], [[1], [2]]):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="base", prompt=prompt)
        assert error.value.param == "prompt"


STRANGE = [
    b"evil.example", b"evil.example:80", b"127.0.0.1.evil.example", b"", b"[::1].evil.example", b"[::1]evil.example:80",
    b"[::1]:80.evil.example", b"[::1%25lo]", b"[::1", b"::1", b"[localhost]", b"localhost@evil.example", b":8000",
    b"evil.example@localhost", b"localhost:80:80", b"localhost:x", b"localhost:70000", b"localhost..", b".localhost",
    b"localhost/", b"localhost#", b"localhost, evil.example", b"[::127.0.0.1]", b"2130706433",
]  # fmt: skip


def test_the_door(running):
    """Host, token, type and size; nothing of it reaches the model."""
    body = {"model": "base", "messages": said("a"), "max_tokens": 1}

    def status(path="/v1/chat/completions", content=None, **headers):
        sent = {b"Content-Type": b"application/json", **bearer(), **headers}
        raw = content or json.dumps(body)
        return httpx.post(running.url + path, content=raw, headers=sent, timeout=600).status_code

    assert status() == 200
    for host in STRANGE:
        assert status(Host=host) == 421, host
    for host in (f"localhost:{running.port}", "127.0.0.1", f"[::1]:{running.port}", "LocalHost.", "[0:0::1]", "[::1]:"):
        assert status(Host=host.encode()) == 200, host
    assert status(Authorization=b"Bearer wrong") == 401
    assert status(Authorization=b"") == 401
    assert httpx.get(running.url + "/v1/models").status_code == 401
    assert httpx.get(running.url + "/health").json()["status"] == "ok"
    assert status(**{"Content-Type": b"text/plain"}) == 415
    assert status(content=b"{" + b" " * 30_000) == 413
    assert status(content=(b" " * 1000 for _ in range(30))) == 413  # no Content-Length
    assert status(content=b"{") == 400
    assert status("/v1/embeddings") == 404


def test_a_wrong_token_is_an_authentication_error(running):
    with pytest.raises(openai.AuthenticationError) as error:
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert error.value.code == "invalid_api_key"


@pytest.fixture
def endless(monkeypatch):
    """Answers that go on until their most tokens."""
    monkeypatch.setattr(decoding, "end_tokens", lambda *_: [])


def open_stream(running, num_tokens, stream=True):
    """A raw client that asks for a long answer and reads as little as it can."""
    asked = {"model": "base", "prompt": LONG, "max_tokens": num_tokens, "temperature": 0, "stream": stream}
    body = json.dumps(asked).encode()
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    raw.settimeout(600)
    raw.connect(("127.0.0.1", running.port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    raw.sendall(head.encode() + b"Authorization: Bearer " + KEY.encode() + b"\r\n")
    raw.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return raw


def first_unfinished(engine):
    """The first request that is being answered; one whose answer is complete can still be in the engine's list."""
    found = []

    def look():
        found.extend(work for work in engine.active if work.answer and work.answer.finish_reason is None)
        return found

    until(look)
    return found[0]


def read_all(raw):
    parts = []
    while part := raw.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_a_slow_reader_holds_up_nobody_and_gets_it_all(running, client, engine, endless, monkeypatch):
    expected = client.completions.create(model="base", prompt=LONG, temperature=0, max_tokens=500).choices[0].text
    step, answered = Engine.advance, threading.Event()

    def stay_unfinished(engine, group):
        """The long answer waits near its end for the other one, however long that takes."""
        held = [w for w in group if w.answer and w.answer.num_tokens >= 400 and not answered.is_set()]
        return held + step(engine, [work for work in group if work not in held])

    monkeypatch.setattr(Engine, "advance", stay_unfinished)
    slow = open_stream(running, 500)
    work = first_unfinished(engine)
    assert ask(client, "base", QUESTIONS[1], max_tokens=4).usage.completion_tokens == 4
    assert work.answer.finish_reason is None  # it was still being answered
    answered.set()
    until(lambda: not engine.active)
    assert work.answer.finish_reason == "length"  # its place is free though nothing was read
    assert work.answer.context.cache.get_seq_length() == 0  # and so is its memory
    raw = read_all(slow).decode()
    slow.close()
    data = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in data) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(running, engine, endless, stream):
    raw = open_stream(running, 900, stream)
    work = first_unfinished(engine)
    raw.close()
    until(lambda: not engine.active)
    assert work.cancelled and work.answer.finish_reason is None and work.answer.num_tokens < 900


def test_a_reader_that_never_reads_is_let_go(running):
    """Behaviour of the guard alone: a send that never ends is given up after the client's time."""

    async def app(scope, receive, send):
        ended.append("begun")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except TimeoutError:
            ended.append("given up")
            raise

    async def receive():
        return told.pop() if told else await asyncio.Event().wait()

    async def send(_):
        await asyncio.Event().wait()

    ended, told = [], [{"type": "http.request", "body": b"", "more_body": False}]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    guard = Guard(app, ServeConfig(client_timeout_seconds=0.05))
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 30))
    assert ended == ["begun", "given up"]


def test_a_body_that_never_comes_is_given_up():
    async def receive():
        await asyncio.Event().wait()

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    guard = Guard(None, ServeConfig(client_timeout_seconds=0.05))
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 30))
    assert sent[0]["status"] == 408


def test_a_head_that_does_not_come_whole_is_given_up():
    """A client that says nothing, and one that goes on with its headers; one that sends a request in time is served."""
    config = ServeConfig(port=0, client_timeout_seconds=1)
    running = Running(
        make_server(
            load_model(BASE, compute_dtype=torch.float32, device="cpu"),
            {"base": Served(None, load_tokenizer(BASE))},
            config,
        )
    )

    def ask_health(client):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = b""
        while not reply.endswith(b"}"):
            reply += client.recv(4096)
        return b"200 OK" in reply

    try:
        served, silent, slow = (socket.create_connection(("127.0.0.1", running.port), 600) for _ in range(3))
        assert ask_health(served)
        end = time.monotonic() + 30
        with pytest.raises(OSError):  # nobody is there to read
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            while time.monotonic() < end:
                slow.sendall(b"x: y\r\n")
                time.sleep(0.05)
        assert silent.recv(1) == b""
        assert ask_health(served)
        for client in (served, silent, slow):
            client.close()
    finally:
        running.stop()


def alone_running(**fields):
    """A server of its own settings."""
    served = {"base": Served(None, load_tokenizer(BASE))}
    return Running(
        make_server(load_model(BASE, compute_dtype=torch.float32, device="cpu"), served, ServeConfig(port=0, **fields))
    )


HEADS = {
    "head": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx: ",
    "body": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 900\r\n\r\n{",
    "nothing": b"",
    "answered": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("part", list(HEADS))
def test_clients_that_send_a_part_keep_nobody_out(part):
    """More connections than the server has places, each with a part of a request, or an answered one, held open."""
    running = alone_running(max_num_seqs=2, max_queued=8, client_timeout_seconds=3600)  # frees no place in time
    places = running.server.config.limit_concurrency
    clients = []
    try:
        for _ in range(places + 8):
            clients.append(socket.create_connection(("127.0.0.1", running.port), 30))
            clients[-1].sendall(HEADS[part])
        for _ in range(3):
            assert httpx.get(f"{running.url}/health", timeout=600).status_code == 200
        until(lambda: len(running.server.server_state.connections) <= places // 2 + 1)
    finally:
        for client in clients:
            client.close()
        running.stop()


def test_the_connection_that_makes_room_is_of_the_peer_with_the_most():
    class Connection:
        def __init__(self, peer):
            self.peer, self.transport, self.gone = peer, self, False

        def abort(self):
            self.gone = True

    door, few, many = Door(4), Connection("few"), [Connection("many") for _ in range(4)]
    for each in (few, *many):
        door.wait(each)
    assert [each.gone for each in (few, *many)] == [False, True, False, False, False]
    door.leave(many[1])
    door.wait(many[0])
    assert list(door.waiting) == [few, *many[2:], many[0]]


def test_large_prompts_hold_up_no_small_one():
    """Six of a megabyte, of the characters that take longest; all are refused by their beginnings: in 10 s of CPU, of
    which other programs take none."""
    running = alone_running()
    large = {"model": "base", "messages": said("<|im_end|>" * 100_000)}
    small = {"model": "base", "messages": said("two mugs"), "max_tokens": 1}

    def ask_raw(body):
        return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=600).status_code

    try:
        assert ask_raw(small) == 200
        start = time.process_time()
        with ThreadPoolExecutor(6) as pool:
            sent = [pool.submit(ask_raw, large) for _ in range(6)]
            until(lambda: running.server.config.app.state.service.num_encoding == 6 or all(s.done() for s in sent))
            assert [ask_raw(small) for _ in range(5)] == [200] * 5
            assert {each.result() for each in sent} == {400}
        assert time.process_time() - start < 10
    finally:
        running.stop()


def test_a_prompt_waits_for_no_long_one_before_it_and_the_queue_ends(monkeypatch):
    """Behaviour of the two threads: while a long prompt is encoded, a short one is, and too many are turned away."""
    free, begun = threading.Event(), threading.Event()
    encode = Service.prompt
    service = Service(
        load_model(BASE, compute_dtype=torch.float32, device="cpu"),
        {"base": Served(None, load_tokenizer(BASE))},
        ServeConfig(),
    )

    def prompt(self, request, long=False):
        if not long:
            return encode(self, request)
        begun.set()
        assert free.wait(60)
        return [1], [None]

    monkeypatch.setattr(Service, "prompt", prompt)

    async def both(service):
        sizes = {True: 2000, False: 2}
        request = {n: ChatRequest(model="base", messages=[Message(**said("mugs " * sizes[n])[0])]) for n in sizes}
        waiting = [asyncio.create_task(service.encoded(request[True])) for _ in range(3)]
        await asyncio.to_thread(begun.wait, 60)
        assert await service.encoded(request[False])
        with pytest.raises(ApiError) as error:
            service.config = ServeConfig(max_num_seqs=1, max_queued=2)
            await service.encoded(request[False])
        assert error.value.status == 503 and error.value.headers == {"retry-after": "1"}
        free.set()
        return [await task for task in waiting]

    try:
        assert asyncio.run(both(service)) == [([1], [None])] * 3 and service.num_encoding == 0
    finally:
        free.set()
        service.close()


def test_a_model_s_prompts_are_of_its_own_tokenizer():
    """An adapter's, which may have added tokens and another template."""
    base, own = load_tokenizer(BASE), load_tokenizer(BASE)
    own.chat_template = "{{ messages[0]['content'] }}"
    service = Service(
        load_model(BASE, compute_dtype=torch.float32, device="cpu"),
        {"a": Served(None, base), "b": Served(None, own)},
        ServeConfig(),
    )
    try:
        found = [service.prompt(ChatRequest(model=name, messages=[Message(**said("mugs")[0])]))[0] for name in "ab"]
    finally:
        service.close()
    assert found == [prompt_ids(said("mugs"), tokenizer) for tokenizer in (base, own)] and found[0] != found[1]


def test_names_of_models_are_settled_before_anything_loads(tmp_path):
    (tmp_path / "lr=1e-4" / "adapter").mkdir(parents=True)
    folder = str(tmp_path / "lr=1e-4" / "adapter")
    assert name_models("org/id", [f"mine={folder}", folder]) == {"org/id": None, "mine": folder, "adapter": folder}
    with pytest.raises(UserError, match="'adapter' twice"):
        name_models(str(tmp_path), [folder, f"adapter={folder}"])


def test_an_address_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="must be this machine's and"):
        serve(None, BASE, {"base": None}, ServeConfig(port=taken.getsockname()[1]))


def test_a_proxy_s_name_is_known_in_any_case():
    guard = Guard(None, ServeConfig(allowed_hosts=["Mugs.Example"]))
    guard.check_headers({"method": "GET", "path": "/", "headers": [(b"host", b"mugs.example:443")]})


def test_an_address_for_others_needs_a_token():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="--api-key"):
            make_config(ServeConfig, {"host": host})
        assert make_config(ServeConfig, {"host": host, "api_key": "x"}).host == host
    for host in ("127.0.0.1", "::1", "localhost"):
        assert make_config(ServeConfig, {"host": host}).api_key is None


def test_serve_answers_and_ends_with_ctrl_c(adapter):
    command = [sys.executable, "-m", "onecard.cli", "serve", "--model", BASE, "--adapter", f"mine={adapter}"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert "serving  base, mine" in process.stdout.readline()
        url = process.stdout.readline().split()[1]
        assert "full answers and a full prefix cache (256MiB)" in process.stdout.readline()
        client = openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
        chunks = client.completions.create(model="mine", prompt=LONG, max_tokens=900, temperature=0, stream=True)
        next(iter(chunks))
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err, err
