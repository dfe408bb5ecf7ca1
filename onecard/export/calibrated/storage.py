"""What a folder's format is made of: how a matrix becomes codes and scales, and how these are stored and named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from onecard.config import CalibrationConfig
from onecard.export.calibrated.calibration import Layer
from onecard.export.folder import Shapes
from onecard.quant.grouped import Grouped

Weight = TypeVar("Weight")  # a matrix's codes and scales


class Storage(ABC, Generic[Weight]):
    """A format of matrices (N, K) in few bits.

    Attributes:
        title: its name for the user.
        block: what a linear's number of inputs must be a multiple of.
        shares_scale: whether the matrices of a module have one scale, which their largest magnitude determines.
    """

    title: ClassVar[str]
    block: ClassVar[int] = 1
    shares_scale: ClassVar[bool] = False

    def scale_dtype(self, stored: str) -> str:
        """Return the dtype of scales, in safetensors' spelling; `stored`: that of the model's 16-bit weights."""
        return stored

    def width(self, config: CalibrationConfig) -> int:
        """Return what a linear's number of inputs must be a multiple of."""
        return self.block

    @abstractmethod
    def nearest(self, W_NK: Tensor, config: CalibrationConfig, dtype: torch.dtype, peak: float = 0.0) -> Weight:
        """Round a float32 weight to the nearest codes.

        Args:
            dtype: of the scales.
            peak: the largest magnitude of the module's matrices, if they share a scale.
        """

    @abstractmethod
    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        """Return a weight's tensors as the file stores them, by the ends of their names."""

    @abstractmethod
    def shapes(self, N: int, K: int, config: CalibrationConfig, dtype: str) -> Shapes:
        """Return the dtype and shape of each tensor of `tensors`; `dtype`: of scales."""

    @abstractmethod
    def config_fields(self, config: CalibrationConfig, linears: list[str], left_out: list[str]) -> dict[str, Any]:
        """Return config.json's fields, with the keys of the format's readers.

        Args:
            linears, left_out: names of the matrices in few bits, and of the decoder layers' others.
        """


class Calibrated(Storage[Grouped]):
    """A format of 4-bit integers in groups, whose codes may be chosen for the outputs on calibration rows."""

    def scale_dtype(self, stored: str) -> str:
        return "F16"

    def width(self, config: CalibrationConfig) -> int:
        return config.group_size

    @abstractmethod
    def quantize_layer(
        self, layer: Layer, names: set[str], config: CalibrationConfig, dtype: torch.dtype
    ) -> Iterator[tuple[str, Grouped | Tensor]]:
        """Yield a layer's quantized weights by their linear's name within it, and other tensors that change by their
        own. They become those that a reader dequantizes.

        Args:
            names: of the linears; dtype: of the scales.
        """

    @abstractmethod
    def quantize(self, W_NK: Tensor, H_KK: Tensor, config: CalibrationConfig, dtype: torch.dtype) -> Grouped:
        """Quantize a float32 weight of an expert, with H of its calibration inputs. `dtype`: of the scales."""
