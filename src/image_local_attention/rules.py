"""What makes logits of queries and keys: one value that every backend takes."""

from typing import NamedTuple

from torch import Tensor

from .window import Window


class Rules(NamedTuple):
    """logit_ij = scale * <q, k_ij> + bias_ij, for the keys of the window that are there.

    bias: [heads, kH*kW] by slot, or [heads, 2*kH-1, 2*kW-1] by displacement of the key; None is none.
    key_mask: bool [B, Hk, Wk], False where a key of the map does not take part; None is all of them.
    precision: of fp32 products on a GPU, "ieee" or "tf32".
    """

    window: Window
    scale: float = 1.0
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    precision: str = "ieee"

    @property
    def by_displacement(self) -> bool:
        return self.bias is not None and self.bias.dim() == 3
