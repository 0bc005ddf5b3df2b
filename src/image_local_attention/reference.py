"""The operators in plain torch: one loop over window slots, readable first.

Maps come as heads `[B, heads, H, W, D]`, weights as `[B, heads, H, W, kH*kW]`. Sums are taken in fp32 for half
precision and in fp64 for fp32 and fp64, whatever `precision` is asked for. All of it is differentiable by autograd
any number of times; memory grows with `kH*kW` weights per pixel and, under autograd, with as many copies of keys
and values.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .maps import accumulator, empty_heads
from .window import Window


def attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, scale: float, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Output [B, heads, H, W, Dv] and natural log-sum-exp [B, heads, H, W] of the softmax over each window."""
    logits = _similarity(_wide(query), _wide(key), window, scale, float("-inf"))
    lse = logits.logsumexp(-1)
    out = _aggregate(_weights(logits, lse), _wide(value), window, 1.0)
    return _like(query, out), lse.to(accumulator(query.dtype))


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    wanted: tuple[bool, bool, bool],
    window: Window,
    scale: float,
    precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, by dS = P * (dP - delta + dlse) with delta = sum(grad_out * out)."""
    q, k, v, g = (_wide(x) for x in (query, key, value, grad_out))
    weight = _weights(_similarity(q, k, window, scale, float("-inf")), lse)
    delta = (g * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_logit = weight * (_similarity(g, v, window, 1.0, 0.0) - delta[..., None])
    return (
        _like(query, _aggregate(grad_logit, k, window, scale)) if wanted[0] else None,
        _like(key, _aggregate_transpose(grad_logit, q, window, scale)) if wanted[1] else None,
        _like(value, _aggregate_transpose(weight, g, window, 1.0)) if wanted[2] else None,
    )


def similarity(
    query: Tensor, key: Tensor, window: Window, scale: float, absent: float, precision: str = "ieee"
) -> Tensor:
    """scale * <q, k_ij>; `absent` where key ij does not take part."""
    return _similarity(_wide(query), _wide(key), window, scale, absent).to(query.dtype)


def aggregate(weight: Tensor, value: Tensor, window: Window, scale: float, precision: str = "ieee") -> Tensor:
    """scale * sum_ij weight_ij * v_ij over the keys in the map."""
    return _like(value, _aggregate(_wide(weight), _wide(value), window, scale))


def aggregate_transpose(
    weight: Tensor, vector: Tensor, window: Window, scale: float, precision: str = "ieee"
) -> Tensor:
    """The transpose of `aggregate`: each pixel sends scale * weight_ij * vector to key ij."""
    return _like(vector, _aggregate_transpose(_wide(weight), _wide(vector), window, scale))


def _like(x: Tensor, result: Tensor) -> Tensor:
    """The result in the dtype and memory format of the map under `x`."""
    return empty_heads(x, result.shape[-1]).copy_(result)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.dtype.itemsize == 2 else torch.float64)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where a query sees no key at all."""
    return (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()


def _slots(x: Tensor, window: Window) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each slot: the keys' rows [H] and columns [W], clamped into the map, and which are there [H, W]."""
    y_axis, x_axis = window.axes(x.shape[2:4])
    for i in range(y_axis.kernel):
        rows = torch.tensor(y_axis.slot(i), device=x.device)
        for j in range(x_axis.kernel):
            cols = torch.tensor(x_axis.slot(j), device=x.device)
            y, x_ = rows.clamp(0, y_axis.size - 1), cols.clamp(0, x_axis.size - 1)
            yield y, x_, (rows == y)[:, None] & (cols == x_)


def _similarity(query: Tensor, key: Tensor, window: Window, scale: float, absent: float) -> Tensor:
    outside = absent if window.masked else 0.0
    logits = []
    for y, x, there in _slots(key, window):
        neighbour = key.index_select(2, y).index_select(3, x)  # [B, heads, H, W, D]
        logits.append(((query * neighbour).sum(-1) * scale).masked_fill(~there, outside))
    return torch.stack(logits, -1)


def _aggregate(weight: Tensor, value: Tensor, window: Window, scale: float) -> Tensor:
    out = value.new_zeros(weight.shape[:4] + value.shape[4:])
    for slot, (y, x, there) in enumerate(_slots(value, window)):
        neighbour = value.index_select(2, y).index_select(3, x)
        out = out + weight[..., slot].masked_fill(~there, 0.0)[..., None] * neighbour
    return out * scale


def _aggregate_transpose(weight: Tensor, vector: Tensor, window: Window, scale: float) -> Tensor:
    out = torch.zeros_like(vector)
    for slot, (y, x, there) in enumerate(_slots(vector, window)):
        sent = weight[..., slot].masked_fill(~there, 0.0)[..., None] * vector
        columns = torch.zeros_like(sent).index_add(3, x, sent)
        out = out.index_add(2, y, columns)
    return out * scale
