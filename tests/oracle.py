"""What the operators mean, in fp64, pixel by pixel.

An independent program: it imports nothing of the library, uses no autograd and loops over pixels. Maps are numpy
arrays [B, channels, H, W], weights [B, heads, H, W, kH*kW], as the public functions take them. Every gradient is
the written-out adjoint of the line above it. `window_of` is the only place that knows geometry and borders.
"""

import functools
from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """What one query pixel sees: the keys in the map, each once, the slot of each, and which slots take part."""

    ys: np.ndarray
    xs: np.ndarray
    slots: np.ndarray
    takes_part: np.ndarray  # [kH*kW]; False: no logit, as if the slot were not there


@functools.lru_cache(maxsize=4096)
def window_of(y: int, x: int, size: tuple[int, int], kernel: tuple[int, int], border: str) -> Seen:
    """The window of the query at (y, x): `kernel` rows and columns of keys, the query at (kH // 2, kW // 2)."""
    height, width = size
    rows, columns = kernel
    found, takes_part = [], []
    for i in range(rows):
        for j in range(columns):
            key_y, key_x = y + i - rows // 2, x + j - columns // 2
            inside = 0 <= key_y < height and 0 <= key_x < width
            takes_part.append(inside or border == "zeros")
            if inside:
                found.append((key_y, key_x, i * columns + j))
    ys, xs, slots = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Seen(ys, xs, slots, np.array(takes_part))


def windows(size: tuple[int, int], kernel: tuple[int, int], border: str):
    """Every query pixel of a map with its window."""
    for y in range(size[0]):
        for x in range(size[1]):
            yield y, x, window_of(y, x, size, kernel, border)


def similarity(query, key, kernel, heads=1, scale=1.0, border="zeros"):
    """scale * <query, key_ij>; 0 at keys outside the map, -inf at keys that do not take part."""
    q, k = _heads(query, heads), _heads(key, heads)
    weight = np.zeros((*q.shape[:2], *q.shape[3:], kernel[0] * kernel[1]))
    for y, x, seen in windows(q.shape[3:], kernel, border):
        weight[:, :, y, x, seen.slots] = scale * np.einsum("bhd,bhdn->bhn", q[..., y, x], k[..., seen.ys, seen.xs])
        weight[:, :, y, x, ~seen.takes_part] = -np.inf
    return weight


def similarity_gradients(grad, query, key, kernel, heads=1, scale=1.0, border="zeros"):
    """Gradients of query and key for a gradient of `similarity`."""
    q, k = _heads(query, heads), _heads(key, heads)
    grad_q, grad_k = np.zeros_like(q), np.zeros_like(k)
    for y, x, seen in windows(q.shape[3:], kernel, border):
        g = scale * grad[:, :, y, x, seen.slots]
        grad_q[..., y, x] = np.einsum("bhn,bhdn->bhd", g, k[..., seen.ys, seen.xs])
        grad_k[..., seen.ys, seen.xs] += g[:, :, None] * q[..., y, x, None]
    return _merge(grad_q), _merge(grad_k)


def aggregate(weight, value, kernel, heads=1, border="zeros"):
    """sum_ij weight_ij * value_ij over the keys in the map."""
    v = _heads(value, heads)
    out = np.zeros_like(v)
    for y, x, seen in windows(v.shape[3:], kernel, border):
        out[..., y, x] = np.einsum("bhn,bhdn->bhd", weight[:, :, y, x, seen.slots], v[..., seen.ys, seen.xs])
    return _merge(out)


def aggregate_gradients(grad, weight, value, kernel, heads=1, border="zeros"):
    """Gradients of weight and value for a gradient of `aggregate`."""
    g, v = _heads(grad, heads), _heads(value, heads)
    grad_weight, grad_v = np.zeros(weight.shape), np.zeros_like(v)
    for y, x, seen in windows(v.shape[3:], kernel, border):
        grad_weight[:, :, y, x, seen.slots] = np.einsum("bhd,bhdn->bhn", g[..., y, x], v[..., seen.ys, seen.xs])
        grad_v[..., seen.ys, seen.xs] += weight[:, :, y, x, seen.slots][:, :, None] * g[..., y, x, None]
    return grad_weight, _merge(grad_v)


def attention(query, key, value, kernel, heads=1, scale=1.0, border="zeros"):
    """Output and log-sum-exp; an empty window gives 0 and -inf."""
    v = _heads(value, heads)
    logits = similarity(query, key, kernel, heads, scale, border)
    out, lse = np.zeros_like(v), np.full(logits.shape[:-1], -np.inf)
    for y, x, seen in windows(v.shape[3:], kernel, border):
        if not seen.takes_part.any():
            continue
        share, lse[:, :, y, x] = _softmax(logits[:, :, y, x])
        out[..., y, x] = np.einsum("bhn,bhdn->bhd", share[..., seen.slots], v[..., seen.ys, seen.xs])
    return _merge(out), lse


def attention_gradients(grad, grad_lse, query, key, value, kernel, heads=1, scale=1.0, border="zeros"):
    """Gradients of query, key and value for gradients of output and log-sum-exp (None: none)."""
    g, q, k, v = (_heads(x, heads) for x in (grad, query, key, value))
    logits = similarity(query, key, kernel, heads, scale, border)
    grad_q, grad_k, grad_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for y, x, seen in windows(q.shape[3:], kernel, border):
        if not seen.takes_part.any():
            continue
        share, _ = _softmax(logits[:, :, y, x])
        grad_share = np.zeros_like(share)  # values outside the map are 0
        grad_share[..., seen.slots] = np.einsum("bhd,bhdn->bhn", g[..., y, x], v[..., seen.ys, seen.xs])
        grad_logit = share * (grad_share - (share * grad_share).sum(-1, keepdims=True))
        if grad_lse is not None:
            grad_logit += share * grad_lse[:, :, y, x, None]
        reached = scale * grad_logit[..., seen.slots]
        grad_q[..., y, x] = np.einsum("bhn,bhdn->bhd", reached, k[..., seen.ys, seen.xs])
        grad_k[..., seen.ys, seen.xs] += reached[:, :, None] * q[..., y, x, None]
        grad_v[..., seen.ys, seen.xs] += share[..., seen.slots][:, :, None] * g[..., y, x, None]
    return _merge(grad_q), _merge(grad_k), _merge(grad_v)


def _softmax(logits):
    """Shares and log-sum-exp over the last axis; a logit of -inf has share 0."""
    top = logits.max(-1, keepdims=True)
    mass = np.exp(logits - top)
    total = mass.sum(-1, keepdims=True)
    return mass / total, (top + np.log(total))[..., 0]


def _heads(x, heads):
    b, channels, h, w = x.shape
    return x.reshape(b, heads, channels // heads, h, w).astype(np.float64)


def _merge(x):
    b, heads, depth, h, w = x.shape
    return x.reshape(b, heads * depth, h, w)
