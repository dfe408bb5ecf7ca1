"""No worse than plain: what generate, chat and serve compute is the model's own forward, whatever cache it wants."""

import pytest
import torch

import onecard
from onecard.config import CACHE_PROBE
from onecard.errors import UserError
from onecard.infer.decoding import CachedContext, OneByOne, Uncached
from onecard.infer.graphs import make_context
from tests.families.build import make_family

WAYS = {"llama": CachedContext, "mamba2": CachedContext, "mamba": OneByOne, "openai-gpt": Uncached, "rwkv": Uncached}
FLOAT32 = 1e-4  # sums in another order, of logits


def load(folder, family):
    return onecard.load_model(str(make_family(folder, family)), compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("family", list(WAYS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pieces_give_the_logits_of_the_whole(family, tmp_path):
    """A prompt, tokens one by one, another message, and an answer asked for again: as in a chat."""
    model = load(tmp_path, family)
    context = make_context(model)
    assert type(context) is WAYS[family]
    ids = torch.randint(5, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def check(found, end):
        assert (found[0] - whole[end - 1]).norm() <= FLOAT32 * whole[end - 1].norm(), end

    start = 0
    for end in (20, 21, 22, 30, 31):
        check(context.feed(ids[start:end]), end)
        start = end
    rest = context.rewind(ids[:25])
    check(context.feed(rest), 25)
    check(context.feed(ids[25:40]), 40)


def test_a_lost_context_is_not_taken_for_a_cache(tmp_path):
    """mamba passes an argument that it does not know by without a word: each token would see none before it."""
    model = load(tmp_path, "openai-gpt")
    ids = [token for piece in CACHE_PROBE for token in piece]
    lost, context = CachedContext(model), make_context(model)
    for piece in CACHE_PROBE:
        without, found = lost.feed(piece), context.feed(piece)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[:, -1]
    assert (without - expected).norm() > 0.1 * expected.norm()
    assert (found - expected).norm() <= FLOAT32 * expected.norm()


@pytest.mark.parametrize("family", ["xlnet", "prophetnet"])
def test_a_model_that_looks_ahead_does_not_generate(family, tmp_path):
    model = load(tmp_path, family)
    with pytest.raises(UserError, match="must predict each token from those before it"):
        make_context(model)
