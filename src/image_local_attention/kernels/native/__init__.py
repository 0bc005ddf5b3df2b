"""CUDA C++ kernels for windows that slide over the map pixel by pixel.

They compute what the kernels of `attention` and `unfused` do in Triton, which serve all that these do not, and are
compiled at run time by the NVRTC that torch brings along. Each entry point says whether it served the call.
"""

from torch import Tensor

from ..launch import LOG2E, Problem
from ..source import ALIGNMENT
from .launch import native, portable, using

__all__ = [
    "aggregate",
    "aggregate_transpose",
    "forward",
    "grad_key_value",
    "grad_query",
    "portable",
    "similarity",
    "using",
]

_SIGNS = {2: 0x8000_8000, 4: 0x8000_0000}  # bits of a word, by bytes of a number


def forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> bool:
    """Fills `out` and its log-sum-exp [B, heads, H, W], contiguous."""
    maps = query, key, value, out
    launch = native("forward", problem, maps)
    if launch is None:
        return False
    heads, h, w = query.shape[1:4]
    launch(maps, lse.data_ptr(), h, w, heads, _factor(query, problem), _flip(query, problem))
    return True


def grad_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad: Tensor,
    problem: Problem,
) -> bool:
    """Fills the gradient of the query, and delta = sum(grad_out * out) - grad_lse [B, heads, H, W], contiguous."""
    if not _contiguous(lse, grad_lse) or problem.rules.window.slots == 1:
        return False
    maps = query, key, value, grad_out, out, grad
    launch = native("grad_query", problem, maps)
    if launch is None:
        return False
    pointers = (0 if x is None else x.data_ptr() for x in (lse, grad_lse, delta))
    launch(maps, *pointers, *_sizes_and_scales(query, problem))
    return True


def grad_key_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    problem: Problem,
    after_grad_query: bool,
) -> bool:
    """Fills the gradients of key and value, where both are wanted.

    after_grad_query: the last launch was that of `grad_query` over the same maps, so that only delta is waited for.
    """
    if grad_key is None or grad_value is None or not _contiguous(lse) or problem.rules.window.slots == 1:
        return False
    maps = query, key, value, grad_out, grad_key, grad_value
    launch = native("grad_key_value", problem, maps)
    if launch is None:
        return False
    launch(maps, lse.data_ptr(), delta.data_ptr(), *_sizes_and_scales(query, problem), after_grad_query)
    return True


def similarity(query: Tensor, key: Tensor, weight: Tensor, problem: Problem) -> bool:
    """Fills weights [B, heads, H, W, kH*kW]."""
    return _unfused("similarity", (query, key), weight, problem)


def aggregate(weight: Tensor, value: Tensor, out: Tensor, problem: Problem) -> bool:
    """Fills the weighted sums of values."""
    return _unfused("aggregate", (value, out), weight, problem)


def aggregate_transpose(weight: Tensor, vector: Tensor, out: Tensor, problem: Problem) -> bool:
    """Fills what keys gather of vectors at queries."""
    return _unfused("aggregate_transpose", (vector, out), weight, problem)


def _unfused(task: str, maps: tuple[Tensor, Tensor], weight: Tensor, problem: Problem) -> bool:
    if weight.dtype != maps[0].dtype or not weight.is_contiguous() or weight.data_ptr() % ALIGNMENT:
        return False
    launch = native(task, problem, maps)
    if launch is None:
        return False
    heads, h, w = maps[0].shape[1:4]
    launch(maps, weight.data_ptr(), h, w, heads, problem.rules.scale)
    return True


def _sizes_and_scales(query: Tensor, problem: Problem) -> tuple[float, ...]:
    heads, h, w = query.shape[1:4]
    return h, w, heads, _factor(query, problem), problem.rules.scale, _flip(query, problem)


def _factor(query: Tensor, problem: Problem) -> float:
    """Of products: to logits in powers of two, or, of fp32, natural ones."""
    return abs(problem.rules.scale) * (LOG2E if query.element_size() == 2 else 1.0)


def _flip(query: Tensor, problem: Problem) -> int:
    """The sign bits of a word of a map where logits have the sign that their products have not."""
    return _SIGNS[query.element_size()] if problem.rules.scale < 0 else 0


def _contiguous(*floats: Tensor | None) -> bool:
    return all(x is None or x.is_contiguous() for x in floats)
