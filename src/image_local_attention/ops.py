"""The registered operators: schemas, fakes, derivatives and autocast. Torch only; a backend loads when it runs.

Operators take maps `[B, channels, H, W]` of any strides and weights `[B, heads, H, W, kH*kW]`, and trust their
arguments: `check` has seen them. The three primitives are closed under differentiation, so the unfused
operators have derivatives of every order:

    similarity(q, k)            dq = aggregate(dW, k)     dk = aggregate_transpose(dW, q)
    aggregate(W, v)             dW = similarity(dO, v)    dv = aggregate_transpose(W, dO)
    aggregate_transpose(W, x)   dW = similarity(x, dY)    dx = aggregate(W, dY)

Each takes a factor `scale`, so that no derivative needs a scaled copy.
"""

import torch
from torch import Tensor

from . import backends
from .maps import accumulator, empty_map, merge_heads, split_heads
from .window import Window

NAMESPACE = "image_local_attention"

# `precision`: of fp32 matrix products on a GPU, "ieee" or "tf32". `backend`: None chooses.
_WHERE = "int[] kernel_size, str border, str precision, str? backend"
_SCHEMAS = {
    "attention": f"(Tensor query, Tensor key, Tensor value, int heads, float scale, {_WHERE}) -> (Tensor, Tensor)",
    "attention_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, bool[] wanted, int heads, float scale, {_WHERE}) -> (Tensor, Tensor, Tensor)",
    # `absent` is the result where a key does not take part
    "similarity": f"(Tensor query, Tensor key, int heads, float scale, float absent, {_WHERE}) -> Tensor",
    "aggregate": f"(Tensor weight, Tensor value, float scale, {_WHERE}) -> Tensor",
    "aggregate_transpose": f"(Tensor weight, Tensor vector, float scale, {_WHERE}) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

_namespace = getattr(torch.ops, NAMESPACE)
attention = _namespace.attention.default
attention_backward = _namespace.attention_backward.default
similarity = _namespace.similarity.default
aggregate = _namespace.aggregate.default
aggregate_transpose = _namespace.aggregate_transpose.default


def _implement(op, shape):
    """Registers a function as the op's implementation on every device, and `shape`, its fake, beside it.

    Where the results are empty the fake's are the answer, and no backend is asked.
    """

    def register(run):
        def implementation(*args):
            first = args[0]
            return shape(*args) if first.numel() == 0 else run(*args)

        torch.library.impl(op.name(), "default", implementation)
        torch.library.register_fake(op.name(), shape)
        return run

    return register


def _empty_lse(query: Tensor, heads: int) -> Tensor:
    b, _, h, w = query.shape
    return query.new_empty((b, heads, h, w), dtype=accumulator(query.dtype))


def _attention_shape(query, key, value, heads, scale, kernel_size, border, precision, backend):
    return empty_map(query, value.shape[1]), _empty_lse(query, heads)


@_implement(attention, _attention_shape)
def _attention(query, key, value, heads, scale, kernel_size, border, precision, backend):
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    module = backends.resolve(backend, query.device, query.dtype, max(q.shape[-1], v.shape[-1]))
    out, lse = module.attention(q, k, v, Window(tuple(kernel_size), border), scale, precision)
    return merge_heads(out), lse


def _attention_backward_shape(
    grad_out, grad_lse, query, key, value, out, lse, wanted, heads, scale, kernel_size, border, precision, backend
):
    maps = zip((query, key, value), wanted, strict=True)
    return tuple(empty_map(x, x.shape[1]) if want else x.new_empty(0) for x, want in maps)


@_implement(attention_backward, _attention_backward_shape)
def _attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, wanted, heads, scale, kernel_size, border, precision, backend
):
    g, q, k, v, o = (split_heads(x, heads) for x in (grad_out, query, key, value, out))
    module = backends.resolve(backend, query.device, query.dtype, max(q.shape[-1], v.shape[-1]))
    window = Window(tuple(kernel_size), border)
    grads = module.attention_backward(g, grad_lse, q, k, v, o, lse, tuple(wanted), window, scale, precision)
    return tuple(query.new_empty(0) if grad is None else merge_heads(grad) for grad in grads)


def _similarity_shape(query, key, heads, scale, absent, kernel_size, border, precision, backend):
    b, _, h, w = query.shape
    return query.new_empty((b, heads, h, w, kernel_size[0] * kernel_size[1]))


@_implement(similarity, _similarity_shape)
def _similarity(query, key, heads, scale, absent, kernel_size, border, precision, backend):
    q, k = split_heads(query, heads), split_heads(key, heads)
    module = backends.resolve(backend, query.device, query.dtype, q.shape[-1])
    return module.similarity(q, k, Window(tuple(kernel_size), border), scale, absent, precision)


def _aggregate_shape(weight, value, scale, kernel_size, border, precision, backend):
    return empty_map(value, value.shape[1])


@_implement(aggregate, _aggregate_shape)
def _aggregate(weight, value, scale, kernel_size, border, precision, backend):
    v = split_heads(value, weight.shape[1])
    module = backends.resolve(backend, value.device, value.dtype, v.shape[-1])
    return merge_heads(module.aggregate(weight, v, Window(tuple(kernel_size), border), scale, precision))


@_implement(aggregate_transpose, _aggregate_shape)
def _aggregate_transpose(weight, vector, scale, kernel_size, border, precision, backend):
    x = split_heads(vector, weight.shape[1])
    module = backends.resolve(backend, vector.device, vector.dtype, x.shape[-1])
    return merge_heads(module.aggregate_transpose(weight, x, Window(tuple(kernel_size), border), scale, precision))


def _save_attention(ctx, inputs, output):
    query, key, value, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output)


def _differentiate_attention(ctx, grad_out, grad_lse):
    query, key, value, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * (3 + len(ctx.options))
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = list(ctx.needs_input_grad[:3])
    grads = attention_backward(grad_out, grad_lse, query, key, value, out, lse, wanted, *ctx.options)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * len(ctx.options)


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "local_attention has no second derivative yet: take local_similarity, softmax and local_aggregate, "
        "which have derivatives of every order"
    )


def _save_similarity(ctx, inputs, output):
    query, key, ctx.heads, ctx.scale, _, *ctx.where = inputs
    ctx.save_for_backward(query, key)


def _differentiate_similarity(ctx, grad):
    query, key = ctx.saved_tensors
    options = ctx.scale, *ctx.where
    grad_query = aggregate(grad, key, *options) if ctx.needs_input_grad[0] else None
    grad_key = aggregate_transpose(grad, query, *options) if ctx.needs_input_grad[1] else None
    return grad_query, grad_key, None, None, None, *(None,) * len(ctx.where)


def _save_pair(ctx, inputs, output):
    weight, x, *ctx.options = inputs
    ctx.save_for_backward(weight, x)


def _differentiate_aggregate(ctx, grad):
    weight, value = ctx.saved_tensors
    grad_weight = _grad_weight(ctx, grad, value) if ctx.needs_input_grad[0] else None
    grad_value = aggregate_transpose(weight, grad, *ctx.options) if ctx.needs_input_grad[1] else None
    return grad_weight, grad_value, *(None,) * len(ctx.options)


def _differentiate_aggregate_transpose(ctx, grad):
    weight, vector = ctx.saved_tensors
    grad_weight = _grad_weight(ctx, vector, grad) if ctx.needs_input_grad[0] else None
    grad_vector = aggregate(weight, grad, *ctx.options) if ctx.needs_input_grad[1] else None
    return grad_weight, grad_vector, *(None,) * len(ctx.options)


def _grad_weight(ctx, at_query, at_key):
    """Of both aggregations: the product of the map at the queries and the map at the keys, 0 where no key is."""
    scale, *where = ctx.options
    return similarity(at_query, at_key, ctx.saved_tensors[0].shape[1], scale, 0.0, *where)


torch.library.register_autograd(attention.name(), _differentiate_attention, setup_context=_save_attention)
torch.library.register_autograd(attention_backward.name(), _refuse_double_backward)
torch.library.register_autograd(similarity.name(), _differentiate_similarity, setup_context=_save_similarity)
torch.library.register_autograd(aggregate.name(), _differentiate_aggregate, setup_context=_save_pair)
torch.library.register_autograd(
    aggregate_transpose.name(), _differentiate_aggregate_transpose, setup_context=_save_pair
)


def _autocast(op, device_type: str):
    """Casts floating maps and weights, fp64 excepted, to the dtype that the user's autocast asks for."""

    def cast(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*(x.to(dtype) if autocasts(x) else x for x in args))

    return cast


def autocasts(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


for _op in (attention, similarity, aggregate, aggregate_transpose):
    for _device_type, _key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        torch.library.impl(_op.name(), _key, _autocast(_op, _device_type))
