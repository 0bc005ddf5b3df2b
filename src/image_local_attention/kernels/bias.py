"""The gradient of a bias: sums of gradients of logits over all queries, without atomics.

Where entries follow the query pixel by pixel, sums are kept of each pair of a pixel of a tile and one of a block around
it, on matrix units; pairs as far from each other are one entry. Elsewhere each entry is a sum of its own.
"""

import triton
import triton.language as tl

from .geometry import after, centre, fold, lattice_sizes, sublattice, visible, window_span, window_start
from .table import load_entries
from .terms import absent, entries, finite, first_entry, load_bias, load_ceiling, table_start, takes_part
from .tile import (
    LOG2E,
    NEVER,
    head_start,
    inside,
    load_block,
    load_floats,
    load_keys,
    load_pixels,
    natural,
    pixel_offsets,
    pixels,
    product,
)


@triton.jit
def pair_sums_kernel(
    q_src, k_src, v_src, g_src, lse_ptr, delta_ptr, bias_ptr, most_ptr, sums_ptr,
    q_s, k_s, v_s, g_s, lse_s, bias_s, most_s,
    B, H, W, HK, WK, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, GROUP: tl.constexpr,
    BY_DISPLACEMENT: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS_X: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, BACK_Y: tl.constexpr, BACK_X: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr, G_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Sums [chunks, heads, blocks, TH*TW, ROWS*COLS] of dS = P * (dP - delta) over tiles i_chunk, i_chunk + chunks, ...

    A block lies where it does from every tile: the first begins BACK_Y rows and BACK_X columns before the tile.
    """
    i_chunk, i_h, i_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_kv = i_h // GROUP
    tiles_y = tl.cdiv(tl.cdiv(H, Y.lattice), TH) * Y.lattice
    tiles_x = tl.cdiv(tl.cdiv(W, X.lattice) + SHIFT, TW) * X.lattice
    b_sums = tl.zeros([TH * TW, ROWS * COLS], tl.float32)
    for i_tile in tl.range(i_chunk, B * tiles_y * tiles_x, tl.num_programs(0)):
        i_b, i_y, i_x = i_tile // (tiles_y * tiles_x), i_tile // tiles_x % tiles_y, i_tile % tiles_x
        y0, x0 = i_y // Y.lattice * TH, i_x // X.lattice * TW - SHIFT
        i_y, i_x = i_y % Y.lattice, i_x % X.lattice
        h, w, hk, wk = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)
        k_y0, k_x0 = y0 - BACK_Y + i_block // BLOCKS_X * ROWS, x0 - BACK_X + i_block % BLOCKS_X * COLS
        m_tile = True
        if BY_DISPLACEMENT:  # most windows are not shifted, and have half of the entries of an axis
            m_tile = meets(y0, k_y0, hk, h, TH, ROWS, Y) & meets(x0, k_x0, wk, w, TW, COLS, X)
        if m_tile:
            q_at, q_st = sublattice(q_src, q_s, i_y, i_x, Y, X)
            k_at, k_st = sublattice(k_src, k_s, i_y, i_x, Y, X)
            v_at, v_st = sublattice(v_src, v_s, i_y, i_x, Y, X)
            g_at, g_st = sublattice(g_src, g_s, i_y, i_x, Y, X)
            lse_at, lse_st = sublattice(lse_ptr, lse_s, i_y, i_x, Y, X)
            delta_at, _ = sublattice(delta_ptr, lse_s, i_y, i_x, Y, X)
            p_entry = table_start(bias_ptr, bias_s, i_h, y0, x0, hk, wk, h, w, BY_DISPLACEMENT, ROW, Y, X)
            b_bias = load_entries(p_entry + k_y0 * ROW + k_x0, TH * TW, ROWS * COLS, TW, COLS, 1, ROW, WARPS)
            b_q = load_block(q_at, q_st, i_b, i_h, y0, x0, h, w, TH, TW, DK, DKP, Q_WAY, WIDE)
            b_k = load_keys(k_at, k_st, i_b, i_kv, k_y0, k_x0, hk, wk, ROWS, COLS, DK, DKP, K_WAY, WIDE, Y, X)
            b_g = load_block(g_at, g_st, i_b, i_h, y0, x0, h, w, TH, TW, DV, DVP, G_WAY, WIDE)
            b_v = load_keys(v_at, v_st, i_b, i_kv, k_y0, k_x0, hk, wk, ROWS, COLS, DV, DVP, V_WAY, WIDE, Y, X)
            o_y, o_x = pixels(y0, x0, TH, TW)
            o_ky, o_kx = pixels(k_y0, k_x0, ROWS, COLS)
            # no query there: P is 0
            b_lse = finite(load_floats(lse_at, lse_st, i_b, i_h, o_y, o_x, h, w, float("inf"), WIDE))
            b_delta = load_floats(delta_at, lse_st, i_b, i_h, o_y, o_x, h, w, 0.0, WIDE)
            b_s = product(b_q, b_k, PRODUCT)
            if natural(PRODUCT):  # as the other gradients have it
                b_s = (b_s * scale + b_bias - b_lse[:, None]) * LOG2E
            else:
                b_s = (b_s * scale + (b_bias - b_lse[:, None])) * LOG2E
            if BY_DISPLACEMENT or Y.absent or X.absent:
                o_start, o_first, count = window_span(o_y, hk, h, True, Y)
                m_s = visible(o_ky[None, :], o_start[:, None], o_first[:, None], count[:, None], Y)
                o_start, o_first, count = window_span(o_x, wk, w, True, X)
                m_s = m_s & visible(o_kx[None, :], o_start[:, None], o_first[:, None], count[:, None], X)
                b_s = tl.where(m_s, b_s, NEVER)
            if RASTER:
                m_s = after(o_ky[None, :], o_kx[None, :], o_y[:, None], o_x[:, None])
                b_s = tl.where(m_s, NEVER, b_s)
            if most_ptr is not None:
                most_at, most_st = sublattice(most_ptr, most_s, i_y, i_x, Y, X)
                o_most = i_b, i_kv, k_y0, k_x0
                b_most = load_ceiling(most_at, most_st, *o_most, hk, wk, ROWS, COLS, WIDE, Y, X)
                b_s = tl.minimum(b_s, b_most[None, :])
            b_sums += tl.exp2(b_s) * (product(b_g, b_v, PRODUCT) - b_delta[:, None])
    i_sums = (i_chunk.to(tl.int64) * tl.num_programs(1) + i_h) * tl.num_programs(2) + i_block
    o_m, o_n = tl.arange(0, TH * TW), tl.arange(0, ROWS * COLS)
    p_sums = sums_ptr + i_sums * (TH * TW * ROWS * COLS)
    tl.store(p_sums + o_m[:, None] * (ROWS * COLS) + o_n[None, :], b_sums)


@triton.jit
def meets(q0, k0, size, queries, TILE: tl.constexpr, STEP: tl.constexpr, A: tl.constexpr):
    """Whether some query of a tile in the map sees some key of a block, on one axis."""
    first = window_start(tl.maximum(q0, 0), size, queries, A)
    last = window_start(tl.minimum(q0 + TILE, queries) - 1, size, queries, A) + A.reach
    return (k0 < last) & (k0 + STEP > first)


@triton.jit
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, grad_ptr, bias_ptr, mask_ptr, sums_ptr,
    q_s, k_s, v_s, g_s, lse_s, grad_s, bias_s, mask_s,
    B, H, W, HK, WK, heads, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, BY_DISPLACEMENT: tl.constexpr, GROUP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [chunks, heads, entries y, entries x] over the tiles of queries i_chunk, i_chunk + chunks, ...

    The gradient of logits is read from `grad_ptr` [B, heads, H, W, slots], or, where that is None, computed:
    dS = P * (dP - delta). Keys are read pixel by pixel, for the query tile of each entry is a tile of keys that is
    shifted. WIDTH is a power of two that holds the entries of a row.
    """
    i_chunk, i_h, i_entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_kv = i_h // GROUP
    tiles_y, tiles_x = tl.cdiv(H, TH), tl.cdiv(W, TW)
    b_sums = tl.zeros([WIDTH], tl.float32)
    o_entries = tl.arange(0, WIDTH)
    for i_tile in tl.range(i_chunk, B * tiles_y * tiles_x, tl.num_programs(0)):
        i_b = i_tile // (tiles_y * tiles_x)
        y0, x0 = i_tile // tiles_x % tiles_y * TH, i_tile % tiles_x * TW
        o_y, o_x = pixels(y0, x0, TH, TW)
        o_start_y = window_start(tl.minimum(o_y, H - 1), HK, H, Y)
        o_start_x = window_start(tl.minimum(o_x, W - 1), WK, W, X)
        o_by = first_entry(tl.minimum(o_y, H - 1), HK, H, BY_DISPLACEMENT, Y)
        o_bx = first_entry(tl.minimum(o_x, W - 1), WK, W, BY_DISPLACEMENT, X)
        # Of the entries of a row, those that some query of the tile has; of the row, whether some has it.
        o_top, o_left = (o_start_y - o_by) // Y.dilation, (o_start_x - o_bx) // X.dilation
        first, end = tl.min(o_left, 0), tl.max(o_left, 0) + X.kernel
        if (i_entry < tl.min(o_top, 0)) | (i_entry >= tl.max(o_top, 0) + Y.kernel):
            end = first
        o_ky = o_by + i_entry * Y.dilation
        m_y = inside(o_y, o_x, H, W) & (o_ky >= o_start_y) & (o_ky < o_start_y + Y.reach)
        if grad_ptr is None:
            b_q = load_pixels(q_ptr, q_s, i_b, i_h, o_y, o_x, H, W, DK, DKP, WIDE).to(tl.float32)  # [M, DKP]
            b_g = load_pixels(g_ptr, g_s, i_b, i_h, o_y, o_x, H, W, DV, DVP, WIDE).to(tl.float32)  # [M, DVP]
            b_lse = finite(load_floats(lse_ptr, lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE))
            b_delta = load_floats(delta_ptr, lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE)
        for i_column in tl.range(first, end):
            o_kx = o_bx + i_column * X.dilation
            m_s = m_y & (o_kx >= o_start_x) & (o_kx < o_start_x + X.reach) & ~absent(o_ky, o_kx, HK, WK, Y, X)
            if RASTER:
                m_s = m_s & ~after(o_ky, o_kx, centre(o_y, HK, H, Y), centre(o_x, WK, W, X))
            if mask_ptr is not None:
                m_s = m_s & takes_part(mask_ptr, mask_s, i_b, i_kv, o_ky, o_kx, HK, WK, WIDE, Y, X)
            if grad_ptr is None:
                o_fy, o_fx = fold(o_ky, HK, Y), fold(o_kx, WK, X)
                b_k = load_pixels(k_ptr, k_s, i_b, i_kv, o_fy, o_fx, HK, WK, DK, DKP, WIDE).to(tl.float32)
                b_v = load_pixels(v_ptr, v_s, i_b, i_kv, o_fy, o_fx, HK, WK, DV, DVP, WIDE).to(tl.float32)
                b_bias = load_bias(bias_ptr, bias_s, i_h, o_ky, o_kx, o_by, o_bx, m_s, Y, X)
                b_s = (tl.sum(b_q * b_k, 1) * scale + (b_bias - b_lse)) * LOG2E
                b_ds = tl.exp2(tl.where(m_s, b_s, NEVER)) * (tl.sum(b_g * b_v, 1) - b_delta)
            else:
                o_i, o_j = (o_ky - o_start_y) // Y.dilation, (o_kx - o_start_x) // X.dilation
                o_w = pixel_offsets(o_y, o_x, grad_s, WIDE) + (o_i * X.kernel + o_j) * grad_s[4]
                b_ds = tl.load(head_start(grad_ptr, i_b, i_h, grad_s) + o_w, mask=m_s, other=0.0).to(tl.float32)
            b_sum = tl.sum(tl.where(m_s, b_ds, 0.0), 0)
            b_sums += tl.where(o_entries == i_column, b_sum, 0.0)
    n_y, n_x = entries(Y.kernel, BY_DISPLACEMENT), entries(X.kernel, BY_DISPLACEMENT)
    p_sums = sums_ptr + ((i_chunk * heads + i_h) * n_y + i_entry) * n_x + o_entries
    tl.store(p_sums, b_sums, mask=o_entries < n_x)
