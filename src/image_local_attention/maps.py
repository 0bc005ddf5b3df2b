"""Views between maps `[B, heads*D, H, W]` and heads `[B, heads, H, W, D]`; no copies."""

from collections.abc import Sequence

import torch
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, heads*D, H, W] -> [B, heads, H, W, D], always a view: channel h*D + d is component d of head h."""
    return x.unflatten(1, (heads, x.shape[1] // heads)).permute(0, 1, 3, 4, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, H, W, D] -> [B, heads*D, H, W], the inverse; a view of what `split_heads` or `empty_heads` made."""
    return x.permute(0, 1, 4, 2, 3).flatten(1, 2)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of what is computed from the map `x`: channels_last stays so, all else gives contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_map(like: Tensor, channels: int, size: Sequence[int] | None = None) -> Tensor:
    """Uninitialised [B, channels, H, W] with batch, dtype, device, memory format and (None) size of the map `like`."""
    shape = like.shape[0], channels, *(like.shape[2:] if size is None else size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def empty_heads(like: Tensor, depth: int, heads: int | None = None, size: Sequence[int] | None = None) -> Tensor:
    """Uninitialised [B, heads, H, W, depth] over a fresh map in the memory format of the map under `like`.

    None: as many heads, and the size, of `like`.
    """
    heads = like.shape[1] if heads is None else heads
    return split_heads(empty_map(merge_heads(like), heads * depth, size), heads)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the log-sum-exp: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
