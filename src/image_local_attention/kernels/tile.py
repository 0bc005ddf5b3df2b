"""Primitives of every kernel: which tile, loads and stores, matrix products.

Prefixes: `i_` index, `o_` offsets, `m_` mask, `p_` pointers, `b_` block in registers; UPPER is known when a kernel
is compiled. A tile is `TH x TW` stationary pixels, flattened to M = TH*TW; a block is `ROWS x COLS` streamed
pixels, flattened to N = ROWS*COLS. Strides come as tuples (batch, head, y, x, channel) in elements.
"""

import triton
import triton.language as tl

from .geometry import fold

# The interpreter multiplies the raw bits of bf16, so its products are taken in fp32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

VECTOR_BYTES = tl.constexpr(16)  # of the widest load

ABSENT = tl.constexpr(float("-inf"))  # the logit of a key that does not take part
NEVER = tl.constexpr(-1.0e30)  # a maximum before any logit: finite, so that a difference of two is no NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MANY = 16  # blocks of a column that need no mask for rows: worth a loop of their own


@triton.jit
def program_tile(
    H, W, heads, TH: tl.constexpr, TW: tl.constexpr, SHIFT: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Batch, head, lattice (y, x) and first row and column of this program's tile there.

    Heads go fastest, for they share cache lines. The first column of tiles begins SHIFT pixels left of the map. FLAT:
    the grid has one axis, else three: heads and columns, rows, batch, which saves divisions. STRIP: programs of a row
    before the next row comes, strip after strip; 0 is all.
    """
    i_x, i_y, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if STRIP:
        columns, rows = tl.num_programs(0), tl.num_programs(1)
        i_program = i_y * columns + i_x
        first = i_program // (STRIP * rows) * STRIP
        width = tl.minimum(columns - first, STRIP)
        i_program -= first * rows
        i_y, i_x = i_program // width, first + i_program % width
    i_h = i_x % heads
    i_x = i_x // heads
    if FLAT:
        tiles_x = tl.cdiv(tl.cdiv(W, X.lattice) + SHIFT, TW) * X.lattice
        tiles_y = tl.cdiv(tl.cdiv(H, Y.lattice), TH) * Y.lattice
        i_y = i_x // tiles_x
        i_x = i_x % tiles_x
        i_b = i_y // tiles_y
        i_y = i_y % tiles_y
    return i_b, i_h, i_y % Y.lattice, i_x % X.lattice, i_y // Y.lattice * TH, i_x // X.lattice * TW - SHIFT


@triton.jit
def pixels(y0, x0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns [ROWS*COLS] of the pixels of a block."""
    o = tl.arange(0, ROWS * COLS)
    return y0 + o // COLS, x0 + o % COLS


@triton.constexpr_function
def row_parts(tile, step, span, more):
    """1, or 3 where most blocks of a column are seen by every query of the tile: before these, these, after them.

    more: whether other things than the window's ends leave keys out.
    """
    many = span.plain and not more and span.kernel // step - (tile - 1 + step - 1) // step >= MANY
    return 3 if many else 1


@triton.constexpr_function
def row_bound(part, tile, step, span):
    """The first block of a part of three, blocks of a column counted from 0; the end of the last for part 3."""
    ends = 0, (tile - 1 + step - 1) // step, span.kernel // step, (tile + span.kernel - 2) // step + 1
    return ends[part]


@triton.jit
def part_bounds(PART: tl.constexpr, PARTS: tl.constexpr, rows, TH: tl.constexpr, ROWS: tl.constexpr, Y: tl.constexpr):
    """The first block of a part and the one after its last."""
    if PARTS == 1:
        return 0, rows
    return row_bound(PART, TH, ROWS, Y), row_bound(PART + 1, TH, ROWS, Y)


@triton.jit
def inside(o_y, o_x, H, W):
    """Whether pixels are in a map, in one comparison for an axis: what is negative wraps around."""
    return (o_y.to(tl.uint32) < H) & (o_x.to(tl.uint32) < W)


@triton.jit
def pixel_offsets(o_y, o_x, strides, WIDE: tl.constexpr):
    """Offsets of pixels within one head of one image; 64-bit where these may pass 2**31."""
    if WIDE:
        o_y, o_x = o_y.to(tl.int64), o_x.to(tl.int64)
    return o_y * strides[2] + o_x * strides[3]


@triton.jit
def channel_offsets(D: tl.constexpr, strides, WIDE: tl.constexpr):
    o_d = tl.arange(0, D)
    if WIDE:
        o_d = o_d.to(tl.int64)
    return o_d * strides[4]


@triton.jit
def head_start(ptr, i_b, i_h, strides):
    return ptr + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[1]


@triton.jit
def load_block(
    src, strides, i_b, i_h, y0, x0, H, W,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WAY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[ROWS*COLS, DP] pixels of a map from (y0, x0) on; zeros outside the map and in channels D .. DP-1.

    WAY, with what `src` is: "rows", a tensor descriptor over [B, H, W, heads, D]; "planes", one over
    [B, heads, D, H, W]; "columns", a pointer to columns side by side and x0 on a whole vector; "pointer".
    """
    if WAY == "rows":
        b_x = src.load([i_b, y0, x0, i_h, 0]).reshape(ROWS * COLS, DP)
    elif WAY == "planes":
        b_x = tl.trans(src.load([i_b, i_h, 0, y0, x0]).reshape(DP, ROWS * COLS))
    else:
        if WAY == "columns":
            x0 = tl.multiple_of(x0, VECTOR_BYTES // (src.dtype.element_ty.primitive_bitwidth // 8))
        o_y, o_x = pixels(y0, x0, ROWS, COLS)
        b_x = load_pixels(src, strides, i_b, i_h, o_y, o_x, H, W, D, DP, WIDE)
    return b_x


@triton.jit
def load_pixels(src, strides, i_b, i_h, o_y, o_x, H, W, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr):
    """[N, DP] pixels (o_y, o_x) of a map by pointer; zeros outside the map and in channels D .. DP-1."""
    p_x = head_start(src, i_b, i_h, strides) + pixel_offsets(o_y, o_x, strides, WIDE)[:, None]
    m_x = inside(o_y, o_x, H, W)[:, None]
    if DP > D:
        m_x = m_x & (tl.arange(0, DP) < D)[None, :]
    return tl.load(p_x + channel_offsets(DP, strides, WIDE)[None, :], mask=m_x, other=0.0)


@triton.jit
def load_keys(
    src, strides, i_b, i_h, y0, x0, H, W,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WAY: tl.constexpr, WIDE: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """`load_block` of the positions from (y0, x0) on, folded into the map where its border folds."""
    if Y.folds or X.folds:
        o_y, o_x = pixels(y0, x0, ROWS, COLS)
        b_x = load_pixels(src, strides, i_b, i_h, fold(o_y, H, Y), fold(o_x, W, X), H, W, D, DP, WIDE)
    else:
        b_x = load_block(src, strides, i_b, i_h, y0, x0, H, W, ROWS, COLS, D, DP, WAY, WIDE)
    return b_x


@triton.jit
def store_block(
    ptr, b_x, strides, i_b, i_h, y0, x0, H, W,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes [ROWS*COLS, DP] to the pixels from (y0, x0) on that lie in the map, in its dtype."""
    o_y, o_x = pixels(y0, x0, ROWS, COLS)
    p_x = head_start(ptr, i_b, i_h, strides) + pixel_offsets(o_y, o_x, strides, WIDE)[:, None]
    m_x = inside(o_y, o_x, H, W)[:, None]
    if DP > D:
        m_x = m_x & (tl.arange(0, DP) < D)[None, :]
    tl.store(p_x + channel_offsets(DP, strides, WIDE)[None, :], b_x.to(ptr.dtype.element_ty), mask=m_x)


@triton.jit
def load_floats(ptr, strides, i_b, i_h, o_y, o_x, H, W, other, WIDE: tl.constexpr):
    """[N] floats of pixels, of a map that has one per pixel and head; `other` outside the map."""
    p_x = head_start(ptr, i_b, i_h, strides) + pixel_offsets(o_y, o_x, strides, WIDE)
    return tl.load(p_x, mask=inside(o_y, o_x, H, W), other=other)


@triton.jit
def store_floats(ptr, b_x, strides, i_b, i_h, o_y, o_x, H, W, WIDE: tl.constexpr):
    p_x = head_start(ptr, i_b, i_h, strides) + pixel_offsets(o_y, o_x, strides, WIDE)
    tl.store(p_x, b_x, mask=inside(o_y, o_x, H, W))


@triton.constexpr_function
def natural(product):
    """Whether logits and their maximum stay natural, for the log-sum-exp and P to be rounded as exactly as products."""
    return product in ("three-pass", "exact")


@triton.jit
def to_tf32(b_x):
    """Rounded to the 11 bits of precision that the matrix units take of fp32."""
    return ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def matmul(b_c, b_a, b_b, PRODUCT: tl.constexpr, FLIP: tl.constexpr = False):
    """b_c + b_a @ b_b in fp32. PRODUCT is one of `gpu.PRODUCTS`.

    "three-pass": each operand is the sum of two in TF32, high and low; low times low is below fp32's rounding. The
    sum begins anew, for the matrix units truncate it at every step, which a long sum would not bear. FLIP: add up as
    the product of the transposes, the second by the first, would.
    """
    if PRODUCT == "three-pass":
        b_a_high, b_b_high = to_tf32(b_a), to_tf32(b_b)
        b_a_low, b_b_low = to_tf32(b_a - b_a_high), to_tf32(b_b - b_b_high)
        if FLIP:
            b_ab = tl.dot(b_a_high, b_b_low, input_precision="tf32")
            b_ab = tl.dot(b_a_low, b_b_high, b_ab, input_precision="tf32")
        else:
            b_ab = tl.dot(b_a_low, b_b_high, input_precision="tf32")
            b_ab = tl.dot(b_a_high, b_b_low, b_ab, input_precision="tf32")
        b_c += tl.dot(b_a_high, b_b_high, b_ab, input_precision="tf32")
    elif PRODUCT == "tf32":
        b_c = tl.dot(b_a, b_b, b_c, input_precision="tf32")
    elif INTERPRETED:
        b_c += tl.dot(b_a.to(tl.float32), b_b.to(tl.float32))
    else:
        b_c = tl.dot(b_a, b_b, b_c, input_precision="ieee")
    return b_c


@triton.jit
def add_product(b_c, b_a, b_b, PRODUCT: tl.constexpr):
    """b_c + b_a @ b_b in fp32; the first operand is rounded to the dtype of the second."""
    return matmul(b_c, b_a.to(b_b.dtype), b_b, PRODUCT)


@triton.jit
def add_exactly(b_sum, b_lost, b_x):
    """b_sum + b_x, and what rounding adds to it: Kahan's summation, for a sum of any length to be rounded as one."""
    b_x = b_x - b_lost
    b_total = b_sum + b_x
    return b_total, (b_total - b_sum) - b_x


@triton.jit
def scores(b_c, b_a, b_b, PRODUCT: tl.constexpr, FLIP: tl.constexpr = False):
    """b_c + b_a @ b_b.T in fp32."""
    return matmul(b_c, b_a, tl.trans(b_b), PRODUCT, FLIP)


@triton.jit
def product(b_a, b_b, PRODUCT: tl.constexpr, FLIP: tl.constexpr = False):
    """b_a @ b_b.T in fp32."""
    return scores(tl.zeros([b_a.shape[0], b_b.shape[0]], tl.float32), b_a, b_b, PRODUCT, FLIP)
