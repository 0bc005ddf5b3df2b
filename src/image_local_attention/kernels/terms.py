"""What may be asked of logits besides the window: a bias, and which keys take part."""

import triton
import triton.language as tl

from .geometry import centre, fold, window_start
from .tile import inside, load_floats


@triton.constexpr_function
def entries(kernel, by_displacement):
    """Entries of a bias on one axis."""
    return 2 * kernel - 1 if by_displacement else kernel


@triton.jit
def first_entry(o_q, size, queries, BY_DISPLACEMENT: tl.constexpr, A: tl.constexpr):
    """The position that the first entry of a bias belongs to, for each query."""
    if BY_DISPLACEMENT:
        return centre(o_q, size, queries, A) - A.dilation * (A.kernel - 1)
    return window_start(o_q, size, queries, A)


@triton.jit
def load_bias(ptr, strides, i_h, o_ky, o_kx, o_y, o_x, BY_DISPLACEMENT: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """The bias [heads, kH, kW], or by displacement, of keys (o_ky, o_kx) from first entries (o_y, o_x); 0 elsewhere."""
    o_i, o_j = (o_ky - o_y) // Y.dilation, (o_kx - o_x) // X.dilation
    m_b = inside(o_i, o_j, entries(Y.kernel, BY_DISPLACEMENT), entries(X.kernel, BY_DISPLACEMENT))
    p_b = ptr + i_h * strides[0] + o_i * strides[1] + o_j * strides[2]
    return tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)


@triton.jit
def takes_part(ptr, strides, i_b, i_h, o_ky, o_kx, H, W, WIDE: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """Whether a mask lets keys in: those outside of the map are none of its business."""
    return load_floats(ptr, strides, i_b, i_h, fold(o_ky, H, Y), fold(o_kx, W, X), H, W, 1, WIDE) != 0


@triton.jit
def absent(o_ky, o_kx, HK, WK, Y: tl.constexpr, X: tl.constexpr):
    """Whether keys lie outside of the map on an axis where such do not take part."""
    m_k = o_ky != o_ky
    if Y.absent:
        m_k = m_k | (o_ky < 0) | (o_ky >= HK)
    if X.absent:
        m_k = m_k | (o_kx < 0) | (o_kx >= WK)
    return m_k


@triton.jit
def finite(b_lse):
    """The log-sum-exp of a query that sees no key is minus infinity; as plus infinity it makes all P zero."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)
