"""Fused attention over tiles: forward, and a backward that computes the weights again."""

import math

import torch
from torch import Tensor

from ..maps import accumulator, empty_heads
from ..window import Window
from .plan import Plan, Work, cut
from .scores import fill_outside_map, outside_window
from .strips import Strip, Sums, multiply, parts

LOG2_E = math.log2(math.e)


def attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, scale: float, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Output [B, heads, H, W, Dv] and natural log-sum-exp [B, heads, H, W] of the softmax over each window."""
    out = empty_heads(query, value.shape[-1])
    lse = out.new_empty(out.shape[:4], dtype=accumulator(out.dtype))
    plan = _plan(query, value, window, products=2, reads=4, key_maps=2, sends=0)
    for maps in parts(plan, query, key, value, out, lse[..., None]):
        _attend(plan, scale, *maps)
    return out, lse


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
    inputs = query, key, value
    grads = [empty_heads(x, x.shape[-1]) if want else None for x, want in zip(inputs, wanted, strict=True)]
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    plan = _plan(query, value, window, products=5, reads=8, key_maps=4, sends=2)
    maps = grad_out, grad_lse[..., None], *inputs, out, lse[..., None]
    for part in parts(plan, *maps, *(grad for grad in grads if grad is not None)):
        results = iter(part[len(maps) :])
        _differentiate(plan, scale, *part[: len(maps)], tuple(next(results) if want else None for want in wanted))
    return tuple(grads)


def _plan(query: Tensor, value: Tensor, window: Window, **work: int) -> Plan:
    batch, heads, *size, depth = query.shape
    depth = (depth + value.shape[-1] + 1) // 2
    return cut(window, tuple(size), batch * heads, Work(depth, **work))


def _attend(plan: Plan, scale: float, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
    """Writes `out` and `lse` [b, h, H, W, 1] of some heads and images."""
    q, o, log_sum = (Strip(plan.queries, x, lse) for x in (query, out, lse))
    k, v = (Strip(plan.keys, x, lse) for x in (key, value))
    logits = Logits(plan, scale, lse)
    for first in plan.strips:
        for strip in (q, k, v):
            strip.load(first)
        for chunk in plan.chunks:
            weight = logits(q.tiles(chunk), k.tiles(chunk), chunk, first)  # [N, M, K]
            top = weight.amax(-1, keepdim=True).clamp_(min=logits.lowest)  # [N, M, 1]
            total = exponential_(weight, top).sum(-1, keepdim=True)  # 1 and more; 0 without any key
            result = o.tiles(chunk)
            multiply(weight, v.tiles(chunk), result)
            result.div_(total.clamp(min=1.0))
            torch.add(top, total.log_(), out=log_sum.tiles(chunk))
        for strip in (o, log_sum):
            strip.store(plan.queries.rows(first))


def _differentiate(
    plan: Plan,
    scale: float,
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Writes those gradients of some heads and images that are not None."""
    q, g, o, log_sum, delta = (Strip(plan.queries, x, lse) for x in (query, grad_out, out, lse, grad_lse))
    k, v = (Strip(plan.keys, x, lse) for x in (key, value))
    dq = None if grads[0] is None else Strip(plan.queries, grads[0], lse)
    dk, dv = (None if grad is None else Sums(plan, grad, lse) for grad in grads[1:])
    logits = Logits(plan, scale, lse)
    products = torch.empty_like(logits.scores)
    for first in plan.strips:
        for strip in (q, g, o, log_sum, delta, k, v):
            strip.load(first)
        delta.pixels.neg_().add_(o.pixels.mul_(g.pixels).sum(-1, keepdim=True))
        log_sum.pixels.clamp_(min=logits.lowest)
        for chunk in plan.chunks:
            queries, keys, grad = q.tiles(chunk), k.tiles(chunk), g.tiles(chunk)
            weight = exponential_(logits(queries, keys, chunk, first), log_sum.tiles(chunk))  # [N, M, K]
            if dv:
                dv.send(chunk, weight, grad)
            if dq or dk:
                grad_logit = products[: len(weight)]
                multiply(grad, v.tiles(chunk).mT, grad_logit)
                grad_logit.sub_(delta.tiles(chunk)).mul_(weight)
            if dq:
                multiply(grad_logit, keys, dq.tiles(chunk), scale)
            if dk:
                dk.send(chunk, grad_logit, queries, scale)
        if dq:
            dq.store(plan.queries.rows(first))
        for sums in (dk, dv):
            if sums:
                sums.flush(first)


def exponential_(logits: Tensor, offset: Tensor) -> Tensor:
    """exp(logits - offset), in place. On a CPU, torch.exp is some twenty times slower where it gives 0; exp2 is not."""
    return logits.sub_(offset).mul_(LOG2_E).exp2_()


class Logits:
    """Logits of tiles, in a buffer that is used again."""

    def __init__(self, plan: Plan, scale: float, like: Tensor):
        queries, keys = plan.scores
        self.plan = plan
        self.scale = scale
        self.lowest = torch.finfo(like.dtype).min  # of a query without any key: subtracted from -inf it leaves -inf
        self.mask = outside_window(plan, like)
        self.scores = like.new_empty((plan.group * plan.chunk, keys, queries)).mT

    def __call__(self, query: Tensor, key: Tensor, chunk: range, first: int) -> Tensor:
        """[N, M, K] of some tiles of a strip; -inf where a key does not take part."""
        scores = self.scores[: len(query)]
        multiply(query, key.mT, scores, self.scale)
        scores += self.mask
        if self.plan.window.masked:
            fill_outside_map(scores, self.plan, chunk, first, float("-inf"))
        return scores
