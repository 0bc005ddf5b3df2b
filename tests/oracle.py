"""What the operators mean, in fp64, pixel by pixel.

An independent program: it imports nothing of the library, uses no autograd and loops over pixels. Maps are numpy
arrays [B, channels, H, W], weights [B, heads, Hq, Wq, kH*kW], as the public functions take them; queries may have a
grid of their own, [Hq, Wq]. Every gradient is the written-out adjoint of the function above it. `window_of` is the
only place that knows geometry and borders.

Of the options, `kernel` and `dilation` are pairs (y, x), `border` is a name or a pair of names, and `causal` a bool, a
pair of bools or "raster". `bias` is [heads, kH*kW], [heads, kH, kW] or, by displacement, [heads, 2*kH-1, 2*kW-1];
`key_mask` is [B, Hk, Wk], False where no key is.
"""

import functools
from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """What one query pixel sees: the keys in the map that take part and the slot of each.

    Borders that fold the map give one key to several slots.
    """

    ys: np.ndarray
    xs: np.ndarray
    slots: np.ndarray
    takes_part: np.ndarray  # [kH*kW]; False: no logit, as if the slot were not there
    displaced: np.ndarray  # [kH*kW]; where each slot stands in a flat bias by displacement


@functools.lru_cache(maxsize=4096)
def window_of(y, x, queries, size, kernel, border="zeros", dilation=(1, 1), causal=False) -> Seen:
    """The window of the query at (y, x) of the grid `queries` over a map of keys of `size`."""
    borders = (border, border) if isinstance(border, str) else border
    ends = (causal, causal) if isinstance(causal, bool) else (False, False) if causal == "raster" else causal
    (centre_y, rows), (centre_x, columns) = (
        _positions(*axis) for axis in zip((y, x), queries, size, kernel, borders, dilation, ends, strict=True)
    )
    found, takes_part, displaced = [], [], []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            key_y, key_x = _fold(row, size[0], borders[0]), _fold(column, size[1], borders[1])
            there = (key_y is not None or borders[0] == "zeros") and (key_x is not None or borders[1] == "zeros")
            if causal == "raster" and (row, column) > (centre_y, centre_x):
                there = False
            takes_part.append(there)
            if there and key_y is not None and key_x is not None:
                found.append((key_y, key_x, i * kernel[1] + j))
            down, right = (row - centre_y) // dilation[0], (column - centre_x) // dilation[1]
            displaced.append((down + kernel[0] - 1) * (2 * kernel[1] - 1) + right + kernel[1] - 1)
    ys, xs, slots = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Seen(ys, xs, slots, np.array(takes_part), np.array(displaced))


def _positions(query, queries, size, kernel, border, dilation, causal):
    """The query's centre on one axis, and its window there before the border is minded."""
    centre = (2 * query + 1) * size // (2 * queries)
    if causal:
        first = centre - dilation * (kernel - 1)
    elif border == "shift":  # within every dilation-th key, those that an unshifted window would see
        residue, index = centre % dilation, centre // dilation
        members = -(-(size - residue) // dilation)
        first = residue + dilation * min(max(index - kernel // 2, 0), members - kernel)
    else:
        first = centre - dilation * (kernel // 2)
    return centre, [first + dilation * i for i in range(kernel)]


def _fold(position, size, border):
    """The key that stands at a position on one axis; None: none of the map."""
    if border == "circular":
        return position % size
    if border == "replicate":
        return min(max(position, 0), size - 1)
    if border == "reflect":
        return size - 1 - abs(size - 1 - abs(position))
    return position if 0 <= position < size else None


def windows(size, kernel, border="zeros", dilation=(1, 1), causal=False, queries=None):
    """Every query pixel with its window over a map of keys of `size`; None: the queries' grid is the keys'."""
    queries = size if queries is None else queries
    for y in range(queries[0]):
        for x in range(queries[1]):
            yield y, x, window_of(y, x, queries, size, kernel, border, dilation, causal)


def similarity(
    query,
    key,
    kernel,
    heads=1,
    kv_heads=None,
    scale=1.0,
    border="zeros",
    dilation=(1, 1),
    causal=False,
    bias=None,
    key_mask=None,
):
    """scale * <query, key_ij> + bias_ij; the bias alone at keys outside the map, -inf where no key takes part."""
    q, k = _heads(query, heads, heads), _heads(key, kv_heads, heads)
    weight = np.zeros((*q.shape[:2], *q.shape[3:], kernel[0] * kernel[1]))
    for y, x, seen in windows(k.shape[3:], kernel, border, dilation, causal, q.shape[3:]):
        logits = weight[:, :, y, x]
        logits[..., seen.slots] = scale * np.einsum("bhd,bhdn->bhn", q[..., y, x], k[..., seen.ys, seen.xs])
        if bias is not None:
            logits += bias.reshape(heads, -1)[:, _entries(bias, kernel, seen)]
        weight[:, :, y, x] = np.where(_takes_part(seen, key_mask), logits, -np.inf)
    return weight


def similarity_gradients(
    grad,
    query,
    key,
    kernel,
    heads=1,
    kv_heads=None,
    scale=1.0,
    border="zeros",
    dilation=(1, 1),
    causal=False,
    bias=None,
    key_mask=None,
):
    """Gradients of query, key and bias (None without one) for a gradient of `similarity`."""
    q, k = _heads(query, heads, heads), _heads(key, kv_heads, heads)
    grad_q, grad_k = np.zeros_like(q), np.zeros_like(k)
    grad_bias = None if bias is None else np.zeros((heads, bias[0].size))
    for y, x, seen in windows(k.shape[3:], kernel, border, dilation, causal, q.shape[3:]):
        grad_logits = np.where(_takes_part(seen, key_mask), grad[:, :, y, x], 0)
        if bias is not None:
            np.add.at(grad_bias, (slice(None), _entries(bias, kernel, seen)), grad_logits.sum(0))
        reached = scale * grad_logits[..., seen.slots]
        grad_q[..., y, x] = np.einsum("bhn,bhdn->bhd", reached, k[..., seen.ys, seen.xs])
        np.add.at(grad_k, (..., seen.ys, seen.xs), reached[:, :, None] * q[..., y, x, None])
    return _merge(grad_q, heads), _merge(grad_k, kv_heads), None if bias is None else grad_bias.reshape(bias.shape)


def aggregate(weight, value, kernel, heads=1, kv_heads=None, border="zeros", dilation=(1, 1), causal=False):
    """sum_ij weight_ij * value_ij over the keys in the map."""
    v, queries = _heads(value, kv_heads, heads), weight.shape[2:4]
    out = np.zeros((*v.shape[:3], *queries))
    for y, x, seen in windows(v.shape[3:], kernel, border, dilation, causal, queries):
        out[..., y, x] = np.einsum("bhn,bhdn->bhd", weight[:, :, y, x, seen.slots], v[..., seen.ys, seen.xs])
    return _merge(out, heads)


def aggregate_gradients(
    grad, weight, value, kernel, heads=1, kv_heads=None, border="zeros", dilation=(1, 1), causal=False
):
    """Gradients of weight and value for a gradient of `aggregate`; 0 for the weights that it does not read."""
    g, v = _heads(grad, heads, heads), _heads(value, kv_heads, heads)
    grad_weight, grad_v = np.zeros(weight.shape), np.zeros_like(v)
    for y, x, seen in windows(v.shape[3:], kernel, border, dilation, causal, g.shape[3:]):
        grad_weight[:, :, y, x, seen.slots] = np.einsum("bhd,bhdn->bhn", g[..., y, x], v[..., seen.ys, seen.xs])
        np.add.at(grad_v, (..., seen.ys, seen.xs), weight[:, :, y, x, seen.slots][:, :, None] * g[..., y, x, None])
    return grad_weight, _merge(grad_v, kv_heads)


def attention(
    query,
    key,
    value,
    kernel,
    heads=1,
    kv_heads=None,
    scale=1.0,
    border="zeros",
    dilation=(1, 1),
    causal=False,
    bias=None,
    key_mask=None,
):
    """Output and log-sum-exp; a query that sees no key gives 0 and -inf."""
    logits = similarity(query, key, kernel, heads, kv_heads, scale, border, dilation, causal, bias, key_mask)
    share, lse = _softmax(logits)
    return aggregate(share, value, kernel, heads, kv_heads, border, dilation, causal), lse


def attention_gradients(
    grad,
    grad_lse,
    query,
    key,
    value,
    kernel,
    heads=1,
    kv_heads=None,
    scale=1.0,
    border="zeros",
    dilation=(1, 1),
    causal=False,
    bias=None,
    key_mask=None,
):
    """Gradients of query, key, value and bias (None without one) for those of output and log-sum-exp (None: none)."""
    of_logits = kernel, heads, kv_heads, scale, border, dilation, causal, bias, key_mask
    share, _ = _softmax(similarity(query, key, *of_logits))
    grad_share, grad_value = aggregate_gradients(grad, share, value, kernel, heads, kv_heads, border, dilation, causal)
    grad_logits = share * (grad_share - (share * grad_share).sum(-1, keepdims=True))
    if grad_lse is not None:
        grad_logits += share * grad_lse[..., None]
    grad_query, grad_key, grad_bias = similarity_gradients(grad_logits, query, key, *of_logits)
    return grad_query, grad_key, grad_value, grad_bias


def _softmax(logits):
    """Shares and log-sum-exp over the last axis; a logit of -inf has share 0, also where all are."""
    top = logits.max(-1, keepdims=True)
    top[np.isneginf(top)] = 0
    mass = np.exp(logits - top)
    total = mass.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    return mass / np.where(total > 0, total, 1), lse[..., 0]


def _takes_part(seen, key_mask):
    """Which slots take part: [B or 1, 1, kH*kW]. A mask is about keys in the map, wherever folding found them."""
    if key_mask is None:
        return seen.takes_part[None, None]
    part = np.repeat(seen.takes_part[None], len(key_mask), 0)
    part[:, seen.slots] &= key_mask[:, seen.ys, seen.xs]
    return part[:, None]


def _entries(bias, kernel, seen):
    """Where the bias of each slot stands in the flat bias of a head."""
    by_displacement = bias.shape[1:] == (2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return seen.displaced if by_displacement else np.arange(kernel[0] * kernel[1])


def _heads(x, own, heads):
    """[B, own * D, H, W] -> [B, heads, D, H, W] in fp64; each of `own` heads (None: all) serves its share of all."""
    b, channels, h, w = x.shape
    own = heads if own is None else own
    return x.reshape(b, own, channels // own, h, w).astype(np.float64).repeat(heads // own, 1)


def _merge(x, own):
    """The adjoint of `_heads`."""
    b, heads, depth, h, w = x.shape
    own = heads if own is None else own
    return x.reshape(b, own, heads // own, depth, h, w).sum(2).reshape(b, own * depth, h, w)
