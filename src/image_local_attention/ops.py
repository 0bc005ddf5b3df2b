"""The registered operators: schemas, implementations, fakes and autocast.

Torch only; a backend loads when it runs. Operators take maps `[B, channels, H, W]` of any strides and weights
`[B, heads, H, W, kH*kW]`, and trust their arguments: `check` has seen them. Each takes a factor `scale`, so that no
derivative needs a scaled copy; `derivatives` says what these are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .maps import accumulator, empty_map, merge_heads, split_heads
from .rules import Rules
from .window import Window

NAMESPACE = "image_local_attention"

# Pairs are (y, x). `precision`: of fp32 matrix products on a GPU, "ieee" or "tf32". `backend`: None chooses.
_WHERE = "int[] kernel_size, str[] border, int[] dilation, bool[] causal, bool raster, str precision, str? backend"
_COUNTS = "int heads, int kv_heads, float scale"
_SCHEMAS = {
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_mask, "
    f"{_COUNTS}, {_WHERE}) -> (Tensor, Tensor)",
    "attention_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_mask, "
    f"bool[] wanted, {_COUNTS}, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor)",
    # `absent` is the result where a key does not take part
    "similarity": "(Tensor query, Tensor key, Tensor? bias, Tensor? key_mask, "
    f"{_COUNTS}, float absent, {_WHERE}) -> Tensor",
    "aggregate": f"(Tensor weight, Tensor value, int kv_heads, float scale, {_WHERE}) -> Tensor",
    # `size`: of the map at the keys
    "aggregate_transpose": f"(Tensor weight, Tensor vector, int kv_heads, int[] size, float scale, {_WHERE}) -> Tensor",
    "bias_gradient": f"(Tensor grad, Tensor? key_mask, int[] shape, int[] size, {_WHERE}) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

_namespace = getattr(torch.ops, NAMESPACE)
attention = _namespace.attention.default
attention_backward = _namespace.attention_backward.default
similarity = _namespace.similarity.default
aggregate = _namespace.aggregate.default
aggregate_transpose = _namespace.aggregate_transpose.default
bias_gradient = _namespace.bias_gradient.default
OPERATORS = attention, attention_backward, similarity, aggregate, aggregate_transpose, bias_gradient


def where(window: Window, precision: str, backend: str | None) -> tuple:
    """The last arguments of every operator."""
    return window.kernel, window.border, window.dilation, window.causal, window.raster, precision, backend


def _rules(where: tuple, scale: float = 1.0, bias: Tensor | None = None, key_mask: Tensor | None = None) -> Rules:
    kernel, border, dilation, causal, raster, precision, _ = where
    window = Window(tuple(kernel), tuple(border), tuple(dilation), tuple(causal), raster)
    return Rules(window, scale, bias, key_mask, precision)


_RUNS = {}


def decompose(op, *args):
    """The operator in standard operations of torch, for an exporter that knows no others."""
    *others, _ = args
    return _RUNS[op](*others, "reference")


def _zeros(results: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return tuple(x.zero_() for x in results) if isinstance(results, tuple) else results.zero_()


def _implement(op, shape):
    """Registers a function as the op's implementation on every device, and `shape`, its fake, beside it.

    Where there are no queries the results are empty, or sums over nothing, and no backend is asked.
    """

    def register(run):
        def implementation(*args):
            return run(*args) if args[0].numel() else _zeros(shape(*args))

        torch.library.impl(op.name(), "default", implementation)
        torch.library.register_fake(op.name(), shape)
        _RUNS[op] = run
        return run

    return register


def _backend(where: tuple, x: Tensor, *depths: int):
    """The module that runs it, for maps or weights like `x`."""
    return backends.resolve(where[-1], x.device, x.dtype, max(depths))


def _attention_shape(query, key, value, bias, key_mask, heads, kv_heads, scale, *where):
    b, _, h, w = query.shape
    out = empty_map(query, value.shape[1] // kv_heads * heads)
    return out, query.new_empty((b, heads, h, w), dtype=accumulator(query.dtype))


@_implement(attention, _attention_shape)
def _attention(query, key, value, bias, key_mask, heads, kv_heads, scale, *where):
    q, k, v = split_heads(query, heads), split_heads(key, kv_heads), split_heads(value, kv_heads)
    rules = _rules(where, scale, bias, key_mask)
    module = _backend(where, q, q.shape[4], v.shape[4])
    out, lse = module.attention(q, k, v, rules)
    return merge_heads(out), lse


def _attention_backward_shape(
    grad_out, grad_lse, out, lse, query, key, value, bias, key_mask, wanted, heads, kv_heads, scale, *where
):
    maps = zip((query, key, value), wanted[:3], strict=True)
    grads = [empty_map(x, x.shape[1]) if want else x.new_empty(0) for x, want in maps]
    return *grads, bias.new_empty(bias.shape) if wanted[3] else query.new_empty(0)


@_implement(attention_backward, _attention_backward_shape)
def _attention_backward(
    grad_out, grad_lse, out, lse, query, key, value, bias, key_mask, wanted, heads, kv_heads, scale, *where
):
    g, q, o = (split_heads(x, heads) for x in (grad_out, query, out))
    k, v = split_heads(key, kv_heads), split_heads(value, kv_heads)
    rules = _rules(where, scale, bias, key_mask)
    module = _backend(where, q, q.shape[4], v.shape[4])
    *grads, grad_bias = module.attention_backward(g, grad_lse, q, k, v, o, lse, tuple(wanted), rules)
    grads = [query.new_empty(0) if grad is None else merge_heads(grad) for grad in grads]
    return *grads, query.new_empty(0) if grad_bias is None else grad_bias


def _similarity_shape(query, key, bias, key_mask, heads, kv_heads, scale, absent, kernel_size, *where):
    b, _, h, w = query.shape
    return query.new_empty((b, heads, h, w, kernel_size[0] * kernel_size[1]))


@_implement(similarity, _similarity_shape)
def _similarity(query, key, bias, key_mask, heads, kv_heads, scale, absent, *where):
    q, k = split_heads(query, heads), split_heads(key, kv_heads)
    rules = _rules(where, scale, bias, key_mask)
    module = _backend(where, q, q.shape[4])
    return module.similarity(q, k, rules, absent)


def _aggregate_shape(weight, value, kv_heads, scale, *where):
    heads, *size = weight.shape[1:4]
    return empty_map(value, value.shape[1] // kv_heads * heads, size)


@_implement(aggregate, _aggregate_shape)
def _aggregate(weight, value, kv_heads, scale, *where):
    v, rules = split_heads(value, kv_heads), _rules(where, scale)
    module = _backend(where, weight, v.shape[4])
    return merge_heads(module.aggregate(weight, v, rules))


def _aggregate_transpose_shape(weight, vector, kv_heads, size, scale, *where):
    return empty_map(vector, vector.shape[1] // weight.shape[1] * kv_heads, size)


@_implement(aggregate_transpose, _aggregate_transpose_shape)
def _aggregate_transpose(weight, vector, kv_heads, size, scale, *where):
    x, rules = split_heads(vector, weight.shape[1]), _rules(where, scale)
    module = _backend(where, weight, x.shape[4])
    return merge_heads(module.aggregate_transpose(weight, x, kv_heads, tuple(size), rules))


def _bias_gradient_shape(grad, key_mask, shape, size, *where):
    return grad.new_empty(shape)


@_implement(bias_gradient, _bias_gradient_shape)
def _bias_gradient(grad, key_mask, shape, size, *where):
    rules = _rules(where, key_mask=key_mask)
    module = _backend(where, grad, 1)
    return module.bias_gradient(grad, rules, tuple(shape), tuple(size))


def autocasts(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def autocast(device_type: str, args: Sequence) -> list:
    """Floating maps, weights and biases, fp64 excepted, in the dtype that the user's autocast asks for."""
    dtype = torch.get_autocast_dtype(device_type)
    return [x.to(dtype) if autocasts(x) else x for x in args]


def _register_autocast(op, device_type: str, key: str) -> None:
    def cast(*args):
        args = autocast(device_type, args)
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    torch.library.impl(op.name(), key, cast)


for _op in (attention, similarity, aggregate, aggregate_transpose):
    for _device_type, _key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        _register_autocast(_op, _device_type, _key)
