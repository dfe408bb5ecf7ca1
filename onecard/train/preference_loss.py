"""The losses on preferences, from the log-probabilities of whole answers.

With c and r the log-probabilities of the chosen and the rejected answer, each less the reference's, and b = beta:

    dpo, sigmoid    -log s(b (c - r))                                      arXiv 2305.18290, s is the sigmoid
    ipo             (c / tokens - r / tokens - 1 / (2 b))^2                arXiv 2310.12036, a mean over the tokens
    kto             w (1 - s(b (c - kl))) or w (1 - s(b (kl - r)))         arXiv 2402.01306, for one answer

orpo and simpo have no reference. Their c and r are means over an answer's tokens:

    orpo            nll - b log s(odds(c) - odds(r)),  odds(x) = x - log(1 - e^x)       arXiv 2403.07691
    simpo           -log s(b (c - r) - simpo_gamma) + cpo_alpha nll                     arXiv 2405.14734, 2401.08417

nll is the mean loss of the chosen tokens; of their prompts too for orpo, as in trl. The equations, their names and
their settings are those of trl's DPOTrainer, KTOTrainer, ORPOTrainer and CPOTrainer.

Shape suffix: E examples. All values are float64, as the difference of two sums over an answer loses digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from onecard.config import PreferenceSettings


def dpo_losses(config: PreferenceSettings, c_E: Tensor, r_E: Tensor, c_len_E: Tensor, r_len_E: Tensor) -> Tensor:
    """Return the losses of dpo and ipo, (E,).

    Args:
        c_E, r_E: log-probabilities less the reference's.
        c_len_E, r_len_E: tokens of the answers.
    """
    beta = config.beta
    if config.loss == "ipo":
        return (c_E / c_len_E - r_E / r_len_E - 1 / (2 * beta)) ** 2
    if config.loss_type == "sigmoid_norm":
        return -logsigmoid(beta * (c_E / c_len_E - r_E / r_len_E))
    return DPO_LOSSES[config.loss_type](beta * c_E, beta * r_E, config.label_smoothing)


def robust(c: Tensor, r: Tensor, smoothing: float) -> Tensor:
    clean, flipped = -logsigmoid(c - r), -logsigmoid(r - c)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def exo_pair(c: Tensor, r: Tensor, smoothing: float) -> Tensor:
    share = torch.tensor(smoothing, dtype=c.dtype, device=c.device)
    log_c, log_r = logsigmoid(c - r), logsigmoid(r - c)
    return log_c.exp() * (log_c - torch.log1p(-share)) + log_r.exp() * (log_r - share.log())


DPO_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {  # of beta c, beta r and label_smoothing
    "sigmoid": lambda c, r, smoothing: -logsigmoid(c - r),
    "hinge": lambda c, r, smoothing: relu(1 - (c - r)),
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": lambda c, r, smoothing: -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r),
    "bco_pair": lambda c, r, smoothing: -logsigmoid(c) - logsigmoid(-r),
    "apo_zero": lambda c, r, smoothing: 1 - c.sigmoid() + r.sigmoid(),
    "apo_down": lambda c, r, smoothing: c.sigmoid() + 1 - (c - r).sigmoid(),
}


def mean_losses(config: PreferenceSettings, c_E: Tensor, r_E: Tensor) -> Tensor:
    """Return the losses of orpo and simpo without their nll, (E,), from mean log-probabilities."""
    if config.loss == "orpo":
        return -config.beta * logsigmoid(c_E - r_E - (log_rest(c_E) - log_rest(r_E)))
    margin = config.beta * (c_E - r_E) - config.simpo_gamma
    return -logsigmoid(margin) * (1 - config.label_smoothing) - logsigmoid(-margin) * config.label_smoothing


def log_rest(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0."""
    return (-torch.expm1(x)).log()


def kto_losses(config: PreferenceSettings, ratio_E: Tensor, desirable_E: Tensor, kl: Tensor) -> Tensor:
    """Return kto's losses, (E,).

    Args:
        ratio_E: log-probabilities less the reference's.
        desirable_E: bool, each answer's label.
        kl: (), the estimate of the divergence from the reference, not below 0.
    """
    sign_E = torch.where(desirable_E, 1.0, -1.0).to(ratio_E)
    weight_E = torch.where(desirable_E, config.desirable_weight, config.undesirable_weight).to(ratio_E)
    return weight_E * (1 - torch.sigmoid(config.beta * sign_E * (ratio_E - kl)))
