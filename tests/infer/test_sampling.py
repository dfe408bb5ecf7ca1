"""Exact: logits are shaped as transformers' generate and OpenAI's formulas say, and logprobs are the model's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config import SamplingConfig
from onecard.infer.decoding import Answer
from onecard.infer.sampling import Sampler
from tests.conftest import make_checkpoint

PROMPT = [5, 90, 17, 33, 210, 8, 64, 99, 120, 41, 7, 255, 18]
PROBABILITIES = torch.tensor([[0.5, 0.3, 0.14, 0.06]])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("m"), "llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answered(loaded, sampling, num_tokens=24, **more):
    answer, text = Answer(*loaded, PROMPT, num_tokens, sampling, **more), ""
    while answer.finish_reason is None:
        text += answer.advance()
    return answer, text


def greedy_of_transformers(loaded, **fields):
    ids = torch.tensor([PROMPT])
    end = loaded[1].eos_token_id
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": end}
    return loaded[0].generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how, **fields)[0].tolist()


def test_penalty_and_bias_are_those_of_transformers(loaded):
    plain = greedy_of_transformers(loaded)
    cases = (
        (SamplingConfig(repetition_penalty=0.2), {"repetition_penalty": 0.2}),
        (
            SamplingConfig(logit_bias={plain[15]: -100.0, 9: 0.5}),
            {"sequence_bias": [[[plain[15]], -100.0], [[9], 0.5]]},
        ),
    )
    for sampling, fields in cases:
        answer, _ = answered(loaded, sampling)
        assert answer.context.tokens + answer.rest == greedy_of_transformers(loaded, **fields) != plain


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({}, 4),
        ({"top_k": 2}, 2),
        ({"top_k": 0}, 4),
        ({"min_p": 0.25}, 3),
        ({"min_p": 0.2, "top_k": 2}, 2),
        ({"top_p": 0.7}, 2),
    ],
)
def test_what_is_drawn_is_among_the_kept_tokens(loaded, fields, kept):
    sampler = Sampler(loaded[0], SamplingConfig(temperature=1, seed=0, **fields))
    assert {sampler.pick([0], PROBABILITIES.log()) for _ in range(400)} == set(range(kept))


def test_counts_are_of_the_answer_alone(loaded):
    """logit - count * frequency - (count > 0) * presence, of tokens after the prompt; the formula by hand."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    sampler = Sampler(loaded[0], SamplingConfig(frequency_penalty=0.75, presence_penalty=1.0), num_prompt_tokens=3)
    (shape,) = sampler.shape
    found = shape(torch.tensor([[1, 1, 1, 0, 0, 2]]), logits)
    assert torch.equal(found, torch.tensor([[4 - 1.5 - 1.0, 3.0, 2 - 0.75 - 1.0, 1.0]]))
    assert sampler.pick([1, 1, 1, 0, 0, 2], logits) == 1


def whole(tokenizer):
    """A bias against control tokens and parts of characters."""
    parts = [token for token in range(304) if "\ufffd" in tokenizer.decode([token])]
    return {token: -100.0 for token in (*parts, *tokenizer.all_special_ids)}


def test_logprobs_are_those_of_one_pass_over_all_tokens(loaded):
    """Whatever shapes the draw. The bound: float32 logits of one pass and of a cache differ by rounding."""
    sampling = SamplingConfig(temperature=1.3, seed=5, top_k=40, frequency_penalty=1.0, logit_bias=whole(loaded[1]))
    answer, text = answered(loaded, sampling, num_logprobs=3)
    tokens = answer.context.tokens + answer.rest
    with torch.no_grad():
        expected = loaded[0](torch.tensor([tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert len(answer.logprobs) == answer.num_tokens == len(expected)
    for found, token, row in zip(answer.logprobs, tokens[len(PROMPT) :], expected):
        assert found.drawn.token == token and abs(found.drawn.logprob - float(row[token])) < 1e-4
        assert [each.token for each in found.likeliest] == row.topk(3).indices.tolist()
    spelled = [each.drawn.text for each in answer.logprobs]
    assert "".join(spelled) == text
    assert [each.start for each in answer.logprobs] == [len("".join(spelled[:i])) for i in range(len(spelled))]


def test_tokens_of_a_stop_string_have_no_logprobs(loaded):
    how = {"temperature": 1, "seed": 5, "logit_bias": whole(loaded[1])}
    _, text = answered(loaded, SamplingConfig(**how))
    stop = text[6:9]
    answer, cut = answered(loaded, SamplingConfig(stop=(stop,), **how), num_logprobs=0)
    assert cut == text[: text.find(stop)] and len(cut) > 3
    assert all(each.start < len(cut) for each in answer.logprobs) and len(answer.logprobs) < answer.num_tokens
