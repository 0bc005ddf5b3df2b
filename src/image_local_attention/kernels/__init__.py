"""The triton backend: launches of the kernels on heads `[B, heads, H, W, D]` of any strides.

The fused forward takes the output and one float per pixel and head, the backward the gradients and one float per
pixel and head (delta). A bias and a key mask are copied into frames (`table`), and the gradient of a bias takes sums of
its own (`grad_bias`). Maps are read where they lie.
"""

import torch
from torch import Tensor

from ..maps import empty_heads
from ..rules import Rules
from . import attention as fused
from . import gpu as gpus
from . import grad_bias, native, plan, unfused
from .geometry import Span
from .gpu import padded
from .launch import LOG2E, Launch, Problem, depths, strides, tile_grid, ways, wide

TINY = 2.0**-126  # the least normal fp32: the product of less, a zero, with minus infinity is NaN


def attention(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output [B, heads, H, W, Dv] and natural log-sum-exp [B, heads, H, W] in fp32."""
    scale = rules.scale
    out = empty_heads(query, value.shape[4])
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    problem = _problem(query, key, rules)
    if native.forward(query, key, value, out, lse, problem):
        return out, lse
    launch = Launch("forward", (query,), (key, value), problem, query.shape[:4])
    q, k, v = launch.sources
    terms, constants = launch.framed(problem)
    launch(
        fused.forward_kernel,
        *(q.handle, k.handle, v.handle, out, lse, *terms),
        *(q.strides, k.strides, v.strides, *strides(out, lse[..., None], *terms)),
        *(*problem.sizes, query.shape[1]),
        *(max(abs(scale) * factor, TINY) if scale else 1.0 for factor in (LOG2E, 1.0)),
        addressed=(query, key, value, out),
        **depths(query, value),
        **ways(q=q, k=k, v=v),
        **constants,
        SIGN=(scale > 0) - (scale < 0),
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and bias; None where not wanted."""
    grad_query, grad_key, grad_value = (
        empty_heads(x, x.shape[4]) if want else None for x, want in zip((query, key, value), wanted[:3], strict=True)
    )
    problem, of_bias = _problem(query, key, rules), None
    delta = query.new_empty(query.shape[:4], dtype=torch.float32)
    maps = query, key, value, grad_out
    given = *maps, grad_lse, out, lse, delta
    made_delta = grad_query is not None and native.grad_query(*given, grad_query, problem)
    if not made_delta:
        _delta(grad_out, grad_lse, out, delta, rules)
        if grad_query is not None:
            _grad_query(*maps, lse, delta, grad_query, rules)
    inputs = *maps, lse, delta
    wants_key_value = grad_key is not None or grad_value is not None
    if wants_key_value and not native.grad_key_value(*inputs, grad_key, grad_value, problem, made_delta):
        _grad_key_value(*inputs, grad_key, grad_value, rules)
    if wanted[3]:
        of_bias = grad_bias.of_attention(*inputs, rules).to(rules.bias.dtype)
    return grad_query, grad_key, grad_value, of_bias


def _problem(at_queries: Tensor, key: Tensor, rules: Rules, until_query: bool = True) -> Problem:
    """at_queries: heads, or weights, [B, heads, H, W, ...]; key: heads [B, kv_heads, Hk, Wk, D]."""
    heads, *queries = at_queries.shape[1:4]
    return Problem(rules, heads, key.shape[1], tuple(queries), tuple(key.shape[2:4]), until_query)


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, delta: Tensor, rules: Rules) -> None:
    """Fills delta = sum(grad_out * out) - grad_lse, [B, heads, H, W] in fp32.

    Where windows are of one key the sum is dP, and dP - delta is without both, which `weight_gradient` knows.
    """
    if rules.window.slots == 1:
        delta.zero_()
        if grad_lse is not None:
            delta.sub_(grad_lse)
        return
    depth, gpu, axis = out.shape[4], gpus.of(out.device), Span(1, 0, 1)
    chosen = plan.INTERPRETED if gpu.interpreted else plan.choose("delta", "half", depth, 1, False)
    grid = tile_grid(out.shape[:4], chosen.tile, 0, (axis, axis))
    floats = [None if x is None else x[..., None] for x in (grad_lse, delta)]
    with torch.cuda.device_of(out):
        fused.delta_kernel[grid](
            *(grad_out, out, grad_lse, delta),
            *strides(grad_out, out, *floats),
            *(*out.shape[2:4], out.shape[1]),
            D=depth,
            DP=padded(depth),
            Y=axis,
            X=axis,
            TH=chosen.tile[0],
            TW=chosen.tile[1],
            FLAT=len(grid) == 1,
            STRIP=0,
            WIDE=wide((grad_out, out, *floats)),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )


def _grad_query(query, key, value, grad_out, lse, delta, grad_query, rules) -> None:
    problem = _problem(query, key, rules)
    launch = Launch("grad_query", (query, grad_out), (key, value), problem, query.shape[:4])
    q, g, k, v = launch.sources
    terms, constants = launch.framed(problem)
    launch(
        fused.grad_query_kernel,
        *(q.handle, k.handle, v.handle, g.handle, lse, delta, grad_query, *terms),
        *(q.strides, k.strides, v.strides, g.strides, *strides(lse[..., None], grad_query, *terms)),
        *(*problem.sizes, query.shape[1]),
        rules.scale * LOG2E,
        rules.scale,
        addressed=(query, key, value, grad_out, grad_query),
        **depths(query, value),
        **ways(q=q, k=k, v=v, g=g),
        **constants,
    )


def _grad_key_value(query, key, value, grad_out, lse, delta, grad_key, grad_value, rules) -> None:
    problem = _problem(query, key, rules)
    launch = Launch("grad_key_value", (key, value), (query, grad_out), problem, key.shape[:4], transposed=True)
    k, v, q, g = launch.sources
    grads = strides(lse[..., None], *(like if x is None else x for x, like in ((grad_key, key), (grad_value, value))))
    terms, constants = launch.framed(problem)
    launch(
        fused.grad_key_value_kernel,
        *(q.handle, k.handle, v.handle, g.handle, lse, delta, grad_key, grad_value, *terms),
        *(q.strides, k.strides, v.strides, g.strides, *grads, *strides(*terms)),
        *(*problem.sizes, key.shape[1], *problem.images),
        rules.scale * LOG2E,
        rules.scale,
        addressed=(query, key, value, grad_out, grad_key, grad_value),
        **depths(query, value),
        **ways(q=q, k=k, v=v, g=g),
        **constants,
        HOIST=launch.plan.hoist,
        EARLY=launch.plan.delta_early,
    )


def similarity(query: Tensor, key: Tensor, rules: Rules, absent: float) -> Tensor:
    """scale * <q, k_ij> + bias_ij, [B, heads, H, W, kH*kW]; `absent` where key ij does not take part."""
    weight = query.new_empty((*query.shape[:4], rules.window.slots))
    depth = query.shape[4]
    problem = _problem(query, key, rules, until_query=False)
    if native.similarity(query, key, weight, problem):
        return weight
    launch = Launch("unfused", (query,), (key,), problem, query.shape[:4])
    q, k = launch.sources
    launch(
        unfused.similarity_kernel,
        *(q.handle, k.handle, weight, *problem.terms),
        *(q.strides, k.strides, *strides(weight, *problem.terms)),
        *(*problem.sizes, query.shape[1]),
        rules.scale,
        absent,
        addressed=(query, key, weight),
        **ways(q=q, k=k),
        BY_DISPLACEMENT=rules.by_displacement,
        D=depth,
        DP=padded(depth),
    )
    return weight


def aggregate(weight: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """scale * sum_ij weight_ij * v_ij over the keys in the map that take part."""
    problem = _problem(weight, value, rules)
    out = empty_heads(value, value.shape[4], weight.shape[1], weight.shape[2:4])
    if native.aggregate(weight, value, out, problem):
        return out
    launch = Launch("unfused", (), (value,), problem, weight.shape[:4])
    return _weighted_sum(launch, unfused.aggregate_kernel, weight, value, out, problem.sizes, rules.scale)


def aggregate_transpose(weight: Tensor, vector: Tensor, kv_heads: int, size: tuple[int, int], rules: Rules) -> Tensor:
    """The transpose of `aggregate`: each pixel sends scale * weight_ij * vector to key ij of `kv_heads` maps."""
    batch, heads, *queries = weight.shape[:4]
    problem = Problem(rules, heads, kv_heads, tuple(queries), tuple(size), until_query=True)
    out = empty_heads(vector, vector.shape[4], kv_heads, size)
    if native.aggregate_transpose(weight, vector, out, problem):
        return out
    launch = Launch("unfused", (), (vector,), problem, (batch, kv_heads, *size), transposed=True)
    kernel, numbers = unfused.aggregate_transpose_kernel, problem.images
    return _weighted_sum(launch, kernel, weight, vector, out, problem.sizes, rules.scale, numbers)


def _weighted_sum(launch: Launch, kernel, weight, x, out, sizes, scale: float, numbers: tuple[int, ...] = ()) -> Tensor:
    (src,) = launch.sources
    launch(
        kernel,
        *(weight, src.handle, out),
        *(weight.stride(), src.strides, out.stride()),
        *(*sizes, out.shape[1], *numbers),
        scale,
        addressed=(weight, x, out),
        **ways(x=src),
        D=x.shape[4],
        DP=padded(x.shape[4]),
    )
    return out


def bias_gradient(grad: Tensor, rules: Rules, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Sums of a gradient of logits over images and pixels, in the shape of a bias; keys lie in a map of `size`."""
    return grad_bias.of_logits(grad, rules, shape, size).to(grad.dtype)
