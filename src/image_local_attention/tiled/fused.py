"""Fused attention over tiles: forward, and a backward that computes the weights again."""

import math

import torch
from torch import Tensor

from ..maps import accumulator, empty_heads
from ..rules import Rules
from .plan import Plan, Work, cut
from .products import at_keys, at_queries, head_bias, key_map, multiply, parts
from .scores import Absent, BiasSums, Logits, Terms
from .strips import key_strip, key_sums, query_strip

LOG2_E = math.log2(math.e)


def attention(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output [B, heads, H, W, Dv] and natural log-sum-exp [B, heads, H, W] of the softmax over each window."""
    out = empty_heads(query, value.shape[-1])
    lse = out.new_empty(out.shape[:4], dtype=accumulator(out.dtype))
    plan = _plan(query, value, rules, products=2, reads=4, key_maps=2, sends=0)
    q, o, log_sum = (at_queries(x, key.shape[1]) for x in (query, out, lse[..., None]))
    k, v = at_keys(key), at_keys(value)
    for part in parts(plan, q, k, v, o, log_sum, key_map(rules, k), head_bias(rules.bias, q)):
        _attend(plan, rules, *part)
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
    """Gradients of query, key, value and bias, by dS = P * (dP - delta + dlse) with delta = sum(grad_out * out)."""
    inputs = query, key, value
    dq, dk, dv = (empty_heads(x, x.shape[-1]) if want else None for x, want in zip(inputs, wanted[:3], strict=True))
    dbias = lse.new_zeros(rules.bias.shape) if wanted[3] else None
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    kv_heads = key.shape[1]
    q, g, o = (at_queries(x, kv_heads) for x in (query, grad_out, out))
    log_sum, delta = (at_queries(x[..., None], kv_heads) for x in (lse, grad_lse))
    k, v = at_keys(key), at_keys(value)
    results = (
        None if dq is None else at_queries(dq, kv_heads),
        None if dk is None else at_keys(dk),
        None if dv is None else at_keys(dv),
        None if dbias is None else head_bias(dbias, q),
    )
    plan = _plan(query, value, rules, products=5, reads=8, key_maps=4, sends=2)
    for part in parts(plan, q, k, v, o, log_sum, g, delta, key_map(rules, k), head_bias(rules.bias, q), *results):
        _differentiate(plan, rules, *part[:-4], part[-4:])
    return dq, dk, dv, None if dbias is None else dbias.to(rules.bias.dtype)


def _plan(query: Tensor, value: Tensor, rules: Rules, **work: int) -> Plan:
    batch, heads, *queries, depth = query.shape
    kv_heads, *size = value.shape[1:4]
    depth = (depth + value.shape[-1] + 1) // 2
    return cut(rules.window, tuple(queries), tuple(size), heads // kv_heads, batch * kv_heads, Work(depth, **work))


def _logits(plan: Plan, rules: Rules, masked: Tensor | None, bias: Tensor | None, like: Tensor) -> Logits:
    scores = like.new_empty((plan.group * plan.chunk, *plan.scores[::-1])).mT
    terms = Terms(plan, None if bias is None else bias[0], rules.by_displacement, like)
    return Logits(rules.scale, terms, Absent(plan, masked, like), scores)


def _attend(
    plan: Plan,
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    masked: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Writes `out` and `lse` [b, h, folded, H, W, 1] of some heads and images."""
    q, o, log_sum = (query_strip(plan, x, lse) for x in (query, out, lse))
    k, v = (key_strip(plan, x, lse) for x in (key, value))
    logits = _logits(plan, rules, masked, bias, lse)
    lowest = torch.finfo(lse.dtype).min  # of a query without any key: subtracted from -inf it leaves -inf
    for strip in plan.strips:
        for there in (q, k, v, logits.absent):
            there.load(strip)
        for chunk in plan.chunks:
            weight = logits(q.tiles(chunk), k.tiles(chunk), chunk, strip, float("-inf"))  # [N, M, K]
            top = weight.amax(-1, keepdim=True).clamp_(min=lowest)  # [N, M, 1]
            total = exponential_(weight, top).sum(-1, keepdim=True)  # 1 and more; 0 without any key
            result = o.tiles(chunk)
            multiply(weight, v.tiles(chunk), result)
            result.div_(total.clamp(min=1.0))
            torch.add(top, total.log_(), out=log_sum.tiles(chunk))
        for there in (o, log_sum):
            there.store(strip)


def _differentiate(
    plan: Plan,
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    masked: Tensor | None,
    bias: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Writes those gradients of some heads and images that are not None, and adds to that of the bias."""
    q, g, o, delta = (query_strip(plan, x, lse) for x in (query, grad_out, out, grad_lse))
    log_sum = query_strip(plan, lse, lse, fill=float("inf"))  # what is no query has no weights, whatever the bias
    k, v = (key_strip(plan, x, lse) for x in (key, value))
    dq = None if grads[0] is None else query_strip(plan, grads[0], lse)
    dk, dv = (None if grad is None else key_sums(plan, grad, lse) for grad in grads[1:3])
    dbias = None if grads[3] is None else BiasSums(plan, grads[3][0], rules.by_displacement)
    logits = _logits(plan, rules, masked, bias, lse)
    products = torch.empty_like(logits.scores)
    for strip in plan.strips:
        for there in (q, g, o, log_sum, delta, k, v, logits.absent):
            there.load(strip)
        delta.pixels.neg_().add_(o.pixels.mul_(g.pixels).sum(-1, keepdim=True))
        log_sum.pixels.clamp_(min=torch.finfo(lse.dtype).min)  # as in the forward
        for chunk in plan.chunks:
            queries, keys, grad = q.tiles(chunk), k.tiles(chunk), g.tiles(chunk)
            weight = exponential_(logits(queries, keys, chunk, strip, float("-inf")), log_sum.tiles(chunk))  # [N, M, K]
            if dv:
                dv.send(chunk, weight, grad)
            if dq or dk or dbias:
                grad_logit = products[: len(weight)]
                multiply(grad, v.tiles(chunk).mT, grad_logit)
                grad_logit.sub_(delta.tiles(chunk)).mul_(weight)
            if dq:
                multiply(grad_logit, keys, dq.tiles(chunk), rules.scale)
            if dk:
                dk.send(chunk, grad_logit, queries, rules.scale)
            if dbias:
                dbias.add(grad_logit, chunk, strip)
        if dq:
            dq.store(strip)
        for sums in (dk, dv):
            if sums:
                sums.flush(strip)
    if dbias:
        dbias.flush()


def exponential_(logits: Tensor, offset: Tensor) -> Tensor:
    """exp(logits - offset), in place. On a CPU, torch.exp is some twenty times slower where it gives 0; exp2 is not."""
    return logits.sub_(offset).mul_(LOG2_E).exp2_()
