"""Exact: in float32, answers that share forward passes, and prompts that share a prefix, are those of each alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config import SamplingConfig
from onecard.infer import engine as engines
from onecard.infer import graphs, together
from onecard.infer.decoding import Answer, CachedContext
from onecard.infer.engine import Engine
from onecard.infer.graphs import FixedContext
from onecard.infer.prefix import PrefixCache
from onecard.infer.together import feed_together, takes_together
from tests.conftest import make_checkpoint
from tests.infer.test_decoding import Gathered

PROMPTS = [[5, 90, 17, 33, 210, 8, 64, 99, 120, 41, 7, 255, 18, 77, 140][i:] for i in range(6)]
SAMPLINGS = [SamplingConfig(temperature=i % 2, seed=i, frequency_penalty=i / 4) for i in range(6)]
CASES = {"llama": {}, "mistral": {"sliding_window": 8}, "gemma2": {"sliding_window": 8}, "qwen3_moe": {}}


@pytest.fixture(scope="module", params=list(CASES))
def loaded(request, tmp_path_factory):
    """mistral and gemma2 with a window shorter than the prompts; gemma2 with a softcap; qwen3_moe with experts."""
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **CASES[request.param])
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answer_alone(loaded, ids, count, sampling):
    answer, text = Answer(*loaded, ids, count, sampling), ""
    while answer.finish_reason is None:
        text += answer.advance()
    return text


def serve_all(loaded, **settings):
    """Answers of lengths that differ, so that they leave one by one; there are fewer places than requests, so that
    others join."""
    engine = Engine(loaded[0], 4, 20, **settings)
    try:
        asked = [Gathered(loaded[1], ids, 6 + 3 * i, s) for i, (ids, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
        assert engine.submit(*(each.work for each in asked))
        return [each.text for each in asked], engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def alone(loaded):
    return [answer_alone(loaded, ids, 6 + 3 * i, s) for i, (ids, s) in enumerate(zip(PROMPTS, SAMPLINGS))]


@pytest.mark.parametrize("fixed", [False, True])
def test_answers_that_share_passes_are_those_alone(loaded, alone, fixed, monkeypatch):
    """With transformers' cache, and with buffers of fixed length, which grow on the way."""
    sizes = []

    def counted(model, contexts, tokens):
        sizes.append(len(tokens))
        return feed_together(model, contexts, tokens)

    monkeypatch.setattr(engines, "feed_together", counted)
    monkeypatch.setattr(graphs, "MIN_BUFFER_TOKENS", 8)
    if fixed:
        monkeypatch.setattr(engines, "make_context", lambda model: FixedContext(model, records=False))
    found, engine = serve_all(loaded)
    assert found == alone and len(set(alone)) == 6
    assert max(sizes) == 4 and engine.batch_size > 0


def test_a_shared_pass_that_fails_costs_no_answer(loaded, alone, monkeypatch):
    """It fails after a layer's keys were appended: its answers begin anew, in smaller passes."""
    passes = []

    def failing(model, contexts, tokens):
        passes.append(len(tokens))
        if len(tokens) > 2:
            keys, values = contexts[0].cache.layers[0].keys, contexts[0].cache.layers[0].values
            contexts[0].append(0, keys[:, :, :1], values[:, :, :1])
            raise torch.OutOfMemoryError("no memory")
        return feed_together(model, contexts, tokens)

    monkeypatch.setattr(engines, "feed_together", failing)
    found, engine = serve_all(loaded)
    assert found == alone
    assert max(passes) > 2 and engine.most_together in (1, 2)


def test_a_model_with_other_logits_answers_one_by_one(loaded, alone, monkeypatch):
    model = loaded[0]
    monkeypatch.setattr(together, "_takes", {})
    right = together.feed_together
    monkeypatch.setattr(together, "feed_together", lambda model, contexts, tokens: right(model, contexts, tokens[::-1]))
    monkeypatch.setattr(engines, "feed_together", lambda *_: pytest.fail("in a shared pass"))
    assert not takes_together(model)
    assert serve_all(loaded)[0] == alone


def test_a_prefix_is_computed_once_and_gives_the_same(loaded, alone):
    """Of full attention; a window has dropped what a shorter prefix needs, so its models keep none."""
    keeps = loaded[0].config.model_type in ("llama", "qwen3_moe")
    engine = Engine(loaded[0], 1, 20, 1 << 20)
    try:
        for i, (ids, sampling) in enumerate(zip([PROMPTS[0]] * 2 + [[*PROMPTS[0][:11], 9, 9]], SAMPLINGS)):
            asked = Gathered(loaded[1], ids, 8, sampling)
            engine.submit(asked.work)
            assert asked.text == answer_alone(loaded, ids, 8, sampling)
            assert asked.pieces[-1].num_cached == (keeps and i > 0) * (11 if i == 2 else len(PROMPTS[0]) - 1)
    finally:
        engine.close()


def test_prefixes_are_of_one_adapter_and_the_oldest_are_dropped(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, "llama")).eval()

    def fed(ids):
        context = CachedContext(model)
        context.feed(ids)
        return context

    first, second = fed(list(range(5, 25))), fed(list(range(40, 60)))
    one = sum(x.nbytes for pair in first.prefix() for x in pair)
    prefixes = PrefixCache(2 * one)
    prefixes.keep(first, "a")
    assert prefixes.fill(CachedContext(model), "b", [*range(5, 25), 9]) == 0
    context = CachedContext(model)
    assert prefixes.fill(context, "a", [*range(5, 25), 9]) == 20 and context.tokens == first.tokens
    assert torch.equal(context.feed([9]), fed([*range(5, 25)]).feed([9]))
    prefixes.keep(context, "a")  # one longer: the shorter one is a part of it
    assert [entry.tokens for entry in prefixes.entries] == [[*range(5, 25), 9]]
    prefixes.keep(second, "a")
    assert [entry.tokens for entry in prefixes.entries] == [second.tokens]  # 41 tokens are more than there is room for
    for size in (0, one // 2):
        small = PrefixCache(size)
        small.keep(first, None)
        assert not small.entries
