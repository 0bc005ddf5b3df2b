"""The unfused kernels: similarity, aggregation and its transpose, over weights [B, heads, H, W, kH*kW]."""

import triton
import triton.language as tl

from .tile import (
    add_product,
    blocks,
    first_query,
    head_start,
    inside,
    load_block,
    pixel_offsets,
    pixels,
    product,
    program_tile,
    store_block,
    window_start,
)


@triton.jit
def slots(o_qy, o_qx, o_ky, o_kx, strides, KH: tl.constexpr, KW: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the weights of query and key pairs within one head, and whether the key is in the window."""
    o_i, o_j = o_ky - window_start(o_qy, KH), o_kx - window_start(o_qx, KW)
    o_slot = o_i * KW + o_j
    if WIDE:
        o_slot = o_slot.to(tl.int64)
    offsets = pixel_offsets(o_qy, o_qx, strides, WIDE) + o_slot * strides[4]
    return offsets, inside(o_i, o_j, KH, KW)


@triton.jit
def similarity_kernel(
    q_src, k_src, w_ptr,
    q_s, k_s, w_s,
    H, W, heads, scale, absent,
    KH: tl.constexpr, KW: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """W_ij = scale * <q, k_ij>; a key outside the map gives 0, or `absent` where the border is masked."""
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    o_y, o_x = pixels(y0, x0, TH, TW)
    m_q = inside(o_y, o_x, H, W)
    b_q = load_block(q_src, q_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, Q_WAY, WIDE)  # [M, DP]
    p_head = head_start(w_ptr, i_b, i_h, w_s)
    halo_y, halo_x = window_start(y0, KH), window_start(x0, KW) - PAD
    for i_col in tl.range(blocks(TW + PAD, KW, COLS)):
        k_x0 = halo_x + i_col * COLS
        for i_row in tl.range(blocks(TH, KH, ROWS)):
            k_y0 = halo_y + i_row * ROWS
            o_ky, o_kx = pixels(k_y0, k_x0, ROWS, COLS)
            b_k = load_block(k_src, k_s, i_b, i_h, k_y0, k_x0, H, W, ROWS, COLS, D, DP, K_WAY, WIDE)
            b_w = product(b_q, b_k, PRODUCT) * scale  # [M, N]
            if MASKED:
                b_w = tl.where(inside(o_ky, o_kx, H, W)[None, :], b_w, absent)
            o_w, m_w = slots(o_y[:, None], o_x[:, None], o_ky[None, :], o_kx[None, :], w_s, KH, KW, WIDE)
            tl.store(p_head + o_w, b_w.to(w_ptr.dtype.element_ty), mask=m_w & m_q[:, None])


@triton.jit
def aggregate_kernel(
    w_ptr, x_src, o_ptr,
    w_s, x_s, o_s,
    H, W, heads, scale,
    KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    X_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """O = scale * sum_ij W_ij x_ij over the keys in the map."""
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    o_y, o_x = pixels(y0, x0, TH, TW)
    m_q = inside(o_y, o_x, H, W)
    p_head = head_start(w_ptr, i_b, i_h, w_s)
    b_o = tl.zeros([TH * TW, DP], tl.float32)
    halo_y, halo_x = window_start(y0, KH), window_start(x0, KW) - PAD
    for i_col in tl.range(blocks(TW + PAD, KW, COLS)):
        k_x0 = halo_x + i_col * COLS
        for i_row in tl.range(blocks(TH, KH, ROWS)):
            k_y0 = halo_y + i_row * ROWS
            o_ky, o_kx = pixels(k_y0, k_x0, ROWS, COLS)
            b_x = load_block(x_src, x_s, i_b, i_h, k_y0, k_x0, H, W, ROWS, COLS, D, DP, X_WAY, WIDE)
            o_w, m_w = slots(o_y[:, None], o_x[:, None], o_ky[None, :], o_kx[None, :], w_s, KH, KW, WIDE)
            m_w = m_w & m_q[:, None] & inside(o_ky, o_kx, H, W)[None, :]
            b_w = tl.load(p_head + o_w, mask=m_w, other=0.0)  # [M, N]
            b_o = add_product(b_o, b_w, b_x, PRODUCT)
    store_block(o_ptr, b_o * scale, o_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, WIDE)


@triton.jit
def aggregate_transpose_kernel(
    w_ptr, x_src, o_ptr,
    w_s, x_s, o_s,
    H, W, heads, scale,
    KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, FLAT: tl.constexpr,
    X_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Each key gathers scale * W_ij x over the queries that see it in their slot ij."""
    i_b, i_h, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT)
    o_y, o_x = pixels(y0, x0, TH, TW)
    m_k = inside(o_y, o_x, H, W)
    p_head = head_start(w_ptr, i_b, i_h, w_s)
    b_o = tl.zeros([TH * TW, DP], tl.float32)
    halo_y, halo_x = first_query(y0, KH), first_query(x0, KW) - PAD
    for i_col in tl.range(blocks(TW + PAD, KW, COLS)):
        q_x0 = halo_x + i_col * COLS
        for i_row in tl.range(blocks(TH, KH, ROWS)):
            q_y0 = halo_y + i_row * ROWS
            o_qy, o_qx = pixels(q_y0, q_x0, ROWS, COLS)
            b_x = load_block(x_src, x_s, i_b, i_h, q_y0, q_x0, H, W, ROWS, COLS, D, DP, X_WAY, WIDE)
            o_w, m_w = slots(o_qy[None, :], o_qx[None, :], o_y[:, None], o_x[:, None], w_s, KH, KW, WIDE)
            m_w = m_w & m_k[:, None] & inside(o_qy, o_qx, H, W)[None, :]
            b_w = tl.load(p_head + o_w, mask=m_w, other=0.0)  # [M, N]
            b_o = add_product(b_o, b_w, b_x, PRODUCT)
    store_block(o_ptr, b_o * scale, o_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, WIDE)
