"""The operators in plain torch: one loop over window slots, readable first.

Maps come as heads `[B, heads, H, W, D]`, weights as `[B, heads, Hq, Wq, kH*kW]`; keys and values may have fewer heads
and another size. Sums are taken in fp32 for half precision and in fp64 for fp32 and fp64, whatever precision is asked
for. All of it is differentiable by autograd any number of times; memory grows with `kH*kW` weights per pixel and,
under autograd, with as many copies of keys and values.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .maps import accumulator, empty_heads
from .rules import Rules
from .window import Window


def attention(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output [B, heads, H, W, Dv] and natural log-sum-exp [B, heads, H, W] of the softmax over each window."""
    logits = _similarity(_wide(query), _wide(key), rules, float("-inf"))
    lse = logits.logsumexp(-1)
    out = _aggregate(_weights(logits, lse), _wide(value), rules.window, 1.0)
    return _like(query, out), lse.to(accumulator(query.dtype))


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    rules: Rules,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and bias, by dS = P * (dP - delta + dlse) with delta = sum(grad_out * out)."""
    q, k, v, g = (_wide(x) for x in (query, key, value, grad_out))
    window, scale = rules.window, rules.scale
    heads_and_size = key.shape[1], key.shape[2:4]
    weight = _weights(_similarity(q, k, rules, float("-inf")), lse)
    delta = (g * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_logit = weight * (_similarity(g, v, Rules(window), 0.0) - delta[..., None])
    return (
        _like(query, _aggregate(grad_logit, k, window, scale)) if wanted[0] else None,
        _like(key, _aggregate_transpose(grad_logit, q, window, scale, *heads_and_size)) if wanted[1] else None,
        _like(value, _aggregate_transpose(weight, g, window, 1.0, *heads_and_size)) if wanted[2] else None,
        _bias_gradient(grad_logit, rules, rules.bias.shape, key.shape[2:4]).to(rules.bias.dtype) if wanted[3] else None,
    )


def similarity(query: Tensor, key: Tensor, rules: Rules, absent: float) -> Tensor:
    """Logits; `absent` where a key does not take part."""
    return _similarity(_wide(query), _wide(key), rules, absent).to(query.dtype)


def aggregate(weight: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """scale * sum_ij weight_ij * v_ij over the keys in the map."""
    return _like(value, _aggregate(_wide(weight), _wide(value), rules.window, rules.scale))


def aggregate_transpose(weight: Tensor, vector: Tensor, kv_heads: int, size: tuple[int, int], rules: Rules) -> Tensor:
    """The transpose of `aggregate`: each pixel sends scale * weight_ij * vector to key ij of `kv_heads` maps."""
    sent = _aggregate_transpose(_wide(weight), _wide(vector), rules.window, rules.scale, kv_heads, size)
    return _like(vector, sent)


def bias_gradient(grad: Tensor, rules: Rules, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Sums of a gradient of logits over images and pixels, in the shape of a bias; keys lie in a map of `size`."""
    return _bias_gradient(_wide(grad), rules, shape, size).to(grad.dtype)


class Slot(NamedTuple):
    """One slot of the windows of all queries [H, W]."""

    index: int
    number: Tensor  # the index, [1]
    rows: Tensor  # [H] of its keys, any row where there is none in the map
    columns: Tensor  # [W]
    there: Tensor  # [H, W]: the key is in the map and takes part
    out: Tensor  # [H, W]: it does not take part
    displacements: tuple[Tensor, Tensor]  # entries of a bias by displacement, [H] and [W]

    def of(self, x: Tensor) -> Tensor:
        """[B, heads, H, W, D]: the key of each query."""
        return x.index_select(2, self.rows).index_select(3, self.columns)

    def absent(self, key_mask: Tensor | None) -> Tensor:
        """[1 or B, 1, H, W]: keys that do not take part, in the map or out of it."""
        if key_mask is None:
            return self.out[None, None]
        masked = ~key_mask.index_select(1, self.rows).index_select(2, self.columns)
        return (self.out | (self.there & masked))[:, None]


def _slots(window: Window, size: tuple[int, int], queries: tuple[int, int], device: torch.device) -> Iterator[Slot]:
    y_axis, x_axis = axes = window.axes(tuple(size), tuple(queries))
    first = [torch.tensor([a.displacement(q) for q in range(a.query_count)], device=device) for a in axes]
    for i in range(y_axis.kernel):
        rows = torch.tensor(y_axis.slot(i), device=device)
        for j in range(x_axis.kernel):
            columns = torch.tensor(x_axis.slot(j), device=device)
            above, left = rows < 0, columns < 0
            out = (above & y_axis.outside_is_absent)[:, None] | (left & x_axis.outside_is_absent)
            out = out | window.dropped(i, j)
            there = ~above[:, None] & ~left & ~out
            index = i * x_axis.kernel + j
            number = torch.tensor([index], device=device)
            places = rows.clamp(min=0), columns.clamp(min=0)
            yield Slot(index, number, *places, there, out, (first[0] + i, first[1] + j))


def _like(x: Tensor, result: Tensor) -> Tensor:
    """The result in the dtype and memory format of the map under `x`."""
    _, heads, *size, depth = result.shape
    return empty_heads(x, depth, heads, size).copy_(result)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.dtype.itemsize == 2 else torch.float64)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where a query sees no key at all."""
    return (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()


def _similarity(query: Tensor, key: Tensor, rules: Rules, absent: float) -> Tensor:
    groups = query.unflatten(1, (key.shape[1], -1))  # [B, kv_heads, heads of one, H, W, D]
    logits = []
    for slot in _slots(rules.window, key.shape[2:4], query.shape[2:4], key.device):
        logit = (groups * slot.of(key)[:, :, None]).sum(-1).flatten(1, 2) * rules.scale
        logit = logit.masked_fill(~slot.there, 0.0)
        if rules.by_displacement:
            y, x = slot.displacements
            logit = logit + rules.bias.index_select(1, y).index_select(2, x)
        elif rules.bias is not None:
            logit = logit + rules.bias[:, slot.index, None, None]
        logits.append(logit.masked_fill(slot.absent(rules.key_mask), absent))
    return torch.stack(logits, -1)


def _aggregate(weight: Tensor, value: Tensor, window: Window, scale: float) -> Tensor:
    weight = weight.unflatten(1, (value.shape[1], -1))  # [B, kv_heads, heads of one, H, W, slots]
    out = value.new_zeros(weight.shape[:5] + value.shape[4:])
    for slot in _slots(window, value.shape[2:4], weight.shape[3:5], value.device):
        out = out + weight[..., slot.index].masked_fill(~slot.there, 0.0)[..., None] * slot.of(value)[:, :, None]
    return out.flatten(1, 2) * scale


def _aggregate_transpose(
    weight: Tensor, vector: Tensor, window: Window, scale: float, kv_heads: int, size: tuple[int, int]
) -> Tensor:
    out = vector.new_zeros(vector.shape[0], kv_heads, *size, vector.shape[4])
    for slot in _slots(window, size, vector.shape[2:4], vector.device):
        sent = weight[..., slot.index].masked_fill(~slot.there, 0.0)[..., None] * vector
        sent = sent.unflatten(1, (kv_heads, -1)).sum(2)
        columns = _index_add(out.new_zeros(*sent.shape[:3], *out.shape[3:]), 3, slot.columns, sent)
        out = _index_add(out, 2, slot.rows, columns)
    return out * scale


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """x.index_add(dim, index, source), in the same order every time: on a GPU that one adds in any."""
    if not x.is_cuda:
        return x.index_add(dim, index, source)
    return torch.ops.aten.index_put(x, [*[None] * dim, index], source, True)


def _bias_gradient(grad: Tensor, rules: Rules, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    total = grad.new_zeros(shape)
    for slot in _slots(rules.window, size, grad.shape[2:4], grad.device):
        part = grad[..., slot.index].masked_fill(slot.absent(rules.key_mask), 0.0).sum(0)  # [heads, H, W]
        if len(shape) == 3:
            columns = _index_add(total.new_zeros(*part.shape[:2], shape[2]), 2, slot.displacements[1], part)
            total = _index_add(total, 1, slot.displacements[0], columns)
        else:
            total = total.index_add(1, slot.number, part.sum((1, 2))[:, None])
    return total
