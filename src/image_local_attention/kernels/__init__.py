"""The triton backend: launches of the kernels on heads `[B, heads, H, W, D]` of any strides.

The fused forward takes the output and one float per pixel and head, the backward the gradients and one float per
pixel and head (delta). Maps are read where they lie. What these kernels do not compute yet,
`backends.beyond_kernels` names.
"""

import torch
from torch import Tensor

from ..maps import empty_heads
from ..rules import Rules
from ..window import Window
from . import attention as fused
from . import unfused
from .gpu import padded
from .launch import Launch, depths, ways

LOG2E = 1.4426950408889634
TINY = 2.0**-126  # the least normal fp32, for a scale of 0: its product with minus infinity is no NaN


def attention(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output [B, heads, H, W, Dv] and natural log-sum-exp [B, heads, H, W] in fp32."""
    window, scale = rules.window, rules.scale
    out = empty_heads(query, value.shape[4])
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    launch = Launch("forward", (query,), (key, value), window, window.lead, rules.precision)
    q, k, v = launch.sources
    launch(
        fused.forward_kernel,
        *(q.handle, k.handle, v.handle, out, lse),
        *(q.strides, k.strides, v.strides, out.stride()),
        *launch.size,
        max(abs(scale) * LOG2E, TINY),
        addressed=(query, key, value, out),
        **depths(query, value),
        **ways(q=q, k=k, v=v),
        MASKED=window.masked,
        NEGATE=scale < 0,
    )
    return out, lse


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """Gradients of query, key and value; None where not wanted."""
    window, scale, precision = rules.window, rules.scale, rules.precision
    grad_query, grad_key, grad_value = (
        empty_heads(x, x.shape[4]) if want else None for x, want in zip((query, key, value), wanted[:3], strict=True)
    )
    delta = _delta(grad_out, grad_lse, out, window)
    inputs = query, key, value, grad_out, lse, delta
    if grad_query is not None:
        _grad_query(*inputs, grad_query, window, scale, precision)
    if grad_key is not None or grad_value is not None:
        _grad_key_value(*inputs, grad_key, grad_value, window, scale, precision)
    return grad_query, grad_key, grad_value, None


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, window: Window) -> Tensor:
    """sum(grad_out * out) - grad_lse, [B, heads, H, W] in fp32."""
    delta = out.new_empty(out.shape[:4], dtype=torch.float32)
    depth = out.shape[4]
    launch = Launch("delta", (grad_out, out), (), window, 0, "ieee")
    launch(
        fused.delta_kernel,
        *(grad_out, out, grad_lse, delta),
        *(grad_out.stride(), out.stride(), delta.stride() if grad_lse is None else grad_lse.stride()),
        *launch.size,
        addressed=(grad_out, out, grad_lse),
        D=depth,
        DP=padded(depth),
    )
    return delta


def _grad_query(query, key, value, grad_out, lse, delta, grad_query, window, scale, precision) -> None:
    launch = Launch("grad_query", (query, grad_out), (key, value), window, window.lead, precision)
    q, g, k, v = launch.sources
    launch(
        fused.grad_query_kernel,
        *(q.handle, k.handle, v.handle, g.handle, lse, delta, grad_query),
        *(q.strides, k.strides, v.strides, g.strides, grad_query.stride()),
        *launch.size,
        scale * LOG2E,
        scale,
        addressed=(query, key, value, grad_out, grad_query),
        **depths(query, value),
        **ways(q=q, k=k, v=v, g=g),
        MASKED=window.masked,
    )


def _grad_key_value(query, key, value, grad_out, lse, delta, grad_key, grad_value, window, scale, precision) -> None:
    launch = Launch("grad_key_value", (key, value), (query, grad_out), window, window.query_lead, precision)
    k, v, q, g = launch.sources
    strides = [(key if x is None else x).stride() for x in (grad_key, grad_value)]
    launch(
        fused.grad_key_value_kernel,
        *(q.handle, k.handle, v.handle, g.handle, lse, delta, grad_key, grad_value),
        *(q.strides, k.strides, v.strides, g.strides, *strides),
        *launch.size,
        scale * LOG2E,
        scale,
        addressed=(query, key, value, grad_out, grad_key, grad_value),
        **depths(query, value),
        **ways(q=q, k=k, v=v, g=g),
    )


def similarity(query: Tensor, key: Tensor, rules: Rules, absent: float) -> Tensor:
    """scale * <q, k_ij>, [B, heads, H, W, kH*kW]; `absent` where key ij does not take part."""
    window = rules.window
    weight = query.new_empty((*query.shape[:4], window.slots))
    depth = query.shape[4]
    launch = Launch("unfused", (query,), (key,), window, window.lead, rules.precision)
    q, k = launch.sources
    launch(
        unfused.similarity_kernel,
        *(q.handle, k.handle, weight),
        *(q.strides, k.strides, weight.stride()),
        *launch.size,
        rules.scale,
        absent,
        addressed=(query, key, weight),
        **ways(q=q, k=k),
        MASKED=window.masked,
        D=depth,
        DP=padded(depth),
    )
    return weight


def aggregate(weight: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """scale * sum_ij weight_ij * v_ij over the keys in the map."""
    launch = Launch("unfused", (), (value,), rules.window, rules.window.lead, rules.precision)
    return _weighted_sum(launch, unfused.aggregate_kernel, weight, value, rules.scale)


def aggregate_transpose(weight: Tensor, vector: Tensor, kv_heads: int, size: tuple[int, int], rules: Rules) -> Tensor:
    """The transpose of `aggregate`: each pixel sends scale * weight_ij * vector to key ij."""
    launch = Launch("unfused", (), (vector,), rules.window, rules.window.query_lead, rules.precision)
    return _weighted_sum(launch, unfused.aggregate_transpose_kernel, weight, vector, rules.scale)


def _weighted_sum(launch: Launch, kernel, weight: Tensor, x: Tensor, scale: float) -> Tensor:
    out = empty_heads(x, x.shape[4])
    (src,) = launch.sources
    launch(
        kernel,
        *(weight, src.handle, out),
        *(weight.stride(), src.strides, out.stride()),
        *launch.size,
        scale,
        addressed=(weight, x, out),
        **ways(x=src),
        D=x.shape[4],
        DP=padded(x.shape[4]),
    )
    return out
