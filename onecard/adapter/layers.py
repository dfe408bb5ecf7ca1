"""The LoRA layers that peft puts around a Linear4bit and around an Experts4bit's stacked weights.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start from parts of W itself, B0 A0, and train over W - s B0 A0.
Here W is in 4 bits and stays as it is. The start is frozen beside the adapter, and the layer computes

    y = W x + s (B A - B0 A0) x = W x + s [B, -B0] [A; A0] x

which is a plain LoRA of rank 2 r over W. It is saved as such, so that merge, exports and peft need not know of it.

`lora_config` registers them as LoraConfig's custom modules. Plain LoRA on a linear runs as one fused operator. DoRA and
the other variants, several active adapters and mixed batches use peft's own forward around Linear4bit. Adapters are
saved in peft's own format in both cases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from onecard.config import LoraSettings
from onecard.errors import UserError
from onecard.hf.head import is_headed
from onecard.kernels import ops
from onecard.kernels.reference import Lora
from onecard.nn.experts import Experts4bit, Factors
from onecard.nn.grid import Grid, merged_linear
from onecard.nn.linear import Linear4bit
from onecard.nn.linears import beside_text, read_directly
from onecard.quant.state import PackedWeight


class LoraLinear4bit(PeftLinear):
    """y = W x + s B A dropout(x) over a frozen 4-bit W; A and B are float32, cast for the products.

    Attributes:
        starts: A0 and -B0 of the adapters that started from W.
        grid: of the file that is trained for; None: the weight is not rounded.
        beside: the layers whose merged weights share a scale in that file, this one among them.
    """

    starts: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012  # peft makes the start before __init__ ends
    grid: Grid | None = None
    beside: tuple[LoraLinear4bit, ...] = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.plain_adapter()
        if name is None or args or kwargs:
            assert self.disable_adapters or not self.starts, "an adapter with a frozen start computes alone"
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        x_in = x.to(base.compute_dtype or x.dtype)
        dropout = self.lora_dropout[name]
        adapter_B: Any = self.lora_B[name]
        active = self.training and not isinstance(dropout, nn.Identity)
        if self.grid is not None:
            peak = max((self.grid.peak(*other.parts(name)) for other in self.beside), default=0.0)
            weight, lora = self.parts(name)
            y = merged_linear(x_in, weight, base.bias, lora, self.grid, peak)
        else:
            packed, state = base.stored()
            lora, dropped = self.factors(name), dropout(x_in) if active else None
            y = ops.qlora_linear(x_in, packed, state, base.bias, *lora, self.scaling[name], dropped)
        if adapter_B.bias is not None:
            y = y + (self.scaling[name] * adapter_B.bias).to(y.dtype)
        return y.to(x.dtype)

    def plain_adapter(self) -> str | None:
        """Return the name of the one active plain LoRA adapter; None if peft's own forward is needed."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant:
            return None
        return names[0]

    def parts(self, name: str) -> tuple[PackedWeight, Lora]:
        """Return the frozen weight, and what is added to it."""
        base: Any = self.get_base_layer()
        return PackedWeight.of(*base.stored()), Lora(*self.factors(name), self.scaling[name])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the A and B that are added to W: the adapter's, with its frozen start if it has one."""
        adapter_A: Any = self.lora_A[name]
        adapter_B: Any = self.lora_B[name]
        A, B = adapter_A.weight, adapter_B.weight
        if name not in self.starts:
            return A, B
        A0, minus_B0 = self.starts[name]
        return torch.cat([A, A0]), torch.cat([B, minus_B0], dim=1)

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        with self.base_in_float32():
            super().pissa_init(adapter_name, init_lora_weights)
        self.keep_start(adapter_name)

    def olora_init(self, adapter_name: str) -> None:
        with self.base_in_float32():
            super().olora_init(adapter_name)
        self.keep_start(adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        with self.base_in_float32(device="meta"):  # peft reads its dtype
            super().orthogonal_init(adapter_name)

    @contextmanager
    def base_in_float32(self, device: str | None = None) -> Iterator[None]:
        """Put a linear of the dequantized weight, which peft changes, in the base's place. On "meta" it is empty."""
        base: Any = self.base_layer
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        if device is None:
            dense.weight = nn.Parameter(base.dequantize().float(), requires_grad=False)
        self.base_layer = dense
        try:
            yield
        finally:
            self.base_layer = base

    def keep_start(self, name: str) -> None:
        A, B = self.factors(name)
        self.starts = {**self.starts, name: (A.detach().clone(), -B.detach())}

    def rests_on_weight(self, *args: Any, **kwargs: Any) -> None:
        must, found = "an adapter's start must leave a 4-bit base as it is", "one that is made from its 16-bit weights"
        raise UserError(must, found, "use gaussian, orthogonal, pissa or olora", "init_lora_weights")

    corda_init = loftq_init = lora_ga_init = mica_init = rests_on_weight  # peft's names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise not_into_4_bits()


class ParamWrapper(PeftParamWrapper):
    """LoRA on one stacked weight (peft's target_parameters). peft recognizes such a layer by this class name.

    lora_A is (E R, K) and lora_B (N, R E). peft's class adds B A to all experts' 16-bit weights. This class passes the
    factors to the Experts4bit, which multiplies each expert's tokens by them.
    """

    def __init__(self, base_layer: Any, adapter_name: str, parameter_name: str | None = None, **kwargs: Any):
        experts: Any = base_layer.get_base_layer() if isinstance(base_layer, PeftParamWrapper) else base_layer
        if parameter_name is None or parameter_name not in experts.weights:
            raise UserError(
                f"an adapter for experts must be on one of {', '.join(experts.weights)}",
                str(parameter_name or "the experts as a module"),
                "name them in target_parameters",
                "target_parameters",
            )
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, **kwargs)
        adapter_A: Any = self.lora_A[adapter_name]
        K = experts.weights[parameter_name].shape[1 if experts.is_transposed else 2]
        if adapter_A.weight.shape[1] != K:
            found = f"lora_A of {adapter_A.weight.shape[1]} inputs on a weight of {K}"
            raise UserError(
                "peft must lay an adapter out as the experts are", found, "pip install 'peft>=0.21'", "peft"
            )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self._param_ndim = 3  # peft swaps the two below unless the experts are transposed
        experts: Any = self.get_base_layer()
        shape = experts.weights[self.parameter_name].shape
        self.num_experts: int = shape[0]
        return shape[1], shape[2]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        experts: Any = self.get_base_layer()
        factors = experts.factors
        if names:
            factors[self.parameter_name] = self.factors(names)
        try:
            yield
        finally:
            factors.pop(self.parameter_name, None)

    def factors(self, names: list[str]) -> Factors:
        """Return the adapters' factors; those of several are concatenated along the rank, with the scaling in B."""
        found = []
        for name in names:
            adapter_A: Any = self.lora_A[name]
            adapter_B: Any = self.lora_B[name]
            A, B = adapter_A.weight, adapter_B.weight
            A_ERK, B_NRE = A.view(self.num_experts, -1, A.shape[1]), B.view(B.shape[0], -1, self.num_experts)
            found.append(Factors(A_ERK, B_NRE, self.scaling[name]))
        if len(found) == 1:
            return found[0]
        A_ERK = torch.cat([each.A_ERK for each in found], dim=1)
        return Factors(A_ERK, torch.cat([each.scaling * each.B_NRE for each in found], dim=1), 1.0)

    def rests_on_weight(self, *args: Any, **kwargs: Any) -> None:
        must, found = "an adapter of experts starts without their weights", "another start"
        raise UserError(must, found, "use default or gaussian", "init_lora_weights")

    pissa_init = olora_init = orthogonal_init = corda_init = loftq_init = lora_ga_init = rests_on_weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise not_into_4_bits()


def not_into_4_bits() -> UserError:
    return UserError(
        "an adapter is merged into 16-bit weights",
        "a 4-bit base, where rounding would undo most of the update",
        "`onecard merge` writes a 16-bit checkpoint with the adapter in it",
        "merge",
    )


def lora_config(settings: LoraSettings, model: Any = None) -> LoraConfig:
    """Return peft's LoraConfig for these settings, with the layers above registered for 4-bit modules.

    Args:
        model: transformers' model, in which "all-linear" is resolved to names of linears.

    Raises:
        UserError: target_modules name a linear whose weight the model's code reads directly.
    """
    targets, excluded, start = settings.target_modules, settings.exclude_modules, settings.init_lora_weights
    if model is not None:
        if targets == "all-linear":
            targets = all_linear(model, [n for n, m in model.named_modules() if isinstance(m, Linear4bit)])
            targets = [n for n in targets if "." not in n or is_adapted(n, settings, [n.rpartition(".")[2]])]
        else:
            check_called(model, targets)
            beside = without_text(model, targets)
            excluded = excluded if beside is None else "|".join([beside, *as_pattern(excluded)])
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=settings.layers_to_transform,
        layers_pattern=settings.layers_pattern,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        lora_bias=settings.lora_bias,
        target_parameters=settings.target_parameters,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=settings.modules_to_save and [*settings.modules_to_save],  # peft may change the list
        init_lora_weights=True if start in ("default", "loftq") else start,  # type: ignore[arg-type]
        task_type="SEQ_CLS" if model is not None and is_headed(model.config) else "CAUSAL_LM",
    )
    return register_fused(config)


def as_pattern(names: list[str] | str | None) -> list[str]:
    """Return exclude_modules as a pattern of whole names, in a list; an empty list for none."""
    if names is None or isinstance(names, str):
        return [names] if names else []
    return [rf"(.+\.)?({'|'.join(map(re.escape, names))})"]


def adapted_linears(settings: LoraSettings, linears: Iterable[str]) -> list[str]:
    """Return those of a model's 4-bit linears that the settings give a LoRA, by peft's own rules."""
    linears, targets = list(linears), settings.target_modules
    if targets == "all-linear":
        targets = sorted({name.rpartition(".")[2] for name in linears})
    return [name for name in linears if is_adapted(name, settings, targets)]


def is_adapted(name: str, settings: LoraSettings, targets: list[str] | str) -> bool:
    """Whether a linear gets a LoRA: target_modules name it, in one of the layers, and nothing excludes it."""
    rules = SimpleNamespace(
        target_modules=targets,
        exclude_modules=settings.exclude_modules,
        layers_to_transform=settings.layers_to_transform,
        layers_pattern=settings.layers_pattern,
        modules_to_save=settings.modules_to_save,
        target_parameters=None,
    )
    return bool(check_target_module_exists(rules, name))


def all_linear(model: Any, linears: list[str]) -> list[str]:
    """Return the targets of "all-linear": the last part of each 4-bit linear's name, or the full name if a module that
    is no target has the same last part; without names that peft refuses or converts to experts' weights."""
    known = set(linears)
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in known}
    short = {name: name.rpartition(".")[2] for name in linears}
    names = {name if last in others else last for name, last in short.items() if peft_takes(model, last)}
    config = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(config, model, None)
    return sorted(config.target_modules or ())


def peft_takes(model: Any, name: str) -> bool:
    """Whether peft accepts LoRA on a linear of this name in a model of this family."""
    alone: Any = nn.Module()
    alone.add_module(name, nn.Linear(1, 1, device="meta"))
    alone.config = SimpleNamespace(model_type=model.config.model_type)
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[name]), alone, low_cpu_mem_usage=True)
    except ValueError:
        return False
    return True


def check_called(model: Any, target_modules: list[str] | str) -> None:
    """Raise UserError if the model's code reads a target's weight directly: an adapter there would have no effect."""
    for name in sorted(read_directly(model)):
        if is_target(name, target_modules):
            must = "target_modules must be linears that the model calls"
            found = f"{name}, whose weight its code reads itself: an adapter there would not take part"
            raise UserError(must, found, "leave it out", "target_modules")


def without_text(model: Any, target_modules: list[str] | str) -> str | None:
    """Return a pattern of the modules that text does not pass through, to exclude; None if none is a target."""
    beside = "|".join(rf"{re.escape(name)}(\..+)?" for name in beside_text(model))
    found = (name for name, _ in model.named_modules() if beside and re.fullmatch(beside, name))
    return beside if any(is_target(name, target_modules) for name in found) else None


def is_target(name: str, target_modules: list[str] | str) -> bool:
    """Whether a pattern matches a module's whole name, or an item of a list its end: peft's rule."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return f".{name}".endswith(tuple(f".{end}" for end in target_modules))


def register_fused(config: Any) -> Any:
    """Register our layers for 4-bit modules in a peft config. The mapping is not saved with an adapter."""
    if isinstance(config, LoraConfig):
        config._register_custom_module({Linear4bit: LoraLinear4bit, Experts4bit: ParamWrapper})
    return config
