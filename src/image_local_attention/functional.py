"""The public operators: check, resolve, one registered operator."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import check, derivatives, ops
from .backends import matmul_precision


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    scale: float | None = 1.0,
    border: str | Sequence[str] = "zeros",
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] | str = False,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every pixel over the `kH x kW` patch around it, fused.

        out = sum_ij softmax_ij(scale * <query, key_ij>) * value_ij

    query: [B, heads*Dk, H, W]; key: [B, kv_heads*Dk, Hk, Wk]; value: [B, kv_heads*Dv, Hk, Wk]; fp16, bf16, fp32 or
        fp64, any strides. Channel h*D + d is component d of head h. Where the two grids differ in size, pixel centres
        are aligned: query q is at key floor((2*q + 1) * Hk / (2*H)), and likewise across.
    kernel_size: kH = kW, or the pair (kH, kW), in pixels. The query at key (y, x) sees the keys (y - kH//2 + i,
        x - kW//2 + j): an even window leans to the top left by one. It may be larger than the map.
    heads: groups of channels that attend on their own. kv_heads: of key and value, `heads` by default, else a
        divisor of it: query head h reads key head h // (heads // kv_heads), and nothing is repeated.
    scale: factor of the logits, 1.0 (none) by default. None means Dk ** -0.5, as in
        torch.nn.functional.scaled_dot_product_attention. 0.0 is legal.
    border: what keys outside the map are, one name or a pair (y, x).
        "zeros" (default): they count with value 0 and logit 0, plus the bias of their slot.
        "mask": they do not take part. A query that sees no key gives 0, log-sum-exp -inf and zero gradients.
        "shift": there are none, the window moves inwards until it lies in the map, with dilation within the residue
        class of the query. Wants kernel_size * dilation <= the keys' size.
        "reflect", "replicate", "circular": the map goes on as torch.nn.functional.pad continues it; windows may
        overhang by less than the size (reflect), by the size (circular), without limit (replicate).
        In a pair, a key outside on an axis whose border is not "zeros" does not take part, whatever the other is.
    dilation: steps between the keys of a window, an int or a pair (y, x).
    causal: True, or a pair (y, x): the window ends at the query on that axis, and does not shift. "raster": keys
        after the query in raster order do not take part. Goes with "zeros", "mask" and, per axis, "shift".
    bias: added to the logits, [heads, kH*kW] or [heads, kH, kW] by window slot; under "shift" also
        [heads, 2*kH-1, 2*kW-1] by displacement from the query, NATTEN's rpb. In the dtype of query; trainable.
    key_mask: bool [B, Hk, Wk], False where a key of the map does not take part. Keys outside the map that count
        under "zeros" are none of its business.
    return_lse: also return the natural log-sum-exp of the logits over each window, [B, heads, H, W] in fp32
        (fp64 for fp64), differentiable. Under "zeros" it counts the keys outside the map. `merge` joins results over
        several key sets.
    backend: None chooses: "triton" on a GPU for fp16 and bf16 up to 256 channels per head and fp32 up to 128, else
        "tiled". "triton", "tiled" and "reference" demand one. Each takes every option.

    Returns [B, heads*Dv, H, W] in the dtype and memory format of query (channels_last stays so, else contiguous). Sums
    are taken in fp32 at least. On a GPU, fp32 products follow torch.set_float32_matmul_precision: exact by default.

    Memory: the output and one float per pixel and head; the backward takes the gradients and one float per pixel and
    head more (triton), or a bounded strip (tiled). triton takes one float more for an entry of a bias and for a pixel
    of a key mask, and for each of a frame around these; for the gradient of a bias, 32 MiB, or a sum for each key that
    a tile sees. Differentiable any number of times, in reverse and forward mode; second derivatives and forward mode
    go through the unfused operators and take their weight map, [B, heads, H, W, kH*kW]. torch.func applies.

    Raises TypeError for an argument of the wrong type or device, or a map or bias of the wrong dtype; ValueError for
    one of the wrong shape or value, a key_mask that is not bool, a combination that has no meaning, or a demanded
    backend that cannot run; NotImplementedError for forward-mode derivatives in a compiled graph.
    """
    check.maps(query=query, key=key, value=value)
    check.same_size("value", value, "key", key)
    kv_heads = check.head_counts(heads, kv_heads, at_queries={"query": query}, at_keys={"key": key, "value": value})
    check.same_depth(query, key, heads, kv_heads)
    window = check.window(kernel_size, border, dilation, causal)
    check.fits(window, key.shape[2:], query.shape[2:], "key")
    scale = check.scale_factor(scale, query.shape[1] // heads)
    bias = check.bias(bias, query, heads, window)
    check.key_mask(key_mask, key)
    check.flag("return_lse", return_lse)
    check.backend_name(backend)
    check.no_compiled_tangents(query=query, key=key, value=value, bias=bias)

    terms = bias, key_mask, heads, kv_heads, scale
    out, lse = derivatives.attention(query, key, value, *terms, *ops.where(window, matmul_precision(), backend))
    return (out, lse) if return_lse else out


def local_similarity(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    scale: float | None = 1.0,
    border: str | Sequence[str] = "zeros",
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] | str = False,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logits of every pixel over the patch around it: scale * <query, key_ij>.

    Arguments and errors are those of `local_attention`. Returns [B, heads, H, W, kH*kW], contiguous, in the dtype
    of query; slot i*kW + j belongs to the key in row i and column j of the window. A key that does not take part has
    logit -inf; one outside the map that counts under border "zeros" has its bias, or 0. Differentiable any number of
    times, in both modes. Memory: the result.
    """
    check.maps(query=query, key=key)
    kv_heads = check.head_counts(heads, kv_heads, at_queries={"query": query}, at_keys={"key": key})
    check.same_depth(query, key, heads, kv_heads)
    window = check.window(kernel_size, border, dilation, causal)
    check.fits(window, key.shape[2:], query.shape[2:], "key")
    scale = check.scale_factor(scale, query.shape[1] // heads)
    bias = check.bias(bias, query, heads, window)
    check.key_mask(key_mask, key)
    check.backend_name(backend)
    check.no_compiled_tangents(query=query, key=key, bias=bias)

    terms = bias, key_mask, heads, kv_heads, scale, float("-inf")
    return derivatives.similarity(query, key, *terms, *ops.where(window, matmul_precision(), backend))


def local_aggregate(
    weight: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    border: str | Sequence[str] = "zeros",
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] | str = False,
    backend: str | None = None,
) -> Tensor:
    """Sum over the patch around every pixel: sum_ij weight_ij * value_ij, with weights from anywhere.

    weight: [B, heads, H, W, kH*kW] of any sign and strides, in the dtype of value; slot i*kW + j belongs to the key
        in row i and column j of the window. The weights of keys that do not take part or lie outside the map are not
        read.
    value: [B, kv_heads*Dv, Hk, Wk].
    The other arguments and the errors are those of `local_attention`.

    Returns [B, heads*Dv, H, W] in the dtype and memory format of value. Sums are taken in fp32 at least.
    Differentiable any number of times, in both modes. Memory: the result.
    """
    check.maps(value=value)
    kv_heads = check.head_counts(heads, kv_heads, at_queries={}, at_keys={"value": value})
    window = check.window(kernel_size, border, dilation, causal)
    check.weights(weight, value, heads, window)
    check.fits(window, value.shape[2:], weight.shape[2:4], "value")
    check.backend_name(backend)
    check.no_compiled_tangents(weight=weight, value=value)

    return derivatives.aggregate(weight, value, kv_heads, 1.0, *ops.where(window, matmul_precision(), backend))


def merge(results: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins attention over several sets of keys into attention over all of them, exactly: one softmax.

        lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s

    results: pairs (out [B, heads*Dv, H, W], lse [B, heads, H, W]) of `local_attention(..., return_lse=True)`, or of
        any attention of the same queries, to other maps, resolutions or extra tokens. Under border "zeros" each set
        counts its own keys outside the map; "mask" counts none.

    Returns (out, lse) in their dtypes; a query that saw no key in any set gives 0 and -inf. Differentiable any number
    of times. Memory: two more outputs. Raises TypeError or ValueError where results do not go together.
    """
    check.results(results)
    outs, sums = zip(*results, strict=True)
    lses = torch.stack(sums)  # [sets, B, heads, H, W]
    nothing = (lses == float("-inf")).all(0)
    lse = lses.masked_fill(nothing, 0.0).logsumexp(0)
    shares = (lses - lse).exp().masked_fill(lses == float("-inf"), 0.0)
    heads = lse.shape[1]
    parts = (out.unflatten(1, (heads, -1)) * share[:, :, None] for out, share in zip(outs, shares, strict=True))
    out = functools.reduce(torch.add, parts).flatten(1, 2).to(outs[0].dtype)
    return out, lse.masked_fill(nothing, float("-inf"))
