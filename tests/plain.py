"""The obvious PyTorch code: copy the keys of every window, multiply, softmax, in the dtype of the maps.

Autograd differentiates it. Its errors are the yardstick of the library's (`budget`), and it stores kH*kW copies of keys
and values. Options are the oracle's (`oracle`), by other means: the map is continued as `numpy.pad` does it.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

PADDING = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Windows(NamedTuple):
    """The windows of all queries, as tensors."""

    rows: torch.Tensor  # [Hq, kH], the key's row; that after the last stands for all outside the map
    columns: torch.Tensor  # [Wq, kW]
    inside: torch.Tensor  # [Hq, Wq, kH*kW], whether there is a key in the map, and it takes part
    absent: torch.Tensor  # [Hq, Wq, kH*kW], whether the slot takes no part
    down: torch.Tensor  # [Hq, kH], displacement from the query in steps of the dilation
    right: torch.Tensor  # [Wq, kW]


@functools.lru_cache(maxsize=64)
def axis(queries, size, kernel, border, dilation, causal):
    """For each query on one axis and each key of its window: the key's index and its displacement in steps."""
    # The centre is the key pixel that the middle of the query pixel falls into.
    centres = [next(j for j in range(size) if 2 * queries * (j + 1) > (2 * q + 1) * size) for q in range(queries)]
    centres = np.array(centres, dtype=np.int64)[:, None]
    steps = np.arange(kernel) - (kernel - 1 if causal else kernel // 2)
    if border == "shift" and not causal:
        slide = []
        for centre in centres[:, 0]:
            siblings = range(centre % dilation, size, dilation)
            wanted, possible = siblings.index(centre) + steps[0], np.arange(len(siblings) - kernel + 1)
            slide.append(possible[abs(possible - wanted).argmin()] - wanted)
        steps = steps + np.array(slide, dtype=np.int64)[:, None]
    steps = np.broadcast_to(steps, (queries, kernel))
    positions = centres + dilation * steps
    before, after = max(0, -positions.min(initial=0)), max(0, positions.max(initial=0) - size + 1)
    if border in PADDING:
        continued = np.pad(np.arange(size), (before, after), PADDING[border])
    else:
        continued = np.pad(np.arange(size), (before, after), constant_values=size)
    return continued[positions + before], steps


def windows(queries, size, kernel, border, dilation, causal, device) -> Windows:
    borders = (border, border) if isinstance(border, str) else border
    ends = {False: (False, False), True: (True, True), "raster": (False, False)}.get(causal, causal)
    axes = [axis(*arguments) for arguments in zip(queries, size, kernel, borders, dilation, ends, strict=True)]
    (rows, down), (columns, right) = [[torch.tensor(table, device=device) for table in tables] for tables in axes]
    shape = (*queries, kernel[0] * kernel[1])

    def over_windows(y, x):
        y, x = y[:, None, :, None], x[:, None, :]
        return y.expand(*queries, *kernel).reshape(shape), x.expand(*queries, *kernel).reshape(shape)

    inside_y, inside_x = over_windows(rows < size[0], columns < size[1])
    inside = inside_y & inside_x
    absent = torch.zeros_like(inside)
    if borders[0] != "zeros":
        absent |= ~inside_y
    if borders[1] != "zeros":
        absent |= ~inside_x
    if causal == "raster":
        below, beside = over_windows(down, right)
        absent |= (below > 0) | ((below == 0) & (beside > 0))
    return Windows(rows, columns, inside & ~absent, absent, down, right)


def neighbours(x, rows, columns):
    """[B, C, Hk, Wk] -> [B, C, Hq, Wq, kH*kW], zeros outside the map."""
    x = F.pad(x, (0, 1, 0, 1))
    x = x.index_select(3, columns.flatten()).unflatten(3, columns.shape)
    x = x.index_select(2, rows.flatten()).unflatten(2, rows.shape)
    return x.transpose(3, 4).flatten(4)


def split(x, kv_heads, heads):
    """[B, kv_heads * n * D, ...] -> [B, kv_heads, n, D, ...]: n query heads to a key head, one for keys and values."""
    return x.unflatten(1, (kv_heads, heads // kv_heads, -1))


def similarity(
    query,
    key,
    kernel,
    heads=1,
    kv_heads=None,
    scale=1.0,
    border="zeros",
    dilation=(1, 1),
    causal=False,
    bias=None,
    key_mask=None,
):
    kv_heads = heads if kv_heads is None else kv_heads
    seen = windows(query.shape[2:], key.shape[2:], kernel, border, dilation, causal, key.device)
    q, k = split(query, kv_heads, heads), split(neighbours(key, seen.rows, seen.columns), kv_heads, kv_heads)
    weight = ((q[..., None] * k).sum(3) * scale).flatten(1, 2)
    if bias is not None:
        weight = weight + by_slot(bias, kernel, seen)
    return weight.masked_fill(missing(seen, key_mask), float("-inf"))


def by_slot(bias, kernel, seen):
    """The bias of every slot of every query: [heads, Hq or 1, Wq or 1, kH*kW]."""
    if bias.shape[1:] != (2 * kernel[0] - 1, 2 * kernel[1] - 1):
        return bias.flatten(1)[:, None, None]
    return neighbours(bias[None], seen.down + kernel[0] - 1, seen.right + kernel[1] - 1)[0]


def missing(seen, key_mask):
    """Which slots take no part: [B or 1, 1, Hq, Wq, kH*kW]."""
    if key_mask is None:
        return seen.absent[None, None]
    hidden = neighbours((~key_mask[:, None]).to(torch.uint8), seen.rows, seen.columns) > 0
    return seen.absent | hidden


def aggregate(weight, value, kernel, heads=1, kv_heads=None, border="zeros", dilation=(1, 1), causal=False):
    kv_heads = heads if kv_heads is None else kv_heads
    seen = windows(weight.shape[2:4], value.shape[2:], kernel, border, dilation, causal, value.device)
    v = split(neighbours(value, seen.rows, seen.columns), kv_heads, kv_heads)
    weight = split(weight.masked_fill(~seen.inside, 0.0), kv_heads, heads).squeeze(3)
    return (weight[:, :, :, None] * v).sum(-1).flatten(1, 3)


def attention(
    query,
    key,
    value,
    kernel,
    heads=1,
    kv_heads=None,
    scale=1.0,
    border="zeros",
    dilation=(1, 1),
    causal=False,
    bias=None,
    key_mask=None,
    softmax=torch.softmax,
):
    logits = similarity(query, key, kernel, heads, kv_heads, scale, border, dilation, causal, bias, key_mask)
    # Where no key is seen, softmax would be NaN, and so would the gradient of a bias of -inf.
    empty = logits.isneginf().all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    share, lse = softmax(logits, -1).masked_fill(empty, 0.0), logits.logsumexp(-1)
    out = aggregate(share, value, kernel, heads, kv_heads, border, dilation, causal)
    return out, lse.masked_fill(empty[..., 0], float("-inf"))


def softmax_in_steps(logits, dim):
    """The softmax, written so that autograd takes each step of its derivative by itself."""
    mass = (logits - logits.detach().amax(dim, keepdim=True)).exp()
    return mass / mass.sum(dim, keepdim=True)
