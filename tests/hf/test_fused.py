"""Exact: which modules are replaced. No worse than plain: a replaced model beside the one it was."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import onecard
from onecard.hf.fused import FusedAttention, FusedGatedMLP, FusedLayer, FusedRMSNorm, unfuse, unfused
from onecard.hf.fusion import fuse
from onecard.kernels import elementwise
from onecard.memory.activations import fused_kinds
from tests.conftest import make_checkpoint


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


PARTS = (FusedRMSNorm, FusedGatedMLP, FusedAttention, FusedLayer)
KINDS = {  # of two layers
    "llama": (5, 2, 2, 2), "mistral": (5, 2, 2, 2), "qwen2": (5, 2, 2, 2), "qwen3": (9, 2, 2, 2), "phi3": (5, 0, 0, 0),
    "gemma2": (0, 2, 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
def test_families(tmp_path, family):
    model = onecard.load_model(str(make_checkpoint(tmp_path, family)))
    assert tuple(count(model, kind) for kind in PARTS) == KINDS[family]
    assert model.config._attn_implementation in ("sdpa", "eager")  # as before


def test_on_a_gpu_only_a_norm_can_be_too_wide():
    pytest.importorskip("triton", reason="Triton is not installed")
    with FakeTensorMode():
        wide, narrow = (torch.empty(size, device="cuda") for size in (28672, 16384))
        assert elementwise.supports(wide, wide)
        assert elementwise.supports_norm(narrow, narrow) and not elementwise.supports_norm(wide, wide)
    for hidden, norm in ((64, True), (28672, False)):
        config = LlamaConfig(hidden_size=hidden, intermediate_size=28672, num_hidden_layers=1, vocab_size=8)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert fused_kinds(model, "cuda") == (norm, True)
        assert fused_kinds(model, "cpu") == (True, True)


@pytest.mark.parametrize("family", KINDS)
def test_the_model_computes_the_same(tmp_path, family):
    """Two layers of the same float32 operations in another order: 64 roundings. With a window shorter than the text
    where the family has one, with two rows, and over a cache."""
    windows = {"mistral": 16, "gemma2": 16}
    settings = {"sliding_window": windows[family]} if family in windows else {}
    folder = make_checkpoint(tmp_path, family, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert tuple(count(fused, kind) for kind in PARTS) == KINDS[family]
    assert set(fused.state_dict()) == set(plain.state_dict())
    ids = torch.arange(80).view(2, 40)
    expected, found = plain(ids).logits, fused(ids).logits
    assert (found - expected).norm() <= 64 * 2**-24 * expected.norm()
    lengths = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(fused.generate(ids[:1], **lengths), plain.generate(ids[:1], **lengths))
    if family != "gemma2":  # eager by itself, as its caps need
        fused.set_attn_implementation("eager")
        assert (fused(ids).logits - expected).norm() <= 64 * 2**-24 * expected.norm()


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def build(family, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **settings}))


def test_another_attention_is_left_alone():
    class Halved(type(build("llama").model.layers[0].self_attn)):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
            cos, sin = position_embeddings
            return super().forward(hidden_states, (cos / 2, sin), attention_mask, **kwargs)

    model = build("llama")
    model.model.layers[0].self_attn.__class__ = Halved
    left = fuse(model)
    assert count(model, FusedAttention) == 0 and "Halved" in left
    assert count(model, FusedLayer) == 1  # whose own sums are Llama's


def test_arguments_of_a_newer_release_pass_through():
    """As transformers 5.24 did: the cache under another name, the interface's arguments handed to the cache, too."""
    own = type(build("llama").model.layers[0].self_attn)

    class Renamed(own):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, store=None, **kwargs):
            return super().forward(hidden_states, position_embeddings, attention_mask, store, **kwargs)

    class RenamedLayer(type(build("llama").model.layers[0])):
        def forward(self, hidden_states, **kwargs):
            cache = kwargs.pop("past_key_values", None) or kwargs.pop("cache", None)
            x = hidden_states
            x = x + self.self_attn(hidden_states=self.input_layernorm(x), store=cache, **kwargs)[0]
            return x + self.mlp(self.post_attention_layernorm(x))

    plain = build("llama", vocab_size=200).eval()
    layer = plain.model.layers[0]
    layer.__class__, layer.self_attn.__class__ = RenamedLayer, Renamed
    fused = copy.deepcopy(plain)
    assert "Renamed" not in fuse(fused) and count(fused, FusedAttention) == 1
    fused.requires_grad_(False)
    lengths = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = torch.arange(40)[None]
    assert torch.equal(fused.generate(ids, **lengths), plain.generate(ids, **lengths))


def test_the_fused_code_runs_while_it_is_compared(monkeypatch):
    """A model whose parameters learn is compared frozen: else its fused code would not run, and pass."""
    ran = []
    for form in PARTS:
        own = form.fused
        monkeypatch.setattr(
            form, "fused", lambda self, *args, own=own, form=form: (ran.append(form), own(self, *args))[1]
        )
    model = build("llama")
    assert fuse(model) == {}
    assert set(ran) == set(PARTS)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("form", PARTS)
def test_a_wrong_fused_form_is_not_taken(monkeypatch, form):
    own = form.fused

    def wrong(self, *args):
        y = own(self, *args)
        return (y[0] * 1.01, *y[1:]) if isinstance(y, tuple) else y * 1.01

    monkeypatch.setattr(form, "fused", wrong)
    model = build("llama")
    assert fuse(model)
    assert count(model, form) == 0


def test_a_wrong_gradient_is_not_taken(monkeypatch):
    own = FusedGatedMLP.fused
    monkeypatch.setattr(FusedGatedMLP, "fused", lambda self, x: own(self, x.detach() + 0.0 * x))
    model = build("llama")
    assert "gradient" in fuse(model)["LlamaMLP"]
    assert count(model, FusedGatedMLP) == 0


def test_unfused_and_unfuse():
    model = build("llama").requires_grad_(False)
    ids = torch.arange(20)[None]
    plain = model(ids).logits
    fuse(model)
    with unfused():
        assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(model(ids).logits, plain)  # another order of roundings
    unfuse(model)
    assert sum(count(model, form) for form in PARTS) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_layer_with_a_scaled_residual_is_left_alone(dtype, scale):
    """Also where the sum hides what is added to it, behind large embeddings."""
    for multiplier, number in ((1.0, 1), (0.22, 0)):
        model = build("granite", residual_multiplier=multiplier, embedding_multiplier=scale).to(dtype)
        left = fuse(model)
        assert count(model, FusedLayer) == number
        assert ("GraniteDecoderLayer" in left) == (number == 0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_are_the_same(tmp_path, family):
    """Of the layers' input, in float32 to 64 roundings; a second backward of another loss adds to it."""
    plain = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, family)).requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    found = []
    for model in (plain, fused):
        x = model.get_input_embeddings()(torch.arange(40).view(1, 40)).requires_grad_()
        out = model(inputs_embeds=x, output_hidden_states=True)
        (out.logits.square().mean() + out.hidden_states[1].sin().mean()).backward()
        found.append(x.grad)
    assert (found[1] - found[0]).norm() <= 64 * 2**-24 * found[0].norm()


def test_a_layer_that_is_told_otherwise_is_another_kind():
    """SmolLM3 turns no heads in every fourth layer."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 200, "pad_token_id": 0,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("smollm3", **sizes)).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert [isinstance(layer.self_attn, FusedAttention) for layer in fused.model.layers] == [True, True, True, False]
    ids = torch.arange(80).view(2, 40)
    assert (fused(ids).logits - plain(ids).logits).norm() <= 64 * 2**-24 * plain(ids).logits.norm()


def test_another_formula_is_left_alone(tmp_path):
    """Gemma's norm multiplies by 1 + weight."""
    model = onecard.load_model(str(make_checkpoint(tmp_path, "gemma2")))
    assert count(model, FusedRMSNorm) == 0
    plain = build("llama")
    plain.model.layers[0].mlp.act_fn = torch.nn.Sigmoid()
    fuse(plain)  # without SiLU the activation is the module's own
    assert count(plain, FusedGatedMLP) == 1 and plain.model.layers[0].mlp(torch.ones(1, 1, 64)).isfinite().all()


def test_a_lookalike_is_left_alone():
    class Shifted(type(build("llama").model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.01

    model = build("llama")
    model.model.layers[0].input_layernorm.__class__ = Shifted
    assert "Shifted" in fuse(model)
    assert (count(model, FusedRMSNorm), count(model, FusedLayer)) == (2, 0)


def test_a_norm_that_learns_gets_its_gradient():
    model = build("llama").requires_grad_(False)
    fuse(model)
    norm = model.model.norm
    assert isinstance(norm, FusedRMSNorm)
    norm.weight.requires_grad_()
    norm(torch.randn(4, 64)).sum().backward()
    assert norm.weight.grad is not None


def test_an_untested_release_names_what_stays_unfused(monkeypatch):
    monkeypatch.setattr("onecard.hf.fusion.is_tested", lambda: False)
    with pytest.warns(UserWarning, match="GraniteDecoderLayer: its output differs by"):
        fuse(build("granite", residual_multiplier=0.5))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_family_may_call_its_dropout_otherwise(rate):
    """As mllama does. In training, the fused attention hands on what the class hands on."""

    class Renamed(type(build("llama").model.layers[0].self_attn)):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
            self.attention_dropout = self.dropout
            try:
                return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
            finally:
                del self.attention_dropout

    model = build("llama", attention_dropout=rate, vocab_size=200)
    attention = model.model.layers[0].self_attn
    del attention.attention_dropout
    attention.dropout, attention.__class__ = rate, Renamed
    assert fuse(model) == {} and count(model, FusedAttention) == 1
    assert attention.train().settings()["dropout"] == rate
    assert attention.eval().settings()["dropout"] == 0.0


def test_what_a_module_does_in_training_alone_counts():
    class Dropped(type(build("llama").model.layers[0].mlp)):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = build("llama")
    model.model.layers[0].mlp.__class__ = Dropped
    before = torch.random.get_rng_state()
    assert "differs" in fuse(model)["Dropped"] and count(model, FusedGatedMLP) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.model.layers[0].mlp.training
