"""Exact: each schedule's rates are those of transformers' scheduler; three have our warm-up, and their rates stay."""

from math import ceil, cos, pi

import pytest
import torch
from transformers.optimization import get_scheduler

from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from onecard.optim.schedule import learning_rate

BASE = {"model": "m", "data": "d", "output": "o", "learning_rate": 3e-4}
THEIRS = [
    ("constant_with_warmup", {}),
    ("cosine_with_min_lr", {"min_lr": 3e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 12}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 9, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "cosine", "decay_type": "linear"}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("polynomial", {"lr_end": 1e-5, "power": 2}),
    ("polynomial", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
]  # fmt: skip


def config(**fields):
    return make_config(TrainConfig, {**BASE, **fields})


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize("warmup", [0, 7, 40])
@pytest.mark.parametrize("name, kwargs", THEIRS, ids=str)
def test_a_schedule_is_transformers_own(name, kwargs, warmup):
    if name == "warmup_stable_decay" and warmup == 40:
        pytest.skip("its phases must fit in the run")
    steps, settings = 40, config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    scheduler = get_scheduler(name, optimizer, warmup, steps, kwargs)
    for step in range(steps):
        assert learning_rate(step, steps, settings) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        if step + 1 < steps:  # polynomial's cannot step past a warm-up of the whole run
            scheduler.step()


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_first_three_are_what_they_were(name):
    settings, steps = config(lr_scheduler_type=name, warmup_ratio=0.1), 53
    warmup = ceil(0.1 * steps)
    for step in range(steps):
        done = (step - warmup) / (steps - warmup)
        after = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[name]
        expected = 3e-4 * (step + 1) / warmup if step < warmup else 3e-4 * after
        assert learning_rate(step, steps, settings) == expected


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_behind_the_warmup_they_are_transformers(name):
    """The formulas differ in the order of a few roundings of float64."""
    settings, steps, warmup = config(lr_scheduler_type=name, warmup_steps=5), 30, 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    factor = get_scheduler(name, optimizer, warmup, steps).lr_lambdas[0]
    for step in range(warmup, steps):
        assert abs(learning_rate(step, steps, settings) - 3e-4 * factor(step)) <= 8 * 2**-53 * 3e-4


def test_warmup_steps_and_their_share_are_one_setting():
    by_steps, by_ratio = config(warmup_steps=5), config(warmup_ratio=0.1)
    assert [learning_rate(i, 50, by_steps) for i in range(50)] == [learning_rate(i, 50, by_ratio) for i in range(50)]
    assert learning_rate(0, 50, config(warmup_steps=0)) == 3e-4


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "not both"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "must hold min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0}}, "one of"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "must hold num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"min_lr": 1e-5}}, "no min_lr"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}}, "must be a number"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 2.5}}, "must be a whole number"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(fields, said):
    with pytest.raises(UserError, match=said):
        config(**fields)


@pytest.mark.parametrize(
    "name, kwargs, said",
    [
        ("warmup_stable_decay", {"num_decay_steps": 41}, "41 updates of warm-up"),
        ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "exp"}, "Unknown decay type"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
    ],
)
def test_settings_that_a_schedule_refuses(name, kwargs, said):
    with pytest.raises(UserError, match=said):
        learning_rate(0, 40, config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=0))
