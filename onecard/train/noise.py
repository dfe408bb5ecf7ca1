"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings in training, none in evaluation.

    x' = x + u alpha / sqrt(L d),    u uniform in -1 ... 1

L is the length of the token's own document. So a document of a packed row has the noise of a row by itself, where
transformers takes the row's length. The generator is the run's, whose state a checkpoint holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EmbeddingNoise:
    """A hook on a model's embedding.

    Attributes:
        cu_seqlens: ends of the row's documents. None: a row is one document.
    """

    def __init__(self, model: Any, alpha: float):
        self.alpha = alpha
        self.cu_seqlens: list[int] | None = None
        self.handle = model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, module: Any, args: Any, x: Tensor) -> Tensor:
        """Return the embeddings (1, T, H) with noise, if the module is in training mode."""
        if not module.training:
            return x
        ends = self.cu_seqlens or [0, x.shape[1]]
        lengths = torch.tensor(ends).diff()
        sizes = self.alpha / (lengths * x.shape[2]).sqrt()
        scale_T1 = sizes.repeat_interleave(lengths)[:, None].to(x.device, x.dtype, non_blocking=True)
        return x + torch.empty_like(x).uniform_(-1, 1) * scale_T1

    def remove(self) -> None:
        self.handle.remove()
