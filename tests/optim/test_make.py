"""Exact: each optimizer makes the updates of its reference, and of its states the plan has the bytes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers.optimization import Adafactor

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.optim.make import make_optimizer, state_bytes
from onecard.optim.schedule import learning_rate

STEPS = 12
SHAPES = {"a.lora_A.weight": (4, 48), "a.lora_B.weight": (64, 4), "b.magnitude": (64,)}
BASE = {"model": "m", "data": "d", "output": "o", "learning_rate": 1e-2, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip


def config(**fields):
    return make_config(TrainConfig, {**BASE, **fields})


def make_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def steps(optimizer, weights, count=STEPS, settings=None, seed=1):
    """Steps with the same gradients each time; a schedule's rate if `settings` are given."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        for p in weights.values():
            p.grad = torch.randn(p.shape, generator=generator)
        if settings is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, count, settings) * group["lr_ratio"]
        optimizer.step()


def lion(ps):
    from lion_pytorch import Lion

    return [Lion(ps, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)]


def muon(ps):
    return [
        torch.optim.Muon(ps[:2], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(ps[2:], lr=1e-2, weight_decay=0.1, fused=True),
    ]


REFERENCES = {
    "adamw_torch": lambda ps: [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True)],
    "adamw_torch_fused": lambda ps: [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True)],
    "lion_32bit": lion,
    "lion": lion,
    "muon": muon,
    "sgd": lambda ps: [torch.optim.SGD(ps, lr=1e-2, weight_decay=0.1)],
    "adafactor": lambda ps: [Adafactor(ps, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)],
}


@pytest.mark.parametrize("name", REFERENCES)
def test_an_optimizer_is_its_reference(name):
    """To the bit. Lion's package takes its factors in another order: within a rounding or two of float32 a step."""
    mine, theirs = make_weights(), make_weights()
    steps(make_optimizer(mine, config(optim=name)), mine)
    references = REFERENCES[name](list(theirs.values()))

    class All:
        def step(self):
            for each in references:
                each.step()

    steps(All(), theirs)
    for key in mine:
        bound = STEPS * 2**-22 * theirs[key].abs().max() if name.startswith("lion") else 0
        assert (mine[key] - theirs[key]).abs().max() <= bound, key


@pytest.mark.parametrize("other", ["adamw_bnb_8bit", "adamw_8bit"])
def test_the_8_bit_names_are_one(other):
    sizes = dict(SHAPES)
    sizes["a.lora_A.weight"] = (64, 128)
    found = []
    for name in ("adamw_8bit", other):
        torch.manual_seed(0)
        weights = {key: nn.Parameter(torch.randn(shape)) for key, shape in sizes.items()}
        optimizer = make_optimizer(weights, config(optim=name))
        steps(optimizer, weights)
        assert "exp_avg_absmax" in optimizer.state[weights["a.lora_A.weight"]]
        found.append(weights)
    assert all(torch.equal(found[0][key], found[1][key]) for key in sizes)


def test_schedule_free_is_the_package_s_and_is_averaged_outside_training():
    """The warm-up of `constant` is the package's own."""
    from schedulefree import AdamWScheduleFree

    settings = config(optim="schedule_free_adamw", warmup_ratio=0.25)
    mine, theirs = make_weights(), make_weights()
    ours = make_optimizer(mine, settings)
    reference = AdamWScheduleFree(list(theirs.values()), lr=1e-2, weight_decay=0.1, warmup_steps=STEPS // 4)
    reference.train()
    steps(ours, mine, settings=settings)
    steps(reference, theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    before = {key: p.detach().clone() for key, p in mine.items()}
    reference.eval()
    with ours.averaged():
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert not any(torch.equal(mine[key], before[key]) for key in mine)
    assert all(torch.equal(mine[key], before[key]) for key in mine)
    ours.finish()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


NAMES = [*REFERENCES, "adamw", "adamw_8bit", "schedule_free_adamw"]


@pytest.mark.parametrize("name", NAMES)
def test_states_that_are_stored_and_restored_go_on_to_the_bit(name):
    straight, first, second = make_weights(), make_weights(), make_weights(9)
    settings = config(optim=name)
    steps(make_optimizer(straight, settings), straight, 5)
    one = make_optimizer(first, settings)
    steps(one, first, 3)
    stored = {key: {k: t.clone() for k, t in one.state_tensors(p).items()} for key, p in first.items()}
    assert all(isinstance(tensor, torch.Tensor) for states in stored.values() for tensor in states.values())
    two = make_optimizer(second, settings)
    for key, p in second.items():
        p.data.copy_(first[key])
        two.load_state(p, stored[key])
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        grads = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        if step >= 3:
            for key, p in second.items():
                p.grad = grads[key]
            two.step()
    assert all(torch.equal(straight[key], second[key]) for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_s_bytes_are_those_of_the_states(name):
    weights = {
        "a.lora_A.weight": nn.Parameter(torch.randn(64, 128)),
        "b.lora_B.weight": nn.Parameter(torch.ones(32, 8)),
    }
    optimizer = make_optimizer(weights, config(optim=name))
    for p in weights.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in weights.values():
        held = optimizer.state_tensors(p)
        found = sum(t.nbytes for key, t in held.items() if t.ndim and key != "trained")
        assert state_bytes(name, tuple(p.shape)) == found, held.keys()


def test_loraplus_has_peft_s_groups():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    lora = LoraConfig(r=2, target_modules=["0", "2"], lora_bias=True, modules_to_save=["1"])
    tuned = get_peft_model(model, lora)
    settings = config(loraplus_lr_ratio=16, weight_decay=0.0)
    theirs = create_loraplus_optimizer(tuned, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    trainable = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    ours = make_optimizer(trainable, settings)
    rates = [{p: g["lr"] for g in o.param_groups for p in g["params"]} for o in (ours, theirs)]
    assert rates[0] == rates[1] and set(rates[0].values()) == {1e-2, 16e-2}
    one = make_optimizer(trainable, config(loraplus_lr_ratio=16))  # with weight decay
    decayed = {p: group["weight_decay"] for group in one.param_groups for p in group["params"]}
    for name, p in trainable.items():
        assert decayed[p] == (0.0 if "lora_B" in name and name.endswith("bias") else 0.1), name


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"optim": "lion", "modules_to_save": ["lm_head"]}, "float32 masters"),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "cosine"}, "needs lr_scheduler_type constant"),
        ({"optim": "schedule_free_adamw", "adam_beta1": 0.0}, "adam_beta1 above 0"),
        ({"optim": "muon", "target_parameters": ["down_proj"]}, "in stacks"),
        ({"neftune_noise_alpha": 5, "loss": "dpo"}, "is for sft"),
        ({"optim": "adamax"}, "optim"),
    ],
)
def test_optimizers_that_do_not_fit(fields, said):
    with pytest.raises(UserError, match=said):
        config(**fields)
