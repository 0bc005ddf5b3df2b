"""The fused kernels: forward, delta, and the gradients of query and of key and value.

Logits are kept in powers of two (`scale_log2 = scale * log2(e)`), the log-sum-exp in memory is natural. Each kernel
keeps a tile of pixels and streams the blocks of its halo, column of blocks by column of blocks, because the
visibility of columns does not change along one.
"""

import triton
import triton.language as tl

from .tile import (
    ABSENT,
    LN2,
    LOG2E,
    NEVER,
    add_product,
    blocks,
    first_query,
    float_pointers,
    head_start,
    inside,
    limit,
    load_block,
    pixel_offsets,
    pixels,
    product,
    program_tile,
    row_bound,
    row_parts,
    scores,
    store_block,
    window_span,
    window_start,
    within,
)

LANES = tl.constexpr(8)  # sums that a row of scores is kept as, for lanes of a warp to add up once, at the end


@triton.jit
def softmax_step(b_o, b_m, b_l, b_s, b_v, scale_log2, PRODUCT: tl.constexpr):
    """Takes the products [M, N] of one block into output [M, DVP], maximum [M] and sums [M, LANES]."""
    b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    b_rescale = tl.exp2(b_m - b_max)
    b_p = tl.exp2(b_s * scale_log2 - b_max[:, None])
    b_o = add_product(b_o * b_rescale[:, None], b_p, b_v, PRODUCT)
    b_sums = tl.sum(b_p.reshape(b_p.shape[0], b_p.shape[1] // LANES, LANES), 1)
    return b_o, b_max, b_l * b_rescale[:, None] + b_sums


@triton.jit
def forward_kernel(
    q_src, k_src, v_src, o_ptr, lse_ptr,
    q_s, k_s, v_s, o_s,
    H, W, heads, scale_log2,
    KH: tl.constexpr, KW: tl.constexpr, MASKED: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr,
    NEGATE: tl.constexpr, WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale * <q, k_ij>) v_ij and its log-sum-exp. `scale_log2` is positive, NEGATE turns the queries."""
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    o_y, o_x = pixels(y0, x0, TH, TW)
    o_top, rows = window_span(o_y, H, KH, MASKED)
    o_left, cols = window_span(o_x, W, KW, MASKED)
    b_q = load_block(q_src, q_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, Q_WAY, WIDE)  # [M, DKP]
    if NEGATE:
        b_q = -b_q
    b_o = tl.zeros([TH * TW, DVP], tl.float32)
    b_m = tl.full([TH * TW], NEVER, tl.float32)
    b_l = tl.zeros([TH * TW, LANES], tl.float32)
    halo_y, halo_x = window_start(y0, KH), window_start(x0, KW) - PAD
    PARTS: tl.constexpr = row_parts(TH, KH, ROWS, MASKED)
    for i_col in tl.range(blocks(TW + PAD, KW, COLS)):
        k_x0 = halo_x + i_col * COLS
        o_ky, o_kx = pixels(halo_y, k_x0, ROWS, COLS)
        b_cols = tl.where(within(o_kx[None, :], o_left[:, None], cols[:, None]), 0.0, ABSENT)  # [M, N]
        for PART in tl.static_range(PARTS):
            for i_row in tl.range(row_bound(PART, PARTS, TH, KH, ROWS), row_bound(PART + 1, PARTS, TH, KH, ROWS)):
                k_y0 = halo_y + i_row * ROWS
                b_k = load_block(k_src, k_s, i_b, i_h, k_y0, k_x0, H, W, ROWS, COLS, DK, DKP, K_WAY, WIDE)
                b_v = load_block(v_src, v_s, i_b, i_h, k_y0, k_x0, H, W, ROWS, COLS, DV, DVP, V_WAY, WIDE)
                b_s = scores(b_cols, b_q, b_k, PRODUCT)
                if PART != 1:
                    b_s = tl.minimum(b_s, limit(o_ky[None, :] + i_row * ROWS, o_top[:, None], rows[:, None]))
                b_o, b_m, b_l = softmax_step(b_o, b_m, b_l, b_s, b_v, scale_log2, PRODUCT)
    b_sum = tl.sum(b_l, 1)
    store_block(o_ptr, b_o / b_sum[:, None], o_s, i_b, i_h, y0, x0, H, W, TH, TW, DV, DVP, WIDE)
    p_lse = float_pointers(lse_ptr, i_b, i_h, o_y, o_x, H, W, heads)
    tl.store(p_lse, (b_m + tl.log2(b_sum)) * LN2, mask=inside(o_y, o_x, H, W))


@triton.jit
def delta_kernel(
    g_ptr, o_ptr, grad_lse_ptr, delta_ptr,
    g_s, o_s, grad_lse_s,
    H, W, heads,
    D: tl.constexpr, DP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad_out * out) - grad_lse per pixel and head, so that dS = P * (dP - delta)."""
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    b_g = load_block(g_ptr, g_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, "pointer", WIDE)
    b_o = load_block(o_ptr, o_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, "pointer", WIDE)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    o_y, o_x = pixels(y0, x0, TH, TW)
    m_q = inside(o_y, o_x, H, W)
    if grad_lse_ptr is not None:
        p_grad_lse = head_start(grad_lse_ptr, i_b, i_h, grad_lse_s)
        b_delta -= tl.load(p_grad_lse + pixel_offsets(o_y, o_x, grad_lse_s, WIDE), mask=m_q, other=0.0)
    tl.store(float_pointers(delta_ptr, i_b, i_h, o_y, o_x, H, W, heads), b_delta, mask=m_q)


@triton.jit
def grad_query_kernel(
    q_src, k_src, v_src, g_src, lse_ptr, delta_ptr, grad_q_ptr,
    q_s, k_s, v_s, g_s, grad_q_s,
    H, W, heads, scale_log2, scale,
    KH: tl.constexpr, KW: tl.constexpr, MASKED: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr, G_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sum_ij dS_ij k_ij over the keys that the tile's queries see."""
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    o_y, o_x = pixels(y0, x0, TH, TW)
    m_q = inside(o_y, o_x, H, W)
    o_top, rows = window_span(o_y, H, KH, MASKED)
    o_left, cols = window_span(o_x, W, KW, MASKED)
    b_q = load_block(q_src, q_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, Q_WAY, WIDE)  # [M, DKP]
    b_g = load_block(g_src, g_s, i_b, i_h, y0, x0, H, W, TH, TW, DV, DVP, G_WAY, WIDE)  # [M, DVP]
    b_lse = tl.load(float_pointers(lse_ptr, i_b, i_h, o_y, o_x, H, W, heads), mask=m_q, other=0.0) * LOG2E
    b_delta = tl.load(float_pointers(delta_ptr, i_b, i_h, o_y, o_x, H, W, heads), mask=m_q, other=0.0)
    b_grad_q = tl.zeros([TH * TW, DKP], tl.float32)
    halo_y, halo_x = window_start(y0, KH), window_start(x0, KW) - PAD
    PARTS: tl.constexpr = row_parts(TH, KH, ROWS, MASKED)
    for i_col in tl.range(blocks(TW + PAD, KW, COLS)):
        k_x0 = halo_x + i_col * COLS
        o_ky, o_kx = pixels(halo_y, k_x0, ROWS, COLS)
        m_cols = within(o_kx[None, :], o_left[:, None], cols[:, None])  # [M, N]
        b_cols = tl.where(m_cols, -b_lse[:, None], NEVER)
        for PART in tl.static_range(PARTS):
            for i_row in tl.range(row_bound(PART, PARTS, TH, KH, ROWS), row_bound(PART + 1, PARTS, TH, KH, ROWS)):
                k_y0 = halo_y + i_row * ROWS
                b_k = load_block(k_src, k_s, i_b, i_h, k_y0, k_x0, H, W, ROWS, COLS, DK, DKP, K_WAY, WIDE)
                b_v = load_block(v_src, v_s, i_b, i_h, k_y0, k_x0, H, W, ROWS, COLS, DV, DVP, V_WAY, WIDE)
                b_s = product(b_q, b_k, PRODUCT) * scale_log2 + b_cols
                if PART != 1:
                    m_rows = within(o_ky[None, :] + i_row * ROWS, o_top[:, None], rows[:, None])
                    b_s = tl.where(m_rows, b_s, NEVER)
                b_ds = tl.exp2(b_s) * (product(b_g, b_v, PRODUCT) - b_delta[:, None])
                b_grad_q = add_product(b_grad_q, b_ds, b_k, PRODUCT)
    store_block(grad_q_ptr, b_grad_q * scale, grad_q_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, WIDE)


@triton.jit
def grad_key_value_kernel(
    q_src, k_src, v_src, g_src, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_s, k_s, v_s, g_s, grad_k_s, grad_v_s,
    H, W, heads, scale_log2, scale,
    KH: tl.constexpr, KW: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr, G_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """dK = scale * sum dS q and dV = sum P g over the queries that see the tile's keys: a gather, no atomics.

    A gradient whose pointer is None is not computed. The border plays no part: these keys are in the map.
    """
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    o_y, o_x = pixels(y0, x0, TH, TW)
    b_k = load_block(k_src, k_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, K_WAY, WIDE)  # [M, DKP]
    b_v = load_block(v_src, v_s, i_b, i_h, y0, x0, H, W, TH, TW, DV, DVP, V_WAY, WIDE)  # [M, DVP]
    b_grad_k = tl.zeros([TH * TW, DKP], tl.float32)
    b_grad_v = tl.zeros([TH * TW, DVP], tl.float32)
    halo_y, halo_x = first_query(y0, KH), first_query(x0, KW) - PAD
    for i_col in tl.range(blocks(TW + PAD, KW, COLS)):
        q_x0 = halo_x + i_col * COLS
        o_qy, o_qx = pixels(halo_y, q_x0, ROWS, COLS)
        o_left, cols = window_span(o_qx, W, KW, False)
        b_cols = tl.where(within(o_x[:, None], o_left[None, :], cols[None, :]), 0.0, NEVER)  # [M, N]
        for i_row in tl.range(blocks(TH, KH, ROWS)):
            q_y0 = halo_y + i_row * ROWS
            o_row = o_qy + i_row * ROWS
            b_q = load_block(q_src, q_s, i_b, i_h, q_y0, q_x0, H, W, ROWS, COLS, DK, DKP, Q_WAY, WIDE)
            b_g = load_block(g_src, g_s, i_b, i_h, q_y0, q_x0, H, W, ROWS, COLS, DV, DVP, G_WAY, WIDE)
            m_q = inside(o_row, o_qx, H, W)
            p_lse = float_pointers(lse_ptr, i_b, i_h, o_row, o_qx, H, W, heads)
            b_lse = tl.load(p_lse, mask=m_q, other=float("inf")) * LOG2E  # no query there: P is 0
            b_s = product(b_k, b_q, PRODUCT) * scale_log2 + b_cols - b_lse[None, :]
            o_top, rows = window_span(o_row, H, KH, False)
            m_rows = within(o_y[:, None], o_top[None, :], rows[None, :])
            b_p = tl.exp2(tl.where(m_rows, b_s, NEVER))  # [M, N]
            if grad_v_ptr is not None:
                b_grad_v = add_product(b_grad_v, b_p, b_g, PRODUCT)
            if grad_k_ptr is not None:
                p_delta = float_pointers(delta_ptr, i_b, i_h, o_row, o_qx, H, W, heads)
                b_delta = tl.load(p_delta, mask=m_q, other=0.0)
                b_ds = b_p * (product(b_v, b_g, PRODUCT) - b_delta[None, :])
                b_grad_k = add_product(b_grad_k, b_ds, b_q, PRODUCT)
    if grad_k_ptr is not None:
        store_block(grad_k_ptr, b_grad_k * scale, grad_k_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, WIDE)
    if grad_v_ptr is not None:
        store_block(grad_v_ptr, b_grad_v, grad_v_s, i_b, i_h, y0, x0, H, W, TH, TW, DV, DVP, WIDE)
