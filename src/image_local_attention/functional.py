"""The public operators: check, resolve, one registered operator."""

from collections.abc import Sequence

from torch import Tensor

from . import check, ops
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

    query, key: [B, heads*Dk, H, W]; value: [B, heads*Dv, H, W]; fp16, bf16, fp32 or fp64, any strides. Channel
        h*D + d is component d of head h.
    kernel_size: kH = kW, or the pair (kH, kW), in pixels. Pixel (y, x) sees the keys (y - kH//2 + i,
        x - kW//2 + j): an even window leans to the top left by one. It may be larger than the map.
    heads: groups of channels that attend on their own.
    scale: factor of the logits, 1.0 (none) by default. None means Dk ** -0.5, as in
        torch.nn.functional.scaled_dot_product_attention. 0.0 is legal.
    border: "zeros" (default): keys outside the map count with logit 0 and value 0. "mask": they do not take part.
    return_lse: also return the natural log-sum-exp of the logits over each window, [B, heads, H, W] in fp32
        (fp64 for fp64), differentiable. Under "zeros" it counts the keys outside the map.
    backend: None chooses: "triton" on a GPU for fp16 and bf16 up to 256 channels per head and fp32 up to 128, else
        "tiled". "triton", "tiled" and "reference" demand one.
    kv_heads, dilation, causal, bias, key_mask: not available yet; anything but the default raises
        NotImplementedError.

    Returns [B, heads*Dv, H, W] in the dtype and memory format of query (channels_last stays channels_last, all
    else gives contiguous). Sums are taken in fp32 at least. On a GPU, fp32 products follow
    torch.set_float32_matmul_precision: exact by default.

    Memory: the output and one float per pixel and head; the backward takes the gradients and one float per pixel
    and head more (triton), or a bounded strip (tiled). It can be differentiated once.

    Raises TypeError for an argument of the wrong type, dtype or device; ValueError for one of the wrong shape or
    value, or a demanded backend that cannot run; NotImplementedError for what is not available yet, forward-mode
    and second derivatives included.
    """
    check.maps(query=query, key=key, value=value)
    check.head_count(heads, kv_heads, query=query, value=value)
    check.same_depth(query, key)
    window = check.window(kernel_size, border, dilation, causal)
    scale = check.scale_factor(scale, query.shape[1] // heads)
    check.no_bias_nor_mask(bias, key_mask)
    check.flag("return_lse", return_lse)
    check.backend_name(backend)
    check.no_tangents(query=query, key=key, value=value)

    where = window.kernel, window.border, matmul_precision(), backend
    out, lse = ops.attention(query, key, value, heads, scale, *where)
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
    of query; slot i*kW + j belongs to key (y - kH//2 + i, x - kW//2 + j). A key outside the map has logit 0 under
    border "zeros" and -inf under "mask". Differentiable any number of times in reverse mode. Memory: the result.
    """
    check.maps(query=query, key=key)
    check.head_count(heads, kv_heads, query=query)
    check.same_depth(query, key)
    window = check.window(kernel_size, border, dilation, causal)
    scale = check.scale_factor(scale, query.shape[1] // heads)
    check.no_bias_nor_mask(bias, key_mask)
    check.backend_name(backend)
    check.no_tangents(query=query, key=key)

    absent = float("-inf") if window.masked else 0.0
    where = window.kernel, window.border, matmul_precision(), backend
    return ops.similarity(query, key, heads, scale, absent, *where)


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

    weight: [B, heads, H, W, kH*kW] of any sign and strides, in the dtype of value; slot i*kW + j belongs to key
        (y - kH//2 + i, x - kW//2 + j). The weights of keys outside the map are not read.
    value: [B, heads*Dv, H, W].
    The other arguments and the errors are those of `local_attention`.

    Returns [B, heads*Dv, H, W] in the dtype and memory format of value. Sums are taken in fp32 at least.
    Differentiable any number of times in reverse mode. Memory: the result.
    """
    check.maps(value=value)
    check.head_count(heads, kv_heads, value=value)
    window = check.window(kernel_size, border, dilation, causal)
    check.weights(weight, value, heads, window)
    check.backend_name(backend)
    check.no_tangents(weight=weight, value=value)

    where = window.kernel, window.border, matmul_precision(), backend
    return ops.aggregate(weight, value, 1.0, *where)
