"""What may be asked of logits besides the window: a bias, and which keys take part."""

import triton
import triton.language as tl

from .geometry import centre, fold, visible, window_span, window_start
from .table import load_here
from .tile import NEVER, head_start, load_floats, pixel_offsets, pixels, product


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
def load_bias(ptr, strides, i_h, o_ky, o_kx, o_y, o_x, m_s, Y: tl.constexpr, X: tl.constexpr):
    """The bias [heads, kH, kW], or by displacement, of keys (o_ky, o_kx) from first entries (o_y, o_x).

    Minus infinity where not `m_s`: pairs of a query in the map and a key in its window, whose entries alone are there.
    """
    if Y.dilation * X.dilation > 1:
        o_b = (o_ky - o_y) // Y.dilation * strides[1] + (o_kx - o_x) // X.dilation * strides[2]
    else:  # one subtraction for a pair
        o_b = (o_ky * strides[1] + o_kx * strides[2]) - (o_y * strides[1] + o_x * strides[2])
    return tl.load(ptr + i_h * strides[0] + o_b, mask=m_s, other=float("-inf")).to(tl.float32)


@triton.jit
def table_start(ptr, strides, i_h, y0, x0, HK, WK, H, W, BY_DISPLACEMENT: tl.constexpr, ROW: tl.constexpr,
                Y: tl.constexpr, X: tl.constexpr):  # fmt: skip
    """The entry, of a table with rows of ROW, of query (y0, x0) and of the key at the map's first pixel."""
    o_by, o_bx = first_entry(y0, HK, H, BY_DISPLACEMENT, Y), first_entry(x0, WK, W, BY_DISPLACEMENT, X)
    return ptr + i_h * strides[0] - (o_by * ROW + o_bx)


@triton.jit
def takes_part(ptr, strides, i_b, i_h, o_ky, o_kx, H, W, WIDE: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """Whether a mask lets keys in: those outside of the map are none of its business."""
    return load_floats(ptr, strides, i_b, i_h, fold(o_ky, H, Y), fold(o_kx, W, X), H, W, 1, WIDE) != 0


@triton.jit
def load_ceiling(
    ptr, strides, i_b, i_h, y0, x0, H, W, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """[ROWS*COLS]: the most that logits of a block's keys may be, of a map with margins as wide as a tile's halo."""
    p_head = head_start(ptr, i_b, i_h, strides)
    if Y.folds or X.folds:
        o_y, o_x = pixels(y0, x0, ROWS, COLS)
        p_x = p_head + pixel_offsets(fold(o_y, H, Y), fold(o_x, W, X), strides, WIDE)
    else:  # a pointer for each row, and columns at known distances from it
        o_y, o_x = pixels(0, 0, ROWS, COLS)
        p_x = p_head + pixel_offsets(y0, x0, strides, WIDE) + o_y * strides[2] + o_x * strides[3]
    return load_here(p_x)


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


@triton.jit
def unseen_columns(o_k, o_q, size, queries, A: tl.constexpr):
    """[M, N]: what to add to the logits of keys that queries do not see for their columns."""
    o_start, o_left, cols = window_span(o_q, size, queries, False, A)
    m_k = visible(o_k[:, None], o_start[None, :], o_left[None, :], cols[None, :], A)
    return tl.where(m_k, 0.0, NEVER)


@triton.jit
def weight_gradient(b_a, b_b, PRODUCT: tl.constexpr, FLIP: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """dP, as far as dS depends on it: a key that is seen alone has weight 1 whatever its logit."""
    if Y.kernel * X.kernel == 1:
        b_dp = tl.zeros([b_a.shape[0], b_b.shape[0]], tl.float32)
    else:
        b_dp = product(b_a, b_b, PRODUCT, FLIP)
    return b_dp
