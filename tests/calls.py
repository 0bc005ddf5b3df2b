"""Calls of the three operators with options of every kind, for the tests of how they live with the rest of torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from conftest import TARGETS
from image_local_attention import local_aggregate, local_attention, local_similarity, ops
from image_local_attention.window import Window
from problems import lay_out

HEADS, KERNEL = 2, (3, 4)
OPERATORS = ("attention", "similarity", "aggregate")
REFERENCE = [t.param() for t in TARGETS if t.backend == "reference"]  # for what hangs on torch, not on the backend


class Options(NamedTuple):
    """Options of a call, and the sizes of its maps, [2, 4 or 2 * kv_heads, *queries or *keys]."""

    border: str | tuple[str, str] = "zeros"
    dilation: tuple[int, int] = (1, 1)
    causal: bool | tuple[bool, bool] | str = False
    kv_heads: int = HEADS
    bias: tuple[int, ...] | None = None  # its shape behind the heads
    masked: bool = False  # with a key_mask
    queries: tuple[int, int] = (6, 7)
    keys: tuple[int, int] = (6, 7)

    @property
    def window(self) -> Window:
        borders = self.border if isinstance(self.border, tuple) else (self.border,) * 2
        raster = self.causal == "raster"
        causal = (False, False) if raster else self.causal if isinstance(self.causal, tuple) else (self.causal,) * 2
        return Window(KERNEL, borders, self.dilation, causal, raster)

    def geometry(self) -> dict:
        return {"border": self.border, "dilation": self.dilation, "causal": self.causal}

    def maps(self, device: str, layout="contiguous", dtype=torch.float32) -> list[Tensor]:
        """Query, key and value."""
        shapes = (4, *self.queries), *[(2 * self.kv_heads, *self.keys)] * 2
        return [
            lay_out(torch.randn(2, *shape, generator=seeded(i)).to(device, dtype), layout).requires_grad_()
            for i, shape in enumerate(shapes)
        ]

    def position_bias(self, device: str, dtype=torch.float32) -> Tensor | None:
        if self.bias is None:
            return None
        return torch.randn(HEADS, *self.bias, generator=seeded(3)).to(device, dtype).requires_grad_()

    def key_mask(self, device: str) -> Tensor | None:
        """Every third key is missing."""
        keys = torch.arange(2 * self.keys[0] * self.keys[1], device=device)
        return (keys % 3 > 0).view(2, *self.keys) if self.masked else None

    def inputs(self, device: str, layout="contiguous", dtype=torch.float32) -> list[Tensor]:
        """Query, key, value and, where there is one, bias."""
        bias = self.position_bias(device, dtype)
        return [*self.maps(device, layout, dtype), *([] if bias is None else [bias])]

    def call(self, operator: str, query, key, value, bias=None, backend=None, **more):
        """A public function over inputs; without its bias where it has none."""
        more |= {"heads": HEADS, "kv_heads": self.kv_heads, "backend": backend} | self.geometry()
        key_mask = self.key_mask(query.device)
        if operator == "attention":
            return local_attention(query, key, value, KERNEL, bias=bias, key_mask=key_mask, **more)
        if operator == "similarity":
            return local_similarity(query, key, KERNEL, bias=bias, key_mask=key_mask, **more)
        weight = query[:, :HEADS, ..., None].expand(-1, -1, -1, -1, KERNEL[0] * KERNEL[1]) * 0.5
        return local_aggregate(weight, value, KERNEL, **more)


PLAIN = Options()
BEYOND = {  # windows that are not plain
    "shift": Options("shift", dilation=(2, 1), bias=(5, 7)),
    "globe": Options(("mask", "circular"), bias=KERNEL, masked=True),
    "causal": Options(("zeros", "shift"), causal=(False, True), kv_heads=1, bias=(12,)),
    "raster": Options("mask", causal="raster", dilation=(1, 2)),
    "grids": Options("replicate", kv_heads=1, masked=True, keys=(4, 9)),
}
OPTIONS = {"plain": PLAIN, **BEYOND}


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def arguments(options: Options, device: str, backend: str, layout: str) -> dict[str, tuple]:
    """Arguments of every registered operator, by name.

    Everything can be compared: a query always sees a key, and what does not take part has the logit 0.
    """
    q, k, v = options.maps(device, layout)
    bias, mask = options.position_bias(device), options.key_mask(device)
    bias = bias if bias is None or options.bias == (5, 7) else bias.detach().flatten(1).requires_grad_()
    where = ops.where(options.window, "ieee", backend)
    weight = torch.randn(2, HEADS, *options.queries, options.window.slots, generator=seeded(4)).to(device)
    weight.requires_grad_()
    counts = HEADS, options.kv_heads, 0.7
    terms = bias, mask, *counts
    out, lse = (x.detach() for x in ops.attention(q, k, v, *terms, *where))
    upstream = torch.ones_like(out).requires_grad_(), torch.ones_like(lse)
    wanted = [True, False, True, bias is not None]
    shape = [HEADS, options.window.slots] if bias is None else list(bias.shape)
    return {
        "attention": (q, k, v, *terms, *where),
        "attention_backward": (*upstream, out, lse, q, k, v, bias, mask, wanted, *counts, *where),
        "similarity": (q, k, *terms, 0.0, *where),
        "aggregate": (weight, v, options.kv_heads, 0.5, *where),
        "aggregate_transpose": (weight, q, options.kv_heads, list(options.keys), 0.5, *where),
        "bias_gradient": (weight, mask, shape, list(options.keys), *where),
    }
