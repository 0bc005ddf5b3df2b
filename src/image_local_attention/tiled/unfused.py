"""The unfused operators over tiles: weights [B, heads, H, W, kH*kW] are the windows of dense tiles of scores."""

import torch
from torch import Tensor

from ..maps import accumulator, empty_heads
from ..rules import Rules
from .plan import Plan, Work, cut
from .products import at_keys, at_queries, head_bias, key_map, multiply, parts
from .scores import Absent, BiasSums, Logits, Terms
from .strips import key_strip, key_sums, query_strip
from .weights import weight_strip


def similarity(query: Tensor, key: Tensor, rules: Rules, absent: float) -> Tensor:
    """scale * <q, k_ij> + bias_ij; `absent` where key ij does not take part."""
    weight = query.new_empty((*query.shape[:4], rules.window.slots))
    plan = _plan(weight, key, rules, reads=2, sends=0)
    q, w, k = at_queries(query, key.shape[1]), at_queries(weight, key.shape[1]), at_keys(key)
    for part in parts(plan, q, k, w, key_map(rules, k), head_bias(rules.bias, q)):
        _compare(plan, rules, absent, *part)
    return weight


def aggregate(weight: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """scale * sum_ij weight_ij * v_ij over the keys in the map."""
    out = empty_heads(value, value.shape[-1], *_heads_and_size(weight))
    plan = _plan(weight, value, rules, reads=2, sends=0)
    w, o, v = at_queries(weight, value.shape[1]), at_queries(out, value.shape[1]), at_keys(value)
    for part in parts(plan, w, v, o):
        _gather(plan, rules.scale, *part)
    return out


def aggregate_transpose(weight: Tensor, vector: Tensor, kv_heads: int, size: tuple[int, int], rules: Rules) -> Tensor:
    """The transpose of `aggregate`: each pixel sends scale * weight_ij * vector to key ij of `kv_heads` maps."""
    out = empty_heads(vector, vector.shape[-1], kv_heads, size)
    plan = _plan(weight, out, rules, reads=2, sends=1)
    for part in parts(plan, at_queries(weight, kv_heads), at_queries(vector, kv_heads), at_keys(out)):
        _send(plan, rules.scale, *part)
    return out


def bias_gradient(grad: Tensor, rules: Rules, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Sums of a gradient of logits over images and pixels, in the shape of a bias; keys lie in a map of `size`."""
    total = grad.new_zeros(shape, dtype=accumulator(grad.dtype))
    heads = grad.shape[1]
    keys = grad.new_empty(()).expand(len(grad), heads, 1, *size, 1)  # the place of the key mask, nothing else
    plan = _plan(grad, keys.squeeze(2), rules, reads=0, sends=0)
    g = at_queries(grad, heads)
    for part in parts(plan, g, key_map(rules, keys), head_bias(total, g)):
        _sum(plan, len(shape) == 3, *part)
    return total.to(grad.dtype)


def _heads_and_size(x: Tensor) -> tuple[int, torch.Size]:
    return x.shape[1], x.shape[2:4]


def _plan(weight: Tensor, at_keys: Tensor, rules: Rules, reads: int, sends: int) -> Plan:
    """For weights [B, heads, Hq, Wq, slots] and a map [B, kv_heads, Hk, Wk, D]."""
    (heads, queries), (kv_heads, size) = _heads_and_size(weight), _heads_and_size(at_keys)
    work = Work(at_keys.shape[-1], min(reads, 1), reads, min(reads, 1), sends)
    return cut(rules.window, tuple(queries), tuple(size), heads // kv_heads, len(weight) * kv_heads, work)


def _compare(
    plan: Plan,
    rules: Rules,
    absent: float,
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    masked: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Writes `weight` of some heads and images."""
    buffer = _zero_scores(plan, query)
    q, k, w = query_strip(plan, query, buffer), key_strip(plan, key, buffer), weight_strip(plan, weight, buffer)
    terms = None if bias is None else Terms(plan, bias[0], rules.by_displacement, buffer)
    logits = Logits(rules.scale, terms, Absent(plan, masked, buffer), buffer)
    for strip in plan.strips:
        for there in (q, k, logits.absent):
            there.load(strip)
        for chunk in plan.chunks:
            w.take(logits(q.tiles(chunk), k.tiles(chunk), chunk, strip, absent), chunk, strip, absent)
        w.store(strip)


def _gather(plan: Plan, scale: float, weight: Tensor, value: Tensor, out: Tensor) -> None:
    """Writes `out`, the weighted sums, of some heads and images."""
    buffer = _zero_scores(plan, value)
    w, v, o = weight_strip(plan, weight, buffer), key_strip(plan, value, buffer), query_strip(plan, out, buffer)
    absent = Absent(plan, None, buffer, everywhere=True)
    for strip in plan.strips:
        for there in (w, v):
            there.load(strip)
        for chunk in plan.chunks:
            result = o.tiles(chunk)
            scores = buffer[: len(result)]
            w.put(scores, chunk, strip)
            absent.fill(scores, chunk, strip, 0.0)
            multiply(scores, v.tiles(chunk), result, scale)
        o.store(strip)


def _send(plan: Plan, scale: float, weight: Tensor, vector: Tensor, out: Tensor) -> None:
    """Writes `out`, the sums of what is sent, of some heads and images."""
    buffer = _zero_scores(plan, vector)
    w, x, sums = weight_strip(plan, weight, buffer), query_strip(plan, vector, buffer), key_sums(plan, out, buffer)
    for strip in plan.strips:
        for there in (w, x):
            there.load(strip)
        for chunk in plan.chunks:
            vectors = x.tiles(chunk)
            scores = buffer[: len(vectors)]
            w.put(scores, chunk, strip)
            sums.send(chunk, scores, vectors, scale)
        sums.flush(strip)


def _sum(plan: Plan, by_displacement: bool, grad: Tensor, masked: Tensor | None, total: Tensor) -> None:
    """Adds to `total`, for some heads and images."""
    buffer = _zero_scores(plan, grad)
    w, sums, absent = weight_strip(plan, grad, buffer), BiasSums(plan, total[0], by_displacement), None
    absent = Absent(plan, masked, buffer)
    for strip in plan.strips:
        for there in (w, absent):
            there.load(strip)
        for chunk in plan.chunks:
            scores = buffer[: grad.shape[:2].numel() * len(chunk)]
            w.put(scores, chunk, strip)
            absent.fill(scores, chunk, strip, 0.0)
            sums.add(scores, chunk, strip)
    sums.flush()


def _zero_scores(plan: Plan, x: Tensor) -> Tensor:
    return x.new_zeros((plan.group * plan.chunk, *plan.scores), dtype=accumulator(x.dtype))
