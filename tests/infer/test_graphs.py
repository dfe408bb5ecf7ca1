"""On a GPU. The same tokens from graphs as from the layers, with and without an adapter."""

import pytest
import torch
from peft import get_peft_model

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings, SamplingConfig
from onecard.infer.decoding import Answer, CachedContext
from onecard.infer.graphs import FixedContext, make_context
from tests.conftest import make_checkpoint, make_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPT = [5, 90, 17, 33, 210, 8, 64, 99, 120, 41]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_graphs_give_the_tokens_of_the_layers(family, tmp_path):
    folder = make_checkpoint(tmp_path, family, max_position_embeddings=4096)
    base = onecard.load_model(str(folder), compute_dtype="float32", device="cuda")
    model = get_peft_model(base, lora_config(LoraSettings(r=4), base)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=2.0, generator=torch.Generator("cuda").manual_seed(0))
    base.set_attn_implementation("eager")  # older transformers' sdpa does without gemma2's softcap
    tokenizer, greedy = make_tokenizer(), SamplingConfig(temperature=0)
    context = make_context(model)
    assert isinstance(context, FixedContext)

    def tokens(context):
        answer = Answer(model, tokenizer, PROMPT, 24, greedy, context)
        answer.ends = []
        while answer.finish_reason is None:
            answer.advance()
        return answer.context.tokens

    tuned = tokens(context)
    assert len(context.buffers.graphs) == 1
    assert tuned == tokens(CachedContext(model))
    context.tokens = []  # whose keys were the adapter's
    with model.disable_adapter():
        assert tokens(context) == tokens(CachedContext(model)) != tuned
    assert len(context.buffers.graphs) == 2
    context.tokens = []
    assert tokens(context) == tuned
