"""Maps in parts, as many heads and images as fill a product, and the products."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rules import Rules
from .plan import Plan, share


def at_queries(x: Tensor, kv_heads: int) -> Tensor:
    """[B, heads, ...] -> [B, kv_heads, folded, ...]: the heads that share a head of the keys."""
    return x.unflatten(1, (kv_heads, -1))


def at_keys(x: Tensor) -> Tensor:
    """[B, kv_heads, ...] -> [B, kv_heads, 1, ...]"""
    return x.unsqueeze(2)


def key_map(rules: Rules, like: Tensor) -> Tensor | None:
    """Which keys are masked, beside a map [B, kv_heads, 1, Hk, Wk, D] at the keys: with D = 1."""
    if rules.key_mask is None:
        return None
    return (~rules.key_mask)[:, None, None, :, :, None].expand(*like.shape[:5], 1)


def head_bias(bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias [heads, ...] beside a map [B, kv_heads, folded, ...]: [B, kv_heads, folded, entries], a view."""
    if bias is None:
        return None
    return bias.reshape(1, *like.shape[1:3], -1).expand(len(like), -1, -1, -1)


def parts(plan: Plan, *maps: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The maps [B, kv_heads, ...] in parts [b, h, ...] of about one size, at most `plan.group` heads and images."""
    batch, heads = maps[0].shape[:2]
    h = share(heads, plan.group)
    b = share(batch, plan.group // heads) if h == heads else 1
    for i in range(0, batch, b):
        for j in range(0, heads, h):
            yield tuple(None if x is None else x[i : i + b, j : j + h] for x in maps)


def multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """out = factor * a @ b of batched matrices, where `out` or its transpose is contiguous."""
    if not out.is_contiguous():
        a, b, out = b.mT, a.mT, out.mT
    if factor == 1.0:
        torch.bmm(a, b, out=out)
    else:
        torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)
