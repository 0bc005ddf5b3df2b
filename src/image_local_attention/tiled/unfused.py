"""The three unfused operators over tiles: weights [B, heads, H, W, kH*kW] are the windows of dense tiles of scores."""

from collections.abc import Iterator

from torch import Tensor

from ..maps import accumulator, empty_heads
from ..window import Window
from .plan import Plan, Work, cut
from .scores import fill_outside_map, window_slots
from .strips import Strip, Sums, multiply, parts


def similarity(
    query: Tensor, key: Tensor, window: Window, scale: float, absent: float, precision: str = "ieee"
) -> Tensor:
    """scale * <q, k_ij>; `absent` where key ij does not take part."""
    weight = query.new_empty((*query.shape[:4], window.slots))
    plan = _plan(query, window, reads=2, sends=0)
    for maps in parts(plan, query, key, weight):
        _compare(plan, scale, absent, *maps)
    return weight


def aggregate(weight: Tensor, value: Tensor, window: Window, scale: float, precision: str = "ieee") -> Tensor:
    """scale * sum_ij weight_ij * v_ij over the keys in the map."""
    out = empty_heads(value, value.shape[-1])
    plan = _plan(value, window, reads=2, sends=0)
    for maps in parts(plan, weight, value, out):
        _gather(plan, scale, *maps)
    return out


def aggregate_transpose(
    weight: Tensor, vector: Tensor, window: Window, scale: float, precision: str = "ieee"
) -> Tensor:
    """The transpose of `aggregate`: each pixel sends scale * weight_ij * vector to key ij."""
    out = empty_heads(vector, vector.shape[-1])
    plan = _plan(vector, window, reads=2, sends=1)
    for maps in parts(plan, weight, vector, out):
        _send(plan, scale, *maps)
    return out


def _plan(x: Tensor, window: Window, reads: int, sends: int) -> Plan:
    batch, heads, *size, depth = x.shape
    return cut(window, tuple(size), batch * heads, Work(depth, 1, reads, 1, sends))


def _compare(plan: Plan, scale: float, absent: float, query: Tensor, key: Tensor, weight: Tensor) -> None:
    """Writes `weight` of some heads and images."""
    buffer = _zero_scores(plan, query)
    q, k = Strip(plan.queries, query, buffer), Strip(plan.keys, key, buffer)
    for first in plan.strips:
        q.load(first)
        k.load(first)
        for chunk in plan.chunks:
            queries = q.tiles(chunk)
            scores = buffer[: len(queries)]
            multiply(queries, k.tiles(chunk).mT, scores, scale)
            if plan.window.masked:
                fill_outside_map(scores, plan, chunk, first, absent)
            for slots, there in _in_map(scores, weight, plan, chunk, first):
                there.copy_(slots)


def _gather(plan: Plan, scale: float, weight: Tensor, value: Tensor, out: Tensor) -> None:
    """Writes `out`, the weighted sums, of some heads and images."""
    buffer = _zero_scores(plan, value)
    v, o = Strip(plan.keys, value, buffer), Strip(plan.queries, out, buffer)
    for first in plan.strips:
        v.load(first)
        for chunk in plan.chunks:
            result = o.tiles(chunk)
            scores = _spread(buffer[: len(result)], weight, plan, chunk, first)
            fill_outside_map(scores, plan, chunk, first, 0.0)
            multiply(scores, v.tiles(chunk), result, scale)
        o.store(plan.queries.rows(first))


def _send(plan: Plan, scale: float, weight: Tensor, vector: Tensor, out: Tensor) -> None:
    """Writes `out`, the sums of what is sent, of some heads and images."""
    buffer = _zero_scores(plan, vector)
    x, sums = Strip(plan.queries, vector, buffer), Sums(plan, out, buffer)
    for first in plan.strips:
        x.load(first)
        for chunk in plan.chunks:
            vectors = x.tiles(chunk)
            sums.send(chunk, _spread(buffer[: len(vectors)], weight, plan, chunk, first), vectors, scale)
        sums.flush(first)


def _zero_scores(plan: Plan, x: Tensor) -> Tensor:
    return x.new_zeros((plan.group * plan.chunk, *plan.scores), dtype=accumulator(x.dtype))


def _spread(scores: Tensor, weight: Tensor, plan: Plan, chunk: range, first: int) -> Tensor:
    """Weights as scores [N, M, K] of some tiles; 0 out of window and for queries outside of the map.

    `scores` holds other such tiles, or zeros.
    """
    (height, width), size = plan.tile, plan.size
    if first + height > size[0] or chunk.stop * width > size[1]:
        scores.zero_()
    for slots, there in _in_map(scores, weight, plan, chunk, first):
        slots.copy_(there)
    return scores


def _in_map(scores: Tensor, weight: Tensor, plan: Plan, chunk: range, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows in the scores [N, M, K] of tiles, where their queries lie in the map, and the weights there.

    Two pairs of views [b, h, tiles, TH, TW, kH, kW] at most: the whole tiles, and the rest to their right.
    """
    height, width = plan.tile
    pixels = weight[:, :, first : first + height, chunk.start * width : chunk.stop * width]
    pixels = pixels.unflatten(-1, plan.window.kernel)  # [b, h, rows, columns, kH, kW]
    tiles = window_slots(scores, plan).unflatten(0, (*weight.shape[:2], len(chunk)))
    tiles = tiles[:, :, :, : pixels.shape[2]]
    whole, rest = divmod(pixels.shape[3], width)
    if whole:
        yield tiles[:, :, :whole], pixels[:, :, :, : whole * width].unflatten(3, (whole, width)).transpose(2, 3)
    if rest:
        yield tiles[:, :, whole, :, :rest], pixels[:, :, :, whole * width :]
