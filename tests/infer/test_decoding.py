"""Exact: an answer's tokens and text, whatever the pieces of its prompt, its turns and the answers beside it."""

import asyncio
import json
import random
import threading
import time
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config import SamplingConfig, ServeConfig
from onecard.infer import decoding, graphs
from onecard.infer.decoding import Answer, CachedContext, Text
from onecard.infer.engine import Engine, GenerationRequest
from onecard.infer.generate import generate
from onecard.infer.graphs import FixedContext
from onecard.infer.protocol import CompletionRequest, parse
from onecard.infer.sampling import Sampler
from onecard.infer.server import Served, Service
from onecard.infer.server import answer as answer_request
from tests.conftest import make_checkpoint, make_tokenizer
from tests.data.chat.test_control import sentencepiece_like

GREEDY = SamplingConfig(temperature=0)
PROMPT = [5, 90, 17, 33, 210, 8, 64, 99, 120, 41, 7, 255, 18, 77, 140, 200, 31, 12, 66]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def loaded(request, tmp_path_factory):
    """mistral and gemma2 with a sliding window shorter than the prompt."""
    folder = tmp_path_factory.mktemp(request.param)
    fields = {"tie_word_embeddings": False, "max_position_embeddings": 4096}
    fields |= {} if request.param == "llama" else {"sliding_window": 8}
    return load(make_checkpoint(folder, request.param, **fields))


def tokens_of(answer):
    text = ""
    while answer.finish_reason is None:
        text += answer.advance()
    return answer.context.tokens + answer.rest, text


def expected_tokens(model, tokenizer, ids, count):
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    return out[0].tolist()


@pytest.mark.parametrize("prefill", [256, 7, 1])
def test_greedy_tokens_are_those_of_transformers(loaded, prefill, monkeypatch):
    """Whatever the pieces in which the prompt is fed: 19 tokens in one, three or nineteen passes."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", prefill)
    found, text = tokens_of(Answer(*loaded, PROMPT, 24, GREEDY))
    assert found == expected_tokens(*loaded, PROMPT, 24)
    assert text == loaded[1].decode(found[len(PROMPT) :], skip_special_tokens=True)


def test_settings_of_the_checkpoint_hold_where_nothing_is_asked_for(loaded):
    model, tokenizer = loaded
    plain = expected_tokens(model, tokenizer, PROMPT, 24)
    model.generation_config.repetition_penalty = 0.1
    try:
        found, _ = tokens_of(Answer(model, tokenizer, PROMPT, 24, GREEDY))
        assert found == expected_tokens(model, tokenizer, PROMPT, 24) != plain
    finally:
        model.generation_config.repetition_penalty = None
    model.generation_config.temperature = 1e-6
    try:
        request = parse(CompletionRequest, b'{"model": "m", "prompt": "a"}')
        assert tokens_of(Answer(model, tokenizer, PROMPT, 24, request.sampling()))[0] == plain  # all but greedy
    finally:
        model.generation_config.temperature = None


def test_the_next_turn_goes_on_with_the_cache(loaded):
    """Same tokens as afresh. A window that has let go of what is needed begins anew; a full cache does not."""
    model, tokenizer = loaded
    context = CachedContext(model)
    first, _ = tokens_of(Answer(model, tokenizer, PROMPT, 8, GREEDY, context))
    for turn in ([*first, 50, 51], [*first[:-3], 60, 61], first[:12]):
        again = Answer(model, tokenizer, turn, 8, GREEDY, context)
        full = model.config.model_type == "llama" or turn[:-2] == first
        assert len(again.rest) < len(turn) or not full
        assert tokens_of(again)[0] == tokens_of(Answer(model, tokenizer, turn, 8, GREEDY))[0]


def test_a_cache_of_fixed_length_gives_the_same(loaded, monkeypatch):
    """The same tokens over prompts in one piece and in several, over turns and as it grows; logits to rounding."""
    model, tokenizer = loaded
    monkeypatch.setattr(graphs, "MIN_BUFFER_TOKENS", 8)
    fixed, own = FixedContext(model, records=False), CachedContext(model)
    ids = PROMPT
    for more in ([50, 51], [60], []):
        a, b = (context.feed(context.rewind(ids)) for context in (fixed, own))
        assert (a - b).norm() <= 1e-5 * b.norm()
        found, _ = tokens_of(Answer(model, tokenizer, ids, 8, GREEDY, fixed))
        assert found == tokens_of(Answer(model, tokenizer, ids, 8, GREEDY))[0]
        ids = [*found[:-2], *more]
    assert fixed.buffers is not None and fixed.buffers.length >= len(fixed.tokens) > 8


def test_a_model_with_other_logits_over_the_fixed_cache_goes_without(loaded, monkeypatch):
    model, logits = loaded[0], graphs.Buffers.logits
    assert graphs.gives_the_same(model)
    monkeypatch.setattr(graphs.Buffers, "logits", lambda self, ids, at, num_keys: logits(self, ids, 2 * at))
    assert not graphs.gives_the_same(model)


def test_a_seed_gives_the_same_tokens_and_another_seed_others(loaded):
    runs = [tokens_of(Answer(*loaded, PROMPT, 24, SamplingConfig(temperature=1, seed=seed)))[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_tokens_are_drawn_as_often_as_the_distribution_says(loaded):
    """Statistical: 4,000 draws, each count within 5 sigma of a binomial's; top_p leaves the third token out."""
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    for top_p, p in ((1.0, [0.5, 0.3, 0.2]), (0.7, [0.625, 0.375, 0.0])):
        sampler = Sampler(loaded[0], SamplingConfig(temperature=1, top_p=top_p, seed=0))
        drawn = [sampler.pick([0], probabilities.log()) for _ in range(4000)]
        for token, share in enumerate(p):
            assert abs(drawn.count(token) - 4000 * share) <= 5 * (4000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("make", [make_tokenizer, lambda: sentencepiece_like()])
def test_text_grows_by_whole_characters_to_the_whole_text(make):
    tokenizer = make()
    words = " two mugs, é 漢字 🦊🦊\n  the fox "
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    ids = [*ids[:4], tokenizer.eos_token_id, *ids[4:]]
    text = Text(tokenizer)
    pieces = [text.push(token) for token in ids]
    assert "".join(pieces) + text.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 10


@pytest.mark.parametrize("make", [make_tokenizer, lambda: sentencepiece_like()])
def test_a_completion_keeps_the_space_after_its_prompt(make, tmp_path, monkeypatch):
    """As the whole text has it; a chat's answer is a text of its own. The model is made to say the rest of it."""
    model, tokenizer = load(make_checkpoint(tmp_path, vocab_size=700))[0], make()
    whole = tokenizer("two mugs and the fox", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("two mugs", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(Sampler, "pick", lambda _, tokens, logits: whole[len(tokens)])
    assert generate(model, tokenizer, prompt, len(whole) - len(prompt), goes_on=True) == " and the fox"
    service = Service(model, {"m": Served(None, tokenizer)}, ServeConfig())
    try:
        asked = {"model": "m", "max_tokens": len(whole) - len(prompt)}
        answer = asyncio.run(answer_request(service, CompletionRequest(**asked, prompt=prompt)))
    finally:
        service.close()
    assert json.loads(answer.body)["choices"][0]["text"] == " and the fox"
    alone = generate(model, tokenizer, prompt, len(whole) - len(prompt))
    assert alone == tokenizer.decode(whole[len(prompt) :])


def test_stop_strings_end_the_text_before_them_and_are_never_shown_in_part():
    tokenizer = make_tokenizer()
    ids = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    text = Text(tokenizer, ("wn f", "own", "zzz"))
    shown = []
    for token in ids:
        shown.append(text.push(token))
        if text.stopped:
            break
    assert text.stopped and "".join(shown) == "the quick br"
    held = Text(tokenizer, ("fox!",))
    assert "".join(held.push(token) for token in ids) == "the quick brown " and held.finish() == "fox"


def released_by_search(stops, pieces):
    """What each piece shows by the definition: every prefix of every stop is looked for at the end."""
    held, shown = "", []
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            return [*shown, held[: min(found)]], True
        keep = max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        shown.append(held[: len(held) - keep])
        held = held[len(held) - keep :]
    return shown, False


def test_what_a_stop_holds_back_is_what_a_search_for_every_prefix_finds():
    """Of two letters, so that stops overlap themselves and each other in every way."""
    rng, stopped = random.Random(0), 0

    def word(most):
        return "".join(rng.choice("ab") for _ in range(rng.randint(1, most)))

    for _ in range(2000):
        stops, pieces = tuple(word(9) for _ in range(rng.randint(1, 4))), [word(4) for _ in range(12)]
        expected, stops_there = released_by_search(stops, pieces)
        text, shown = Text(make_tokenizer_once(), stops), []
        for piece in pieces:
            shown.append(text.release(piece, last=False))
            if text.stopped:
                break
        assert (shown, text.stopped) == (expected, stops_there), (stops, pieces)
        stopped += text.stopped
    assert 200 < stopped < 1900


@cache
def make_tokenizer_once():
    return make_tokenizer()


def test_a_stop_s_length_costs_nothing():
    """A million characters of which the text never comes to the end, and a text that is all their beginning."""
    tokenizer = make_tokenizer_once()
    start = time.process_time()
    text = Text(tokenizer, tuple(letter * 1_000_000 for letter in "xyzw"))
    assert "".join(text.release("x" * 3, last=False) for _ in range(1000)) == ""
    assert text.release("!", last=False) == "x" * 3000 + "!"
    assert time.process_time() - start < 1


def test_a_temperature_near_zero_is_the_likeliest_token(loaded):
    """Also those that are 0 in float32, and where the first two logits are next to each other."""
    logits = torch.tensor([[1.0, 80.0, 79.99999, -3e38]])
    for temperature in (1e-300, 1e-45, 1e-38, 1e-20, 1e-9):
        sampler = Sampler(loaded[0], SamplingConfig(temperature=temperature, seed=0))
        assert {sampler.pick([0], logits) for _ in range(20)} == {1}, temperature
    drawn = [Sampler(loaded[0], SamplingConfig(temperature=1e-5, seed=i)).pick([0], logits) for i in range(40)]
    assert {1, 2} == set(drawn)


class Gathered:
    """What one Work emits, and a way to wait for its end."""

    def __init__(self, tokenizer, ids, count, sampling=GREEDY, adapter=None):
        self.pieces, self.ended = [], threading.Event()
        self.work = GenerationRequest(ids, count, sampling, adapter, tokenizer, self.emit)

    def emit(self, piece):
        self.pieces.append(piece)
        if piece.finish_reason or piece.error:
            self.ended.set()

    @property
    def text(self):
        assert self.ended.wait(60) and not self.pieces[-1].error, self.pieces[-1]
        return "".join(piece.text for piece in self.pieces)


def test_answers_side_by_side_are_those_alone_and_a_bad_one_hurts_no_other(loaded):
    model, tokenizer = loaded
    samplings = [SamplingConfig(temperature=i % 2, seed=i) for i in range(8)]
    prompts = [PROMPT[i:] for i in range(8)]
    alone = [
        tokens_of(Answer(model, tokenizer, ids, 12 + i, s))[1] for i, (ids, s) in enumerate(zip(prompts, samplings))
    ]
    engine = Engine(model, max_active=5, max_queued=20)
    try:
        works = [Gathered(tokenizer, ids, 12 + i, s) for i, (ids, s) in enumerate(zip(prompts, samplings))]
        bad = Gathered(tokenizer, [10**9], 5)
        for work in (bad, *works):
            assert engine.submit(work.work)
        assert [work.text for work in works] == alone
        assert bad.ended.wait(60) and "IndexError" in bad.pieces[-1].error
    finally:
        engine.close()
    assert not engine.thread.is_alive()


def test_every_request_gets_a_token_in_turn(loaded):
    """Behaviour: of answers that began together none is ever more than a token ahead."""
    (model, tokenizer), order = loaded, []
    engine = Engine(model, max_active=4, max_queued=20)
    try:
        works = [Gathered(tokenizer, PROMPT[:5], 20) for _ in range(3)]
        for i, each in enumerate(works):
            each.work.emit = lambda piece, i=i, emit=each.work.emit: (order.append((i, piece.num_tokens)), emit(piece))
        with engine.changed:  # all are there before the first round
            engine.waiting.extend(each.work for each in works)
            engine.changed.notify()
        assert len({each.text for each in works}) == 1
    finally:
        engine.close()
    assert [n for _, n in order] == sorted(n for _, n in order)


def test_cancelled_work_leaves_and_a_full_queue_turns_away(loaded):
    model, tokenizer = loaded
    engine = Engine(model, max_active=1, max_queued=1)
    try:
        first, second, third = (Gathered(tokenizer, PROMPT, count) for count in (4000, 3, 3))
        started = threading.Event()
        first.work.emit = lambda piece: started.set()
        assert engine.submit(first.work) and started.wait(60)
        assert engine.submit(second.work) and not engine.submit(third.work)
        first.work.cancelled = True
        assert second.text and first.work.answer.finish_reason is None
    finally:
        engine.close()
    assert not engine.submit(third.work)


def test_a_burst_fills_the_free_places_and_the_queue(loaded):
    model, tokenizer = loaded
    engine = Engine(model, max_active=3, max_queued=1)
    try:
        works = [Gathered(tokenizer, PROMPT, 3) for _ in range(5)]
        with engine.changed:  # the engine gets to none of them before all are there
            assert [engine.submit(each.work) for each in works] == [True] * 4 + [False]
        assert all(each.text for each in works[:4])
    finally:
        engine.close()
