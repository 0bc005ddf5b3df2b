"""Who is timed: this library, and the other ways to compute local attention that can be imported here."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import local_attention
from .cases import Case
from .unfold import unfold_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

UNFOLD_COPIES = 4.5  # of a map in fp32, times kH*kW: what the unfold code holds in forward and backward


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Peer:
    """A way to compute a case: `make` gives the function of query, key and value [B, heads*D, H, W].

    border: the one that it computes whatever a case asks for, None where just that; away from borders windows are the
    same. suits: whether it can, on a device, in so much free memory (bytes). trains: whether it has a backward there.
    compiles: whether a first call compiles.
    """

    make: Callable[[Case], Attend]
    suits: Callable[[Case, torch.device, int], bool]
    border: str | None = None
    trains: Callable[[torch.device], bool] = lambda device: True
    compiles: bool = False

    def problem(self, case: Case) -> Case:
        """The case with the border that it computes."""
        return replace(case, border=self.border or case.border)


def _ours(case: Case) -> Attend:
    window = {"border": case.border, "dilation": case.dilation}
    return lambda q, k, v: local_attention(q, k, v, case.kernel, heads=case.heads, **window)


def _unfold(case: Case) -> Attend:
    return lambda q, k, v: unfold_attention(q, k, v, case.kernel, case.kernel)


def _unfold_suits(case: Case, device: torch.device, free: int) -> bool:
    wanted = UNFOLD_COPIES * case.kernel**2 * case.batch * case.height * case.width * sum(case.depths) / 2 * 4
    return case.heads == 1 and case.dilation == 1 and case.border == "zeros" and wanted < free


def _natten(case: Case) -> Attend:
    """NATTEN's fused neighbourhood attention on [B, H, W, heads, D], which it chooses the kernel of."""
    from natten import na2d

    def attend(*maps: Tensor) -> Tensor:
        q, k, v = (x.permute(0, 2, 3, 1).unflatten(3, (case.heads, -1)) for x in maps)
        out = na2d(q, k, v, kernel_size=(case.kernel,) * 2, dilation=(case.dilation,) * 2, scale=1.0)
        return out.flatten(3).permute(0, 3, 1, 2)

    return attend


def _natten_suits(case: Case, device: torch.device, free: int) -> bool:
    fits = case.kernel % 2 == 1 and case.kernel * case.dilation <= min(case.height, case.width)
    return find_spec("natten") is not None and device.type == "cuda" and fits


def _flex(case: Case) -> Attend:
    """torch's FlexAttention, compiled, over pixels in raster order, with a mask of the window."""
    from torch.nn.attention.flex_attention import create_block_mask

    count, before = case.height * case.width, case.kernel // 2 * case.dilation

    def seen(batch, head, query, key):
        down = key // case.width - query // case.width + before
        right = key % case.width - query % case.width + before
        last = (case.kernel - 1) * case.dilation
        near = (down >= 0) & (down <= last) & (right >= 0) & (right <= last)
        return near & (down % case.dilation == 0) & (right % case.dilation == 0)

    masks = {}

    def attend(*maps: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (case.heads, -1)).flatten(3).transpose(2, 3) for x in maps)
        if q.device not in masks:
            masks[q.device] = create_block_mask(seen, None, None, count, count, device=q.device, _compile=True)
        out = _compiled_flex()(q, k, v, block_mask=masks[q.device], scale=1.0)
        return out.transpose(2, 3).unflatten(3, (case.height, case.width)).flatten(1, 2)

    return attend


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex_suits(case: Case, device: torch.device, free: int) -> bool:
    there = find_spec("torch.nn.attention.flex_attention") is not None
    return there and case.depths[0] == case.depths[1]


PEERS = {
    "ours": Peer(_ours, lambda case, device, free: True),
    "unfold": Peer(_unfold, _unfold_suits),
    "natten": Peer(_natten, _natten_suits, border="shift"),
    "flex": Peer(_flex, _flex_suits, border="mask", trains=lambda device: device.type == "cuda", compiles=True),
}
