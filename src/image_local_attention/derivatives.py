"""How the operators differentiate, and the functions that take part in it.

The primitives are closed under differentiation, so the unfused operators have derivatives of every order:

    similarity(q, k, bias)      dq = aggregate(dW, k)     dk = aggregate_transpose(dW, q)     dbias = bias_gradient(dW)
    aggregate(W, v)             dW = similarity(dO, v)    dv = aggregate_transpose(W, dO)
    aggregate_transpose(W, x)   dW = similarity(x, dY)    dx = aggregate(W, dY)
    bias_gradient(W)            dW = similarity(0, 0, dBias)

The first derivative of the fused operator is fused; the second, and forward mode, go through the unfused ones.

Compiled graphs hold the registered operators of `ops`. Eager code calls these inside autograd Functions, which
torch.func differentiates in both modes and batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import batching, ops
from .maps import accumulator, memory_format

_AUTOCASTS = ("cuda", "cpu")  # the devices whose autocast the operators follow


def attention(*args) -> tuple[Tensor, Tensor]:
    """`ops.attention`, fused as long as no forward-mode derivative is taken."""
    args = _autocast(args)
    if not torch.compiler.is_compiling() and forward_mode():
        return unfused_attention(*args)
    return _call(ops.attention, *args)


def attention_backward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _call(ops.attention_backward, *args)


def similarity(*args) -> Tensor:
    return _call(ops.similarity, *_autocast(args))


def aggregate(*args) -> Tensor:
    return _call(ops.aggregate, *_autocast(args))


def aggregate_transpose(*args) -> Tensor:
    return _call(ops.aggregate_transpose, *_autocast(args))


def bias_gradient(*args) -> Tensor:
    return _call(ops.bias_gradient, *args)


def _call(op, *args):
    if torch.compiler.is_compiling():
        return ops.decompose(op, *args) if torch.onnx.is_in_onnx_export() else op(*args)
    function, count = _FUNCTIONS[op]
    return function.apply(*args[:count], _Static(args[count:]))


@dataclass(frozen=True)
class _Static:
    """The arguments behind the tensors, as one: a tree of them would want gradients of its shape."""

    args: tuple


def forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken, of whatever tensor."""
    return forward_ad._current_level >= 0


def _autocast(args: tuple) -> tuple | list:
    """Eager code casts before the Function, which so gets the gradients of what it computed with."""
    device_type = args[0].device.type
    if torch.compiler.is_compiling() or device_type not in _AUTOCASTS:
        return args
    return ops.autocast(device_type, args) if torch.is_autocast_enabled(device_type) else args


def unfused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    *where,
) -> tuple[Tensor, Tensor]:
    """What `attention` computes, through the weight map: output and log-sum-exp, differentiable any number of times."""
    weight, lse = _softmax(similarity(query, key, bias, key_mask, heads, kv_heads, scale, float("-inf"), *where))
    return aggregate(weight.to(value.dtype), value, kv_heads, 1.0, *where), lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the slots; 0 and -inf where no slot takes part."""
    logits = logits.to(accumulator(logits.dtype))
    nothing = (logits == float("-inf")).all(-1)
    logits = logits.masked_fill(nothing[..., None], 0.0)
    weight = logits.softmax(-1).masked_fill(nothing[..., None], 0.0)
    return weight, logits.logsumexp(-1).masked_fill(nothing, float("-inf"))


class Terms(NamedTuple):
    """The arguments of `attention` behind the maps and the bias."""

    key_mask: Tensor | None
    heads: int
    kv_heads: int
    scale: float
    where: tuple

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What `attention_backward` computes, through the weight map, in differentiable steps."""
        mask, size = self.key_mask, key.shape[2:]
        terms = self.heads, self.kv_heads, self.scale
        weight, _ = _softmax(similarity(query, key, bias, mask, *terms, float("-inf"), *self.where))
        grad_weight = similarity(grad_out, value, None, None, self.heads, self.kv_heads, 1.0, 0.0, *self.where)
        delta = (weight * grad_weight).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[..., None]
        grad_logit = (weight * (grad_weight - delta)).to(query.dtype)
        return (
            aggregate(grad_logit, key, self.kv_heads, self.scale, *self.where),
            aggregate_transpose(grad_logit, query, self.kv_heads, size, self.scale, *self.where),
            aggregate_transpose(weight.to(query.dtype), grad_out, self.kv_heads, size, 1.0, *self.where),
            None if bias is None else bias_gradient(grad_logit, mask, bias.shape, size, *self.where),
        )


def _save(ctx, *tensors: Tensor | None) -> None:
    """What is saved for forward mode outlives the backward pass, so it is saved only there."""
    ctx.save_for_backward(*tensors)
    if forward_mode():
        ctx.save_for_forward(*tensors)


def _save_attention(ctx, inputs, output) -> None:
    query, key, value, bias, key_mask, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, key_mask, *output)


def _differentiate_attention(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * (5 + len(ctx.options))
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = list(ctx.needs_input_grad[:4])
    grads = attention_backward(grad_out, grad_lse, out, lse, *inputs, wanted, *ctx.options)
    grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *grads, None, *(None,) * len(ctx.options)


def _save_attention_backward(ctx, inputs, output) -> None:
    grad_out, grad_lse, _, _, query, key, value, bias, key_mask, ctx.wanted, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out, grad_lse, query, key, value, bias, key_mask)


def _differentiate_attention_backward(ctx, *grads):
    """Output and log-sum-exp, which were inputs too, follow from the others and have no gradient of their own."""
    *inputs, key_mask = ctx.saved_tensors
    used = [i for i, (grad, want) in enumerate(zip(grads, ctx.wanted, strict=True)) if want and grad is not None]
    results = [None] * len(inputs)
    if used:
        heads, kv_heads, scale, *where = ctx.options
        terms = Terms(key_mask, heads, kv_heads, scale, tuple(where))
        there = [i for i, x in enumerate(inputs) if x is not None]

        def backward(*given: Tensor) -> tuple[Tensor, ...]:
            full = dict(zip(there, given, strict=True))
            computed = terms.backward(*(full.get(i) for i in range(len(inputs))))
            return tuple(computed[i] for i in used)

        _, pull = torch.func.vjp(backward, *(inputs[i] for i in there))
        for i, grad in zip(there, pull(tuple(grads[i] for i in used)), strict=True):
            results[i] = grad
    grad_out, grad_lse, *others = results
    return grad_out, grad_lse, None, None, *others, *(None,) * (2 + len(ctx.options))


def _save_similarity(ctx, inputs, output) -> None:
    query, key, bias, key_mask, ctx.heads, ctx.kv_heads, ctx.scale, _, *ctx.where = inputs
    ctx.bias_shape = None if bias is None else bias.shape
    _save(ctx, query, key, key_mask)


def _differentiate_similarity(ctx, grad):
    query, key, key_mask = ctx.saved_tensors
    options, size = (ctx.scale, *ctx.where), key.shape[2:]
    grad_query = grad_key = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_query = aggregate(grad, _there(key, key_mask), ctx.kv_heads, *options)
    if ctx.needs_input_grad[1]:
        grad_key = _there(aggregate_transpose(grad, query, ctx.kv_heads, size, *options), key_mask)
    if ctx.needs_input_grad[2]:
        grad_bias = bias_gradient(grad, key_mask, ctx.bias_shape, size, *ctx.where)
    return grad_query, grad_key, grad_bias, *(None,) * (5 + len(ctx.where))


def _push_similarity(ctx, query_tangent, key_tangent, bias_tangent, *_):
    query, key, key_mask = ctx.saved_tensors
    options = key_mask, ctx.heads, ctx.kv_heads, ctx.scale, 0.0, *ctx.where
    parts = []
    if query_tangent is not None:
        parts.append(similarity(query_tangent, key, None, *options))
    if key_tangent is not None:
        parts.append(similarity(query, key_tangent, None, *options))
    if bias_tangent is not None:
        parts.append(_spread(bias_tangent, key_mask, ctx.heads, query, key.shape[2:], ctx.where))
    return _sum(parts)


def _there(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """A map at the keys, 0 where a key does not take part, in its memory format."""
    if key_mask is None:
        return x
    return x.masked_fill(~key_mask[:, None], 0.0).contiguous(memory_format=memory_format(x))


def _spread(bias: Tensor, key_mask: Tensor | None, heads: int, query: Tensor, size, where) -> Tensor:
    """The bias of every query and key that takes part: the transpose of `bias_gradient`."""
    nothing = bias.new_zeros(())
    query, key = nothing.expand(query.shape[0], heads, *query.shape[2:]), nothing.expand(query.shape[0], 1, *size)
    return similarity(query, key, bias, key_mask, heads, 1, 0.0, 0.0, *where)


def _sum(parts: list[Tensor]) -> Tensor:
    total, *others = parts
    for part in others:
        total = total + part
    return total


def _save_pair(ctx, inputs, output) -> None:
    weight, x, *ctx.options = inputs
    _save(ctx, weight, x)


def _differentiate_aggregate(ctx, grad):
    weight, value = ctx.saved_tensors
    kv_heads, *options = ctx.options
    grad_weight = _grad_weight(weight, grad, value, kv_heads, *options) if ctx.needs_input_grad[0] else None
    grad_value = None
    if ctx.needs_input_grad[1]:
        grad_value = aggregate_transpose(weight, grad, kv_heads, value.shape[2:], *options)
    return grad_weight, grad_value, *(None,) * len(ctx.options)


def _differentiate_aggregate_transpose(ctx, grad):
    weight, vector = ctx.saved_tensors
    kv_heads, _, *options = ctx.options
    grad_weight = _grad_weight(weight, vector, grad, kv_heads, *options) if ctx.needs_input_grad[0] else None
    grad_vector = aggregate(weight, grad, kv_heads, *options) if ctx.needs_input_grad[1] else None
    return grad_weight, grad_vector, *(None,) * len(ctx.options)


def _grad_weight(weight: Tensor, at_query: Tensor, at_key: Tensor, kv_heads: int, scale: float, *where) -> Tensor:
    """Of both aggregations: the product of the map at the queries and the map at the keys, 0 where no key is."""
    return similarity(at_query, at_key, None, None, weight.shape[1], kv_heads, scale, 0.0, *where)


def _push_pair(apply: Callable) -> Callable:
    """The tangent of an operator that is linear in each of two tensors."""

    def push(ctx, weight_tangent, x_tangent, *_):
        weight, x = ctx.saved_tensors
        pairs = (weight_tangent, x), (weight, x_tangent)
        return _sum([apply(*pair, *ctx.options) for pair in pairs if pair[0] is not None and pair[1] is not None])

    return push


def _save_bias_gradient(ctx, inputs, output) -> None:
    grad, key_mask, ctx.bias_shape, ctx.size, *ctx.where = inputs
    ctx.shape = grad.shape
    _save(ctx, key_mask)


def _differentiate_bias_gradient(ctx, bias):
    (key_mask,) = ctx.saved_tensors
    batch, heads, *queries, _ = ctx.shape
    query = bias.new_zeros(()).expand(batch, heads, *queries)
    return _spread(bias, key_mask, heads, query, ctx.size, ctx.where), *(None,) * (3 + len(ctx.where))


def _push_bias_gradient(ctx, tangent, *_):
    return bias_gradient(tangent, *ctx.saved_tensors, ctx.bias_shape, ctx.size, *ctx.where)


_FUNCTIONS: dict[object, tuple[type[torch.autograd.Function], int]] = {}  # and how many tensors come first


def _function(op, save: Callable, differentiate: Callable, push: Callable | None = None) -> None:
    """An autograd Function that calls an operator; the operator by itself gets the same derivative.

    push: the tangent of the result, from those of the arguments.
    """
    count = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            *tensors, static = args
            device_type = tensors[0].device.type
            if device_type not in _AUTOCASTS or not torch.is_autocast_enabled(device_type):
                return op(*tensors, *static.args)
            with torch.autocast(device_type, enabled=False):  # what was to be cast has been
                return op(*tensors, *static.args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            *tensors, static = inputs
            save(ctx, (*tensors, *static.args), output)

        @staticmethod
        def backward(ctx, *grads):
            return *differentiate(ctx, *grads)[:count], None

    if push:
        Function.jvp = staticmethod(push)
    torch.library.register_autograd(op.name(), differentiate, setup_context=save)
    _FUNCTIONS[op] = Function, count


batching.register()
_function(ops.attention, _save_attention, _differentiate_attention)
_function(ops.attention_backward, _save_attention_backward, _differentiate_attention_backward)
_function(ops.similarity, _save_similarity, _differentiate_similarity, _push_similarity)
_function(ops.aggregate, _save_pair, _differentiate_aggregate, _push_pair(aggregate))
_function(ops.aggregate_transpose, _save_pair, _differentiate_aggregate_transpose, _push_pair(aggregate_transpose))
_function(ops.bias_gradient, _save_bias_gradient, _differentiate_bias_gradient, _push_bias_gradient)
